# %% [markdown]
# # 5. RoPE: position as rotation
#
# At the end you can rotate queries and keys by their positions without a copy, in both layouts, and say why the backward is the same kernel.
# You need lesson 3. 20 minutes.
#
# Attention compares a query with keys by dot products. By itself it does not know where they stand. **RoPE** turns each pair of numbers of a
# query by an angle that grows with its position, and keys likewise: the dot product then depends on the distance between them.

# %%
import course  # before triton
import torch
import triton
import triton.language as tl
from einops import rearrange

import liger_fn

_ = torch.manual_seed(0)
DEVICE = course.DEVICE

# %% [markdown]
# ## A pair is a complex number
#
# **Formula.** Take two numbers of a query as $z = q_1 + i q_2$. At position $t$ with frequency $\omega$ it becomes $z\,e^{i \omega t}$:
#
# $$q'_1 = q_1 \cos \omega t - q_2 \sin \omega t, \qquad q'_2 = q_2 \cos \omega t + q_1 \sin \omega t.$$
#
# A head of $D$ numbers has $D/2$ pairs, pair $j$ with frequency $\omega_j = b^{-2j/D}$, $b = 10000$ or more: from one radian a token down to a
# full turn in tens of thousands.
#
# **Why the distance.** The dot product of two pairs is the real part of $z_q \overline{z_k}$. Rotated, at positions $m$ and $n$:
#
# $$\mathrm{Re}\left(z_q e^{i\omega m}\,\overline{z_k e^{i\omega n}}\right) = \mathrm{Re}\left(z_q \overline{z_k}\, e^{i\omega(m-n)}\right).$$
#
# **Picture.** Left: one pair at positions 0 to 9. Right: the dot product of one query and one key at all positions: constant along diagonals.


# %%
def tables(T, D, base=10000.0):
    """cos and sin of every position and pair: [T, D/2]."""
    omega = base ** (-torch.arange(0, D, 2) / D)
    angle = torch.outer(torch.arange(T), omega)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """The definition, halves layout: pair j is (x[j], x[j + D/2]). x: [..., T, D]."""
    first, second = rearrange(x, "... (half d) -> half ... d", half=2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


T, D = 24, 16
cos, sin = tables(T, D)
q, k = torch.randn(2, D)
scores = rotate(q.expand(T, D), cos, sin) @ rotate(k.expand(T, D), cos, sin).T
fig, axes = course.figure(8, 3.2, columns=2)
turned = rotate(torch.tensor([1.0, 0.0]).expand(10, 2), *tables(10, 2))
axes[0].quiver(
    [0] * 10, [0] * 10, turned[:, 0], turned[:, 1], range(10), angles="xy", scale_units="xy", scale=1, cmap="viridis", width=0.008
)
axes[0].set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), title="one pair, ω = 1, positions 0 (dark) to 9", aspect="equal")
image = axes[1].imshow(scores, cmap="RdBu")
fig.colorbar(image, ax=axes[1], shrink=0.8)
axes[1].set(title="q · k by position", xlabel="position of k", ylabel="position of q")
fig

# %% [markdown]
# ## Layouts
#
# Which two numbers are a pair? Two conventions, and a model trained with one is wrong with the other:
#
# - **halves** (Llama in Hugging Face): $(x_j, x_{j + D/2})$. `"... (half d) -> half ... d"`
# - **interleaved** (the paper, GPT-J): $(x_{2j}, x_{2j+1})$. `"... (d pair) -> pair ... d"`
#
# **Partial** rotary turns only the first `rotary_dim` numbers of a head, and leaves the rest as they are.

# %%
fig, axes = course.figure(8, 1.6, columns=2)
course.access(axes[0], [[j, j + 4] for j in range(4)], 8, "halves: pair number of each element")
course.access(axes[1], [[2 * j, 2 * j + 1] for j in range(4)], 8, "interleaved")
fig

# %% [markdown]
# ### Exercise 5.1
#
# **Specification.** `rotate_pairs(x: [T, D], cos: [T, R/2], sin: [T, R/2], layout) -> [T, D]`, in PyTorch. `layout` is "half" or "interleaved"; `R`, twice the
# tables' width, may be less than `D`: numbers from R on stay. Do not change x.


# %%
def rotate_pairs(x, cos, sin, layout):
    raise NotImplementedError  # your code here


course.check("5.1", rotate_pairs)

# %% [markdown]
# ## A kernel over views
#
# A projection makes `[B, T, heads · D]`; attention wants `[B, heads, T, D]`. That is a view, with other strides over the same memory:

# %%
B, T, heads, D = 2, 3, 4, 8
projected = torch.randn(B, T, heads * D)
view = rearrange(projected, "b t (h d) -> b h t d", h=heads)
print(
    "shape",
    tuple(view.shape),
    "strides",
    view.stride(),
    "contiguous?",
    view.is_contiguous(),
    "same memory?",
    view.data_ptr() == projected.data_ptr(),
)

# %% [markdown]
# `.contiguous()` here would read and write all queries before the kernel begins, and again in backward. A kernel that takes strides needs
# none of that. One program takes one head at one position: $D$ numbers, next to each other in memory; a row of the tables serves all heads.
#
# ### Exercise 5.2
#
# **Specification.** `rope(q: [B, H, T, D], cos: [T, D/2], sin: [T, D/2]) -> [B, H, T, D]`, halves layout, fp32, new memory, contiguous; q may have any
# strides but its last, which is 1. The grid is `(B * H, T)`. Half of D is a power of two.


# %%
@triton.jit
def rope_kernel(q_ptr, cos_ptr, sin_ptr, y_ptr, b_stride, h_stride, t_stride, H, T, HALF: tl.constexpr):
    pass  # your code here; of program (i, t): b = i // H, h = i % H


def rope(q, cos, sin):
    raise NotImplementedError  # remove this line when the kernel is written
    B, H, T, D = q.shape
    y = torch.empty(B, H, T, D, device=q.device)
    rope_kernel[(B * H, T)](q, cos, sin, y, q.stride(0), q.stride(1), q.stride(2), H, T, HALF=D // 2)
    return y


course.check("5.2", rope)

# %% [markdown]
# The library's kernel serves both layouts, partial rotary, several axes of position (images and video), and tables of any strides. Look for
# where the two numbers of a pair are loaded, and for `BACKWARD`.

# %%
course.show_source("_rope_kernels.py", "_rope_kernel")

# %% [markdown]
# ## Its own backward
#
# **Formula.** For one pair $q' = R q$ with $R = \begin{pmatrix} c & -s \\ s & c \end{pmatrix}$. The backward is $dq = R^T dq'$, and
#
# $$R^T = \begin{pmatrix} c & s \\ -s & c \end{pmatrix}$$
#
# is the rotation by $-\theta$: the same kernel with $s$ negated. Nothing of q has to be kept; the tables are the residuals.
#
# Lengths stay as they are, since $R^T R = 1$, so no rounding error can grow from layer to layer:

# %%
cos, sin = tables(64, 32)
q = torch.randn(64, 32, dtype=torch.float64)
there = rotate(q, cos.double(), sin.double())
back = rotate(there, cos.double(), -sin.double())
print("turned and turned back:", float((back - q).abs().max()))
print("lengths kept:", torch.allclose(there.norm(dim=-1), q.norm(dim=-1)))

# %% [markdown]
# ### Exercise 5.3
#
# **Specification.** `backward(cos, sin, dy, layout) -> dq`, by one call of `rotate_pairs` or of your own; cos and sin are `[T, R/2]`, dy is `[T, D]`. The check gives
# tables whose cos² + sin² is not 1 (some models scale them): then the transpose is right, and the inverse is not.


# %%
def backward(cos, sin, dy, layout):
    raise NotImplementedError  # your code here


course.check("5.3", backward)

# %% [markdown]
# `liger_fn.rope` takes q and k in one launch, as views, and gives them back with the same order of memory:

# %%
q = rearrange(torch.randn(2, 5, 4 * 16, device=DEVICE), "b t (h d) -> b h t d", h=4).requires_grad_()
k = rearrange(torch.randn(2, 5, 2 * 16, device=DEVICE), "b t (h d) -> b h t d", h=2)
cos, sin = (torch.cat([t, t], -1)[None].to(DEVICE) for t in tables(5, 16))
q2, k2 = liger_fn.rope(q, k, cos, sin)
dy = torch.randn_like(q2)
(dq,) = torch.autograd.grad(q2, q, dy)
again, _ = liger_fn.rope(dy, k, cos, -sin)
print("backward = forward by −θ?", torch.allclose(dq, again))


def prepare(fn):
    def ready():
        table = torch.randn(1, 4096, 128, device="cuda", dtype=torch.bfloat16)
        qk = [torch.randn(4, 4096, n, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in (32, 8)]
        return lambda: fn(*qk, table, table)

    return ready


moved = 2 * 2 * 4 * 4096 * 40 * 128  # q and k, read and written, in bf16
rows = [
    ("plain PyTorch", course.timed("5 rope reference", prepare(liger_fn.rope.reference), bytes=moved)),
    ("liger_fn.rope", course.timed("5 rope", prepare(liger_fn.rope), bytes=moved)),
]
print(course.table(rows))

# %% [markdown]
# ## Summary
#
# - RoPE turns pairs by angles that grow with position; dot products then depend on distances.
# - Layouts differ in which numbers are a pair. The wrong one gives no error, only a worse model.
# - Strides instead of copies. The backward is the rotation back, and keeps nothing of q.
#
# Next, lesson 6: what a layer must keep, and what it can forget.
