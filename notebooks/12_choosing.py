# %% [markdown]
# # 12. Reading figures, and choosing
#
# At the end you can tell whether a benchmark means anything, find where another tool is better, say what a faster kernel is worth to a whole step, and
# write down your choice as rules. You need lessons 2 and 8. 25 minutes.
#
# Every figure here is read from the library's committed measurements, those behind `docs/benchmarks.md`. Nothing is timed in this lesson.

# %%
from functools import reduce

import course  # before triton
import torch
from course.lessons.lesson12 import Device, Kernel, measured

from tests.bench import report, results, table
from tests.bench.peers import COMPILE, EAGER, LIGER, NATIVE, OURS
from tests.bench.training import profile
from tests.bench.training import report as training

# %% [markdown]
# ## 1. Where others win
#
# A **case** is a function, a shape and a pass: `rms_norm`, 8192 × 4096, forward. Two times may be compared only if one run measured both: on another day the GPU is
# warmer or colder, and its clock is another. So `measured` takes each case whole from the last run that has it, and never mixes runs. (`together` groups
# the runs that have one machine and one set of versions; `allowed` are the rows of functions whose tests are green, since a wrong function has no speed.)

# %%
course.show_source("lessons/lesson12.py", "measured", package="notebooks/course")
cases = measured()
for runs in report.together({path.stem: results.load(path) for path in results.FOLDER.glob("*.json")}).values():
    machine = reduce(results.Result.with_later, runs.values()).machine
    print(len(runs), "runs:", ", ".join(f"{name} {version}" for name, version in machine.items() if name not in ("date", "sources")))

# %% [markdown]
# **Picture.** For each function and shape, the time of each other tool over ours: right of the line ours is faster, left of it slower. *native* is PyTorch's
# own function (`F.rms_norm`), *eager* its definition in plain PyTorch. Predict: at which functions does the blue dot, `torch.compile`, lie on the line?

# %%
colours = {EAGER: course.PALETTE[7], COMPILE: course.PALETTE[1], NATIVE: course.PALETTE[2], LIGER: course.PALETTE[3]}
fig, axes = course.figure(10, 5.4, columns=2, sharey=True)
shapes = list(dict.fromkeys(c[:2] for c in cases if c[2] == table.BOTH))
for ax, mode in zip(axes, (table.FORWARD, table.BOTH), strict=True):
    for y, shape in enumerate(shapes):
        rows = cases.get((*shape, mode), {})
        for who, colour in colours.items():
            if OURS in rows and who in rows:
                ax.plot(rows[who].us / rows[OURS].us, y, "o", color=colour, markersize=5, alpha=0.85)
    ax.axvline(1, color=course.INK, linewidth=0.9)
    ax.set(
        xscale="log", xlim=(0.7, 30), title=f"{mode}: their time ÷ ours", xticks=[1, 2, 5, 10, 20], xticklabels=["1", "2", "5", "10", "20"]
    )
    ax.minorticks_off()
    ax.grid(axis="y", alpha=0.25)
axes[0].set_yticks(range(len(shapes)), [" ".join(shape) for shape in shapes], fontsize=7.5)
axes[0].invert_yaxis()
for who, colour in colours.items():
    axes[1].plot([], [], "o", color=colour, label=who)
axes[1].legend(loc="lower right", fontsize=8)
fig

# %% [markdown]
# ### Exercise 12.1
#
# **Specification.** `slower(times: dict[case, dict[tool, µs]], ours: str, margin: float) -> dict[case, (tool, ratio)]`: the cases in which the fastest other tool is faster than
# `ours` by more than `margin` (0.02: 2 %, about what two runs of the same kernel differ by), with its name and ours ÷ theirs. Cases without `ours`, or in which it stands alone,
# are left out. The check then runs it on the committed figures and shows what it found.


# %%
def slower(times, ours, margin):
    raise NotImplementedError  # your code here


course.check("12.1", slower)

# %% [markdown]
# What it finds, and why, said as plainly as the wins:
#
# - **`rms_norm` forward of 65536 × 128**: 16 MiB, which the L2 cache holds. The floor of lesson 2, bytes over the bandwidth of *memory*, is no floor there, and others are
#   better at it.
# - **`layer_norm` and `rms_norm` forward**: liger-kernel is a few percent faster. Ours sums a third time in `layer_norm`, which keeps the digits of a large mean: a price that was chosen.
# - **The head at a vocabulary of 32,000**: `torch.compile` keeps all logits, and they fit.
# - Elementwise functions (`swiglu`, `geglu`, `relu_squared`) are not in the list, since they tie: both tools run at the memory's rate, and no kernel can be better.
#   If your model compiles, you need no library for these.
#
# ## 2. It depends on the size
#
# **Picture.** Forward and backward against the size: time over the floor (1 is as fast as a copy of the same bytes), and for the head its memory. Predict for the head which of
# the two will differ, time or memory.

# %%
SWEEPS = (("rms_norm", "width, 2²⁵ elements in all"), ("swiglu", "rows of 14336"), ("cross_entropy", "vocabulary, 4096 rows"))
fig, axes = course.figure(10, 5, rows=2, columns=3)
every = [row for by_tool in cases.values() for row in by_tool.values()]
lines = {OURS: course.PALETTE[0], **colours}


def draw(ax, rows, value):
    for who, colour in lines.items():
        points = sorted((r.size, value(r)) for r in rows if r.provider == who and r.us)
        if points:
            ax.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3.5, linewidth=1.2, label=who)
    ax.set_xscale("log", base=2)
    ax.grid(alpha=0.25)


for ax, (op, along) in zip(axes[0], SWEEPS, strict=True):
    draw(ax, [r for r in every if r.op == op and r.mode == table.SWEEP], lambda r: r.over_floor)
    ax.set(title=op, xlabel=along, ylim=(0, 4))
heads = [r for r in every if r.mode == table.HEAD_SWEEP]
draw(axes[1][0], heads, lambda r: r.us / r.size)
axes[1][0].set(title="head: time", xlabel="tokens", ylabel="µs a token", ylim=(0, 4))
draw(axes[1][1], heads, lambda r: r.mib / 1024)
axes[1][1].set(title="head: memory beside gradients", xlabel="tokens", ylabel="GiB", ylim=(0, 4.5))
axes[0][0].set(ylabel="time ÷ floor")
axes[1][2].axis("off")
for who, colour in lines.items():
    axes[1][2].plot([], [], "o-", color=colour, label=who)
axes[1][2].legend(loc="center left", title="above 4: cut off")
fig

# %% [markdown]
# `torch.compile`'s line for the head ends at 16,384 tokens: beyond it was not measured, since it keeps all the logits. Up to there the times are
# alike; what differs is memory. liger-kernel keeps least of all at few tokens, at the price of time; at the most tokens it is a little faster than ours, and keeps more. So "is it faster?" is the wrong question for a head; "do the logits fit?" is the right one.
#
# **Tiny inputs.** A GPU can only be as fast as the host gives it work. For each call and its backward, the host's cost on a tiny input (`torch.compile`'s was
# not measured); predict who costs least:

# %%
hosts = {op: rows for (op, _, mode), rows in cases.items() if mode == table.HOST}
fig, ax = course.figure(9, 2.8)
for n, (who, colour) in enumerate(lines.items()):
    found = [(i + 0.17 * (n - 2), rows[who].us) for i, rows in enumerate(hosts.values()) if who in rows and rows[who].us]
    if found:
        ax.bar(*zip(*found, strict=True), 0.16, color=colour, label=who)
ax.set_xticks(range(len(hosts)), [op.replace("_", "\n") for op in hosts], fontsize=7.5)
ax.set(ylabel="µs of the host", title="one call and its backward, tiny input")
ax.legend(fontsize=8, ncols=2)
fig

# %% [markdown]
# PyTorch's own functions, where they exist (green), are called from C++ and cost the host least. If a call's device time is below its host time, the GPU waits for Python, and a
# faster kernel changes nothing. Larger batches do, or CUDA graphs: recorded launches, which the GPU replays without the host.
#
# ## 3. What a faster kernel is worth
#
# **Formula** (Amdahl). Parts take the fractions $f_p$ of a step, and part $p$ becomes $s_p$ times faster:
#
# $$\text{the step becomes } \frac{1}{\sum_p f_p / s_p} \text{ times faster, and never more than } \frac{1}{\text{what stays}}.$$
#
# ### Exercise 12.2
#
# **Specification.** `step_speedup(fractions: dict[str, float], speedups: dict[str, float]) -> float`: fractions of a step by part (they sum to 1), and how many times faster some parts
# become; `math.inf` is allowed. The others stay.


# %%
def step_speedup(fractions, speedups):
    raise NotImplementedError  # your code here


course.check("12.2", step_speedup)

# %% [markdown]
# **Picture.** Where a step of Llama 1B goes, by kinds of kernels, at 4 × 4096 tokens and at longer sequences. The red part is all that functions like ours can change; matrix
# products, attention and the optimizer are not ours. Before you run it: if the red part of *stock* took no time, how many times faster would it be?

# %%
STAYS = {"matrix products": course.PALETTE[1], "attention": course.PALETTE[5], "optimizer": course.PALETTE[7]}
steps = {(r.model, r.shape, r.provider): r for run in training.read().values() for r in run.rows if r.kernels_ms}
shown = [("4x4096", who) for who in ("stock", "stock + compile", "liger_fn")] + [("2x16384", "liger_fn"), ("2x32768", "liger_fn")]
fig, ax = course.figure(9, 2.9)
for y, (shape, who) in enumerate(shown):
    ms = profile.shares(steps["Llama 1B", shape, who].kernels_ms)
    total, left = sum(ms.values()), 0.0
    for name, colour in STAYS.items():
        ax.barh(y, ms[name] / total, left=left, color=colour, label=name if y == 0 else None)
        left += ms[name] / total
    ax.barh(y, 1 - left, left=left, color=course.PALETTE[0], label="all else" if y == 0 else None)
    print(
        f"{shape:>8} {who:<16} {total:7.0f} ms; attention {ms['attention']:5.0f} ms; without the red part at most {1 / left:.2f} times faster"
    )
ax.set_yticks(range(len(shown)), [f"{shape} {who}" for shape, who in shown])
ax.invert_yaxis()
ax.set(xlabel="fraction of the step's device time", xlim=(0, 1))
ax.legend(ncols=4, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
rate = {who: steps["Llama 1B", "4x4096", who].tokens_per_s for who in ("stock", "liger_fn")}
print(f"measured at 4x4096: liger_fn is {rate['liger_fn'] / rate['stock']:.2f} times stock")
fig

# %% [markdown]
# Three things to read there. **The base matters**: the bound is for the step that you *have*. After patching little is left to win, and "88 % cannot be changed" is true of the patched step, not
# of the stock one. **A whole step has surprises**: compare the milliseconds of attention in *stock + compile* with those in *stock*. Its elementwise work is fused as well as
# anybody's, and the step gains little, since it lost elsewhere. Only a profile says so; a table of single functions never would. **Long sequences**: attention grows with the square of the length and takes over, and then it hardly matters whose norms you use.
#
# ## 4. Reading a benchmark
#
# The usual floor: bytes over bandwidth. A figure far below it is not a fast kernel but a wrong measurement, or an array that the cache holds. Below is a timing function as one finds
# them, on a toy device. Its calls are queued and take *device* time; the first call of a kernel for a dtype compiles; memory is quicker to read from a cache that the last
# call left warm, which shortens both kernels, but not equally; now
# and then somebody else has the device; and it gets slower as it heats.

# %%
course.show_source("lessons/lesson12.py", "Device", package="notebooks/course")


# %%
def faulty(device, ours, theirs, x, repeat):
    """theirs ÷ ours: how many times faster ours is."""

    def microseconds(kernel, x):
        start = device.now()
        for _ in range(repeat):
            device.launch(kernel, x)
        device.synchronize()
        return (device.now() - start) / repeat

    slow = microseconds(theirs, x.float())  # the reference, in full precision
    return slow / microseconds(ours, x)


norm, peer = Kernel("ours", us_per_mib=0.8), Kernel("theirs", us_per_mib=0.8)
x = torch.empty(64, 2**20, dtype=torch.bfloat16, device="meta")  # 128 MiB
for repeat in (5, 50, 500, 5000):
    print(f"repeat={repeat:<5} 'ours is {faulty(Device(), norm, peer, x, repeat):.2f} times faster'; the two kernels take the same")

# %% [markdown]
# The answer depends on `repeat`. With 5 it says 1 for a wrong reason: compiling takes 20,000 µs in both, and drowns the rest.
#
# ### Exercise 12.3
#
# **Specification.** `ratio(device, ours, theirs, x, repeat) -> float`: the time of `theirs` over that of `ours`, for one call with a cold cache, without compilation, both on `x` as it is. Medians;
# and the two in turns, so that both meet the same heat. `faulty` has five faults; one that it does not have, but that is as common, is not to wait for the device. The check
# has a device for each fault and says which one is left.


# %%
def ratio(device, ours, theirs, x, repeat):
    raise NotImplementedError  # your code here


course.check("12.3", ratio)

# %% [markdown]
# The library's own replays CUDA graphs, so that the host is left out. It leaves the cache as the last replay left it, and says so; the heads, which run long enough to
# heat a GPU, are timed in turns with the products that they are compared to:

# %%
print((course.ROOT / "tests/bench/measure.py").read_text().split('"""')[1].strip(), end="\n\n")
course.show_source("bench/heads.py", "in_turns", package="tests")

# %% [markdown]
# ## 5. A table to decide by
#
# ### Exercise 12.4
#
# **Specification.** `choose(case) -> str` is a rule with four steps. `case` has `share` (of the step, 0 to 1), `device_us`, `host_us` and `mib` (dicts by tool), `room` (MiB that are free)
# and `compiles: bool`.
#
# 1. If the part's disappearing would make the step less than 2 % faster, return `"leave it"`.
# 2. Tools that take more than `room` are out, and `"torch.compile"` if the model does not compile.
# 3. A call costs the larger of its device and host time. (A tool that is not in `host_us` costs the host nothing, and one that is not in `mib` no memory.)
# 4. Of all that cost at most 2 % more than the cheapest, take the one that you need to install least for: `"native"`, `"eager"`, `"torch.compile"`, `"liger_fn"`, in this order.
#
# If no tool is left, return `"own kernel"`. The check makes the table of your rule over the committed figures.


# %%
def choose(case):
    raise NotImplementedError  # your code here


course.check("12.4", choose)

# %% [markdown]
# What no figure has in it: whether a compiled model stays compiled when its inputs change shape, how long compiling takes, whether you can read the code when a loss is NaN at 3 in the morning.
# A rule of yours may have more steps.
#
# ## Summary of the course
#
# - Count bytes and FLOPs first; the floor says whether there is something to win.
# - Write the pair: forward, backward, residuals. Prove it against fp64, through strides, with an upstream gradient of 3.
# - Make it fast where it shows in a profile of a whole step; measure in one run, in turns, cold, and say where others are better.
# - Often the best kernel is somebody else's.
#
# Next: `CONTRIBUTING.md` says how a function comes into the library. Take one that a profile of yours shows.
