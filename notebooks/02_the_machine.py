# %% [markdown]
# # 2. The machine
#
# At the end you can count the bytes and FLOPs of a function, place it on a roofline, and say how fast it could be before you write it. You
# need lesson 1, and no Triton: the one kernel here is explained in lesson 3. 20 minutes.

# %%
import course  # before triton
import torch
import triton
import triton.language as tl
from course.lessons.lesson02 import COUNTS, product_work

from tests.bench import results, table
from tests.bench.peers import EAGER, OURS

_ = torch.manual_seed(0)

# %% [markdown]
# ## 1. Where numbers are
#
# A GPU is many small processors around one large memory. An H100 has 132 of them, called **multiprocessors**. A multiprocessor computes only on
# what is in its **registers**. Numbers come there from the large memory, **HBM** (what `nvidia-smi` shows), through two caches: **L2**, which all
# multiprocessors share, and each one's own **L1**, part of which a kernel can use by hand: **shared memory**. The H100 SXM:
#
# | level | size | rate | source |
# |---|---|---|---|
# | registers | 132 × 256 KiB | feed the arithmetic: 989 TFLOP/s of dense bf16 products | white paper; data sheet |
# | L1 and shared memory | 132 × 256 KiB | 132 × 128 bytes a clock | white paper; programming guide: 32 banks of 4 bytes |
# | L2 | 50 MB | not published: we measure it | white paper |
# | HBM | 80 GB | 3.35 TB/s | data sheet |
#
# (NVIDIA: *H100 Tensor Core GPU* data sheet; *H100 Tensor Core GPU Architecture* white paper, 2022; *CUDA C++ Programming Guide*. The data sheet
# prints 1,979 TFLOP/s for bf16 with a footnote, "with sparsity": half of the factors must be zeros. Dense is half of that.)
#
# **Picture.** What holds how much. Predict: can all registers, or L2, hold one activation `[16384, 4096]` in bf16?

# %%
PROCESSORS, COPY_SHEET, PRODUCT_SHEET = 132, 3350.0, 989.0  # GB/s and TFLOP/s of the data sheet
sizes = {
    "registers, all": PROCESSORS * 256 * 2**10,
    "L1 + shared, all": PROCESSORS * 256 * 2**10,
    "L2": 50e6,
    "one activation": 16384 * 4096 * 2,
    "HBM": 80e9,
}
fig, ax = course.figure(8, 2.4)
ax.barh(list(sizes), list(sizes.values()), color=[course.PALETTE[3 if "activation" in name else 1] for name in sizes])
for name, size in sizes.items():
    ax.text(size * 1.15, name, f"{size / 1e6:,.0f} MB", va="center", fontsize=9)
ax.invert_yaxis()
ax.set(xscale="log", xlim=(1e7, 5e11), xlabel="bytes", title="what holds how much, H100")
fig

# %% [markdown]
# Neither. A training step has hundreds of such activations, so between two kernels each goes to HBM and comes back. What does HBM cost,
# beside L2? The kernel below reads 2 GiB in all, from an array that may be smaller: then it reads the same numbers again. Each program takes blocks
# that lie far apart, so that its own L1 helps little. Predict the curve: where does it fall?


# %%
@triton.jit
def read_kernel(x_ptr, sum_ptr, BLOCKS, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(ROUNDS):
        block = ((program + i * 2087) % BLOCKS).to(tl.int64)
        total += tl.load(x_ptr + block * BLOCK + tl.arange(0, BLOCK))
    tl.store(sum_ptr + program, tl.sum(total, 0))


def read(x, programs, rounds, block):
    """The sum of each program's blocks of x."""
    sums = torch.empty(programs, device=x.device)
    read_kernel[(programs,)](x, sums, x.numel() // block, ROUNDS=rounds, BLOCK=block, num_warps=8)
    return sums


small = torch.randn(8 * 16, device=course.DEVICE)
expected = [sum(float(small.view(8, 16)[(p + i * 2087) % 8].sum()) for i in range(3)) for p in range(4)]
print("right?", torch.allclose(read(small, 4, 3, 16).cpu(), torch.tensor(expected), atol=1e-4))


def prepare_read(mib):
    def prepare():
        x = torch.ones(mib * 2**18, device="cuda")
        return lambda: read(x, 2048, 64, 4096)

    return prepare


MIB = (4, 8, 16, 32, 64, 128, 512, 2048)
reads = {m: course.timed(f"2 read 2 GiB from an array of {m} MiB", prepare_read(m), bytes=2**31) for m in MIB}
fig, ax = course.figure(8, 2.8)
ax.plot(MIB, [reads[m].gb_per_s for m in MIB], "o-", color=course.PALETTE[1])
ax.axhline(COPY_SHEET, color=course.INK, linestyle="--", linewidth=0.9)
ax.axvline(50e6 / 2**20, color=course.INK, linestyle=":", linewidth=0.9)
ax.set(
    xscale="log",
    xlabel="array, MiB (dotted: the size of L2)",
    ylabel="GB/s (dashed: HBM's data sheet)",
    ylim=(0, None),
    title="reading again",
)
ax.set_xticks(MIB, [str(m) for m in MIB])
ax.minorticks_off()
fig

# %% [markdown]
# Read two things off the curve: how many times as fast as HBM the cache is, and how large an array may be to profit from it. L2 helps those who
# come back soon to something small. So the plan of every kernel in this library is the same: read each array from HBM once, do all that can
# be done in registers, and write once.
#
# ## 2. Counting bytes
#
# **Formula.** A function of arrays `[N, H]` with $b$ bytes a number (its dtype: 4 for fp32, 2 for bf16) that reads each input once and writes each output once moves
#
# $$bytes = b \cdot N H \cdot (\text{arrays read} + \text{arrays written}).$$
#
# No implementation does with less: the **least bytes**. A forward reads its inputs and writes its outputs. A backward reads each gradient that
# arrives and what it needs of the forward's arrays, and writes a gradient for each input.
#
# **Picture.** An example: relu², $y = \max(x, 0)^2$ and $dx = dy \cdot 2 \max(x, 0)$. The right side of the picture is what plain PyTorch does: one kernel for each
# operation, each with arrays of its own. How many arrays are on each side? Count, then look.

# %%
fused = {"forward": ["x", "→ y"], "backward": ["dy", "x", "→ dx"]}
plain = {"forward": ["x", "→ a", "a", "→ y"], "backward": ["dy", "a", "→ da", "da", "a", "→ dx"]}  # a = relu(x), then a²
fig, axes = course.figure(9, 1.9, columns=2, sharey=True)
for ax, (title, passes) in zip(axes, {"one kernel a pass": fused, "one kernel an operation": plain}.items(), strict=True):
    for name, arrays in passes.items():
        for n, array in enumerate(arrays):
            ax.barh(name, 0.96, left=n, color=course.PALETTE[0 if "→" in array else 1])
            ax.text(n + 0.48, name, array, ha="center", va="center", color="white", fontsize=9)
    ax.set(title=f"{title}: {sum(map(len, passes.values()))} arrays", xlim=(0, 6), xlabel="arrays through HBM (blue: read, red: written)")
axes[0].invert_yaxis()
fig

# %% [markdown]
# ### Exercise 2.1
#
# **Specification.** `least_bytes(op, N, H, size) -> (forward, backward)`, with `size` bytes a number. Weights and statistics of rows are small: leave them
# out. The ops, with what goes in → what comes out:
#
# - `"rms_norm"`: x → y. The backward needs dy and x.
# - `"swiglu"`: gate, up → y. The backward needs dy, gate and up.
# - `"add_rms_norm"`: x, residual → sum, y, with sum = x + residual and y = rms_norm(sum). Both results go on into the model, so the gradients of both arrive: dy and dsum. The
#   backward needs sum. (What is the gradient of x, what that of residual?)
# - `"cross_entropy"`: logits → one loss a row, which is small, and so is its gradient. The backward needs the logits.


# %%
def least_bytes(op, N, H, size):
    raise NotImplementedError  # your code here


course.check("2.1", least_bytes)

# %% [markdown]
# The library counts the same way: `passes` of a function are its arrays, of the forward, and of forward and backward together. Every time in
# `docs/benchmarks.md` is shown as a multiple of the floor that follows from them.

# %%
course.show_source("bench/table.py", "least_bytes", "least_flops", package="tests")
for bench in table.ALL:
    if bench.op in COUNTS:
        print(f"{bench.op:<16} forward {bench.passes[0]}, forward and backward {bench.passes[1]}")

# %% [markdown]
# Line by line: the `2 *` in `least_bytes` is bf16; `elements` is $N H$ (of rope, another product of sizes); `products` counts matrix products, of $2$ FLOPs for each
# multiplication with its addition.
#
# ## 3. Counting FLOPs
#
# **Formula.** A **FLOP** is one operation on floating-point numbers. We count +, −, ·, /, exp and max as one each; a sum over a row of $H$ is one + for
# each number; what happens once a row (a root, a division by $H$) is not counted. Per number, relu² has a max and a · in its forward: 2 FLOPs; and max, · 2, · dy in
# its backward: 3.
#
# **Intensity** is FLOPs for each byte moved. Forward of relu² in bf16: 2 FLOPs for 4 bytes.
#
# ### Exercise 2.2
#
# **Specification.** `flops_each(op) -> (forward, backward)`: FLOPs for each number of the array, exactly as these formulas compute. The backward has only what
# it reads (exercise 2.1) and one number a row ($r$, or $lse$); anything else of the forward is computed again.
#
# - `"rms_norm"`: $r = 1/\sqrt{\mathrm{mean}(x \cdot x) + \epsilon}$, $\;y = x \cdot r \cdot w$. Backward: $\hat x = x \cdot r$, $\;g = dy \cdot w$, $\;c = \mathrm{mean}(g \cdot \hat x)$,
#   $\;dx = (g - \hat x \cdot c) \cdot r$, $\;dw = \sum_{rows} dy \cdot \hat x$.
# - `"swiglu"`: $\sigma = 1/(1 + \exp(-gate))$ (the sign is free), $\;a = gate \cdot \sigma$, $\;y = a \cdot up$. Backward: $dup = dy \cdot a$,
#   $\;dgate = dy \cdot up \cdot (\sigma + a \cdot (1 - \sigma))$.
# - `"cross_entropy"`: $m = \max_j a_j$, $\;s = \sum_j \exp(a_j - m)$, and the rest once a row. Backward: $da_j = \exp(a_j - lse) \cdot dloss$, less $dloss$ at the target.


# %%
def flops_each(op):
    raise NotImplementedError  # your code here


course.check("2.2", flops_each)

# %% [markdown]
# ## Products
#
# **Formula.** $C = AB$ with $A: [a, b]$, $B: [b, c]$ has $ac$ dot products of $b$ multiplications and $b$ additions: $2abc$ FLOPs. Both factors have a gradient,
# $dA = dC\,B^\top$ and $dB = A^\top dC$: two more products of as many FLOPs, which read $dC$, and each the other factor.
#
# **Picture.** The intensity of a square product of size $n$ is $2n^3$ FLOPs over $3 \cdot 2 n^2$ bytes: it grows with $n$, where that of an elementwise function stays.
# One row times a matrix stays, too: at 1, as the norm. (The dotted ridge is explained below.)

# %%
n = [2**i for i in range(4, 15)]
fig, ax = course.figure(8, 2.8)
for each, colour, name in (
    ([f / b for f, b in (product_work("matmul", s, s, s) for s in n)], 0, "product n × n × n"),
    ([f / b for f, b in (product_work("matmul", 1, s, s) for s in n)], 3, "one row times n × n"),
    ([COUNTS["rms_norm"].flops[0] / 2 / COUNTS["rms_norm"].arrays(0)] * len(n), 1, "rms_norm of n columns"),
):
    ax.plot(n, each, "--" if colour == 1 else "o-", color=course.PALETTE[colour], label=name)
ax.axhline(PRODUCT_SHEET * 1e3 / COPY_SHEET, color=course.INK, linestyle=":", linewidth=0.9)
ax.set(xscale="log", yscale="log", xlabel="n", ylabel="FLOPs a byte", title="intensity (dotted: the ridge of an H100)")
ax.legend(fontsize=8)
fig

# %% [markdown]
# ### Exercise 2.3
#
# **Specification.** `products(op, a, b, c) -> (flops, bytes)`, in bf16.
#
# - `"matmul"`: the forward `[a, b] [b, c] -> [a, c]`.
# - `"matmul with gradients"`: that, and the gradients of both factors. Forward and backward are separate: what both need is read twice.
# - `"linear_cross_entropy"`: the head of a language model, x `[a, b]` times a weight `[b, c]` and the loss of these logits, with the gradients of x and weight.
#   Count its three products alone. Its logits `[a, c]` and their gradient need not be in memory at all (lesson 8 shows how), and least bytes means least.


# %%
def products(op, a, b, c):
    raise NotImplementedError  # your code here


course.check("2.3", products)

# %% [markdown]
# ## 4. The roofline
#
# **Formula.** A function of intensity $I$ (FLOPs a byte) on a machine that moves $\beta$ bytes and computes $\pi$ FLOPs a second reaches at most
#
# $$\min(\pi,\; \beta I) \text{ FLOP/s}, \qquad \text{and takes at least} \qquad \max\Bigl(\frac{bytes}{\beta},\; \frac{FLOPs}{\pi}\Bigr) \text{ seconds}.$$
#
# Left of the **ridge** $I = \pi / \beta$ memory decides, right of it arithmetic. What is it for an H100 by its data sheet? A data sheet says what wires and clocks could
# do. What a program gets is measured, by the two things that do nothing else: a copy, and a large product.

# %%
COPIED = 2**28  # numbers of bf16: 512 MiB


def copy():
    a, b = torch.empty(2, COPIED, dtype=torch.bfloat16, device="cuda")
    return lambda: b.copy_(a)


def square():
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    return lambda: a @ b


copied = course.timed("2 copy of 512 MiB", copy, bytes=4 * COPIED)
multiplied = course.timed("2 product of 8192", square, flops=2 * 8192**3)
print(f"copy:    {copied}: {copied.gb_per_s / COPY_SHEET:.0%} of the data sheet")
print(f"product: {multiplied}: {multiplied.tflop_per_s / PRODUCT_SHEET:.0%} of the data sheet")
print(
    f"ridge: {PRODUCT_SHEET * 1e3 / COPY_SHEET:.0f} by the data sheet, {multiplied.tflop_per_s * 1e3 / copied.gb_per_s:.0f} as measured, FLOPs a byte"
)

# %% [markdown]
# ### Exercise 2.4
#
# **Specification.** `floor_us(bytes, flops, bandwidth, compute) -> float`: the least time in µs. Bandwidth in GB/s (10⁹ bytes), compute in TFLOP/s (10¹² FLOPs).


# %%
def floor_us(bytes, flops, bandwidth, compute):
    raise NotImplementedError  # your code here


course.check("2.4", floor_us)

# %% [markdown]
# **Picture.** This library's functions, forward and backward, on the roofline of the H100 that `docs/benchmarks.md` was measured on: bytes and FLOPs as counted above, times from the committed
# measurements. Dots are `liger_fn`, crosses the same function in eager PyTorch (each operation a kernel). Predict: which of them can be
# near the flat roof?

# %%
runs = [results.load(path) for path in sorted(results.FOLDER.glob("*.json"))]
limits = next(run.limits for run in runs if "copy_gbs" in run.limits)
SHAPES = {"rms_norm": (8192, 4096), "add_rms_norm": (8192, 4096), "swiglu": (8192, 14336), "relu_squared": (8192, 14336)}
SHAPES |= {"cross_entropy": (8192, 128256), "linear_cross_entropy": (16384, 2048, 32000)}


def work(op, sizes):
    """(FLOPs, bytes) of forward and backward, in bf16."""
    if op == "linear_cross_entropy":
        return product_work(op, *sizes)
    count, elements = COUNTS[op], sizes[0] * sizes[1]
    return sum(count.flops) * elements, 2 * (count.arrays(0) + count.arrays(1)) * elements


took = {}  # (op, provider) → µs
for run in runs:
    for row in run.rows:
        if row.op in SHAPES and row.shape == "x".join(map(str, SHAPES[row.op])) and row.mode == table.BOTH and row.us:
            took[row.op, row.provider] = row.us
points = {}
for op, sizes in SHAPES.items():
    flops, moved = work(op, sizes)
    points[op] = [(flops / moved, flops / took[op, who] / 1e6) for who in (OURS, EAGER)]
fig, ax = course.figure(9, 4.2)
course.roofline(
    ax, {" " * n: both[0] for n, both in enumerate(points.values())}, bandwidth=limits["copy_gbs"], compute=limits["matmul_tflops"]
)
for n, (op, (ours, eager)) in enumerate(points.items()):
    ax.plot(*ours, "o", color=course.PALETTE[n], label=op)
    ax.plot(*eager, "x", color=course.PALETTE[n])
ax.legend(fontsize=8, loc="upper left")
ax.set_title("forward and backward; dots: liger_fn, crosses: eager PyTorch")
fig

# %% [markdown]
# Only the head, which has products, stands right of the ridge. The others cannot pass the slope, whatever their arithmetic costs: a norm can be perfect and
# reach a two-hundredth of what the arithmetic could. So counting FLOPs exactly matters little here (twice as many move a point along the slope), and
# counting bytes is everything. The same points as a question of distance: how many times its floor does each take?

# %%
fig, ax = course.figure(8.5, 2.8)
for shift, who, colour in ((-0.2, OURS, 0), (0.2, EAGER, 7)):
    over = []
    for op, sizes in SHAPES.items():
        flops, moved = work(op, sizes)
        floor = max(moved / limits["copy_gbs"] / 1e3, flops / limits["matmul_tflops"] / 1e6)
        over.append(took[op, who] / floor)
    ax.bar([i + shift for i in range(len(SHAPES))], over, 0.4, color=course.PALETTE[colour], label=who)
    for i, value in enumerate(over):
        ax.text(i + shift, value + 0.15, f"{value:.1f}", ha="center", fontsize=8)
ax.axhline(1, color=course.INK, linestyle="--", linewidth=0.9)
ax.set_xticks(range(len(SHAPES)), SHAPES, fontsize=9)
ax.set(ylabel="time ÷ floor", ylim=(0, 18), title="how far from the floor (dashed: 1)")
ax.legend()
fig

# %% [markdown]
# Where the eager bar is high, a fused kernel has much to win, and it is known how much before a line of it is written. Where it is near 1, as it is
# for a single product, leave the work to PyTorch.
#
# ## Summary
#
# - Activations do not fit on the chip: between kernels each goes through HBM. L2 helps only those who come back soon.
# - Least bytes: each input read once, each output written once; backwards have the gradients that arrive, and one for each input.
# - The floor is the longer of bytes over bandwidth and FLOPs over compute. Both rates are measured, not read from a data sheet.
# - Left of the ridge, fuse: bytes are all that counts. Right of it, leave the work to the matrix units.
#
# Next, lesson 3: the first kernels.
