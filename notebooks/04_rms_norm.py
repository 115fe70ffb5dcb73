# %% [markdown]
# # 4. RMSNorm, forward and backward
#
# At the end you can derive the backward of a row-wise function, write both as kernels, and sum a gradient over rows that different programs
# hold, with the same bits each time. You need lesson 3. 25 minutes.
#
# RMSNorm divides each row by its root mean square and scales the columns by a learned weight. Every layer of a Llama has two of them.

# %%
import course  # before triton
import numpy as np
import torch
import triton
import triton.language as tl

_ = torch.manual_seed(0)
DEVICE = course.DEVICE

# %% [markdown]
# ## Forward
#
# **Formula.** For a row $x$ of $H$ numbers, a weight $w$ of $H$, and a small $\epsilon$:
#
# $$r = \frac{1}{\sqrt{\frac1H \sum_i x_i^2 + \epsilon}}, \qquad y_i = x_i \, r \, w_i.$$
#
# **Traffic** for $[N, H]$: each number of $x$ is read once, each of $y$ written once, and one $r$ a row, which the backward will need. The
# weight is read by every program, and stays in the cache.
#
# **Why statistics are fp32.** bf16 keeps 8 bits of a number. A running sum in bf16 no longer grows where the next square is less than half
# a unit of its last bit, or just half of it (a tie goes to the even neighbour). Predict: at which size does a sum of ones in bf16 stop?

# %%
counts = [2**i for i in range(4, 13)]
found = []
for count in counts:
    total = torch.zeros((), dtype=torch.bfloat16)
    one = torch.ones((), dtype=torch.bfloat16)
    for _ in range(count):
        total = total + one
    found.append(float(total))
fig, ax = course.figure(7, 2.8)
ax.plot(counts, counts, label="true")
ax.plot(counts, found, "o-", label="running sum in bf16")
ax.set(xscale="log", yscale="log", xlabel="ones to add", ylabel="sum", title="a sum in bf16 stops at 256")
ax.legend()
fig

# %% [markdown]
# So a kernel widens what it loads to fp32, computes there, and rounds once, at the store.
#
# ### Exercise 4.1
#
# **Specification.** `forward(x: [N, H], w: [H], eps: float) -> (y: [N, H], r: [N])`; y has x's dtype, r is fp32. Rows of x are `x.stride(0)`
# apart; y is contiguous. Columns beyond the row must add 0 to the sum of squares, and H is the divisor, not the block.


# %%
@triton.jit
def forward_kernel(x_ptr, w_ptr, y_ptr, r_ptr, stride, H, eps, BLOCK: tl.constexpr):
    pass  # your code here: one program a row


def forward(x, w, eps):
    raise NotImplementedError  # remove this line when the kernel is written
    N, H = x.shape
    y, r = torch.empty(N, H, dtype=x.dtype, device=x.device), torch.empty(N, device=x.device)
    forward_kernel[(N,)](x, w, y, r, x.stride(0), H, eps, BLOCK=triton.next_power_of_2(H))
    return y, r


course.check("4.1", forward)

# %% [markdown]
# The library's forward. `ROWS` short rows share a program; `eviction_policy="evict_first"` tells the cache that x is not read again soon;
# `div_rn` and `sqrt_rn` round correctly, where the quick instructions may be off by a bit. `LLAMA` is a detail of that model: it rounds
# the normalised row before it scales.

# %%
course.show_source("rms_norm.py", "_rms_norm_fwd_kernel")

# %% [markdown]
# ## Backward, by hand
#
# Given $dy_i = \partial L / \partial y_i$, we want $dx_j = \partial L / \partial x_j$. Let $g_i = dy_i w_i$. A small change $\delta x$ of the row
# changes $r$ too, and the loss by $\delta L = \sum_i g_i \, \delta(x_i r) = \sum_i g_i \, (r\,\delta x_i + x_i\,\delta r)$.
#
# $r$ depends on every $x_j$. From $r = (\frac1H \sum_i x_i^2 + \epsilon)^{-1/2}$:
#
# $$\frac{\partial r}{\partial x_j} = -\tfrac12 \left(\tfrac1H \textstyle\sum x^2 + \epsilon\right)^{-3/2} \cdot \tfrac{2 x_j}{H} = -\frac{r^3 x_j}{H}.$$
#
# Put in $\delta r = \sum_j \frac{\partial r}{\partial x_j} \delta x_j$, and collect what stands before $\delta x_j$:
#
# $$dx_j = r\,g_j - x_j\,r^3\,\frac1H \sum_i g_i x_i.$$
#
# The second term makes the row's gradient orthogonal to the row: stretching $x$ changes nothing in $y$ (but for $\epsilon$, which is 0 here).
# Check both:

# %%
x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
w, dy = torch.randn(8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
r = torch.rsqrt(x.square().mean(1, keepdim=True))
(x * r * w).backward(dy)
g = dy * w
by_hand = (r * g - x * r**3 * (g * x).mean(1, keepdim=True)).detach()
print("formula = autograd?", torch.allclose(by_hand, x.grad))
print("dx · x of each row:", (x.grad * x).sum(1).detach().numpy().round(15))

# %% [markdown]
# ### Exercise 4.2
#
# **Specification.** `dx(dy: [N, H], x: [N, H], w: [H], r: [N]) -> [N, H]`, all contiguous fp32. One program a row.


# %%
@triton.jit
def dx_kernel(dy_ptr, x_ptr, w_ptr, r_ptr, dx_ptr, H, BLOCK: tl.constexpr):
    pass  # your code here


def dx(dy, x, w, r):
    raise NotImplementedError  # remove this line when the kernel is written
    out = torch.empty_like(x)
    dx_kernel[(len(x),)](dy, x, w, r, out, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return out


course.check("4.2", dx)

# %% [markdown]
# ## The weight's gradient: a sum over programs
#
# **Formula.** $dw_j = \sum_{n} dy_{nj}\, x_{nj}\, r_n$: over all rows, and rows belong to different programs.
#
# Three ways:
#
# 1. Every program adds its row to `dw` with `tl.atomic_add`. Programs end in any order, so the additions happen in any order, and the last
#    bits differ from run to run.
# 2. Every program writes its row's share, `[N, H]` in fp32, and a second launch sums them. The same bits each time; but twice the memory of
#    an x in bf16.
# 3. **Two stages**: P programs take turns through the rows, each keeps one running sum of H numbers in registers, and writes that. A second
#    launch sums `[P, H]`. With P = 264 (two for each multiprocessor of an H100) this is small beside x.
#
# **Picture.** Which program holds which row: left one row a program, right four programs that walk.

# %%
N = 12
fig, axes = course.figure(8, 2.6, columns=2)
course.access(axes[0], [[n * 2, n * 2 + 1] for n in range(N)], 2, "one row a program: 12 shares")
course.access(axes[1], [[c for n in range(p, N, 4) for c in (n * 2, n * 2 + 1)] for p in range(4)], 2, "4 programs walk: 4 shares")
fig

# %% [markdown]
# Does order matter? The same column of 4096 numbers, added in 200 random orders, in fp32:

# %%
column = torch.randn(4096)
sums = torch.tensor(
    [np.cumsum(column[torch.randperm(4096)].numpy(), dtype=np.float32)[-1] for _ in range(200)]
)  # one after another, in fp32
fig, ax = course.figure(7, 2.4)
ax.hist((sums.double() - column.double().sum()).numpy() * 1e6, bins=40, color=course.PALETTE[1])
ax.set(xlabel="error of the sum, in millionths", ylabel="orders", title=f"{len(sums.unique())} different results of one sum")
fig

# %% [markdown]
# ### Exercise 4.3
#
# **Specification.** `dw(dy: [N, H], x: [N, H], r: [N], programs: int) -> [H]`, fp32, in two stages. The kernel is the first: program $p$ takes
# rows $p, p + P, p + 2P, \dots$ and writes row $p$ of `shares: [P, H]`. There may be more programs than rows: those write zeros. The second stage is
# `shares.sum(0)`, which is the same for the same input.


# %%
@triton.jit
def shares_kernel(dy_ptr, x_ptr, r_ptr, shares_ptr, N, H, P, BLOCK: tl.constexpr):
    pass  # your code here: `for n in range(tl.program_id(0), N, P):`


def dw(dy, x, r, programs):
    raise NotImplementedError  # remove this line when the kernel is written
    N, H = x.shape
    shares = torch.empty(programs, H, device=x.device)
    shares_kernel[(programs,)](dy, x, r, shares, N, H, programs, BLOCK=triton.next_power_of_2(H))
    return shares.sum(0)


course.check("4.3", dw)

# %% [markdown]
# The library makes dx and the shares of dw in one launch, so that dy and x are read once for both, and sums shares by a kernel of its own
# with a fixed order. Here is the second stage:

# %%
course.show_source("_reduce.py", "sum_rows")

# %% [markdown]
# Is it the same bits twice? And how far is it from fp64, beside plain PyTorch in bf16?

# %%
import liger_fn

x, w = torch.randn(64, 96, device=DEVICE).bfloat16(), torch.rand(96, device=DEVICE).bfloat16()
dy = torch.randn(64, 96, device=DEVICE).bfloat16()


def gradients(fn, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
    return torch.autograd.grad(fn(*leaves), leaves, dy.to(dtype))


ours, again = gradients(liger_fn.rms_norm, torch.bfloat16), gradients(liger_fn.rms_norm, torch.bfloat16)
naive, truth = gradients(liger_fn.rms_norm.reference, torch.bfloat16), gradients(liger_fn.rms_norm.reference, torch.float64)
print("same bits twice?", all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)))
for name, a, b, t in zip(("dx", "dw"), ours, naive, truth, strict=True):
    error = [float((v.double() - t).norm() / t.norm()) for v in (a, b)]
    print(f"{name}: error of the kernel {error[0]:.1e}, of plain PyTorch in bf16 {error[1]:.1e}")

# %% [markdown]
# ## How fast
#
# At the least, forward reads x and writes y: 2 arrays of $2NH$ bytes in bf16. Backward reads dy and x and writes dx: 3 more. The forward on an
# H100 (lesson 11 makes a backward fast):

# %%
n, h = 8192, 4096


def prepare(fn):
    def ready():
        big, scale = torch.randn(n, h, device="cuda", dtype=torch.bfloat16), torch.ones(h, device="cuda", dtype=torch.bfloat16)
        return lambda: fn(big, scale)

    return ready


rows = [
    (
        "plain PyTorch",
        course.timed("4 rms_norm reference forward", prepare(lambda a, b: liger_fn.rms_norm.reference(a, b)), bytes=4 * n * h),
    ),
    ("liger_fn.rms_norm", course.timed("4 rms_norm forward", prepare(lambda a, b: liger_fn.rms_norm(a, b)), bytes=4 * n * h)),
]
print(course.table(rows))

# %% [markdown]
# ## Summary
#
# - Statistics are fp32; values are rounded once.
# - The backward needs x, w and one number a row: $dx = r g - x r^3\,\mathrm{mean}(g x)$.
# - A sum over programs is made in two stages: few shares, then their sum in a fixed order. Atomics would give other bits each time.
#
# Next, lesson 5: a function whose backward is itself.
