# %% [markdown]
# # 3. First Triton kernels
#
# At the end you can write a Triton kernel over one or two dimensions, mask its edges, read strided arrays, and reduce a row. You need
# Python and PyTorch; lesson 2 explains why kernels are worth writing at all. 25 minutes.
#
# A **kernel** is a function that the GPU runs many times at once. Each of these runs is a **program**. All programs have the same code and
# the same arguments; they differ in one number, their index. A program works on a **block**: an array of elements whose size is fixed when
# the kernel is compiled, and a power of two.
#
# This machine may have no GPU. Triton's **interpreter** then runs the programs one after another in NumPy: slow, but the same code, the
# same masks and the same numbers.

# %%
import course  # before triton: it switches the interpreter on where there is no GPU
import torch
import triton
import triton.language as tl
from einops import rearrange

print("kernels run", "in the interpreter" if course.INTERPRETED else "on the GPU")

# %% [markdown]
# ## Programs and blocks
#
# **Formula.** $z_i = x_i + y_i$ for $i = 0 \dots n-1$. Program $p$ takes the block
#
# $$i \in \{\, p \cdot BLOCK + j \;:\; 0 \le j < BLOCK \,\}, \qquad \lceil n / BLOCK \rceil \text{ programs in all.}$$
#
# **Picture.** 37 elements in blocks of 16. How many programs are there, and how much of the last block lies beyond the array? Count first.

# %%
n, BLOCK = 37, 16
programs = [range(p * BLOCK, (p + 1) * BLOCK) for p in range(triton.cdiv(n, BLOCK))]
fig, ax = course.figure(8, 1.8)
course.access(ax, programs, 16, f"{n} elements, {len(programs)} programs; hatched: masked off", masked=range(n, 3 * BLOCK))
fig

# %% [markdown]
# **The kernel.** `x_ptr` is the address of the first element. `x_ptr + i` with an array `i` is an array of addresses, and `tl.load` reads them
# all. `mask` says which of them may be touched: the others are neither read nor written, and `other` stands in for them.


# %%
@triton.jit
def add_kernel(x_ptr, y_ptr, z_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < n
    x = tl.load(x_ptr + i, mask=keep)
    y = tl.load(y_ptr + i, mask=keep)
    tl.store(z_ptr + i, x + y, mask=keep)


def add(x, y):
    z = torch.empty_like(x)
    n = x.numel()
    add_kernel[(triton.cdiv(n, 16),)](x, y, z, n, BLOCK=16)
    return z


x, y = torch.randn(2, 37, device=course.DEVICE)
print("largest difference from x + y:", float((add(x, y) - (x + y)).abs().max()))

# %% [markdown]
# `add_kernel[grid](…)` is a **launch**: `grid` is how many programs run. `BLOCK: tl.constexpr` is known when the kernel is compiled; another
# value compiles another kernel. `n` is not, so one compiled kernel serves all lengths.
#
# **What a missing mask does.** Without `keep`, the last program writes 11 elements that belong to somebody else. Here that somebody is the
# rest of a larger array, where one can see it. On a GPU it is whatever lies behind, and nothing warns.


# %%
@triton.jit
def add_without_mask(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(z_ptr + i, tl.load(x_ptr + i) + tl.load(y_ptr + i))


owner = torch.full((48,), 7.0, device=course.DEVICE)  # ours are the first 37 elements, the last 11 belong to a neighbour
ones = torch.ones(48, device=course.DEVICE)
add_without_mask[(3,)](ones, ones, owner[:37], BLOCK=16)
print("the neighbour's 7s are now:", owner[37:].tolist())

# %% [markdown]
# ### Exercise 3.1
#
# **Specification.** `scale_add(x: [n], y: [n], a: float) -> z: [n]` with $z = a x + y$. Any $n$ from 0 up; write nothing beyond. The launcher is
# given; write the kernel, and remove the `raise`.


# %%
@triton.jit
def scale_add_kernel(x_ptr, y_ptr, z_ptr, a, n, BLOCK: tl.constexpr):
    pass  # your code here


def scale_add(x, y, a):
    raise NotImplementedError  # remove this line when the kernel is written
    z = torch.empty_like(x)
    if x.numel():
        scale_add_kernel[(triton.cdiv(x.numel(), 32),)](x, y, z, a, x.numel(), BLOCK=32)
    return z


course.check("3.1", scale_add)

# %% [markdown]
# The library's own kernel of this kind is that of the gated units, $y = act(gate) \cdot up$: two arrays in, one out. Read it with the questions: which elements are a program's,
# what is the mask, where are numbers widened to fp32, where rounded back?

# %%
course.show_source("_glu_rows.py", "_glu_fwd_kernel")

# %% [markdown]
# The arithmetic is one line; the rest is where things are. Offsets are 64-bit (`.to(tl.int64)`), because an array can have more than $2^{31}$
# elements, and a 32-bit product of row and stride would turn negative. Lesson 10 shows that fault.
#
# ## Strides
#
# **Formula.** An array of shape `[R, C]` with strides $(s_r, s_c)$ keeps element $(r, c)$ at $r\,s_r + c\,s_c$ from its start. A slice or a
# transpose is another pair of strides over the same memory: nothing is moved.
#
# **Picture.** The right half of a `[4, 8]` array: 4 rows of 4, whose rows begin 8 elements apart. A kernel that takes it for contiguous
# reads the elements on the right picture.

# %%
packed = torch.arange(32.0, device=course.DEVICE).view(4, 8)
right = packed[:, 4:]
print("shape", tuple(right.shape), "strides", right.stride(), "contiguous?", right.is_contiguous())
fig, axes = course.figure(8, 2.2, columns=2)
true = [[r * 8 + 4 + c for c in range(4)] for r in range(4)]
wrong = [[4 + r * 4 + c for c in range(4)] for r in range(4)]
course.access(axes[0], true, 8, "by its strides: one program a row")
course.access(axes[1], wrong, 8, "taken for contiguous")
fig

# %% [markdown]
# The remedy is to hand the kernel the stride, or to make a contiguous copy first, which costs a read and a write of everything. `einops`
# says what a view means: of a packed projection, the two halves are

# %%
gate, up = rearrange(packed, "r (half c) -> half r c", half=2)
print(
    "gate", gate.stride(), "up", up.stride(), "- views of one memory:", gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
)

# %% [markdown]
# ## A row in one program: softmax
#
# **Formula.** $y_{rc} = e^{x_{rc} - m_r} / \sum_{c'} e^{x_{rc'} - m_r}$ with $m_r = \max_c x_{rc}$. Without $m_r$ the same fraction
# overflows: $e^{89}$ is beyond fp32.
#
# Program $r$ holds row $r$ as one block. Columns beyond the row must not count: in a maximum they must be $-\infty$, so that
# $e^{-\infty} = 0$ leaves the sum alone too.
#
# A row that is all $-\infty$ has no softmax: $-\infty - (-\infty)$ is NaN, in PyTorch as here.


# %%
@triton.jit
def row_max_kernel(x_ptr, m_ptr, stride, C, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + col, mask=col < C, other=-float("inf"))
    tl.store(m_ptr + row, tl.max(x, 0))


x = torch.randn(4, 11, device=course.DEVICE) - 5  # all negative: another `other` would show
m = torch.empty(4, device=course.DEVICE)
row_max_kernel[(4,)](x, m, x.stride(0), 11, BLOCK=16)
print("row maxima right?", torch.equal(m, x.max(1).values))

# %% [markdown]
# Which `other` is right depends on what comes after it. The picture is the softmax of one row of 11 in a block of 16, with
# `other=-inf` and with `other=0`: five zeros in the sum take a share of every probability.

# %%
row = x[0].cpu()
shares = {"other=−inf": row.softmax(0), "other=0": torch.cat([row, torch.zeros(5)]).softmax(0)[:11]}
fig, ax = course.figure(8, 2.4)
for k, (name, values) in enumerate(shares.items()):
    ax.bar(torch.arange(11) + 0.4 * k - 0.2, values, 0.4, label=f"{name}: sums to {float(values.sum()):.3f}")
ax.set(xlabel="column", ylabel="probability", title="one row of softmax")
ax.legend()
fig

# %% [markdown]
# ### Exercise 3.2
#
# **Specification.** `softmax(x: [R, C]) -> y: [R, C]`, fp32, over the last axis. `x` may have any row stride (columns are next to each other);
# `y` is contiguous. `C` is at most 1024, and need not be a power of two. Values may be large, or $-\infty$ in part of a row.


# %%
@triton.jit
def softmax_kernel(x_ptr, y_ptr, stride, C, BLOCK: tl.constexpr):
    pass  # your code here


def softmax(x):
    raise NotImplementedError  # remove this line when the kernel is written
    R, C = x.shape
    y = torch.empty(R, C, device=x.device)
    softmax_kernel[(R,)](x, y, x.stride(0), C, BLOCK=triton.next_power_of_2(C))
    return y


course.check("3.2", softmax)

# %% [markdown]
# The library's softmax takes rows of any length. Short rows share a program, as a block of rows and columns; a row too long for one
# program is walked in pieces (lesson 7 has that idea). The kernel for rows that fit:

# %%
course.show_source("softmax.py", "_softmax_fwd_kernel")

# %% [markdown]
# ## Two dimensions of programs
#
# **Formula.** Transpose: $y_{cr} = x_{rc}$. Program $(p, q)$ takes the tile of rows $pB \dots pB + B - 1$ and columns $qB \dots qB + B - 1$.
# Addresses of a tile are a column of row offsets plus a row of column offsets: `row[:, None] * stride + col[None, :]`.
#
# **Picture.** A `[6, 10]` array in tiles of 4. The mask has two conditions now.

# %%
R, C, B = 6, 10, 4
tiles, off = [], []
for p in range(triton.cdiv(R, B)):
    for q in range(triton.cdiv(C, B)):
        cells = [(p * B + i, q * B + j) for i in range(B) for j in range(B)]
        tiles.append([r * 12 + c for r, c in cells])
        off += [r * 12 + c for r, c in cells if r >= R or c >= C]
fig, ax = course.figure(8, 3.2)
course.access(ax, tiles, 12, "6 × 10 in tiles of 4 × 4; hatched: masked off", masked=off)
fig

# %% [markdown]
# ### Exercise 3.3
#
# **Specification.** `transpose(x: [R, C]) -> y: [C, R]` contiguous, with `x` of any two strides. The grid is
# `(cdiv(R, 16), cdiv(C, 16))`; `tl.program_id(1)` is the second index.


# %%
@triton.jit
def transpose_kernel(x_ptr, y_ptr, row_stride, col_stride, R, C, BLOCK: tl.constexpr):
    pass  # your code here


def transpose(x):
    raise NotImplementedError  # remove this line when the kernel is written
    R, C = x.shape
    y = torch.empty(C, R, device=x.device)
    transpose_kernel[(triton.cdiv(R, 16), triton.cdiv(C, 16))](x, y, x.stride(0), x.stride(1), R, C, BLOCK=16)
    return y


course.check("3.3", transpose)

# %% [markdown]
# ## What the interpreter cannot show
#
# - **Races.** Its programs run in order. Two programs that write one element always end the same way here; on a GPU either may be last.
# - **Speed**, and all that comes of it: whether neighbouring threads read neighbouring addresses, how many registers a block takes.
# - **Blocks that are too large.** A block of $2^{20}$ elements works here. On a GPU it has no room.
# - **Stray reads.** NumPy may well find readable memory where a GPU stops with an error, or gives you somebody's numbers.
#
# On a GPU the same cells run compiled. What the copy rate of memory allows for `add` is three arrays through memory; here is how near the
# kernel comes, with a block of 1024, against PyTorch's own addition.

# %%
N = 2**26


def prepare(fn):
    def ready():
        x, y, z = (torch.randn(N, device="cuda") for _ in range(3))
        return lambda: fn(x, y, z)

    return ready


rows = [
    (
        "add_kernel, BLOCK=16",
        course.timed("3 add block 16", prepare(lambda x, y, z: add_kernel[(N // 16,)](x, y, z, N, BLOCK=16)), bytes=12 * N),
    ),
    (
        "add_kernel, BLOCK=1024",
        course.timed("3 add block 1024", prepare(lambda x, y, z: add_kernel[(N // 1024,)](x, y, z, N, BLOCK=1024)), bytes=12 * N),
    ),
    ("torch.add", course.timed("3 torch.add", prepare(lambda x, y, z: torch.add(x, y, out=z)), bytes=12 * N)),
]
print(course.table(rows))

# %% [markdown]
# ## Summary
#
# - A program is one index; a block is a fixed power of two of elements; the grid covers the array.
# - The mask keeps the edges. `other` must be the neutral element of what follows: 0 of a sum, $-\infty$ of a maximum.
# - Strides say where elements are: pass them, and views cost no copy.
# - The interpreter shows what is computed and touched. It shows neither races nor speed.
#
# Next, lesson 4: a norm, whose backward sums over rows that different programs hold.
