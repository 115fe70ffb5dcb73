# %% [markdown]
# # 8. Linear cross entropy: from 12 GiB to a quarter of one
#
# At the end you can say where the memory of a language model's head goes, compute its loss and gradients in chunks that never hold all the
# logits, choose the size of a chunk from two numbers of a GPU, and measure what the sum of a gradient over chunks costs in digits. You
# need lesson 7. 25 minutes.
#
# The **head** is the last layer: it multiplies each token's hidden state, H numbers, with one row of weights for each of V words.

# %%
import inspect
import weakref

import course  # before triton
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import liger_fn
from liger_fn import _head, _loss_kernel

_ = torch.manual_seed(0)
DEVICE = course.DEVICE
N, H, V = 8192, 4096, 128256  # tokens, hidden size, vocabulary: one batch of Llama 3 8B

# %% [markdown]
# ## Where the memory goes
#
# **Formula.** With hidden states $x$ `[N, H]`, weights $w$ `[V, H]`, and $g$ the gradient of the logits, from lesson 7:
#
# $$a = x\,w^T, \qquad loss = \tfrac1C \textstyle\sum_n (lse_n - a_{n y_n}), \qquad g = \tfrac1C\,(p - \text{onehot}(y)), \qquad dx = g\,w, \qquad dw = g^T x.$$
#
# $x$ takes 64 MiB in bf16, $w$ and $dw$ 1002 MiB each. The logits $a$ are `[N, V]`. They are nobody's result.
#
# **Count first.** PyTorch runs `F.cross_entropy((x @ w.T).float(), y)` like this: the product makes $a$ in bf16; `.float()` a copy in fp32; log-softmax writes
# its result in fp32, which its backward will read, and then nobody needs the copy. In the backward, the loss's gradient of the
# log-softmax is made in fp32, as large again; then log-softmax's backward reads both and writes the gradient of its input, in fp32. At
# that moment, how many arrays of N · V numbers exist? All else is small beside them. And with chunks of `rows` rows, of which only one
# exists at a time, in bf16, and lesson 7's gradient in place?
#
# ### Exercise 8.1
#
# **Specification.** `peaks(N: int, V: int, rows: int) -> (eager, chunked)`: bytes of arrays of logits' shape at the peak, for PyTorch and for chunks.


# %%
def peaks(N, V, rows):
    raise NotImplementedError  # your code here


course.check("8.1", peaks)

# %% [markdown]
# **Picture.** No need to believe the count. A *meta* tensor has a shape and a dtype but no memory; PyTorch runs every operation on it in name
# only. The class below is told of each operation, and adds and subtracts the bytes that its results would take. So a laptop can run the head
# at full size:


# %%
class Live(TorchDispatchMode):
    """Bytes that exist after each operation, without the inputs."""

    def __init__(self, *inputs):
        super().__init__()
        self.now, self.history, self.known = 0, [], {t.untyped_storage()._cdata for t in inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (s := t.untyped_storage())._cdata not in self.known:
                self.known.add(s._cdata)
                self.now += s.nbytes()
                weakref.finalize(s, self.freed, s._cdata, s.nbytes())
        self.history.append((str(function).split(".")[1], self.now / 2**20))
        return out

    def freed(self, which, size):
        self.known.discard(which)
        self.now -= size


def in_chunks(x, w, rows):
    """The operations of a chunked head, but for the kernel that turns logits into their gradient in place: it makes no tensor."""
    dx, dw = torch.empty_like(x), torch.empty_like(w)
    buffer = x.new_empty(rows, len(w))  # one for all chunks: `a = x[at] @ w.T` would hold two, the old until the new is there
    for start in range(0, len(x), rows):
        at = slice(start, start + rows)
        a = torch.mm(x[at], w.T, out=buffer)
        torch.mm(a, w, out=dx[at])
        dw.addmm_(a.T, x[at], beta=1 if start else 0)
    return dx, dw


x, w = (torch.empty(s, H, dtype=torch.bfloat16, device="meta", requires_grad=True) for s in (N, V))
y = torch.empty(N, dtype=torch.int64, device="meta")
with Live(x, w, y) as eager:
    F.cross_entropy((x @ w.T).float(), y).backward()
with Live(x, w, y) as chunked, torch.no_grad():
    made = in_chunks(x, w, 1024)

own = (N + V) * H * 2 / 2**20  # dx and dw
fig, axes = course.figure(9, 3.3, columns=2, sharey=True)
for ax, live, title in ((axes[0], eager, "all logits at once"), (axes[1], chunked, "8 chunks of 1024 rows")):
    sizes = [mib / 1024 for _, mib in live.history]
    ax.fill_between(range(len(sizes)), sizes, step="mid", color=course.PALETTE[1], alpha=0.8)
    ax.axhline(own / 1024, color=course.INK, linewidth=0.8, linestyle=":")
    ax.set(title=f"{title}: at most {max(sizes):.2f} GiB", xlabel="operation, in order", xticks=[], ylim=(0, 13.5))
axes[0].set(ylabel="GiB beside x, w, y")
for i, (name, mib) in enumerate(eager.history):
    if name in ("_to_copy", "_log_softmax", "_log_softmax_backward_data"):
        axes[0].annotate(name, (i, mib / 1024), fontsize=7.5, ha="center", xytext=(0, 3), textcoords="offset points")
axes[1].annotate("dotted: dx and dw, the results", (0.5, own / 1024 + 0.6), fontsize=8)
print(f"chunks: {max(m for _, m in chunked.history):.0f} MiB, of which dx and dw are {own:.0f} and the logits {1024 * V * 2 / 2**20:.0f}")
fig

# %% [markdown]
# Nearly all that chunks hold is their result. The logits, 12 GiB with what PyTorch makes of them, are a quarter of a GiB.
#
# ## A chunk: one product, one kernel, two products
#
# Chunks cut the *tokens*. A token's loss needs all words but no other token, so each chunk's losses are final. $dx$ of a chunk's rows is final,
# too. $dw$ is a sum over chunks.
#
# Who makes $g$? Autograd would call the backward after the forward has dropped the chunk's logits, and would have to make them again: a
# fourth product. But a scalar loss has one upstream gradient for all rows, a factor, and $dx$, $dw$ are linear in it. So the forward makes
# the gradients for a factor of 1 while the logits are at hand, and the backward multiplies: lesson 7's donation, with a buffer of our own that
# nobody else can read. (With a loss *per token* each row has a factor of its own, known in the backward only. $dx$ could be scaled by rows
# then. Could $dw$? It is a sum over rows, each already in it with a factor of 1. So then the logits are made twice.)
#
# ### Exercise 8.2
#
# The kernel of a chunk: lesson 7's two kernels in one launch. One program a row walks it twice, first for $m$ and $s$, then for the
# gradient, which it stores in place. Predict the bug: what would `a_y` be, if it were loaded after the second walk?
#
# **Specification.** `turn(logits: [R, V], target: [R], count: []) -> losses: [R]`, fp32. The logits, contiguous, fp32 or bf16 and finite, become
# $(p - \text{onehot}) / count$. `count` is a tensor, the number of targets that count *in all chunks*. Targets of −100: loss 0, gradient 0.


# %%
@triton.jit
def turn_kernel(a_ptr, y_ptr, count_ptr, loss_ptr, V, ignore_index, BLOCK: tl.constexpr):
    pass  # your code here: scale = 1.0 / tl.load(count_ptr).to(tl.float32); then a_y, and two walks


def turn(logits, target, count):
    raise NotImplementedError  # remove this line when the kernel is written
    R, V = logits.shape
    loss = torch.empty(R, device=logits.device)
    turn_kernel[(R,)](logits, target, count, loss, V, -100, BLOCK=64)
    return loss


course.check("8.2", turn)

# %% [markdown]
# ### Exercise 8.3
#
# From here on, `turn_rows` is the library's kernel (lesson 7 read it), which does what 8.2 asks for.
#
# **Specification.** `head(x: [N, H], w: [V, H], target: [N], rows: int) -> (loss: [], dx: [N, H], dw: [V, H])`: the mean over the targets that are not −100, 0 if there is
# none. `rows` need not divide N. No tensor may be larger than a chunk's logits, `rows` · V, than x or than w.


# %%
def turn_rows(logits, target, count):
    loss, stats = torch.empty(len(logits), device=logits.device), torch.empty(len(logits), 2, device=logits.device)
    _loss_kernel.kernel_rows(logits, target, -100, stats=stats, loss=loss, grad=logits, divisor=count)
    return loss


def head(x, w, target, rows):
    raise NotImplementedError  # your code here


course.check("8.3", head)

# %% [markdown]
# **Why `count` is that of all chunks.** Say 16 tokens, of which the first 7 are a prompt and do not count, in two chunks of 8. A mean of the two
# chunks' means gives the one target of the first chunk as much weight as the eight of the second together:

# %%
counted = torch.arange(16) >= 7
true = counted / counted.sum()
of_means = torch.cat([c / c.sum() / 2 for c in counted.float().split(8)])
fig, ax = course.figure(7.5, 2.5)
ax.bar(torch.arange(16) - 0.2, of_means, width=0.4, color=course.PALETTE[0], label="mean of the chunks' means")
ax.bar(torch.arange(16) + 0.2, true, width=0.4, color=course.PALETTE[1], label="mean of all that count")
ax.axvline(7.5, color=course.INK, linewidth=0.8, linestyle=":")
ax.set(xlabel="token (dotted: between the chunks)", ylabel="weight in the loss", xticks=range(16))
ax.legend()
fig

# %% [markdown]
# The same fault returns one level up, when gradients are accumulated over several batches, each with a mean of its own. There the divisor is
# the number of targets of *all* batches; the library takes it as `num_items`.
#
# The library's loop, and where the sum is made. `Kept` are the rows whose target counts: the others are not multiplied at all, which halves the
# work where half the tokens are prompts. `turn` is the caller's: cross entropy here, but also distillation and log-probabilities use this
# loop. `gradients.add` is `dw += gᵀ x`, with `beta=0` in the first chunk instead of a buffer of zeros.

# %%
course.show_source("_head.py", "by_tokens", "product")
print(inspect.getsource(_head.Gradients.add))

# %% [markdown]
# Is it the same as all logits at once? In fp32, on a small head with a third of the targets ignored and 7 rows a chunk:

# %%
x, w = torch.randn(50, 16, device=DEVICE), torch.randn(90, 16, device=DEVICE)
y = torch.randint(90, (50,), device=DEVICE)
y[::3] = -100


def gradients(fn, dtype=torch.float32):
    leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
    return torch.autograd.grad(fn(*leaves) / 3, leaves)  # an upstream gradient of 1/3


truth = gradients(lambda a, b: F.cross_entropy(a @ b.T, y), torch.float64)
ours = gradients(lambda a, b: liger_fn.linear_cross_entropy(a, b, y, memory_budget=7 * 90 * 4))
plain = gradients(lambda a, b: F.cross_entropy(a @ b.T, y))
for name, t, o, p in zip(("dx", "dw"), truth, ours, plain, strict=True):
    print(f"{name}: error in chunks {float((o - t).norm() / t.norm()):.1e}, of plain PyTorch {float((p - t).norm() / t.norm()):.1e}")

# %% [markdown]
# ## How large a chunk
#
# Why 1024 rows, and not 64? The smaller the chunk, the less memory; but each chunk reads all of $w$ for each of its products.
#
# **Formula.** The **arithmetic intensity** of a computation is its FLOPs over the bytes that it must move. A product of `[R, H]` and `[H, V]` has
# $2RHV$ FLOPs and, in bf16, moves $2(RH + HV + RV)$ bytes. While R is small beside H and V, that is
#
# $$\frac{2RHV}{2HV} = R \quad \text{FLOPs for each byte.}$$
#
# A GPU has an intensity of its own: an H100 does about 700 TFLOP/s in large bf16 products and moves about 3000 GB/s, so 233 FLOPs in the time
# of a byte. Below that many rows, a chunk's products wait for $w$. The third product, $dw \mathrel{+}= g^T x$, also reads and writes $dw$ in each chunk,
# $4HV$ bytes. Predict its threshold: twice as many rows, or half as many?
#
# **Picture.** Each product takes the longer of its arithmetic and its traffic. For N = 8192, by rows in a chunk:

# %%
TFLOPS, GB_PER_S = 700.0, 3000.0
sizes = [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]


def intensities(R):
    """Of the products that make logits (dx has the same) and that add to dw."""
    return 2 * R * H * V / (2 * (R * H + H * V + R * V)), 2 * R * H * V / (2 * (R * H + 2 * H * V + R * V))


def model_ms(R):
    """All chunks: three products, each as slow as its arithmetic or its traffic."""
    each = 2 * R * H * V
    return N / R * sum(max(each / TFLOPS / 1e9, each / i / GB_PER_S / 1e6) for i in (*intensities(R)[:1] * 2, intensities(R)[1]))


def prepare(fn):
    def ready():
        a, b = (torch.randn(s, H, device="cuda", dtype=torch.bfloat16).mul_(H**-0.5).requires_grad_() for s in (N, V))
        words = torch.randint(V, (N,), device="cuda")
        return lambda: torch.autograd.grad(fn(a, b, words), (a, b))

    return ready


def chunks_of(R):
    return lambda a, b, t: liger_fn.linear_cross_entropy(a, b, t, accumulate="weight", memory_budget=R * V * 2)


flops = 6 * N * H * V
times = {R: course.timed(f"8 head {R} rows", prepare(chunks_of(R)), flops=flops) for R in sizes[1:-1]}
fig, axes = course.figure(9, 3.2, columns=2)
for line, label, colour in zip(
    zip(*map(intensities, sizes), strict=True), ("logits, dx", "dw, read and written"), course.PALETTE, strict=False
):
    axes[0].plot(sizes, line, "o-", color=colour, label=label)
axes[0].axhline(TFLOPS / GB_PER_S * 1e3, color=course.INK, linewidth=0.8, linestyle=":")
axes[0].set(xscale="log", yscale="log", xlabel="rows in a chunk", ylabel="FLOPs for each byte", title="dotted: what the GPU can do")
axes[0].legend()
axes[1].plot(sizes, [model_ms(R) for R in sizes], color=course.PALETTE[7], label="model: the products alone")
axes[1].plot(
    list(times),
    [t.us / 1e3 for t in times.values()],
    "o",
    color=course.PALETTE[0],
    label=f"liger_fn, {next(iter(times.values())).machine[:22]}",
)
axes[1].set(xscale="log", yscale="log", xlabel="rows in a chunk", ylabel="ms", title="time of all chunks")
axes[1].legend(fontsize=8)
for ax in axes:
    ax.set_xticks(sizes[::2], sizes[::2])
    ax.minorticks_off()
axes[1].set_yticks([25, 50, 100, 200, 400], [25, 50, 100, 200, 400])
fig

# %% [markdown]
# Twice as many: an addition moves $dw$ twice. From about 512 rows on, the model is flat: more rows cost memory and win nothing. Real products need some
# more, for a GPU works on tiles of 128 × 256 and has 132 multiprocessors to fill. The library takes the rows from a budget of bytes:

# %%
course.show_source("_head.py", "default_budget", "settle")
rows = [(f"chunks of {R} rows", t) for R, t in times.items()]
rows += [
    ("all logits, plain PyTorch", course.timed("8 head plain", prepare(lambda a, b, t: F.cross_entropy((a @ b.T).float(), t)), flops=flops))
]
print(course.table(rows, floor=flops / TFLOPS / 1e6))

# %% [markdown]
# ## What a sum over chunks costs in digits
#
# A product sums its terms in fp32 and rounds once, at the end. A sum over chunks in bf16 rounds at *each* chunk: $dw$ is read, widened, added to,
# and rounded to 8 bits again.
#
# **Formula.** Measure errors in units of half a spacing, $u = 2^{-8}$ for bf16. One rounding of random numbers then errs by about 0.41 on average
# (root mean square). If the partial sum after chunk $k$ of $C$ has the size $\sqrt{k/C}$ of the whole, as sums of random terms do, the roundings add up,
# as independent errors, to
#
# $$\frac{\lVert error \rVert}{u\,\lVert dw \rVert} \approx \sqrt{0.41^2 \textstyle\sum_{k=1}^{C} \frac kC + e_0^2} \approx \sqrt{0.41^2\,\frac{C + 1}{2} + e_0^2},$$
#
# with $e_0$ what bf16 logits and gradients err by before any sum. Predict: how many chunks until the error is four times that of one?
#
# **Picture.** The library's three ways, against fp64, for 2048 tokens:

# %%
n, h, v = 2048, 64, 256
x = torch.randn(n, h, device=DEVICE).bfloat16()
w = (torch.randn(v, h, device=DEVICE) * h**-0.5).bfloat16()
y = torch.randint(v // 4, (n,), device=DEVICE)
x64, w64 = x.double(), w.double().requires_grad_()
(truth,) = torch.autograd.grad(F.cross_entropy(x64 @ w64.T, y), w64)


def roundings(how, chunks):
    """The error of dw, in units of u ‖dw‖."""
    leaf = w.clone().requires_grad_()
    with liger_fn.use_backend("reference"):  # plain PyTorch: the same chunks, without the interpreter's waits
        loss = liger_fn.linear_cross_entropy(x, leaf, y, accumulate=how, memory_budget=n // chunks * v * 2)
        (dw,) = torch.autograd.grad(loss, leaf)
    return float((dw.double() - truth).norm() / truth.norm()) * 2**8


counts = [1, 2, 4, 8, 16, 32, 64, 128, 256]
errors = {how: [roundings(how, c) for c in counts] for how in ("weight", "fp32", "exact")}
first = errors["weight"][0] ** 2 - 0.41**2
fig, ax = course.figure(7.5, 3.4)
ax.plot(counts, [(0.41**2 * (c + 1) / 2 + first) ** 0.5 for c in counts], color=course.PALETTE[7], linestyle="--", label="the formula")
for (how, line), mark, colour in zip(errors.items(), ("o-", "s-", "x:"), course.PALETTE, strict=False):
    ax.plot(counts, line, mark, color=colour, label=f'accumulate="{how}"')
ax.axvline(_head.FEW, color=course.INK, linewidth=0.8, linestyle=":")
ax.annotate('"auto" leaves "weight" here', (_head.FEW, 0.45), fontsize=8, xytext=(4, -2), textcoords="offset points", va="top")
ax.set(
    xscale="log", yscale="log", xlabel="chunks", ylabel="error of dw, in roundings", ylim=(0.3, 8), xticks=counts, yticks=[0.5, 1, 2, 4, 8]
)
ax.set_xticklabels(counts)
ax.set_yticklabels([0.5, 1, 2, 4, 8])
ax.minorticks_off()
ax.legend()
fig

# %% [markdown]
# An error of half a rounding is the best that a bf16 result can have. `"fp32"` keeps it at any number of chunks: it adds into a buffer of
# fp32 and rounds once. That buffer is $4VH$ bytes, 2 GiB for this head: as much as all its logits in bf16. `"exact"` needs no buffer. It cuts the
# *vocabulary*: for some classes at a time, all tokens' logits are made once more, from which $g$ follows as every $lse$ is known by then,
# and one product over all tokens makes those rows of $dw$, summed in fp32 within it and rounded once. The price is a fourth product.
#
# ### Exercise 8.4
#
# **Specification.** `dw_by_classes(x: [N, H], w: [V, H], target: [N], lse: [N], count: [], width: int) -> dw: [V, H]`, in w's dtype. At most `width` classes' logits at a
# time. In a slice that begins at class `first`, which column is the target's, and in which slice is it at all?


# %%
def dw_by_classes(x, w, target, lse, count, width):
    raise NotImplementedError  # your code here


course.check("8.4", dw_by_classes)

# %% [markdown]
# The library's, line by line: `blocks` cuts the tokens as well where even `width` classes of all of them are too many; then, and only then, a slice's sum
# needs a buffer (`slab`), in fp32 and of a slice's size. `make` returns $g$ of some rows and some classes. With `sums`, dx is made from the same
# $g$: a sum over *classes* this time, in fp32, which saves the pass over the tokens that would make it.

# %%
course.show_source("_head.py", "by_classes")

# %% [markdown]
# ## Summary
#
# - The head's memory is arrays of logits, three in fp32 at PyTorch's peak. In chunks, with the gradient in place, it is one chunk in bf16.
# - The gradients of a mean are made in the forward, for an upstream gradient of 1, and only scaled later. The mean's divisor is that of all chunks.
# - A chunk of R rows does R FLOPs for each byte of weights: some hundred rows are needed to keep a GPU busy, and a thousand suffice.
# - A sum over C chunks in bf16 errs by about $0.3 \sqrt{C}$ roundings. Few chunks, an fp32 buffer, or slices of the vocabulary avoid it.
#
# Next, lesson 9: from a function to a model. How kernels are put into a model that somebody else wrote.
