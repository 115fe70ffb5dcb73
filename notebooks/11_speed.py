# %% [markdown]
# # 11. Speed: from a naive kernel to the rate of memory
#
# At the end you can take a right kernel to the rate of memory in measured steps, read from its machine code why a step helped, and
# choose a block and its threads from what the compiler says they take. You need lessons 2, 3 and 4. 25 minutes.
#
# The subject is RMSNorm, which lesson 4 made right. Times are from an H100, or from your GPU if you have one. Machine code is compiled
# here, for an H100, with no GPU.

# %%
from functools import partial

import course  # before triton
import torch
import triton
import triton.language as tl
from course import kernels11 as k
from course.lessons.lesson11 import chosen
from course.offline import compiled, job

import liger_fn

_ = torch.manual_seed(0)
DEVICE = course.DEVICE
N, H = 8192, 4096  # what is timed: bf16, 64 MiB
FP32 = ("r_ptr", "dw_ptr", "shares_ptr")  # pointers to fp32; the others are to bf16

# %% [markdown]
# ## 1. The floor, and a naive kernel
#
# **Formula.** A function that must read and write $B$ bytes takes at least $B / \beta$, with $\beta$ the rate of memory (lesson 2). RMSNorm's forward reads $x$
# and writes $y$:
#
# $$y_i = x_i \, r \, w_i, \qquad r = \frac{1}{\sqrt{\frac1H \sum_i x_i^2 + \epsilon}}, \qquad B = 2 \cdot 2NH \text{ in bf16}.$$
#
# **Picture.** Bytes through memory for each number of $x$. Plain PyTorch, whose statistics are fp32 (4 bytes), runs one kernel for each of its
# operations. Count first: `h = x.float()`, `h.square()`, `.mean(-1)`, `h * r`, `.to(bfloat16)`, `* w`. How many times the floor?

# %%
plain_pytorch = {"float": 2 + 4, "square": 4 + 4, "mean": 4, "h · r": 4 + 4, "to bf16": 4 + 2, "· w": 2 + 2}
moved = {"plain PyTorch": plain_pytorch, "two walks": {"read x": 2, "again": 2, "write y": 2}, "one pass": {"read x": 2, "write y": 2}}
fig, ax = course.figure(8.5, 2.3)
for name, parts in moved.items():
    left = 0
    for n, (what, size) in enumerate(parts.items()):
        ax.barh(name, size, left=left, color=course.PALETTE[n], edgecolor="white")
        ax.text(left + size / 2, name, what, ha="center", va="center", fontsize=8 if size > 2 else 6, color="white")
        left += size
ax.axvline(4, color=course.INK, linestyle="--", linewidth=0.9)
ax.invert_yaxis()
ax.set(xlabel="bytes read and written for each number (dashed: the floor)", title="what a forward moves")
fig

# %% [markdown]
# 36 bytes, 9 times the floor. One kernel for all of it must be faster. Here is the naive one: its block is small, so that it works for any
# row; it walks the row for the sum of squares, and again for $y$. (`notebooks/course/kernels11.py` holds the kernels of this lesson, `launch`,
# which runs one with a row a program, and what makes the inputs that are timed.)

# %%
course.show_source("course/kernels11.py", "two_walks", package="notebooks")
small, scale = torch.randn(5, 300, device=DEVICE), torch.rand(300, device=DEVICE)
for kernel, block in ((k.two_walks, 64), (k.one_pass, None), (k.hinted, None)):
    name = kernel.fn.__name__
    course.near(name, k.launch(kernel, small, scale, block=block), k.truth(small, scale), rounding=8)
    print(f"{name} is right")

# %% [markdown]
# First right, then fast: a wrong kernel has no speed. Now time them. `BLOCK` is 256: with 4 **warps** (groups of 32 threads that run in
# step), 128 threads, each holds 2 numbers.
#
# Does the second walk cost a third array through memory, 1.5 times the floor? Predict. Between the two walks of a row lie 8 KB, and L2 holds
# 50 MB. To tell the second walk from the small block, the last row of the table has two walks, too, but each loads the row at once.

# %%
times = {}


def step(name, fn, begin=0, columns=H):
    """The time of `fn(x, w)`, where the rows of x begin `begin` elements into wider ones; those of 4096 columns are kept in `times`."""
    time = course.timed(f"11 forward {name}", k.forward_of(fn, N * H // columns, columns, begin), bytes=4 * N * H)
    if columns == H:
        times[name] = time
    return time


copied = course.timed("11 copy of 64 MiB", k.forward_of(lambda x, w: x.clone(), N, H), bytes=4 * N * H)
step("plain PyTorch", k.plain)
step("fused, 256 columns at a time", lambda x, w: k.launch(k.two_walks, x, w, block=256))
step("two walks, 4096 columns at a time", lambda x, w: k.launch(k.two_walks, x, w, block=4096, warps=8))
print(course.table([("a copy", copied), *times.items()], floor=copied.us))

# %% [markdown]
# If the last row is near the copy, the second walk came from a cache. The row above it then shows what small blocks cost: few bytes asked for
# at once, many times. Sections 2 and 3 make that precise.
#
# ### Exercise 11.1
#
# **Specification.** `one_pass(x: [N, H], w: [H], eps) -> (y: [N, H], r: [N])`; y in x's dtype, r in fp32. Rows of x are `x.stride(0)` apart.
# A program holds its row in one block and loads it once. The check runs your kernel, then compiles it for an H100 and counts what it loads.


# %%
@triton.jit
def one_pass_kernel(x_ptr, w_ptr, y_ptr, r_ptr, stride, H, eps, BLOCK: tl.constexpr):
    pass  # your code here


def one_pass(x, w, eps):
    raise NotImplementedError  # remove this line when the kernel is written
    N, H = x.shape
    y, r = torch.empty(N, H, dtype=x.dtype, device=x.device), torch.empty(N, device=x.device)
    one_pass_kernel[(N,)](x, w, y, r, x.stride(0), H, eps, BLOCK=triton.next_power_of_2(H))
    return y, r


course.check("11.1", one_pass)

# %% [markdown]
# ## 2. Reading machine code
#
# Triton turns a kernel into **PTX**, NVIDIA's portable assembly, and `ptxas` turns that into machine code. Neither needs a GPU, only to know
# which one is meant: an H100 is `sm_90`. But Triton decides at its import whether it interprets or compiles, and without a GPU this course
# interprets. So the compiler runs in a process of its own, with `TRITON_INTERPRET=0`, which gets the kernel's text:

# %%
course.show_source("course/offline.py", "compiled", package="notebooks")
use = compiled(job(k.one_pass, warps=8, fp32=FP32, BLOCK=4096))[0]
print("\n".join(line.strip() for line in use.ptx.splitlines() if "ld.global" in line or "st.global" in line))

# %% [markdown]
# Read the first line. `ld.global` loads from memory, `.v4.b32` four registers of 32 bits: 128 bits, 8 numbers of bf16, the widest load that
# one thread of an H100 has. `@%p1` is the mask: one bit for all 8 numbers. The row needs 4096 / 8 = 512 such loads; 256 threads make 2 each,
# and 2 for the weight.
#
# **Formula.** A thread may load $v$ neighbours at once if the compiler can prove three things: the $v$ addresses follow each other (**contiguity**), $v$
# divides the first (**divisibility**: a load of 16 bytes must begin at a multiple of 16), and the mask is the same for all $v$ (**constancy**).
#
# **Picture.** 8 threads of one warp, 64 numbers. Left: 128 bits a thread, one instruction. Right: 16 bits a thread; coloured is what one
# instruction loads, and hatched is left for 7 more. The number is the thread.

# %%
fig, axes = course.figure(9, 2.5, columns=2)
course.access(axes[0], [range(8 * t, 8 * t + 8) for t in range(8)], 16, "128 bits a thread")
course.access(axes[1], [range(t, 64, 8) for t in range(8)], 16, "16 bits a thread", masked=range(8, 64))
fig

# %% [markdown]
# What does the compiler know? At a launch Triton looks at each integer and address, and compiles a kernel of its own for multiples of 16 (of an
# address: bytes), and for the integer 1. Below are variants that compute the same. Predict which of them keep wide loads:
#
# - `one_pass`, all sizes and addresses multiples of 16;
# - `one_pass`, none of them a multiple of 16;
# - `strided`: columns `col_stride` apart, which at run time is 1, but the compiler was told not to look (`do_not_specialize`);
# - `hidden_mask`: its mask is `col <= H - 1` instead of `col < H`.

# %%
variants = {
    "one_pass": job(k.one_pass, warps=8, fp32=FP32, BLOCK=4096),
    "nothing divisible by 16": job(k.one_pass, warps=8, fp32=FP32, divisible=False, BLOCK=4096),
    "strided": job(k.strided, warps=8, fp32=FP32, BLOCK=4096),
    "hidden_mask": job(k.hidden_mask, warps=8, fp32=FP32, BLOCK=4096),
    "two_walks": job(k.two_walks, warps=4, fp32=FP32, BLOCK=256),
}
found = dict(zip(variants, compiled(*variants.values()), strict=True))
for name, use in found.items():
    loads = ", ".join(f"{n} of {bits} bits" for bits, n in sorted(use.loads.items(), reverse=True))
    print(f"{name:<24} {use.registers:3} registers a thread, loads: {loads}")

# %% [markdown]
# Of the three proofs, "nothing divisible" lacks two: a row may begin anywhere, and the mask may end within 8 numbers. `strided` lacks contiguity of x;
# its weight is still wide. `hidden_mask` lacks constancy alone: the compiler knows what 16 | H says of `col < H`, and nothing of $H - 1$. The same
# mask in other words, and eight times the instructions. (`two_walks` has few loads in its text, and runs them 16 times. Its block gives a thread only
# 2 numbers, so its widest load is 32 bits.)
#
# In a model the second comes from a slice, `x[:, 1:]`: its rows begin 2 bytes off, and lie an odd number apart. H is still 4096, so that only x's
# loads are narrow. Time it beside whole rows:

# %%
step("the row at once, 8 warps", lambda x, w: k.launch(k.one_pass, x, w, warps=8))
step("8 warps, of a slice x[:, 1:]", lambda x, w: k.launch(k.one_pass, x, w, warps=8), begin=1)
print(course.table([("a copy", copied), *list(times.items())[1:]], floor=copied.us))

# %% [markdown]
# ### Exercise 11.2
#
# A kernel is compiled anew for each kind of size that Triton looks at. A library may forbid that for some (`do_not_specialize`) and then has to
# say itself what divides them. `tl.multiple_of(n, 16)` of a plain integer is lost on this compiler; arithmetic is not: it knows that 16
# divides `n // 16 * 16`.
#
# **Specification.** `add_rows(x: [N, H], a: [N, H]) -> s: [N, H]`; rows of x are `x.stride(0)` apart, a and s are contiguous. The kernel below is right
# and slow. Give it wide loads and stores where `EVEN`, which says that 16 divides H and the stride; it must stay right where `EVEN` is false. The
# check compiles both.


# %%
@triton.jit(do_not_specialize=["stride", "H"])
def add_rows_kernel(x_ptr, a_ptr, s_ptr, stride, H, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    # your code here
    x = tl.load(x_ptr + row * stride + col, mask=col < H, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + row * H + col, mask=col < H, other=0.0).to(tl.float32)
    tl.store(s_ptr + row * H + col, (x + a).to(s_ptr.dtype.element_ty), mask=col < H)


def add_rows(x, a):
    raise NotImplementedError  # remove this line when the kernel is changed
    N, H = x.shape
    s = torch.empty_like(a)
    even = H % 16 == 0 and x.stride(0) % 16 == 0
    add_rows_kernel[(N,)](x, a, s, x.stride(0), H, EVEN=even, BLOCK=triton.next_power_of_2(H))
    return s


course.check("11.2", add_rows)

# %% [markdown]
# The library compiles anew for widths and strides, on which the loads depend. It does not for *counts* of rows, which change from batch to
# batch and on which no load's width depends. These names are counts, in every kernel:

# %%
course.show_source("_launch.py", "COUNTS", "jit")

# %% [markdown]
# ## 3. Enough under way
#
# **Formula.** A load takes a time $L$, its **latency**, until its bytes arrive. To receive $\beta$ bytes a second, $\beta L$ bytes must have been asked for and not have arrived
# yet (Little's law). Divided by 132 multiprocessors:
#
# $$\text{bytes under way in each} \ge \beta L / 132.$$
#
# What a multiprocessor has under way is what its programs have asked for. An H100's holds at once, by the tables of NVIDIA's CUDA programming
# guide (compute capability 9.0): 65,536 registers, which a thread gets in eights; 2048 threads; 32 programs; 228 KiB of shared memory, of which
# each program takes 1 KiB more than it asks for. The scarcest decides:
#
# $$programs = \min\Bigl(\Bigl\lfloor\tfrac{65536}{32 \cdot warps \cdot 8 \lceil registers / 8 \rceil}\Bigr\rfloor, \Bigl\lfloor\tfrac{2048}{32 \cdot warps}\Bigr\rfloor, 32, \Bigl\lfloor\tfrac{228 \cdot 1024}{shared + 1024}\Bigr\rfloor\Bigr).$$
#
# $L$ is measured by a chase: each load's address is what the last load brought, so none can start early.

# %%
HOPS = 4096
course.show_source("course/kernels11.py", "chase", package="notebooks")
latency = course.timed("11 chase of 4096 loads", k.chasing(HOPS)).us / HOPS
needed = copied.gb_per_s / 2 * 1e3 * latency / 132  # half of a copy's bytes are read; GB/s · µs = 10³ bytes
print(f"latency {latency:.2f} µs; at the least {needed / 1024:.1f} KiB of loads under way in each multiprocessor")

# %% [markdown]
# That is the least, as if loads were under way all the time. **Picture.** The candidates: `one_pass` with 1 to 32 warps. What does each take?

# %%
WARPS = (1, 2, 4, 8, 16, 32)
uses = dict(zip(WARPS, compiled(*[job(k.one_pass, warps=n, fp32=FP32, BLOCK=4096) for n in WARPS]), strict=True))
wide = dict(zip(WARPS[1:], compiled(*[job(k.one_pass, warps=n, fp32=FP32, BLOCK=16384) for n in WARPS[1:]]), strict=True))
for columns, candidates in ((4096, uses), (16384, wide)):
    print(f"rows of {columns}: warps, numbers a thread, registers a thread, bytes spilled, widest load in bits")
    for n, u in candidates.items():
        print(f"{n:22} {columns // (32 * n):16} {u.registers:18} {u.spilled:14} {max(u.loads):12}")

# %% [markdown]
# Fewer threads hold more numbers each, and take more registers; 255 is the most a thread can have. What does not fit is **spilled**: written to memory and
# read back. With 32 warps a thread has only 4 numbers of a row of 4096, and its loads are half as wide.
#
# ### Exercise 11.3
#
# **Specification.** `worth_timing(uses, held: int, needed: int) -> dict[int, int]`. `uses` maps warps to what the compiler said, with fields `registers`
# (a thread), `spilled` (bytes), `shared` (bytes a program) and `warps`; `held` is how many bytes each program has under way. Return warps → bytes under way on one
# multiprocessor, for those that do not spill and have at least `needed`.


# %%
def worth_timing(uses, held, needed):
    raise NotImplementedError  # your code here


course.check("11.3", worth_timing)

# %% [markdown]
# The check's own count, beside the times; rows of 16384 are a quarter as many, so that both move as much. (With 1 warp those are not tried: 512
# numbers a thread.) At 2 warps a bar is missing on the left; what is its time? At 32 warps, are 16 KiB enough, and 32 KiB?

# %%
fig, axes = course.figure(9, 2.8, columns=2)
for shift, columns, candidates, colour in ((-0.2, 4096, uses, 1), (0.2, 16384, wide, 3)):
    flying = chosen(candidates, held=2 * columns, needed=0)
    at = [WARPS.index(n) + shift for n in candidates]
    names = [f"the row at once, {k.several(n, 'warp')}" + f", of {columns}" * (columns != H) for n in candidates]
    us = [step(name, partial(k.launch, k.one_pass, warps=n), columns=columns).us for name, n in zip(names, candidates, strict=True)]
    axes[0].bar(at, [flying.get(n, 0) / 1024 for n in candidates], 0.4, color=course.PALETTE[colour], label=f"rows of {columns}")
    axes[1].bar(at, us, 0.4, color=course.PALETTE[colour])
axes[0].axhline(needed / 1024, color=course.INK, linestyle="--", linewidth=0.9)
axes[0].set(xlabel="warps", ylabel="KiB", title="under way in a multiprocessor (dashed: the least)")
axes[0].legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
axes[1].axhline(copied.us, color=course.INK, linestyle="--", linewidth=0.9)
axes[1].set(xlabel="warps", ylabel="µs", title="time (dashed: a copy)")
for ax in axes:
    ax.set_xticks(range(len(WARPS)), [str(n) for n in WARPS])
fig

# %% [markdown]
# The least is not enough, since a program's bytes are under way for a part of its life alone: it starts, loads, sums and stores. A count excludes
# what cannot work; a clock decides among the rest. The library's choice of warps is such a rule, with constants found by the clock on an H100: a
# warp holds 512 numbers of rows of 1024 to 8192, and 1024 of others. `rows` is the next step: a row of 128 numbers gives one warp 4 numbers a
# thread, so short rows share a program.

# %%
course.show_source("_norm_rows.py", "Tile", "tile")
short = torch.randn(10, 128, device=DEVICE)
ones = torch.ones(128, device=DEVICE)
course.near("several_rows", k.launch_rows(short, ones, 4, 4), k.truth(short, ones), rounding=8)

shorts = {}
for rows, warps in ((1, 4), (1, 1), (4, 1), (8, 1), (16, 4)):
    name = f"rows of 128, {rows} a program, {k.several(warps, 'warp')}"
    shorts[name] = step(name, partial(k.launch_rows, rows=rows, warps=warps), columns=128)
print(course.table([("a copy", copied), *shorts.items()], floor=copied.us))

# %% [markdown]
# ## 4. Hints, and the whole staircase
#
# A cache cannot know what will be read again. `eviction_policy="evict_first"` says of x: nobody reads it soon. `cache_modifier=".cs"` says the same
# of what is stored. What is left of the cache is for the weight, which every program reads. Below all steps, and the library's forward, which has
# them all: find `ROWS`, the two hints, and the mask in it. (The chart leaves plain PyTorch out, so that the others can be told apart.)

# %%
course.show_source("rms_norm.py", "_rms_norm_fwd_kernel")
step("8 warps, hints", lambda x, w: k.launch(k.hinted, x, w, warps=8))
step("liger_fn.rms_norm", lambda x, w: liger_fn.rms_norm(x, w))
fig, ax = course.figure(8.5, 3.6)
kernels = {name: time for name, time in times.items() if name != "plain PyTorch"}  # it would squeeze the others
ax.barh(list(kernels), [t.us for t in kernels.values()], color=course.PALETTE[1])
ax.axvline(copied.us, color=course.INK, linestyle="--", linewidth=0.9)
ax.invert_yaxis()
ax.set(xlabel="µs (dashed: a copy of the same array)", title=f"RMSNorm forward, {N} × {H}, bf16")
print(course.table([("a copy", copied), *times.items()], floor=copied.us))
fig

# %% [markdown]
# Compare the row with hints and the one without. The weight is 8 KB, and every program reads it, so it hardly leaves the cache in any case. A step
# that gains nothing is a result, too. (In a model, arrays of other kernels share the cache, which this timing cannot show.)
#
# ## 5. The backward: a sum that crosses programs
#
# **Formula** (lesson 4), with $\hat x = x r$ and $g = dy\,w$: $\;dx = r\,(g - \hat x\,\mathrm{mean}(g \hat x))$ and $dw = \sum_{rows} dy\,\hat x$. Least bytes: read dy and x, write dx. Three ways:
#
# - **atomics**: one row a program, and each adds its H numbers to dw in memory. All programs write the same 16 KB, so the adds queue; and their order changes the last bits.
# - **shares**: P programs take turns through the rows; each keeps its dw in registers, writes it once, and a second launch sums $[P, H]$ shares.
# - **shares, rows ahead**: a program with all those registers has few neighbours on its multiprocessor, so little is under way. `num_stages`
#   lets it load the next rows into shared memory while it computes this one.

# %%
course.show_source("course/kernels11.py", "backward_shares", package="notebooks")
dy, x, w = (torch.randn(s, device=DEVICE) for s in ((9, 50), (9, 50), (50,)))
_, residuals = liger_fn.rms_norm.fwd(x.double(), w.double(), eps=0.0)
true = liger_fn.rms_norm.bwd(residuals, dy.double(), needs=(True, True))
for name, fn in {"atomics": k.by_atomics, "shares": lambda *a: k.by_shares(*a, programs=4, stages=3)}.items():
    for which, a, b in zip(("dx", "dw"), fn(dy, x, w, residuals.rstd.float()), true, strict=True):
        course.near(f"{which} by {name}", a, b.cpu(), rounding=16)
    print(f"{name}: dx and dw are right")
for stages, u in zip((1, 3), compiled(*[job(k.backward_shares, warps=8, fp32=FP32, BLOCK=4096, STAGES=s) for s in (1, 3)]), strict=True):
    print(f"shares, {k.several(stages, 'stage')}: {u.registers} registers a thread, {u.shared} bytes of shared memory a program")

# %% [markdown]
# Three stages keep two more rows in shared memory, 16 KB each; with one it only passes numbers from thread to thread.
#
# How many programs? Fewer than 132 leave multiprocessors idle. More make the second launch longer, and more than fit at once run in rounds.
# Count: with the registers printed above, 8 warps and one stage, how many programs has a multiprocessor?

# %%
back = {"atomics": course.timed("11 backward atomics", k.backward_of(k.by_atomics, N, H), bytes=6 * N * H)}
for programs, stages in ((66, 1), (132, 1), (264, 1), (528, 1), (132, 3), (264, 3)):
    name = f"{programs} shares, {k.several(stages, 'stage')}"
    call = partial(k.by_shares, programs=programs, stages=stages)
    back[name] = course.timed(f"11 backward {name}", k.backward_of(call, N, H), bytes=6 * N * H)
back["liger_fn.rms_norm"] = course.timed("11 backward liger_fn", k.library_backward(N, H), bytes=6 * N * H)
floor = copied.us * 6 / 4
fig, ax = course.figure(8.5, 2.8)
ax.barh(list(back), [t.us for t in back.values()], color=course.PALETTE[3])
ax.axvline(floor, color=course.INK, linestyle="--", linewidth=0.9)
ax.invert_yaxis()
ax.set(xlabel="µs (dashed: three arrays at the rate of the copy)", title=f"RMSNorm backward, {N} × {H}, bf16")
print(course.table(list(back.items()), floor=floor))
fig

# %% [markdown]
# Two: up to 128 registers, 65,536 / (256 · 128) = 2. So 264 programs run at once, and 528 in two rounds. The library's constants are again from
# a clock; its stages keep some 64 KB under way in a multiprocessor, more than Little's law asked for at the least (`HELD` is 8192 columns):

# %%
course.show_source("_norm_bwd.py", "STEP", "_tile")

# %% [markdown]
# ## Summary
#
# - Count the floor first. A kernel at the rate of a copy is done.
# - Read once: what is held in registers is not read again.
# - Wide loads need three proofs: contiguous, divisible, a constant mask. Compile and count; no GPU is needed for that.
# - Bytes under way = programs that fit × what each has asked for. Registers, threads and shared memory decide how many fit.
# - Each step is measured against the floor. That one gained nothing is a result, too.
#
# Next, lesson 12: reading figures, and when not to write a kernel.
