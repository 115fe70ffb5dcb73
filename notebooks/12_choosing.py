# %% [markdown]
# # 12. Reading figures, and choosing
#
# At the end you can tell whether a benchmark means anything, what a faster kernel is worth to a whole step, and when `torch.compile` or PyTorch's
# own functions are the better tool. You need lesson 2. 20 minutes.

# %%
import course  # before triton
import torch

from tests.bench import results, table
from tests.bench.peers import COMPILE, EAGER, LIGER, NATIVE, OURS

runs = [results.load(path) for path in sorted(results.FOLDER.glob("*.json"))]
rows = {row.key: row for run in runs for row in run.rows}.values()  # of a figure measured again, the last

# %% [markdown]
# ## Where others win
#
# All figures here are read from the committed measurements of an H100 (`docs/benchmarks.md` has them with machine and versions). **Picture.**
# For each function and shape, the time of the best other tool over ours: right of 1 ours is faster, left of it slower. Predict on which side
# a function that reads once and writes once will be.


# %%
def best_others(mode):
    """name → (their time ÷ ours, who) for each function and shape of a mode."""
    found = {}
    for row in rows:
        if row.mode == mode and row.us:
            found.setdefault((row.op, row.shape), {})[row.provider] = row.us
    out = {}
    for (op, shape), times in found.items():
        others = {p: t for p, t in times.items() if p in (EAGER, COMPILE, NATIVE, LIGER)}
        if OURS in times and others:
            who = min(others, key=others.get)
            out[f"{op} {shape}"] = (others[who] / times[OURS], who)
    return out


fig, axes = course.figure(10, 5.2, columns=2)
colours = {EAGER: course.PALETTE[7], COMPILE: course.PALETTE[1], NATIVE: course.PALETTE[2], LIGER: course.PALETTE[3]}
for ax, mode in zip(axes, (table.FORWARD, table.BOTH), strict=True):
    pairs = sorted(best_others(mode).items(), key=lambda kv: kv[1][0])
    ax.barh([name for name, _ in pairs], [ratio - 1 for _, (ratio, _) in pairs], left=1, color=[colours[who] for _, (_, who) in pairs])
    ax.axvline(1, color=course.INK, linewidth=0.8)
    ax.tick_params(axis="y", labelsize=7)
    ax.set(title=f"{mode}: the best other ÷ liger_fn")
for who, colour in colours.items():
    axes[1].plot([], [], "s", color=colour, label=who)
axes[1].legend(loc="lower right", fontsize=8)
fig

# %% [markdown]
# Read it honestly:
#
# - **Elementwise functions** tie with `torch.compile`. It fuses them as well as anybody; both are at the memory's rate. If your model compiles
#   without breaks, you need no library for these.
# - **Norms**: the forward ties or loses a little at small arrays; forward and backward together are ahead, because of the weight's gradient.
# - **Heads**: `torch.compile` is as fast where all the logits fit. The library's gain there is memory.
# - **Tiny inputs**: what counts is the host. PyTorch's own functions cost it least.
#
# ### Exercise 12.1
#
# **Specification.** `slower(times: dict[str, dict[str, float]], ours: str) -> dict[str, tuple[str, float]]`: from µs by case and tool, the cases in which some other tool is faster than
# `ours`: the fastest one's name, and ours ÷ theirs. Cases without `ours`, or in which it stands alone, are left out.


# %%
def slower(times, ours):
    raise NotImplementedError  # your code here


course.check("12.1", slower)

# %% [markdown]
# ## What a faster kernel is worth
#
# **Formula** (Amdahl). A part that takes the fraction $f$ of a step, made $s$ times faster, makes the step
#
# $$\frac{1}{(1 - f) + f / s} \text{ times faster, and never more than } \frac{1}{1 - f}.$$
#
# **Picture.** In a training step of Llama 1B at 4 × 4096, 88 % are matrix products, attention and the optimizer (`docs/results.md`), the same for
# all libraries. What is left for everything else to win?

# %%
speedups = torch.logspace(0, 2, 60)
fig, ax = course.figure(7, 2.8)
for n, f in enumerate((0.05, 0.12, 0.3, 0.6)):
    ax.plot(speedups, 1 / (1 - f + f / speedups), label=f"{f:.0%} of the step", color=course.PALETTE[n])
    ax.axhline(1 / (1 - f), color=course.PALETTE[n], linewidth=0.6, linestyle=":")
ax.set(xscale="log", xlabel="times faster, that part", ylabel="times faster, the step", title="dotted: if that part took no time")
ax.legend()
fig

# %% [markdown]
# ### Exercise 12.2
#
# **Specification.** `step_speedup(fractions: dict[str, float], speedups: dict[str, float]) -> float`: fractions of a step by part (they sum to 1), and how many times faster some parts
# become; the others stay.


# %%
def step_speedup(fractions, speedups):
    raise NotImplementedError  # your code here


course.check("12.2", step_speedup)

# %% [markdown]
# ## Reading a benchmark
#
# Questions to ask of any figure, ours too:
#
# 1. **Was the device waited for?** A launch returns at once. Without a synchronisation one times the host.
# 2. **Was it warm?** The first call compiles.
# 3. **What lay in the cache?** An input of 30 MB, timed in a loop, is read from L2.
# 4. **The same work?** dtype, gradients, and is an in-place rival given its input anew?
# 5. **One run?** Clocks and temperatures differ between days: compare within a run; ratios, not absolutes. The median of many, not the best.
# 6. **Against what?** The floor says how much was there to win.
#
# ### Exercise 12.3
#
# A timing function gets a toy `device`: `device.launch(fn)` queues a call (which takes *device* time), `device.synchronize()` waits, `device.now()` is the host's clock in µs, and
# `device.flush()` empties the cache. The first launch of a function compiles, which is slow.
#
# **Specification.** `measure(device, fn, repeat) -> float`: the median device time of one call of fn with a cold cache and without compilation.


# %%
def measure(device, fn, repeat):
    raise NotImplementedError  # your code here


course.check("12.3", measure)

# %% [markdown]
# The library's own, which replays CUDA graphs so that the host is left out; the heads are timed by events, in turns with the products they
# are compared to:

# %%
print((course.ROOT / "tests/bench/measure.py").read_text().split('"""')[1].strip())

# %% [markdown]
# ## A table to decide by
#
# | you have | take |
# |---|---|
# | elementwise chains, and a model that compiles | `torch.compile` |
# | a norm or softmax, small arrays, no compiler | PyTorch's own function |
# | a vocabulary of 32,000 or more, memory short | a head without logits: `linear_cross_entropy` |
# | a Hugging Face model, one line, no compiling | `liger_patch.auto(model)`; compile it too, if it stays stable |
# | very long sequences | whatever you like: attention is most of the step |
# | a function that nobody fused, and it shows in a profile | your own kernel, with its floor counted first |
#
# ## Summary of the course
#
# - Count bytes and FLOPs first; the floor says whether there is something to win.
# - Write the pair: forward, backward, residuals. Prove it against fp64, through strides, with an upstream gradient of 3.
# - Make it fast where it shows, measure in one run, and say where others are better.
