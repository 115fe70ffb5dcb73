# %% [markdown]
# # 6. Gated units: fusing, keeping, forgetting
#
# At the end you can count what a layer keeps for its backward, fuse elementwise operations, and trade memory for arithmetic by computing
# again. You need lessons 1 and 3. 20 minutes.

# %%
import course  # before triton
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from einops import rearrange

import liger_fn

_ = torch.manual_seed(0)
DEVICE = course.DEVICE

# %% [markdown]
# ## What eager code reads, writes and keeps
#
# A Llama's MLP is $y = (silu(x W_g^T) \cdot x W_u^T)\, W_d^T$. Between the products stands one elementwise function of $gate = x W_g^T$ and
# $up = x W_u^T$, each `[N, I]`. Eager PyTorch runs it as two: $a = silu(gate)$, then $h = a \cdot up$.
#
# Count arrays of `[N, I]`: forward reads gate, writes a, reads a and up, writes h: 5. One fused kernel reads gate and up and writes h: 3. And what is
# *kept*? PyTorch tells, by hooks on what autograd saves:


# %%
def kept(fn, *inputs):
    """How many bytes autograd holds when `fn` has run, beyond its inputs; each memory once."""
    own, found = {t.untyped_storage().data_ptr() for t in inputs}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fn(*inputs)
    return sum(found.values())


def eager(gate, up, down):
    return (F.silu(gate) * up) @ down.T


def fused(gate, up, down):
    return liger_fn.swiglu(gate, up) @ down.T


gate, up, down = (
    torch.randn(64, 256, requires_grad=True),
    torch.randn(64, 256, requires_grad=True),
    torch.randn(32, 256, requires_grad=True),
)
one = gate.untyped_storage().nbytes()
for name, fn in (("eager", eager), ("fused", fused)):
    print(f"{name}: keeps {kept(fn, gate, up, down) / one:.0f} arrays of [N, I] beyond gate and up")

# %% [markdown]
# Eager keeps $a = silu(gate)$ (the product's backward needs it) and $h$ (the last product's weight gradient needs it). Fused forgets a: its backward
# computes it again from gate. h stays: it is an input of the next product.
#
# **Picture.** Arrays of `[N, I]` read, written and kept, forward.

# %%
fig, ax = course.figure(8, 2.6)
names = ["eager", "fused", "whole MLP as one function"]
for k, (what, counts) in enumerate({"read": (3, 2, 2), "written": (2, 1, 1), "kept": (4, 3, 2)}.items()):
    ax.bar([n + 0.26 * (k - 1) for n in range(3)], counts, 0.26, label=what)
ax.set_xticks(range(3), names)
ax.set(ylabel="arrays of [N, I]", ylim=(0, 5.2))
ax.legend(ncols=3, loc="upper right")
fig

# %% [markdown]
# The third bar is `liger_fn.swiglu_mlp`: the MLP as one function. It keeps gate and up, and makes h again in its backward, where one
# elementwise kernel is nothing beside six matrix products.
#
# ### Exercise 6.1
#
# **Specification.** `bytes_kept(N, I, layers, how) -> int`: bytes kept in bf16 by the MLPs of `layers` layers, of arrays `[N, I]` alone, for `how` of "eager", "fused", "mlp",
# as in the picture.


# %%
def bytes_kept(N, I, layers, how):
    raise NotImplementedError  # your code here


course.check("6.1", bytes_kept)

# %% [markdown]
# ## Other gates
#
# **Formula.** $y = act(gate) \cdot up$; only $act$ and $act'$ differ. $gelu(a) = a\,\Phi(a)$ with the normal distribution $\Phi$ has
#
# $$gelu'(a) = \Phi(a) + a\,\varphi(a), \qquad \varphi(a) = \tfrac{1}{\sqrt{2\pi}} e^{-a^2/2},$$
#
# and its tanh approximation, which Gemma uses, $\Phi(a) \approx \tfrac12(1 + \tanh u)$ with $u = \sqrt{2/\pi}\,(a + 0.044715\,a^3)$. The two differ:

# %%
a = torch.linspace(-5, 5, 400, dtype=torch.float64)
fig, axes = course.figure(8, 2.6, columns=2)
axes[0].plot(a, F.gelu(a), label="gelu")
axes[0].plot(a, F.silu(a), label="silu")
axes[0].plot(a, F.relu(a), label="relu")
axes[0].legend()
axes[0].set(title="gates")
axes[1].plot(a, F.gelu(a, approximate="tanh") - F.gelu(a))
axes[1].set(title="gelu by tanh, minus gelu", xlabel="a")
axes[1].ticklabel_format(axis="y", scilimits=(0, 0))
fig

# %% [markdown]
# ### Exercise 6.2
#
# **Specification.** `geglu_backward(gate, up, dy) -> (dgate, dup)`: one kernel, fp32, for the exact gelu. Flat contiguous inputs of one shape. `tl.erf` is
# there: $\Phi(a) = \tfrac12(1 + erf(a/\sqrt 2))$. Nothing of the forward but its inputs is given: compute Φ again.


# %%
@triton.jit
def geglu_backward_kernel(gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, n, BLOCK: tl.constexpr):
    pass  # your code here


def geglu_backward(gate, up, dy):
    raise NotImplementedError  # remove this line when the kernel is written
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    n = gate.numel()
    geglu_backward_kernel[(triton.cdiv(n, 64),)](gate, up, dy, dgate, dup, n, BLOCK=64)
    return dgate, dup


course.check("6.2", geglu_backward)

# %% [markdown]
# The library's backward kernel serves all gates: `ACT` is a `tl.constexpr`, so the branch is taken when the kernel is compiled. Each gradient is
# made only if somebody wants it.

# %%
course.show_source("_glu_rows.py", "_glu_bwd_kernel")

# %% [markdown]
# ## Packed halves
#
# Some models (Phi-3) make gate and up by one product: `[N, 2I]`, the halves side by side. `einops` says the view, and a kernel with strides
# reads it where it is. The gradient must be packed likewise: two views of *one* new array, or a copy follows.

# %%
packed = torch.randn(4, 2 * 6)
gate, up = rearrange(packed, "n (half i) -> half n i", half=2)
print("rows of gate begin", gate.stride(0), "apart; up begins", up.storage_offset(), "later")

# %% [markdown]
# ### Exercise 6.3
#
# **Specification.** `packed_backward(gate_up: [N, 2I], dy: [N, I]) -> dgate_up: [N, 2I]`, SwiGLU, in PyTorch: allocate the result once, and write both halves into
# views of it. Not by `torch.cat`, which writes everything twice.


# %%
def packed_backward(gate_up, dy):
    raise NotImplementedError  # your code here


course.check("6.3", packed_backward)

# %% [markdown]
# ## Reusing memory: donation
#
# The backward reads gate, up and dy, and writes dgate and dup of the same shapes. Element by element, so dgate can be written over gate. That
# takes 3 arrays in place of 5 at the peak. It is right when nobody reads gate again; lesson 1 showed what happens otherwise. In
# `liger_fn.swiglu(gate, up, donate=True)` the caller says so, and it is done only where autograd frees the graph too.
#
# At the least forward and backward move 8 arrays (2 in and 1 out; then 3 in, 2 out). On an H100, 8192 × 14336 in bf16:

# %%
n, i = 8192, 14336


def prepare(fn):
    def ready():
        g, u = (torch.randn(n, i, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
        dy = torch.randn(n, i, device="cuda", dtype=torch.bfloat16)
        return lambda: torch.autograd.grad(fn(g, u), (g, u), dy)

    return ready


rows = [
    ("F.silu(gate) * up", course.timed("6 swiglu eager", prepare(lambda g, u: F.silu(g) * u), bytes=16 * n * i)),
    ("liger_fn.swiglu", course.timed("6 swiglu", prepare(liger_fn.swiglu), bytes=16 * n * i)),
]
print(course.table(rows))

# %% [markdown]
# ## Summary
#
# - Fusing saves readings and writings; computing again saves what is kept. Both are free where memory is the limit.
# - What is an input of a matrix product stays, unless the function includes the product.
# - Views need strides, in the gradient as in the forward.
#
# Next, lesson 7: the largest array of all.
