# %% [markdown]
# # 11. Speed
#
# At the end you can take a right kernel to the rate of memory in steps that you measure, and read from its machine code why a step helped. You need
# lessons 2 and 4. 25 minutes.
#
# The kernels are in `course/kernels11.py`. Times are from an H100, or from your GPU if you have one; machine code is compiled here, for an H100,
# without one.

# %%
import course  # before triton
import torch
import triton
from course import kernels11 as k
from course.offline import compiled

_ = torch.manual_seed(0)
DEVICE = course.DEVICE

# %% [markdown]
# ## Step 0: right, and the floor
#
# RMSNorm forward (lesson 4) of `[8192, 4096]` in bf16 must read x and write y: 134 MB. At the rate of a copy, which the H100 reaches at about 3,000
# GB/s, that is 45 µs. Plain PyTorch in fp32 moves: read x, write fp32 x, read it for the squares, read for the product, ... Count: how many times
# 45 µs?
#
# First: are the variants right? On the CPU they run in the interpreter.


# %%
def launch(kernel, x, w, warps=4, block=None, eps=1e-6):
    N, H = x.shape
    y, r = torch.empty(N, H, dtype=x.dtype, device=x.device), torch.empty(N, device=x.device)
    strides = (x.stride(0), x.stride(1)) if kernel is k.strided else (x.stride(0),)
    kernel[(N,)](x, w, y, r, *strides, H, eps, BLOCK=block or triton.next_power_of_2(H), num_warps=warps)
    return y


x, w = torch.randn(5, 300, device=DEVICE), torch.rand(300, device=DEVICE)
truth = x.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + 1e-6) * w.double()
for name, y in (
    ("three_passes", launch(k.three_passes, x, w, block=64)),
    ("one_pass", launch(k.one_pass, x, w)),
    ("strided", launch(k.strided, x, w)),
):
    course.near(name, y, truth, rounding=8)
    print(name, "is right")

# %% [markdown]
# ## The steps
#
# 1. **Fuse**: one kernel, but its block is 256 columns, so it walks the row twice.
# 2. **Hold the row**: a block of 4096, read once.
# 3. **Threads**: a program is `num_warps` × 32 threads. With 4 warps a thread holds 32 numbers of x; with 8 it holds 16. More warps, more loads under way at a time;
#    but a sum over more warps goes through shared memory.
#
# Predict which step gains most.

# %%
N, H = 8192, 4096


def prepare(fn, begin=0):
    def ready():
        a, b = torch.randn(N, H + begin, device="cuda", dtype=torch.bfloat16), torch.ones(H, device="cuda", dtype=torch.bfloat16)
        return lambda: fn(a[:, begin:], b)

    return ready


def plain(x, w):
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


moved = 2 * 2 * N * H
steps = {
    "plain PyTorch": plain,
    "fused, 256 columns at a time": lambda a, b: launch(k.three_passes, a, b, block=256),
    "the row at once, 1 warp": lambda a, b: launch(k.one_pass, a, b, warps=1),
    "the row at once, 4 warps": lambda a, b: launch(k.one_pass, a, b, warps=4),
    "the row at once, 8 warps": lambda a, b: launch(k.one_pass, a, b, warps=8),
    "the row at once, 16 warps": lambda a, b: launch(k.one_pass, a, b, warps=16),
}
times = {name: course.timed(f"11 forward {name}", prepare(fn), bytes=moved) for name, fn in steps.items()}
odd = "8 warps, of a slice x[:, 1:]"  # its rows begin where 16 does not divide
times[odd] = course.timed(f"11 forward {odd}", prepare(steps["the row at once, 8 warps"], begin=1), bytes=moved)
copied = course.timed("11 copy of 64 MiB", prepare(lambda a, b: a.clone()), bytes=moved)
print(course.table([*times.items(), ("a copy", copied)]))

# %%
fig, ax = course.figure(8, 3)
ax.barh(list(times), [t.us for t in times.values()], color=course.PALETTE[1])
ax.axvline(copied.us, color=course.INK, linestyle="--", linewidth=0.9)
ax.invert_yaxis()
ax.set(xlabel="µs (dashed: a copy of the same array)", title=f"RMSNorm forward, {N} × {H}, bf16")
fig

# %% [markdown]
# ## Reading machine code
#
# Triton compiles to **PTX**, NVIDIA's portable assembly; an assembler makes machine code of it, in which it stands how many registers a thread takes. Both run
# without a GPU. What to look for:
#
# - `ld.global.v4.b32`: one instruction that loads 128 bits, 8 numbers of bf16. Narrow loads need more instructions for the same bytes.
# - **registers**: a multiprocessor has 65,536. With 64 a thread, 1024 threads are at work; with 255, 256 are, and fewer loads under way.
# - **spills**: registers that had no room, and went to memory.

# %%
found = {
    "one_pass, 1 warp": compiled("one_pass", block=4096, warps=1),
    "one_pass, 4 warps": compiled("one_pass", block=4096, warps=4),
    "one_pass, 8 warps": compiled("one_pass", block=4096, warps=8),
    "the same, nothing divisible by 16": compiled("one_pass", block=4096, warps=8, divisible=False),
    "strided": compiled("strided", block=4096, warps=8),
}
for name, use in found.items():
    loads = ", ".join(f"{n} of {bits} bits" for bits, n in sorted(use["loads"].items(), key=lambda kv: -int(kv[0])))
    print(f"{name:<36} {use['registers']:4} registers, {use['spilled']:5} bytes spilled; loads: {loads}")
print("\nfirst loads of one_pass with 8 warps:")
print("\n".join([line for line in found["one_pass, 8 warps"]["ptx"].splitlines() if "ld.global" in line][:4]))

# %%
fig, axes = course.figure(9, 2.8, columns=2, sharey=True)
axes[0].barh(list(found), [use["registers"] for use in found.values()], color=course.PALETTE[1])
axes[0].set(xlabel="registers a thread (at most 255)")
axes[1].barh(list(found), [sum(use["loads"].values()) for use in found.values()], color=course.PALETTE[3])
axes[1].set(xlabel="load instructions a thread")
axes[0].invert_yaxis()
fig

# %% [markdown]
# Two things made loads narrow: a stride of the columns that is unknown, so that neighbours may not be neighbours; and a row length of which the
# compiler does not know that 16 divides it, since then the mask may end within a vector, and a row may begin between two. At a launch Triton looks at
# each argument, and compiles a kernel of its own for multiples of 16, and for ones: a column stride of 1 is known there. A slice `x[:, 1:]` loses
# the first; the last bar above shows its price.
#
# ### Exercise 11.1
#
# **Specification.** `threads_at_work(registers, warps) -> int`: how many threads a multiprocessor of 65,536 registers holds of programs with `warps` warps of 32 threads, each thread with
# `registers`. Whole programs only, and at most 2048 threads.


# %%
def threads_at_work(registers, warps):
    raise NotImplementedError  # your code here


course.check("11.1", threads_at_work)

# %% [markdown]
# ### Exercise 11.2
#
# **Specification.** `bytes_in_flight(H, warps, registers) -> int`: bytes of x in bf16 that a multiprocessor's programs load at once when each holds one row of H, with your count of threads.
# (By Little's law the H100 needs about 3 TB/s × 0.7 µs / 132 ≈ 16 KB of loads under way in each multiprocessor to keep memory busy.)


# %%
def bytes_in_flight(H, warps, registers):
    raise NotImplementedError  # your code here


course.check("11.2", bytes_in_flight)

# %% [markdown]
# ## The backward's sum: atomics or shares
#
# dw (lesson 4) of 8192 rows: each row's share added by `atomic_add`, or P programs with a share each and a second launch.


# %%
def dw_atomic(dy, x, r):
    dw = torch.zeros(x.shape[1], device=x.device)
    k.dw_atomic[(len(x),)](dy, x, r, dw, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=8)
    return dw


def dw_shares(dy, x, r, P):
    shares = torch.empty(P, x.shape[1], device=x.device)
    k.dw_shares[(P,)](dy, x, r, shares, len(x), x.shape[1], P, BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=8)
    return shares.sum(0)


dy, x, r = torch.randn(40, 50, device=DEVICE), torch.randn(40, 50, device=DEVICE), torch.rand(40, device=DEVICE)
truth = (dy.double() * x.double() * r.double()[:, None]).sum(0)
course.near("dw by atomics", dw_atomic(dy, x, r), truth, rounding=32)
course.near("dw by shares", dw_shares(dy, x, r, 8), truth, rounding=32)


def prepare_dw(fn):
    def ready():
        a, b = torch.randn(2, N, H, device="cuda").bfloat16()
        c = torch.rand(N, device="cuda")
        return lambda: fn(a, b, c)

    return ready


sums = {"atomics": course.timed("11 dw atomics", prepare_dw(dw_atomic), bytes=moved)}
for P in (33, 132, 264, 528, 2048):
    sums[f"{P} shares"] = course.timed(f"11 dw {P} shares", prepare_dw(lambda a, b, c, P=P: dw_shares(a, b, c, P)), bytes=moved)
print(course.table(list(sums.items())))

# %% [markdown]
# An H100 has 132 multiprocessors: fewer programs leave some idle; many more make the second launch longer. The library's numbers come from such
# a measurement, and stand in the code as functions of the shape:

# %%
course.show_source("_norm_rows.py", "Tile", "tile")

# %% [markdown]
# ### Exercise 11.3
#
# **Specification.** `warps_for(H) -> int`: the warps for a row of H in `one_pass`: a power of two from 1 to 32, so that a thread holds 8 to 32 numbers of the block (a block is the next power
# of two from H), where that can be. Below 256 columns that is one warp with fewer.


# %%
def warps_for(H):
    raise NotImplementedError  # your code here


course.check("11.3", warps_for)

# %% [markdown]
# ## Summary
#
# - Read once: what is held in registers is not read again.
# - Wide loads: contiguous columns, and sizes that 16 divides.
# - Enough under way: threads, registers and programs decide how many bytes are in flight.
# - Each step is measured. What did not gain is taken out again.
#
# Next, lesson 12: when not to write a kernel.
