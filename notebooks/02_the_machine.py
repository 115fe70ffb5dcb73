# %% [markdown]
# # 2. The machine
#
# At the end you can count the bytes and FLOPs of a function, place it on a roofline, and say how fast it could be before you write it. You
# need lesson 1. 20 minutes.

# %%
import course  # before triton
import torch

# %% [markdown]
# ## Where numbers are
#
# A GPU computes on what is in **registers**. Numbers come there from **HBM** (the large memory: what `nvidia-smi` shows), through the **L2**
# cache, which all multiprocessors share, and a multiprocessor's own L1 and **shared memory**. Of an H100 SXM, from its data sheet and
# architecture paper (NVIDIA, 2022): 132 multiprocessors, each with 256 KiB of registers and 256 KiB of L1 and shared memory; 50 MB of L2; 80 GB
# of HBM at 3.35 TB/s; 989 TFLOP/s of dense bf16 products.
#
# **Picture.** Each step outward holds a hundred times more. Predict: how large is everything on the chip, beside one activation of
# `[16384, 4096]` in bf16?

# %%
sizes = {
    "registers, all": 132 * 256 * 2**10,
    "L1 + shared, all": 132 * 256 * 2**10,
    "L2": 50e6,
    "one activation": 16384 * 4096 * 2,
    "HBM": 80e9,
}
fig, ax = course.figure(8, 2.4)
ax.barh(list(sizes), list(sizes.values()), color=[course.PALETTE[3 if "activation" in name else 1] for name in sizes])
ax.invert_yaxis()
ax.set(xscale="log", xlabel="bytes", title="what holds how much, H100")
fig

# %% [markdown]
# So an activation does not stay on the chip between two kernels: each kernel reads it from HBM, and writes it back. Time is bytes moved over
# the rate of memory, or FLOPs over the rate of arithmetic, whichever is more.
#
# ## Counting bytes
#
# **Formula.** With $N$ rows of $H$ numbers of $b$ bytes, a function that reads each input once and writes each output once moves
#
# $$bytes = b \sum_{arrays} \text{elements}.$$
#
# That is the least: no implementation can do with less. For elementwise functions of $k$ arrays: $k\,N H\,b$. A backward has more: it reads $dy$, and what
# the forward read, and writes a gradient for each input.
#
# ### Exercise 2.1
#
# **Specification.** `least_bytes(op, N, H) -> (forward, backward)` in bf16 (2 bytes), for "rms_norm" (x → y; weights and statistics are small: leave them out),
# "swiglu" (gate, up → y) and "cross_entropy" (logits `[N, H]` → a loss a row; the loss is small; its backward may read a gradient made before, so count the forward as
# one reading, the backward as one reading and one writing).


# %%
def least_bytes(op, N, H):
    raise NotImplementedError  # your code here


course.check("2.1", least_bytes)

# %% [markdown]
# ## Counting FLOPs
#
# **Formula.** $C = AB$ with $A: [M, K]$, $B: [K, N]$ has $MN$ dot products of $K$ multiplications and $K$ additions: $2MNK$ FLOPs. Its backward is two
# products, $dA = dC\,B^T$ and $dB = A^T dC$, of as many FLOPs each.
#
# **Intensity** is FLOPs for each byte moved. An elementwise function has less than 10. A product of $8192^3$ has $2 \cdot 8192^3 / (3 \cdot 8192^2 \cdot 2) = 2731$.
#
# ### Exercise 2.2
#
# **Specification.** `product(M, K, N) -> (flops, bytes, intensity)` of the forward $C = AB$ in bf16, each array touched once.


# %%
def product(M, K, N):
    raise NotImplementedError  # your code here


course.check("2.2", product)

# %% [markdown]
# ## The roofline
#
# **Formula.** A function of intensity $I$ on a machine of bandwidth $\beta$ and arithmetic rate $\pi$ reaches at most
#
# $$\min(\pi,\; \beta I) \text{ FLOP/s}.$$
#
# Left of the **ridge** $\pi / \beta$ memory decides, right of it arithmetic. What is $\pi/\beta$ for an H100? Data sheets flatter: measured rates are
# those of a copy and of a large product.

# %%
n = 2**28


def copy():
    a, b = torch.empty(2, n, dtype=torch.bfloat16, device="cuda")
    return lambda: b.copy_(a)


def square():
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    return lambda: a @ b


copied = course.timed("2 copy of 512 MiB", copy, bytes=4 * n)
multiplied = course.timed("2 product of 8192", square, flops=2 * 8192**3)
print("copy:   ", copied)
print("product:", multiplied)

# %% [markdown]
# **Picture.** This library's functions on the roofline of the machine that `docs/benchmarks.md` was measured on. Each point is at the
# FLOPs that the function needs and at the rate that the committed measurement found. A norm has about 4 FLOPs for each number it moves; it can
# be perfect and reach a hundredth of the arithmetic. What a fused kernel gains is bytes.

# %%
from tests.bench import results, table
from tests.bench.peers import EAGER, OURS

runs = [results.load(path) for path in sorted(results.FOLDER.glob("*.json"))]
limits = next(run.limits for run in runs if "copy_gbs" in run.limits)
FLOPS = {"rms_norm": 12, "swiglu": 18, "softmax": 10, "relu_squared": 4}  # for each element, forward and backward, about
points = {}
for run in runs:
    for row in run.rows:
        if row.mode != table.BOTH or row.provider not in (OURS, EAGER) or not row.us:
            continue
        if row.op in FLOPS and row.shape in ("8192x4096", "8192x14336"):
            passes = next(b for b in table.ALL if b.op == row.op).passes[1]
            count = FLOPS[row.op] * row.bytes / 2 / passes
            points[f"{row.op}, {row.provider}"] = (count / row.bytes, count / row.us / 1e6)
        elif row.op == "linear_cross_entropy" and row.flops:
            N, H, V = (int(v) for v in row.shape.split("x"))
            moved = 2 * (2 * N * H + 2 * V * H)  # x, weight and their gradients: the logits need not exist
            points[f"{row.op}, {row.provider}"] = (row.flops / moved, row.flops / row.us / 1e6)
fig, ax = course.figure(8.5, 4)
ours = {k.split(",")[0]: v for k, v in points.items() if k.endswith(OURS)}
course.roofline(ax, ours, bandwidth=limits["copy_gbs"], compute=limits["matmul_tflops"])
for name, (x, y) in points.items():
    if name.endswith(EAGER):
        ax.plot([x], [y], "x", color=course.PALETTE[7])
ax.set_title("points: liger_fn; grey crosses: eager PyTorch, the same function")
fig

# %% [markdown]
# The points lie on the slope: memory's rate is all used. The crosses lie below by as much as eager code moves more than it must. Only the head
# has products, and stands to the right.
#
# ### Exercise 2.3
#
# **Specification.** `floor_us(bytes, flops, bandwidth, compute) -> float`: the least time in µs. Bandwidth in GB/s (10⁹), compute in TFLOP/s (10¹²).


# %%
def floor_us(bytes, flops, bandwidth, compute):
    raise NotImplementedError  # your code here


course.check("2.3", floor_us)

# %% [markdown]
# The library counts the same way. In `tests/bench/table.py` each function has `passes`, the arrays of forward, and of forward and backward
# together; every figure of the benchmarks is shown as a multiple of this floor.

# %%
course.show_source("bench/table.py", "least_bytes", "least_flops", package="tests")
for bench in table.ALL:
    if bench.passes[1]:
        print(f"{bench.op:<16} forward {bench.passes[0]} arrays, with backward {bench.passes[1]}")

# %% [markdown]
# ## Summary
#
# - Activations do not fit on the chip: each kernel moves them through memory.
# - Count the least bytes and FLOPs; the slower of the two is the floor.
# - Left of the ridge, fuse. Right of it, leave the work to the matrix units.
#
# Next, lesson 3: the first kernels.
