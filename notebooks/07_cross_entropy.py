# %% [markdown]
# # 7. Cross entropy in one pass
#
# At the end you can prove and write the online softmax, make a loss and its gradient while a row is read in blocks, and say when the
# gradient may be written over the logits. You need lessons 3 and 4. 25 minutes.
#
# A language model's vocabulary has 32,000 to 262,144 words. Its logits for 8192 tokens and 128,256 words are 2 GiB in bf16, more than all the
# activations of a layer. Each pass over them costs.

# %%
import course  # before triton
import torch
import triton
import triton.language as tl

import liger_fn

torch.manual_seed(0)
DEVICE = course.DEVICE

# %% [markdown]
# ## The loss
#
# **Formula.** For logits $z \in R^V$ and the right word $t$:
#
# $$\ell = -\log \frac{e^{z_t}}{\sum_j e^{z_j}} = \underbrace{\log \sum_j e^{z_j}}_{lse} - z_t, \qquad \frac{\partial \ell}{\partial z_j} = \underbrace{e^{z_j - lse}}_{softmax(z)_j} - [j = t].$$
#
# Written as it stands, $e^{z_j}$ overflows. With $m = \max_j z_j$: $lse = m + \log \sum_j e^{z_j - m}$. That is two passes over the row, one for $m$,
# one for the sum; and a third for the gradient. How many times would 2 GiB be read and written by PyTorch, which does one operation at a
# time in fp32? Count, then look at `docs/results.md`: 17.8 ms against 2.1.
#
# ## Online softmax
#
# Read the row in blocks, and keep a pair $(m, s)$: the maximum so far, and $s = \sum e^{z_j - m}$ so far. Two pairs, of two parts of a row, merge:
#
# $$(m_1, s_1) \oplus (m_2, s_2) = \left(m,\; s_1 e^{m_1 - m} + s_2 e^{m_2 - m}\right), \qquad m = \max(m_1, m_2).$$
#
# **Proof.** $s_i = \sum_{j \in part_i} e^{z_j - m_i}$, so $s_i e^{m_i - m} = \sum_{j \in part_i} e^{z_j - m}$; their sum is that of both parts, about their
# maximum. The result depends on the set of numbers alone, not on how it was cut: $\oplus$ is associative and commutative. Its neutral
# element is $(-\infty, 0)$. ∎
#
# **Picture.** A row of 60 logits in blocks of 10. The maximum rises now and then; the sum so far is then shrunk to the new measure.

# %%
row = torch.randn(60).cumsum(0) * 0.7
m, s, path = torch.tensor(-torch.inf), torch.tensor(0.0), []
for block in row.split(10):
    new = torch.maximum(m, block.max())
    s = s * torch.exp(m - new) + torch.exp(block - new).sum()
    m = new
    path.append((float(m), float(m + s.log())))
fig, ax = course.figure(8, 2.8)
ax.plot(row, color=course.PALETTE[7], linewidth=1, label="logits")
ends = range(9, 60, 10)
ax.step(ends, [p[0] for p in path], where="post", label="m, the maximum so far")
ax.plot(ends, [p[1] for p in path], "o", label="m + log s, the lse so far")
ax.axhline(float(row.logsumexp(0)), linestyle="--", linewidth=0.8, color=course.INK)
ax.set(xlabel="column", title="after the last block m + log s is the lse (dashed)")
ax.legend()
fig

# %% [markdown]
# ### Exercise 7.1
#
# **Specification.** `merge(a, b) -> (m, s)` of two pairs of equal-shaped tensors. $(-\infty, 0)$ must be neutral, merged with itself too: $-\infty - (-\infty)$
# is NaN, which must not come out.


# %%
def merge(a, b):
    raise NotImplementedError  # your code here


course.check("7.1", merge)

# %% [markdown]
# ### Exercise 7.2
#
# **Specification.** `loss(z: [N, V], target: [N]) -> (loss: [N], lse: [N])`, fp32. One program a row, which reads the row in blocks of `BLOCK` and once only. A target of
# −100 is ignored: its loss is 0, whatever the row holds. $z_t$ is one more load of one number.


# %%
@triton.jit
def loss_kernel(z_ptr, target_ptr, loss_ptr, lse_ptr, stride, V, BLOCK: tl.constexpr):
    pass  # your code here: `for start in range(0, V, BLOCK):`


def loss(z, target):
    raise NotImplementedError  # remove this line when the kernel is written
    N, V = z.shape
    out, lse = torch.empty(2, N, device=z.device)
    loss_kernel[(N,)](z, target, out, lse, z.stride(0), V, BLOCK=16)
    return out, lse


course.check("7.2", loss)

# %% [markdown]
# ## The gradient
#
# **Formula.** With an upstream gradient $g$ of the row's loss: $dz_j = g\,(e^{z_j - lse} - [j = t])$. A mean over the rows that count has
# $g = 1/n$, with n counted over targets that are not ignored; and a loss that somebody scales has another $g$. A kernel which assumes 1 is
# wrong by a factor that no shape check finds.
#
# **Picture.** The gradient of one row of 12 words: what softmax gives to wrong words is taken back, and the right word gets what it lacks.
# Its sum is 0.

# %%
z = torch.randn(12) * 1.5
p, t = z.softmax(0), 4
pull = p.clone()
pull[t] -= 1
fig, axes = course.figure(8, 2.4, columns=2)
axes[0].bar(range(12), p, color=[course.PALETTE[0] if j == t else course.PALETTE[1] for j in range(12)])
axes[0].set(title="softmax; red: the right word", xlabel="word")
axes[1].bar(range(12), pull, color=[course.PALETTE[0] if j == t else course.PALETTE[1] for j in range(12)])
axes[1].set(title=f"gradient, sums to {abs(float(pull.sum())):.0f}", xlabel="word")
fig

# %% [markdown]
# ### Exercise 7.3
#
# **Specification.** `gradient(z: [N, V], target: [N], lse: [N], g: [N]) -> dz: [N, V]` of z's dtype, computed in fp32. Ignored rows get zeros, even where they hold NaN.


# %%
@triton.jit
def gradient_kernel(z_ptr, target_ptr, lse_ptr, g_ptr, dz_ptr, V, BLOCK: tl.constexpr):
    pass  # your code here: program (row, block)


def gradient(z, target, lse, g):
    raise NotImplementedError  # remove this line when the kernel is written
    N, V = z.shape
    dz = torch.empty_like(z)
    gradient_kernel[(N, triton.cdiv(V, 16))](z, target, lse, g, dz, V, BLOCK=16)
    return dz


course.check("7.3", gradient)

# %% [markdown]
# The library does both in one kernel: after the walk that finds lse, it walks the row again and writes the gradient, while part of the row is
# still in the cache. Read it for the pair $(m, s)$, the block in which the target lies, and what `other` is.

# %%
course.show_source("_loss_kernel.py", "_loss_rows_kernel")

# %% [markdown]
# ## In place, and what donation means
#
# dz has z's shape and dtype, and the forward is the last that needs z. So the gradient could be written over the logits: 2 GiB less. It is
# right if nobody else reads z again, and wrong without an error if somebody does. Who could that be? A metric on the logits; a second loss
# of the same logits; `retain_graph=True`. PyTorch's in-place functions raise a tensor's version, which autograd checks. A kernel's stores do not:

# %%
z = torch.randn(4, 10)
before = z._version
z.add_(1)
print("after add_: version", before, "→", z._version)
before = z._version
z.numpy()[:] = 0  # stores by address, as a kernel's
print("after stores by address: version", before, "→", z._version)

# %% [markdown]
# `liger_fn.cross_entropy(..., donate=True)` is the caller's word that logits are read no more. Without it, the logits are as they were:

# %%
logits, target = torch.randn(6, 50, device=DEVICE, requires_grad=True), torch.randint(50, (6,), device=DEVICE)
middle = logits * 1.0
kept = middle.detach().clone()
liger_fn.cross_entropy(middle, target).backward()
print("without donate, logits untouched:", torch.equal(middle.detach(), kept))
kept_grad = logits.grad.clone()
logits.grad = None
middle = logits * 1.0
liger_fn.cross_entropy(middle, target, donate=True).backward()
print("with donate, the same gradient:", torch.equal(logits.grad, kept_grad))

# %% [markdown]
# What the second reading and the extra buffer cost, for 8192 rows of 128,256 in bf16. The least is one reading and one writing of the
# gradient beside the forward's one reading: three arrays of 2 GiB.

# %%
n, v = 8192, 128256


def prepare(fn):
    def ready():
        big = torch.randn(n, v, device="cuda", dtype=torch.bfloat16).requires_grad_()
        words = torch.randint(v, (n,), device="cuda")

        def call():
            big.grad = None
            fn(big, words).backward()

        return call

    return ready


rows = [
    ("torch.nn.functional", course.timed("7 F.cross_entropy", prepare(torch.nn.functional.cross_entropy), bytes=6 * n * v)),
    ("liger_fn.cross_entropy", course.timed("7 cross_entropy", prepare(liger_fn.cross_entropy), bytes=6 * n * v)),
]
print(course.table(rows))

# %% [markdown]
# ## Summary
#
# - $(m, s)$ merges like a sum: a row can be read in blocks, once, in any grouping.
# - The gradient is softmax minus one-hot, times what comes from above, which is not always 1.
# - Writing it over the logits is right exactly when nobody reads them again. Only the caller can know.
#
# Next, lesson 8: the logits need not exist at all.
