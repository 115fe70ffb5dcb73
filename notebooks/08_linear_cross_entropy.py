# %% [markdown]
# # 8. A head without its logits
#
# At the end you can compute a language model's loss and all its gradients without ever holding the logits, choose a chunk's size, and measure
# what the sums' precision costs. You need lesson 7. 25 minutes.

# %%
import course  # before triton
import torch
import torch.nn.functional as F

import liger_fn

torch.manual_seed(0)
DEVICE = course.DEVICE

# %% [markdown]
# ## Where the memory goes
#
# The **head** multiplies hidden states $x: [N, H]$ with a weight $W: [V, H]$ to logits $z = x W^T: [N, V]$, and the loss follows. For
# $N = 8192$, $H = 4096$, $V = 128256$ in bf16, count before you run: x, W, and z; then z in fp32 for the softmax, and the gradient of each.

# %%
N, H, V, GiB = 8192, 4096, 128256, 2**30
parts = {
    "x": 2 * N * H,
    "W": 2 * V * H,
    "logits, bf16": 2 * N * V,
    "logits, fp32": 4 * N * V,
    "their log-softmax, fp32": 4 * N * V,
    "gradient of that, fp32": 4 * N * V,
    "gradient of logits, bf16": 2 * N * V,
}
fig, ax = course.figure(8, 2.8)
ax.barh(list(parts), [b / GiB for b in parts.values()], color=[course.PALETTE[1]] * 2 + [course.PALETTE[0]] * 5)
ax.invert_yaxis()
ax.set(xlabel="GiB", title="red: what need not exist")
fig

# %% [markdown]
# ## Chunks of tokens
#
# **Formula.** The loss of a token depends on its own row of z alone. So take C tokens at a time: make their logits $z_c = x_c W^T$, their loss, and
# at once their gradient $dz_c = softmax(z_c) - onehot(t_c)$; from it
#
# $$dx_c = dz_c W, \qquad dW \mathrel{+}= dz_c^T x_c;$$
#
# then forget $z_c$. The gradients are there when the *forward* ends; the backward only multiplies them by what comes from above. Memory:
# $C \cdot V$ in place of $N \cdot V$, several times over. Products: the same three.
#
# **Picture.** What exists at a time: one band of the logits.

# %%
fig, ax = course.figure(7, 2.2)
for c in range(8):
    now = c == 2
    ax.barh(c, 10, height=0.9, color=course.PALETTE[0] if now else "none", edgecolor=course.PALETTE[7], linestyle="-" if now else ":")
    ax.text(
        5,
        c,
        "chunk 2: logits, loss, gradient" if now else ("done: only dx and its share of dW" if c < 2 else ""),
        ha="center",
        va="center",
        fontsize=8,
    )
ax.invert_yaxis()
ax.set(yticks=range(8), ylabel="chunk of tokens", xticks=[], xlabel="vocabulary")
fig

# %% [markdown]
# ### Exercise 8.1
#
# **Specification.** `head(x: [N, H], W: [V, H], target: [N], chunk: int) -> (loss, dx: [N, H], dW: [V, H])`: loss is the mean over targets that are not −100; the gradients are
# those of that mean. Never make more than `chunk` rows of logits. N need not divide by chunk. All ignored: loss 0, gradients 0. Use `torch.logsumexp`.


# %%
def head(x, W, target, chunk):
    raise NotImplementedError  # your code here


course.check("8.1", head)

# %% [markdown]
# The mean is where it goes wrong: a mean over each chunk, then over the chunks, weighs a token in a chunk with few targets more. The number
# of targets that count is that of all tokens, and across devices and accumulated batches that of all of those (`num_items`).
#
# ## How large a chunk?
#
# A matrix product of $[C, H]$ with $[H, V]$ does $2CHV$ FLOPs and must at the least read $W$: $2HV$ bytes. So it does $C$ FLOPs for a
# byte. An H100 does about 785 TFLOP/s in the time it moves 3 TB, some 260 FLOPs a byte. Below $C \approx 260$ the product waits for
# $W$; and at each chunk dW is read and written once more.
#
# ### Exercise 8.2
#
# **Specification.** `cost(N, H, V, C) -> (flops, bytes)` of all three products over all chunks, in bf16: each product reads its two factors and writes its
# result once; the third also reads dW, which it adds to, but in the first chunk. Chunks are whole: C divides N. Integers.


# %%
def cost(N, H, V, C):
    raise NotImplementedError  # your code here


course.check("8.2", cost)


# %%
def model(C, bandwidth=3.0e12, rate=785e12):
    """Time in ms by the slower of memory and arithmetic; your `cost`, written out."""
    chunks = N // C
    flops = 6 * N * H * V
    moved = 2 * chunks * (3 * C * H + 3 * C * V + 4 * V * H) - 2 * V * H
    return max(flops / rate, moved / bandwidth) * 1e3


sizes = [2**i for i in range(4, 14)]
fig, axes = course.figure(8, 2.8, columns=2)
axes[0].plot(sizes, [model(C) for C in sizes], "o-")
axes[0].set(xscale="log", yscale="log", xlabel="tokens in a chunk", ylabel="ms, by the model", title="time")
axes[1].plot(sizes, [2 * C * V / 2**20 for C in sizes], "o-", color=course.PALETTE[1])
axes[1].set(xscale="log", yscale="log", xlabel="tokens in a chunk", ylabel="MiB of logits", title="memory")
fig

# %% [markdown]
# The curve is flat from a thousand tokens on: there is nothing to gain from more, but memory to lose. The library takes about that many, and
# `memory_budget` says otherwise. Its measured figures, in `docs/results.md`, are 1.10 to 1.25 times the three products alone.
#
# ## What sums cost
#
# dW is a sum over chunks. In bf16, each addition rounds to 8 bits: the more chunks, the more it errs. Against fp64, by the number of chunks:

# %%
n, h, v = 4096, 16, 64
x64, W64 = torch.randn(n, h, dtype=torch.float64), torch.randn(v, h, dtype=torch.float64) * h**-0.5
target = torch.randint(v, (n,))
dz = (torch.softmax(x64 @ W64.T, 1) - F.one_hot(target, v)) / n
truth = dz.T @ x64


def summed(chunks, dtype):
    total = torch.zeros(v, h, dtype=dtype)
    for a, b in zip(dz.chunk(chunks), x64.chunk(chunks), strict=True):
        total = total + (a.T @ b).to(dtype)
    return float((total.double() - truth).norm() / truth.norm())


counts = [2**i for i in range(11)]
fig, ax = course.figure(7, 2.8)
ax.plot(counts, [summed(c, torch.bfloat16) for c in counts], "o-", label="sum in bf16")
ax.plot(counts, [summed(c, torch.float32) for c in counts], "o-", label="sum in fp32")
ax.axhline(2**-9, linestyle="--", linewidth=0.8, color=course.INK)
ax.set(xscale="log", yscale="log", xlabel="chunks", ylabel="error of dW, against fp64", title="dashed: one rounding to bf16")
ax.legend()
fig

# %% [markdown]
# The ways out, each of which `liger_fn.linear_cross_entropy` has as `accumulate=`:
#
# - `"weight"`: sum in W's dtype. Fast; errs with the number of chunks.
# - `"fp32"`: a buffer of $4VH$ bytes.
# - `"exact"`: slices of the vocabulary, each summed in fp32 over all tokens. No such buffer, a fourth product.
# - `"auto"`: the first where few chunks make it as good as plain PyTorch, then the second.
#
# ### Exercise 8.3
#
# **Specification.** `kept_bytes(accumulate, V, H) -> int`: bytes beyond W's bf16 gradient itself that a sum over chunks needs while it is made, for "weight" (the product
# adds to the gradient in place) and for "fp32".


# %%
def kept_bytes(accumulate, V, H):
    raise NotImplementedError  # your code here


course.check("8.3", kept_bytes)

# %% [markdown]
# The library's own: how a chunk is chosen, and the gradient of a chunk's logits, which is a Triton kernel that writes over the logits. That is the
# library's own buffer, so nobody else can read it.

# %%
course.show_source("_head.py", "budget")
course.show_source("_head_kernels.py", "_head_gradient_kernel")

# %%
x = torch.randn(64, 32, device=DEVICE, requires_grad=True)
W = torch.randn(100, 32, device=DEVICE, requires_grad=True)
words = torch.randint(100, (64,), device=DEVICE)
words[::3] = -100
ours = torch.autograd.grad(liger_fn.linear_cross_entropy(x, W, words, memory_budget=16 * 100 * 4), (x, W))
stock = torch.autograd.grad(F.cross_entropy(x @ W.T, words), (x, W))
print("dx, dW as with all logits?", [torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, stock, strict=True)])


def prepare(fn):
    def ready():
        a = torch.randn(N, H, device="cuda", dtype=torch.bfloat16).requires_grad_()
        b = (torch.randn(V, H, device="cuda") * H**-0.5).bfloat16().requires_grad_()
        t = torch.randint(V, (N,), device="cuda")

        def call():
            a.grad = b.grad = None
            fn(a, b, t).backward()

        return call

    return ready


rows = [
    (
        "logits, F.cross_entropy",
        course.timed("8 logits and F.cross_entropy", prepare(lambda a, b, t: F.cross_entropy(a @ b.T, t)), flops=6 * N * H * V),
    ),
    ("linear_cross_entropy", course.timed("8 linear_cross_entropy", prepare(liger_fn.linear_cross_entropy), flops=6 * N * H * V)),
]
print(course.table(rows))

# %% [markdown]
# ## Summary
#
# - A token's loss needs its own logits alone; with the gradient made at once, they are forgotten chunk by chunk.
# - A chunk must be large enough for the product, a thousand tokens; more buys nothing.
# - Sums over many chunks need fp32. Means divide by the targets of all tokens.
#
# Next, lesson 9: into a model that somebody else wrote.
