# %% [markdown]
# # 5. RoPE: position as rotation
#
# At the end you can rotate queries and keys by their positions, prove why attention then sees distances, tell the two layouts apart and turn
# one into the other, write the kernel over views without a copy, and say why its backward is the same kernel. You need lesson 3. 25 minutes.
#
# Attention compares a query with keys by dot products. A dot product does not know where its two vectors stand in the text. **RoPE** (rotary
# position embedding) turns each pair of numbers of a query by an angle that grows with its position, and does the same to keys. There is
# nothing to learn in it, and it runs in every layer: once over all queries and keys forward, once over all their gradients backward.

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
# **Formula.** Take two numbers of a query as $z = q_1 + i q_2$. At position $t$, with **frequency** $\omega$ (radians a token), it becomes
# $z\,e^{i \omega t}$. Written out:
#
# $$q'_1 = q_1 \cos \omega t - q_2 \sin \omega t, \qquad q'_2 = q_2 \cos \omega t + q_1 \sin \omega t.$$
#
# **Proof that only the distance counts.** The dot product of two pairs is the real part of $z_q \overline{z_k}$:
# $(q_1 + i q_2)(k_1 - i k_2)$ has real part $q_1 k_1 + q_2 k_2$. Rotate the query to position $m$ and the key to position $n$:
#
# $$\mathrm{Re}\left(z_q e^{i\omega m}\;\overline{z_k e^{i\omega n}}\right)
#   = \mathrm{Re}\left(z_q \overline{z_k}\; e^{i\omega m} e^{-i\omega n}\right)
#   = \mathrm{Re}\left(z_q \overline{z_k}\; e^{i\omega(m-n)}\right).$$
#
# $m$ and $n$ are left only in $m - n$. A head of $D$ numbers has $D/2$ pairs, and its dot product is the sum over them, so the same holds for
# the whole head. Pair $j$ has its own frequency $\omega_j = b^{-2j/D}$, with the **base** $b = 10000$ in the paper.
#
# **Picture.** Take one query and one key, and put each of them at all of 24 positions. Predict the pattern of the 24 × 24 dot products.


# %%
def tables(T, D, base=10000.0, dtype=torch.float32):
    """cos and sin of every position and pair: [T, D/2]."""
    omega = base ** (-torch.arange(0, D, 2, dtype=dtype) / D)
    angle = torch.outer(torch.arange(T, dtype=dtype), omega)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """The definition, where pair j is (x[j], x[j + D/2]). x: [..., T, D]."""
    first, second = rearrange(x, "... (pair d) -> pair ... d", pair=2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


T, D = 24, 16
cos, sin = tables(T, D)
q, k = torch.randn(2, D)
scores = rotate(q.expand(T, D), cos, sin) @ rotate(k.expand(T, D), cos, sin).T
fig, axes = course.figure(8, 3.2, columns=2)
turned = rotate(torch.tensor([1.0, 0.0]).expand(6, 2), *tables(6, 2))
axes[0].quiver([0] * 6, [0] * 6, turned[:, 0], turned[:, 1], angles="xy", scale_units="xy", scale=1, color=course.PALETTE[1], width=0.009)
for t, (x, y) in enumerate(1.15 * turned):
    axes[0].text(float(x), float(y), str(t), ha="center", va="center")
axes[0].set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), title="one pair, ω = 1, positions 0 to 5", aspect="equal")
image = axes[1].imshow(scores, cmap="RdBu")
fig.colorbar(image, ax=axes[1], shrink=0.8)
axes[1].set(title="q · k", xlabel="position of k", ylabel="position of q")
fig

# %% [markdown]
# Constant along diagonals: one value for each distance. Moving both by the same number of tokens changes nothing.
#
# **Frequencies.** A pair comes round after its **wavelength** $2\pi/\omega_j$. Pair 0 has $\omega_0 = 1$: about 6 tokens. Its angle tells
# neighbours apart, and repeats soon. The last pair of $D = 128$ needs 54 thousand tokens. Together they tell near and far, as the hands of a
# clock do. A larger base slows the slow hands, for longer texts: Llama 3 has 500000.
#
# **The angle has to be made in fp32.** bf16 keeps 8 significant bits. Predict: which is the first position that bf16 cannot hold, and what
# happens to the tokens there?

# %%
fig, axes = course.figure(8, 2.9, columns=2)
for base in (1e4, 5e5):
    pair = torch.arange(64)
    axes[0].plot(pair, 2 * torch.pi * base ** (2 * pair / 128), label=f"base {base:,.0f}")
axes[0].set(yscale="log", xlabel="pair j of a head of 128", ylabel="tokens", title="wavelength")
axes[0].legend()
where = torch.arange(248, 272)
axes[1].plot(where, where.float().cos(), "o-", markersize=3, label="position in fp32")
axes[1].plot(where, where.bfloat16().float().cos(), "s--", markersize=3, label="position in bf16")
axes[1].set(xlabel="position", title="cos of pair 0", ylim=(-1.1, 1.8))
axes[1].legend(ncols=1, loc="upper right")
fig

# %% [markdown]
# 257: bf16 has 256 and 258, and nothing between. Every odd position goes to a neighbour: 256 and 257 become one position, 259, 260 and 261
# another. From 512 on, only each fourth exists. The dashed line stands still and jumps where the solid one turns. So models compute
# $\omega t$, its cos and its sin in fp32, and round the finished tables, if they do.
#
# ## Layouts
#
# Which two numbers of a head are a pair? There are two conventions, called **layouts**:
#
# - **half**: $(x_j,\ x_{j + D/2})$ (Llama in Hugging Face, Qwen). In `einops` notation the head is `(pair d)`.
# - **interleaved**: $(x_{2j},\ x_{2j+1})$ (the paper, GPT-J, Cohere). The head is `(d pair)`.
#
# A model trained with one and run with the other raises no error. It is a bad model.
#
# **Partial** rotary turns only the first $R$ numbers of a head (`rotary_dim`), and leaves the rest as they are: those compare without position.
#
# **Picture.** The elements of a head of 10 of which $R = 8$ turn, each with the number of its pair. Grey (number 4) passes through.

# %%
fig, axes = course.figure(8, 1.5, columns=2)
for ax, title, pairs in (
    (axes[0], "half", [[j, j + 4] for j in range(4)]),
    (axes[1], "interleaved", [[2 * j, 2 * j + 1] for j in range(4)]),
):
    course.access(ax, pairs, 10, title)
    for i in (8, 9):
        ax.add_patch(course.picture.Rectangle((i, 0), 0.92, 0.92, facecolor=course.PALETTE[7]))
        ax.text(i + 0.46, 0.5, "4", ha="center", va="center", fontsize=7, color="white")
fig

# %% [markdown]
# ### Exercise 5.1
#
# **Specification.** `rotate_pairs(x: [T, D], cos: [T, R/2], sin: [T, R/2], layout) -> [T, D]`, in PyTorch. `layout` is "half" or
# "interleaved". R, twice the tables' width, may be less than D: numbers from R on stay. x is not changed.


# %%
def rotate_pairs(x, cos, sin, layout):
    raise NotImplementedError  # your code here


course.check("5.1", rotate_pairs)

# %% [markdown]
# **One layout from the other.** Reorder the numbers of a head, from `(d pair)` to `(pair d)`, and interleaved pairs lie in halves. If queries
# *and* keys are reordered alike, dot products stay, since a sum does not mind its order. The numbers of a query are rows of the projection's
# weight $W_q$ (`q = x @ W_q.T`), so the weights can be reordered once, when a checkpoint is loaded, and never again.
#
# ### Exercise 5.2
#
# **Specification.** `to_halves(weight: [heads * D, width], heads) -> [heads * D, width]`: reorder the rows of a weight whose model rotates
# interleaved, so that the layout "half" gives the same attention. Apply it to $W_q$ and $W_k$. Each head keeps its own rows.


# %%
def to_halves(weight, heads):
    raise NotImplementedError  # your code here


course.check("5.2", to_halves)

# %% [markdown]
# ## A kernel over views
#
# A projection makes `[B, T, heads * D]`. Attention wants `[B, heads, T, D]`. That is a **view**: another shape and other strides over the same
# memory. (A stride says how many elements further the next index of an axis lies.)

# %%
B, T, heads, D = 1, 3, 2, 4
projected = torch.randn(B, T, heads * D)
view = rearrange(projected, "b t (h d) -> b h t d", h=heads)
print("shape     ", list(view.shape))
print("strides   ", view.stride(), "   a copy would have", view.contiguous().stride())
print("contiguous", view.is_contiguous(), "   same memory", view.data_ptr() == projected.data_ptr())

# %% [markdown]
# **Picture.** The 24 numbers in the order of memory, 8 a line. Each has the number of the program that reads it, where program $h \cdot T + t$
# takes head $h$ at position $t$. Left the view, right what `.contiguous()` would make.

# %%
place = torch.arange(T * heads * D).view(B, T, heads * D)
fig, axes = course.figure(8, 1.9, columns=2)
for ax, title, q in (
    (axes[0], "the view: a line is a token", rearrange(place, "b t (h d) -> b h t d", h=heads)),
    (axes[1], "a copy: heads one after the other", place.view(B, heads, T, D)),
):
    course.access(ax, [q[0, h, t].tolist() for h in range(heads) for t in range(T)], heads * D, title)
fig

# %% [markdown]
# Either way a program reads $D$ numbers that are next to each other. Only the distance from program to program differs, and that is what
# strides tell. The copy buys nothing.
#
# What would it cost? Queries of `[4, 4096, 32 * 128]` in bf16. Count first: how many bytes does the rotation read and write at the least, and how
# many does a `.contiguous()` before it add?

# %%
size = 4 * 4096 * 32 * 128 * 2
print(f"rotation: reads {size / 1e6:.0f} MB, writes {size / 1e6:.0f} MB")
print(f"the copy: reads {size / 1e6:.0f} MB, writes {size / 1e6:.0f} MB, before the rotation begins; and again in backward")

# %% [markdown]
# ### Exercise 5.3
#
# **Specification.** `rope(q: [B, H, T, D], cos: [T, D/2], sin: [T, D/2]) -> [B, H, T, D]`, layout "half", fp32. The result is new memory, and
# contiguous. q may have any strides but its last, which is 1, and is not copied. The tables are contiguous. The grid is `(B * H, T)`: program
# $(i, t)$ takes position $t$ of head $i \bmod H$ of batch $\lfloor i / H \rfloor$. Half of D is a power of two.


# %%
@triton.jit
def rope_kernel(q_ptr, cos_ptr, sin_ptr, y_ptr, b_stride, h_stride, t_stride, H, T, HALF: tl.constexpr):
    pass  # your code here: i = tl.program_id(0).to(tl.int64), since offsets in a large tensor pass 2^31; t = tl.program_id(1)


def rope(q, cos, sin):
    raise NotImplementedError  # remove this line when the kernel is written
    B, H, T, D = q.shape
    y = torch.empty(B, H, T, D, device=q.device)
    rope_kernel[(B * H, T)](q, cos, sin, y, q.stride(0), q.stride(1), q.stride(2), H, T, HALF=D // 2)
    return y


course.check("5.3", rope)

# %% [markdown]
# **How often are the tables read?** Your kernel reads a row of both tables for each head: $D$ fp32 numbers, $4D$ bytes, beside $2D$ bytes of a
# bf16 query read and $2D$ written. They come from the cache, but come they must: as many bytes again as the work itself. All heads of a token
# need the same row. So the library takes *one program for one token*, with all its heads, of q and of k:

# %%
course.show_source("_rope_kernels.py", "_rope_kernel")

# %% [markdown]
# Line by line:
#
# - `token` is in 64 bits, as your `i` is; `b, t` are its batch and position.
# - Each `_table` call returns two rows: `c1` for the first numbers of the pairs, `c2` for the second. Models hold each cosine twice, one for each
#   number of a pair, and nothing forces the two to be equal. `WHOLE` says that the table is that wide. (`SECTIONS` is for images and video,
#   where pairs take their position from time, height or width.)
# - `if q_ptr is not None`: a pointer that is None is known when the kernel is compiled, so the branch costs nothing. In backward, one of the
#   two may need no gradient.
# - `QH` and `KH`, the numbers of heads rounded up to powers of two, differ: with **grouped queries** several heads of q share one of k.
#
# The rotation itself is in `_turn`, which finds its pairs by `_pairs`:

# %%
course.show_source("_rope_kernels.py", "_pairs", "_turn")

# %% [markdown]
# - `head` is a column of indices, `e` and `d` are rows: `x_at` plus a row is a tile `[H, D]` of addresses. `head < heads` masks the rounding up.
# - `head.to(tl.int64) * xh`: strides come in as numbers, four for q and four for k. No line asks for contiguous memory.
# - `PAIRS`, the interleaved layout: *one* load of $2D$ neighbours, and `tl.split` takes the pairs apart in registers. Two loads with step 2 would
#   fetch the same memory twice. `tl.interleave` is the way back.
# - Otherwise two loads `HALF` apart, as you wrote them. `DENSE` says that the last stride is 1; for other strides `_along` multiplies.
# - `.to(tl.float32)` at the load, `.to(y_ptr.dtype.element_ty)` before the store: computed in fp32, rounded once.
# - `REST`: a partial rotation has to write all of y, so what passes through is copied.
# - `BACKWARD` exchanges a sign and a table, nothing else. Why that is enough comes next.
#
# ## Its own backward
#
# **Formula.** For one pair $q' = A q$ with the matrix $A = \begin{pmatrix} c & -s \\ s & c \end{pmatrix}$. The backward of any linear function is its
# transpose: a small change $\delta q$ changes the loss by $\delta L = dq'^T A\, \delta q = (A^T dq')^T \delta q$, so the gradient $dq$ is $A^T dq'$, with
#
# $$A^T = \begin{pmatrix} c & s \\ -s & c \end{pmatrix}.$$
#
# That is $A$ with $s$ negated: the rotation by $-\theta$, by the same kernel. $q$ does not occur. The residuals are the two tables, shared by all
# layers: RoPE keeps nothing of its own.
#
# With $c^2 + s^2 = 1$ the matrix is **orthogonal**: $A^T A = 1$. So the backward of the forward is the identity, and lengths stay as they are.
# Predict the two errors below, all computed in fp64: with tables that were rounded to fp32 (spacing about $10^{-7}$ at 1), and with tables of
# fp64 (about $10^{-16}$).

# %%
q = torch.randn(64, 32, dtype=torch.float64)
for dtype in (torch.float32, torch.float64):
    cos, sin = (t.double() for t in tables(64, 32, dtype=dtype))
    there = rotate(q, cos, sin)
    back = rotate(there, cos, -sin)
    lengths = there.norm(dim=-1) - q.norm(dim=-1)
    print(f"tables of {dtype}: there and back off by {float((back - q).abs().max()):.0e}, lengths by {float(lengths.abs().max()):.0e}")

# %% [markdown]
# The library lets `c1`, `s1` differ from `c2`, `s2`. Its matrix is $\begin{pmatrix} c_1 & -s_1 \\ s_2 & c_2 \end{pmatrix}$; write down the transpose, and
# compare it with the line after `if BACKWARD` above: `lo * c1 + hi * s2`, `hi * c2 - lo * s1`.
#
# ### Exercise 5.4
#
# **Specification.** `backward(cos: [T, R/2], sin: [T, R/2], dy: [T, D], layout) -> dq: [T, D]`, by one call of your `rotate_pairs` or afresh. The
# check gives tables whose $c^2 + s^2$ is not 1 (long-context variants such as YaRN scale them). The backward is then still the transpose,
# which is no longer the inverse.


# %%
def backward(cos, sin, dy, layout):
    raise NotImplementedError  # your code here


course.check("5.4", backward)

# %% [markdown]
# ## The library's function
#
# `liger_fn.rope` takes q and k in one launch, as views, and gives results whose memory is ordered as that of the inputs. So the view back to
# `[B, T, heads * D]`, which the gradient of the projection needs, costs nothing either. Its tables are as wide as the part that turns: each number
# twice, by `cat` for the layout "half".

# %%
q = rearrange(torch.randn(2, 5, 4 * 16, device=DEVICE), "b t (h d) -> b h t d", h=4).requires_grad_()
k = rearrange(torch.randn(2, 5, 2 * 16, device=DEVICE), "b t (h d) -> b h t d", h=2)
cos, sin = (torch.cat([t, t], -1)[None].to(DEVICE) for t in tables(5, 16))
q2, k2 = liger_fn.rope(q, k, cos, sin)
print("backend", liger_fn.backend(q), "   strides in", q.stride(), "out", q2.stride())

dy = torch.randn_like(q2)
(dq,) = torch.autograd.grad(q2, q, dy)
again, _ = liger_fn.rope(dy, k, cos, -sin)
print("backward = forward by −θ:", torch.allclose(dq, again))

scores = rearrange(q2.detach(), "b (k g) t d -> b k g t d", k=2) @ k2.detach()[:, :, None].transpose(-1, -2)
later = [torch.cat([t, t], -1)[None, 100:105].to(DEVICE) for t in tables(105, 16)]
q3, k3 = liger_fn.rope(q.detach(), k, *later)
moved_on = rearrange(q3, "b (k g) t d -> b k g t d", k=2) @ k3[:, :, None].transpose(-1, -2)
print(f"scores when all move 100 tokens on: off by at most {float((moved_on - scores).abs().max()):.0e}")

# %% [markdown]
# (The last line is not 0, since an angle of 100 radians is rounded to fp32 a hundred times more coarsely than one of 1.)
#
# On a GPU this function does two multiplications and an addition for each number it moves, so the memory decides. The floor below is the time
# that reading and writing q and k takes at 3.35 TB/s, what an H100's memory can do at most. Plain PyTorch makes `rotate_half(q)`, two products and
# a sum, and writes each of them to memory. Predict how many times the floor that is, before you look.


# %%
def prepare(fn):
    def ready():
        table = torch.randn(1, 4096, 128, device="cuda", dtype=torch.bfloat16)
        qk = [torch.randn(4, 4096, n, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in (32, 8)]
        return lambda: fn(*qk, table, table)

    return ready


moved = 2 * 2 * 4 * 4096 * 40 * 128  # q and k, read and written, 2 bytes each
rows = [
    ("plain PyTorch", course.timed("5 rope reference", prepare(liger_fn.rope.reference), bytes=moved)),
    ("liger_fn.rope", course.timed("5 rope", prepare(liger_fn.rope), bytes=moved)),
]
print(course.table(rows, floor=moved / 3.35e6))

# %% [markdown]
# By count, in arrays the size of q and k: the negated half 1, `cat` 2, two products 4, the sum 3. That is 10 where 2 are the least, 5 times the floor. Does the
# row show more? A count of bytes is a lower bound. A likely part of the rest: `cat` makes a contiguous array out of a view, and the sum then meets operands
# that lie in memory in two orders.

# %% [markdown]
# ## Summary
#
# - RoPE multiplies complex numbers by $e^{i\omega t}$. In a dot product only the difference of two positions is left.
# - Layouts say which numbers are a pair. The wrong one raises no error; rows of the weights, reordered, turn one into the other.
# - A kernel that takes strides reads views where they are. A copy costs as much as the whole rotation.
# - The backward is the transpose: the same kernel with $-\sin$, and nothing of q is kept.
#
# Next, lesson 6: layers that do have to keep something, and what they can forget.
