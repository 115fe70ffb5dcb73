# %% [markdown]
# # 7. Cross entropy: one pass, and a gradient in place
#
# At the end you can prove that a softmax can be computed block by block in any order, write that as a kernel, write the gradient over the
# logits themselves, and say exactly when that is safe. You need lessons 3 and 4. 25 minutes.
#
# A language model ends with one number for each word of its vocabulary: the **logits**, `[N, V]` for N tokens. The vocabulary is large: with
# V = 128256 a single row, widened to fp32, takes 513 KB: twice what the registers of a multiprocessor hold. So a kernel cannot load a row and
# look at it as a whole, as lesson 4 did.

# %%
import inspect

import course  # before triton
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

import liger_fn
from liger_fn import _loss_kernel, _loss_parts

_ = torch.manual_seed(0)
DEVICE = course.DEVICE


def show_lines(function, first, last):
    """The lines of a function of the library, from the one that begins with `first` to the one that begins with `last`."""
    lines = inspect.getsource(function).splitlines()
    a = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    b = next(i for i, line in enumerate(lines) if i >= a and line.strip().startswith(last))
    print("\n".join(lines[a : b + 1]))


# %% [markdown]
# ## A softmax in parts
#
# **Formula.** For one row of logits $a$ and the index $y$ of the right word, the loss is the negative logarithm of its probability:
#
# $$p_j = \frac{e^{a_j}}{\sum_i e^{a_i}}, \qquad loss = -\log p_y = \underbrace{\log \textstyle\sum_i e^{a_i}}_{lse} - a_y.$$
#
# $e^{89}$ is infinite in fp32, so one subtracts the maximum first: $m = \max_i a_i$, $s = \sum_i e^{a_i - m}$, $lse = m + \log s$. Read literally
# that takes two passes: one for $m$, then one for $s$. The way out is to let each **part** of a row tell its own pair $(m, s)$, and to merge pairs:
#
# $$(m_1, s_1) \oplus (m_2, s_2) = \bigl(m,\; s_1 e^{m_1 - m} + s_2 e^{m_2 - m}\bigr), \qquad m = \max(m_1, m_2).$$
#
# **Is ⊕ associative?** It must be, or the result would depend on how a row is cut. Call $v = s\,e^{m}$ the *value* of a pair: the plain sum
# $\sum e^{a_i}$ of its part. Merging adds the values:
#
# $$s\,e^{m} = s_1 e^{m_1 - m} e^{m} + s_2 e^{m_2 - m} e^{m} = s_1 e^{m_1} + s_2 e^{m_2} = v_1 + v_2.$$
#
# So in terms of $(m, v)$ merging is $(\max, +)$. Both are associative and commutative. A pair $(m, s)$ and its $(m, v)$ determine each other
# for finite $m$, so ⊕ is both, too. Its neutral element is $(-\infty, 0)$, a part without a possible word. ∎
#
# The proof uses $v$, which overflows; the program never does. (In floating point the order still moves the last bits, as in any sum.)
#
# **Picture.** 48 logits that rise from left to right, in blocks of 8, merged from left to right. Predict: when the maximum of the next
# block is larger by 3, what happens to the sum that was collected so far?

# %%
row = torch.linspace(-6, 8, 48) + torch.randn(48)
m, s, history = -torch.inf, torch.tensor(0.0), []
for start in range(0, 48, 8):
    block = row[start : start + 8]
    new = max(m, float(block.max()))
    kept, added = float(s * torch.exp(torch.tensor(m - new))), float(torch.exp(block - new).sum())
    history.append((float(s), kept, added))
    m, s = new, torch.tensor(kept + added)

fig, axes = course.figure(8.5, 3, columns=2)
axes[0].bar(range(48), row, color=[course.PALETTE[1] if i // 8 % 2 else course.PALETTE[7] for i in range(48)])
axes[0].step(range(0, 49, 8), [*(float(row[:e].max()) for e in range(8, 49, 8)), m], where="post", color=course.PALETTE[0])
axes[0].set(title="logits in blocks of 8; red: maximum so far", xlabel="column", ylabel="logit")
x = range(6)
axes[1].bar(x, [h[0] for h in history], color=course.PALETTE[3], width=0.25, label="sum before")
axes[1].bar([i + 0.27 for i in x], [h[1] for h in history], color=course.PALETTE[0], width=0.25, label="the same, rescaled")
axes[1].bar([i + 0.54 for i in x], [h[2] for h in history], color=course.PALETTE[2], width=0.25, label="this block's")
axes[1].set(title="what is merged", xlabel="block", ylim=(0, 5))
axes[1].legend(fontsize=8, ncols=3, loc="upper left")
print(f"in blocks: {m + float(torch.log(s)):.6f}    torch.logsumexp: {float(torch.logsumexp(row, 0)):.6f}")
fig

# %% [markdown]
# Each new maximum shrinks what came before: by $e^{-3} \approx 0.05$ if it is larger by 3. Nothing is lost; the old sum is stated in another unit.
#
# ### Exercise 7.1
#
# **Specification.** `merge(m1: [N], s1: [N], m2: [N], s2: [N]) -> (m: [N], s: [N])`, fp32, in PyTorch. Either part may be empty, $(-\infty, 0)$, and so may
# both; $-\infty - (-\infty)$ is NaN.


# %%
def merge(m1, s1, m2, s2):
    raise NotImplementedError  # your code here


course.check("7.1", merge)

# %% [markdown]
# The library merges pairs in four places: a thread merges blocks, a program merges its threads, a kernel merges the tiles of a matrix
# product, and GPUs merge their slices of a vocabulary. It is the same formula each time. Here is the last, in PyTorch. `parts` holds what each
# GPU has sent; `tops` are their $m_r$ and `rests` their $\log s_r$, `[GPUs, n]`, so that `e` is $e^{m_r - m + \log s_r} = s_r e^{m_r - m}$, and
# `e.sum(0)` merges them all at once. `fall` is $m_r - m$; where both are $-\infty$, it says 0 instead of NaN. (`gap`, `others` and `log1p`
# keep the digits of a small loss: that is explained below. `spreads` serves label smoothing.)

# %%
show_lines(_loss_parts.joined, "tops, rests =", "rest =")

# %% [markdown]
# ## One pass over a row
#
# **Formula.** A program takes one row and merges block after block into a running pair. Since the maximum of the old pair and of the block
# are both at hand, the block's own pair is never formed; its terms go straight into the new unit:
#
# $$m' = \max(m, \max_j a_j), \qquad s' = s\,e^{m - m'} + \sum_j e^{a_j - m'}.$$
#
# **Picture.** 3 rows of 21 columns in blocks of 8. Left: the colour is the program. Right: the colour is the step of the loop in which the
# program loads the element. Hatched elements lie beyond the row. With which value must they be loaded, so that they change neither $m$ nor $s$?

# %%
V, BLOCK = 21, 8
padded = -(-V // BLOCK) * BLOCK
outside = [n * padded + j for n in range(3) for j in range(V, padded)]
fig, axes = course.figure(9, 1.5, columns=2)
course.access(axes[0], [range(n * padded, (n + 1) * padded) for n in range(3)], padded, "by program", masked=outside)
steps = [[n * padded + i * BLOCK + j for n in range(3) for j in range(BLOCK)] for i in range(padded // BLOCK)]
course.access(axes[1], steps, padded, "by step", masked=outside)
fig

# %% [markdown]
# $-\infty$: it is never the maximum, and $e^{-\infty} = 0$. (Zero would count as a word with logit 0.)
#
# **Rows that do not count.** Padding, and a user's side of a chat, are not learned. Their target is `ignore_index`, −100 by custom. Such a row
# has loss 0 *whatever its logits are*, and −100 must never be used as an address: branch on it before you load the target's logit.
#
# ### Exercise 7.2
#
# **Specification.** `losses(logits: [N, V], target: [N] of int64, ignore_index) -> (loss: [N], lse: [N])`, fp32; both 0 in rows that do not count. Logits
# are fp32 or bf16, rows `logits.stride(0)` apart, at least one finite in each row that counts; whole blocks may be −∞, also the first.


# %%
@triton.jit
def losses_kernel(a_ptr, y_ptr, loss_ptr, lse_ptr, stride, V, ignore_index, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)  # n * stride may pass 2³¹
    y = tl.load(y_ptr + n)
    loss = 0.0
    lse = 0.0
    if y != ignore_index:
        pass  # your code here: for start in range(0, V, BLOCK): ...
    tl.store(loss_ptr + n, loss)
    tl.store(lse_ptr + n, lse)


def losses(logits, target, ignore_index):
    raise NotImplementedError  # remove this line when the kernel is written
    N, V = logits.shape
    loss, lse = torch.empty(2, N, device=logits.device)
    losses_kernel[(N,)](logits, target, loss, lse, logits.stride(0), V, ignore_index, BLOCK=64)
    return loss, lse


course.check("7.2", losses)

# %% [markdown]
# The library's kernel serves losses with weights, smoothing, caps and slices of a vocabulary, and is long. Here is its loop over blocks.

# %%
show_lines(_loss_kernel._loss_rows_kernel.fn, "for i in range(1, blocks)", "rest = ")

# %% [markdown]
# Line by line, where it differs from yours:
#
# - `_lanes` folds a block to `[lanes, WIDTH]`, and `tops`, `rests` are *per lane*: one pair for each thread, not one for the program. A
#   maximum over the program makes its threads wait for each other at every block; ⊕ is associative, so they need to meet only once, at the end:
#   `top = tl.max(tops, 0)` and `others = tl.sum(rests * fade, 0)`.
# - `at = home + i`: the walk begins with the block that holds the target, whose own term is left out of the sum (`others`), and wraps around.
#   Order does not matter, for the same reason.
# - `rest` is $\log s$, kept apart from `top`, never as their sum $lse$. Why? See next.
#
# **Digits of a small loss.** A model that is nearly sure has a target logit far above the rest: say $a_y = 30$ and all others near 0. The true
# loss is about $V e^{-30}$. But $lse$ is about 30, where fp32 numbers are $2 \cdot 10^{-6}$ apart; $lse - a_y$ cannot be a small number other than
# 0 or that. If the target has the maximum, then $s = 1 + \sum_{j \ne y} e^{a_j - m}$, so that $loss = \log s = \mathrm{log1p}(\sum_{j \ne y} e^{a_j - m})$
# keeps every digit. Predict where the two formulas part:

# %%
gaps = torch.linspace(2, 34, 65)
rows = torch.zeros(65, 512) + 0.1 * torch.randn(512)
rows[:, 7] = gaps
others = torch.exp(rows.double() - rows[:, 7:8].double())
others[:, 7] = 0.0
truth = torch.log1p(others.sum(1))  # in fp64: also there the difference would lose its digits, only later
as_difference = torch.logsumexp(rows, 1) - rows[:, 7]
seven = torch.full((65,), 7, device=DEVICE)
ours = liger_fn.cross_entropy(rows.to(DEVICE), seven, reduction="none").cpu()
fig, ax = course.figure(7.5, 3)
for name, got, colour in (("lse − a_y", as_difference, course.PALETTE[0]), ("liger_fn: log1p of the others", ours, course.PALETTE[1])):
    ax.plot(gaps, ((got.double() - truth).abs() / truth).clamp(min=1e-9), label=name, color=colour)
ax.set(yscale="log", xlabel="the target's logit, the others near 0", ylabel="relative error", title="digits of the loss: all lost, or none")
ax.axhline(1, color=course.INK, linewidth=0.6, linestyle=":")
ax.legend(loc="upper left", bbox_to_anchor=(0, 0.95))
fig

# %% [markdown]
# ## The gradient, in place
#
# **Formula.** From $loss = lse - a_y$ and $\partial\, lse / \partial a_j = e^{a_j} / \sum_i e^{a_i} = p_j$:
#
# $$da_j = dloss \cdot (p_j - [j = y]), \qquad p_j = e^{a_j - lse},$$
#
# with $[j = y]$ 1 at the target and 0 elsewhere, and $dloss$ the gradient that arrives from above, the **upstream gradient** (or cotangent). For a mean
# over $C$ rows that count, each row's is $1/C$; and when somebody calls `(loss / 8).backward()`, as gradient accumulation does, it is $1/(8C)$.
#
# **Count.** $da$ is as large as the logits. For N = 8192, V = 128256 in bf16, how large is that? Each element of $da$ depends on *its own*
# logit and on one number a row: once $lse$ is known, `da[n, j]` can be stored where `a[n, j]` was loaded, and the second array is not needed.

# %%
N, V = 8192, 128256
print(f"logits: {N * V * 2 / 2**30:.2f} GiB, so logits and a gradient of their own: {2 * N * V * 2 / 2**30:.2f} GiB")

# %% [markdown]
# What could go wrong within a program? The target's logit $a_y$ must be read before its place is written. In a kernel that makes loss *and*
# gradient in one launch, many threads write the row while others may still be about to read $a_y$. The library loads `a_y` first, and has
# a `tl.debug_barrier()` ("wait until all threads of this program are here") before the first store. The interpreter cannot show this race:
# its programs and threads run in order.
#
# ### Exercise 7.3
#
# **Specification.** `gradient_(logits: [N, V], target: [N], lse: [N], dloss: [N], ignore_index) -> logits`: the gradient, in the memory of the logits. Rows that
# do not count become 0, also where their logits are NaN. Nothing beyond a row may be written: logits may be a slice of a wider array.


# %%
@triton.jit
def gradient_kernel(a_ptr, y_ptr, lse_ptr, dloss_ptr, stride, V, ignore_index, BLOCK: tl.constexpr):
    pass  # your code here: one program a row; load a block, store its gradient at the same place


def gradient_(logits, target, lse, dloss, ignore_index):
    raise NotImplementedError  # remove this line when the kernel is written
    N, V = logits.shape
    gradient_kernel[(N,)](logits, target, lse, dloss, logits.stride(0), V, ignore_index, BLOCK=64)
    return logits


course.check("7.3", gradient_)

# %% [markdown]
# The library's second half of the kernel. `scale` is the upstream gradient over the divisor of the mean, read from memory: the host never needs
# to know either. `tl.where(legal, scale, nan)` makes a target that is no word loud instead of wrong. The walk goes *backwards* (`home - i`):
# what the first walk read last is still in the L2 cache. The target's block comes last, and its element is `expm1(x)`, $p_y - 1$ without
# the digits that 1 would swallow. `.cs` tells the cache that nobody reads the stored gradient soon. Weights, smoothing, z-loss and caps have
# names of their own here; for the plain loss `mass` is 1, so `factor` is `scale`, `pull`, `whole` and `share` are 0, and `bend` is None.
# `_gradient` loads a block and returns `exp(a − top − rest) · factor`.

# %%
show_lines(_loss_kernel._loss_rows_kernel.fn, "if grad_ptr is not None", "tl.store(g_at + col")

# %% [markdown]
# ## Donation: who else reads the logits?
#
# Overwriting an input is safe only if nobody reads it afterwards. To **donate** a tensor is to promise that. PyTorch has a guard: each tensor
# counts its in-place changes in `_version`, autograd notes the count when it saves a tensor for a backward, and compares it later. But
# only PyTorch's own operations count. A kernel gets an address. Predict what the last two lines print:


# %%
def turn_(logits, target, count):
    """Losses `[N]`; the logits become the gradient of their sum over `count`. The library's kernel, in place."""
    loss, stats = logits.new_empty(len(logits)), logits.new_empty(len(logits), 2)
    _loss_kernel.kernel_rows(logits.detach(), target, -100, stats=stats, loss=loss, grad=logits.detach(), divisor=count)
    return loss


target = torch.tensor([1, 5, -100, 0], device=DEVICE)
leaf = torch.randn(4, 6, device=DEVICE, requires_grad=True)
true = torch.autograd.grad((leaf * 1.0).square().mean(), leaf)[0]

logits = leaf * 1.0
neighbour = logits.square().mean()  # some other loss on the same logits: its backward is 2 · logits / 24
turn_(logits, target, (target != -100).sum())
got = torch.autograd.grad(neighbour, leaf)[0]
print("version after the kernel:", logits._version)
print("the neighbour's gradient is", "right" if torch.allclose(got, true) else "wrong, and nothing was said")

# %% [markdown]
# The neighbour's backward read gradients for logits. `torch.autograd.graph.increment_version(logits)` is how a kernel's author tells autograd what it
# could not see. Then the same program ends with PyTorch's error, which is what it deserves.
#
# Who keeps logits for a backward? It depends on the operation that *made* them and on those that *read* them:

# %%
x, w = torch.randn(4, 8, device=DEVICE), torch.randn(6, 8, device=DEVICE, requires_grad=True)
makers = {
    "x @ w.T": lambda: x @ w.T,  # its backward reads x and w
    "(x @ w.T) / 0.7": lambda: (x @ w.T) / 0.7,  # reads the number
    "30 tanh(x @ w.T / 30)": lambda: 30 * torch.tanh(x @ w.T / 30),  # tanh reads its result, but 30 · makes new memory
    "tanh(x @ w.T)": lambda: torch.tanh(x @ w.T),  # reads its result: these logits
    "exp(x @ w.T)": lambda: torch.exp(x @ w.T),  # the same
}
for name, make in makers.items():
    plain = torch.autograd.grad(liger_fn.cross_entropy(make(), target), w)[0]
    try:
        given = torch.autograd.grad(liger_fn.cross_entropy(make(), target, donate=True), w)[0]
        print(f"{name:<24} donated: {'the same gradient' if torch.allclose(given, plain, rtol=1e-4, atol=1e-6) else 'WRONG'}")
    except RuntimeError as error:
        print(f"{name:<24} donated: refused, {str(error)[41:100]} …")

# %% [markdown]
# What the counter does not see even then: readers that autograd knows nothing of. `logits.argmax(-1)` for an accuracy *after* the loss reads
# gradients, and gets plausible indices. So donation is off by default here, and `return_aux=True` returns accuracy, entropy and log-probabilities
# from the same pass, before anything is overwritten.
#
# ### Exercise 7.4
#
# The forward makes the gradient of the mean loss; the upstream gradient is known in the backward only. It is a factor, so the backward multiplies.
# Two traps: the factor is not always 1; and a backward may run twice over one graph (`retain_graph=True`), so what forward made must
# survive the first. Scaling it in place by a kernel gives the second backward a factor too many, in silence.
#
# **Specification.** `mean_loss(logits: [N, V], target: [N]) -> loss: []`, the mean over the targets that are not −100 (0 if there is none), by an
# `autograd.Function` that calls `turn_` from above in its forward. No copy of the logits; whoever kept them must get PyTorch's error.


# %%
class Donated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        raise NotImplementedError  # your code here

    @staticmethod
    def backward(ctx, dloss):
        raise NotImplementedError  # your code here; no gradient for the target: None


def mean_loss(logits, target):
    return Donated.apply(logits, target)


course.check("7.4", mean_loss)

# %% [markdown]
# The library's backward. Its own argument `donate` says that the graph is not kept: nobody will read what forward made again, so the product may
# be in place after all. `_scale_kernel` then does nothing when the factor is 1, which `loss.backward()` sends: it looks on the device, where the
# factor is, so that the host need not wait.

# %%
show_lines(liger_fn.cross_entropy.pairs["triton"].bwd.func, "if res.donate", "return (out,)")
course.show_source("_scale.py", "_scale_kernel")

# %% [markdown]
# ## How many passes
#
# Count the bytes at the least, for forward and backward, in arrays of the logits' size ($2NV$ bytes in bf16). Without donation: the forward
# reads the logits; the backward reads them again and writes the gradient. With donation: the logits are read twice, but a row of
# 257 KB (bf16) is still in the L2 cache the second time. What is the ratio? Plain PyTorch: the logits are widened to fp32, log-softmax writes
# another such array, and the backward reads and writes more.

# %%
array = 2 * N * V


def prepare(make_loss):
    def ready():
        big = torch.randn(N, V, device="cuda", dtype=torch.bfloat16).requires_grad_()
        words = torch.randint(V, (N,), device="cuda")
        return lambda: torch.autograd.grad(make_loss(big, words), big)

    return ready


rows = [
    ("plain PyTorch", course.timed("7 cross_entropy plain", prepare(lambda a, y: F.cross_entropy(a.float(), y)), bytes=3 * array)),
    ("liger_fn", course.timed("7 cross_entropy", prepare(lambda a, y: liger_fn.cross_entropy(a, y)), bytes=3 * array)),
    (
        "liger_fn, donated",
        course.timed("7 cross_entropy donated", prepare(lambda a, y: liger_fn.cross_entropy(a, y, donate=True)), bytes=2 * array),
    ),
]
print(course.table(rows))

# %% [markdown]
# GB/s here are the *least* bytes over the time, so a function that moves more shows a lower rate.
#
# ## Summary
#
# - Pairs $(m, s)$ of parts of a row merge by an associative ⊕, so threads, blocks, tiles and GPUs may merge them in any order.
# - One pass suffices for the loss; with $lse$, each element of the gradient depends on its own logit, so it can take its place.
# - $lse - a_y$ loses the digits of a small loss; $\mathrm{log1p}$ of the others keeps them.
# - A kernel's write is invisible to autograd. Who overwrites an input must be told that nobody reads it, and must say so: `increment_version`.
# - A gradient made in forward is multiplied by the upstream gradient in backward, into new memory unless the graph is done with.
#
# Next, lesson 8: the logits themselves are the problem. They need never exist.
