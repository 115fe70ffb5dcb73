# %% [markdown]
# # 10. The failure gallery
#
# At the end you can write tests that tell a right kernel from one that is nearly right. You need lessons 1, 3, 4, 5 and 7. 25 minutes.
#
# Every fault below has shipped in code that people train models with. Most pass the usual test: one shape, contiguous inputs, `loss.backward()` once.
#
# **Here you write the tests.** A check calls your test with a right function, which it must pass, and with faulty ones, for each of which its
# `assert` must fail. A test that has never failed has shown nothing.

# %%
import course  # before triton
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd import Function, grad
from torch.utils.flop_counter import FlopCounterMode

import liger_fn

_ = torch.manual_seed(0)
DEVICE = course.DEVICE

# %% [markdown]
# ## Room 1: a write that nobody sees
# **Formula.** With $g$ = gate, $u$ = up and $\sigma$ the sigmoid: $dg = dy\,u\,\sigma(g)(1 + g(1 - \sigma(g)))$, $du = dy\,g\,\sigma(g)$. To
# save memory, this kernel stores both over its inputs. Predict: what does a second backward through the same graph return?


# %%
@triton.jit
def greedy_kernel(dy_ptr, gate_ptr, up_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    dy, gate, up = tl.load(dy_ptr + i, mask=inside), tl.load(gate_ptr + i, mask=inside), tl.load(up_ptr + i, mask=inside)
    s = tl.sigmoid(gate)
    tl.store(gate_ptr + i, dy * up * s * (1 + gate * (1 - s)), mask=inside)
    tl.store(up_ptr + i, dy * gate * s, mask=inside)


def differentiable(forward, backward):
    return type("Made", (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}).apply


def forward(ctx, gate, up):
    ctx.save_for_backward(gate, up)
    return F.silu(gate) * up


def greedy_backward(ctx, dy):
    gate, up = (t.detach() for t in ctx.saved_tensors)
    greedy_kernel[(triton.cdiv(gate.numel(), 32),)](dy.contiguous(), gate, up, gate.numel(), BLOCK=32)
    return gate, up


gate = torch.linspace(-4, 4, 48, device=DEVICE).requires_grad_()
up = torch.ones(48, device=DEVICE).requires_grad_()
axis, y = gate.detach().cpu().clone(), differentiable(forward, greedy_backward)(gate, up)
first, second = (grad(y, gate, torch.ones_like(y), retain_graph=True)[0].cpu().clone() for _ in range(2))
print("gate's version:", gate._version, "  gate is what it was:", torch.equal(gate.detach().cpu(), axis))

fig, ax = course.figure(7, 2.6)
ax.plot(axis, first, label="first backward (right)")
ax.plot(axis, second, label="second backward")
ax.set(xlabel="gate", ylabel="dgate", title="the same graph, asked twice")
ax.legend()
fig

# %% [markdown]
# No error: PyTorch counts its own in-place functions in `_version`, and a kernel writes by address. So the second backward took $dg$ for $g$ and
# $du$ for $u$. The same fault in other clothes: RoPE that turns `q` where it lies, and a norm whose backward writes `dx` over `dy`. That one breaks
# the *neighbour*: in `h = x + norm(x)` both branches receive one and the same `dy`. Below, `norm` is a factor of 3, so $dx = 1 + 3$. Predict what comes.

# %%
over_dy = differentiable(lambda ctx, x: 3 * x, lambda ctx, dy: dy.data.mul_(3))  # past the version counter, as a kernel writes
x, dy = torch.ones(3, requires_grad=True), torch.ones(3)
print("dx:", grad(x + over_dy(x), x, dy)[0].tolist(), "= 3 + 3, expected 1 + 3; dy is now", dy.tolist())

# %% [markdown]
# ### Exercise 10.1
# **Specification.** `assert_untouched(call, tensors: list of Tensor) -> None`: runs `call()`, and raises AssertionError if any *byte* of any of the
# tensors changed. They may be transposed, bf16, or hold NaN (which is not equal to itself) and 0 (which equals −0).


# %%
def assert_untouched(call, tensors):
    raise NotImplementedError  # your code here


course.check("10.1", assert_untouched)

# %% [markdown]
# The library's own:

# %%
course.show_source("numerics.py", "bits", "untouched", package="tests")

# %% [markdown]
# ## Room 2: cotangents
# **Formula.** A backward is linear and pure: $bwd(res, c \cdot dy) = c \cdot bwd(res, dy)$, today and when asked again.
#
# **Scaled twice.** A loss may compute its gradient in forward, and multiply it by what comes from above. Done in place, it stays multiplied.
# With `loss.backward()` the factor is 1, and nothing shows. Predict the second number for a factor of ½:


# %%
def sum_of_squares(ctx, x):
    ctx.dx = 2 * x
    return (x * x).sum()


x = torch.ones(1, requires_grad=True)
loss = differentiable(sum_of_squares, lambda ctx, dy: ctx.dx.mul_(dy).clone())(x)
print("dx for dy = ½, expected 1 each time:", [float(grad(loss, x, torch.tensor(0.5), retain_graph=True)[0]) for _ in range(3)])

# %% [markdown]
# **Strides.** `y.sum().backward()` sends an *expanded* tensor: one number in memory, all strides 0. A kernel that reads `dy_ptr + i` reads
# what lies behind that number. **Picture:** here we own what lies behind, so that the picture is the same each time.


# %%
@triton.jit
def doubled_kernel(dy_ptr, dx_ptr, N, BLOCK: tl.constexpr):  # the backward of y = 2x, for a contiguous dy alone
    i = tl.arange(0, BLOCK)
    tl.store(dx_ptr + i, 2 * tl.load(dy_ptr + i, mask=i < N), mask=i < N)


y = torch.ones(3, 4, requires_grad=True) * 2
y.register_hook(lambda dy: print("sum() sends strides", dy.stride(), "and", dy.untyped_storage().nbytes(), "bytes for 12 numbers"))
y.sum().backward()

memory = torch.arange(1.0, 13.0, device=DEVICE)
dy, dx = memory[:1].expand(3, 4), torch.empty(3, 4, device=DEVICE)
doubled_kernel[(1,)](dy, dx, 12, BLOCK=16)
fig, axes = course.figure(7, 2.1, columns=2)
for ax, t, title in zip(axes, (2 * dy, dx), ("dx, right", "dx, as the kernel reads"), strict=True):
    ax.imshow(t.cpu(), cmap="YlOrBr", vmin=0, vmax=40)
    for (row, column), n in ((divmod(i, 4), float(t[divmod(i, 4)])) for i in range(12)):
        ax.text(column, row, f"{n:.0f}", ha="center", va="center")
    ax.set(title=title, xticks=[], yticks=[])
fig

# %% [markdown]
# **Frozen inputs.** A backward that returns nothing if its *first* input needs no gradient leaves a head over frozen hidden states untrained.
#
# ### Exercise 10.2
# **Specification.** `check_backward(swiglu) -> None`: `swiglu(gate, up) -> y` is differentiable and `F.silu(gate) * up` is its truth, to fp32's rounding.
# Raise AssertionError unless the gradients are right for a cotangent that is not 1, for one that is expanded or transposed, the second time
# through one graph, and for `up` alone.


# %%
def check_backward(swiglu):
    raise NotImplementedError  # your code here


course.check("10.2", check_backward)

# %% [markdown]
# The library's. `s` is a sample of a function's inputs, `s.cots` its cotangents; `restride` puts NaN between strided elements. All gradients are
# compared bit for bit. Why may they be, also those of the doubled cotangent?

# %%
course.show_source("contract.py", "test_second_backward", "restride", package="tests")

# %% [markdown]
# The same kernel on the same numbers, without atomics, gives the same bits. And a factor of 2 changes only exponents: it commutes with rounding.
#
# ## Room 3: offsets of 32 bits
# **Formula.** `offset = row * stride + column`. `tl.program_id` and whole numbers below $2^{31}$ are int32 in a kernel, and so is their product:
# it is taken modulo $2^{32}$, and read with a sign. With 128,256 logits a row, which row is the first to begin at a negative offset? No memory
# is needed to see it: this kernel stores the offset itself.


# %%
@triton.jit
def offset_kernel(out_ptr, first, stride, WIDE: tl.constexpr):
    row = first + tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)  # before the product: after it is too late
    tl.store(out_ptr + tl.program_id(0), row * stride)


V = 128256
first_row = -(-(2**31) // V)
for wide in (False, True):
    out = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    offset_kernel[(2,)](out, first_row - 1, V, WIDE=wide)
    print(f"offsets of rows {first_row - 1} and {first_row} in {64 if wide else 32} bits:", out.tolist())

rows = torch.arange(0, 80_000, 50)
fig, ax = course.figure(7, 2.6)
ax.plot(rows, rows * V / 2**31, label="64 bits")
ax.plot(rows, (rows.int() * V) / 2**31, label="32 bits")
ax.set(xlabel="row of logits", ylabel="offset, in units of 2³¹", title="below 0: somebody else's memory; back above 0: another row's")
ax.legend()
fig

# %% [markdown]
# ### Exercise 10.3
# **Specification.** `check_offsets(offset) -> None`: `offset(row: int, column: int, stride: int) -> int`, as a kernel would compute it. Raise
# AssertionError unless it is exact. The faulty ones hold the offset in 32 bits, with and without a sign, or in fp32.


# %%
def check_offsets(offset):
    raise NotImplementedError  # your code here


course.check("10.3", check_offsets)

# %% [markdown]
# In the library, where each program of the GLUs finds its place. Which of these lines keep the products right?

# %%
course.show_source("_glu_rows.py", "_place")

# %% [markdown]
# Both `.to(tl.int64)` stand before a product: by `BLOCK` here, by a stride in the caller. `left` is at most `BLOCK`, so 32 bits hold it.
#
# ## Room 4: numbers
# **Formula.** The rule of lesson 1, with $u$ = half the spacing of the dtype at 1 ($2^{-8}$ for bf16, whose `eps` is $2^{-7}$):
#
# $$\|ours - truth\| \le \|naive - truth\| + u\,\|truth\|.$$
#
# Truth is fp64 of the same, already rounded, inputs. **Picture:** $dw = \sum_n x_n\,dy_n$ of 4096 rows, added up in chunks. The dashed
# line is what the rule allows; a tolerance of 0.2 would lie above everything drawn here.

# %%
x, dy = torch.randn(2, 4096, 64).bfloat16()
truth, naive = (x.double() * dy.double()).sum(0), (x * dy).sum(0)


def error(count, dtype):
    total = torch.zeros(64, dtype=dtype)
    for a, b in zip(x.chunk(count), dy.chunk(count), strict=True):
        total += (a.float() * b.float()).sum(0).to(dtype)
    return float((total.bfloat16().double() - truth).norm() / truth.norm())


fig, ax = course.figure(7, 2.8)
for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
    ax.plot(2 ** torch.arange(11), [error(2**i, dtype) for i in range(11)], "o-", label=f"total in {name}")
allowed = float((naive.double() - truth).norm() / truth.norm()) + torch.finfo(torch.bfloat16).eps / 2
ax.axhline(allowed, color=course.INK, linestyle="--", linewidth=0.9, label="allowed by the rule")
ax.set(xscale="log", yscale="log", xlabel="chunks", ylabel="error / ‖truth‖", title="a total in bf16 is rounded once a chunk")
ax.legend()
fig

# %% [markdown]
# ### Exercise 10.4
# **Specification.** `check_dweight(dweight) -> None`: `dweight(x: [N, H], dy: [N, H]) -> dw: [H]`, all bf16. Raise AssertionError unless dw keeps the
# rule. The faulty ones walk over x in chunks of 16 rows. Two traps: how many rows, and what `error > allowed` is if error is NaN.


# %%
def check_dweight(dweight):
    raise NotImplementedError  # your code here


course.check("10.4", check_dweight)

# %%
# the library's: first NaN and infinities, element by element; then the rule over all that is finite
course.show_source("numerics.py", "assert_near", package="tests")

# %% [markdown]
# **Memory that nobody wrote.** `torch.empty` often returns what an earlier, right call left there, so a kernel that stores nothing passes.
# Fill it with NaN first, as the library's tests do for every call. Here one program of 32 is launched for 40 numbers:

# %%
torch.use_deterministic_algorithms(True)  # with it, torch.empty is filled with NaN
half_done = torch.empty(40, device=DEVICE)
torch.use_deterministic_algorithms(False)
doubled_kernel[(1,)](torch.ones(40, device=DEVICE), half_done, 40, BLOCK=32)
print("never written:", int(half_done.isnan().sum()), "of 40")

# %% [markdown]
# ## Room 5: edges of the domain
# **Formula.** $L = \frac1n \sum_{t_i \ne -100} L_i$ with $n$ the number of targets that are not ignored. For $n = 0$ that is 0/0. And for
# a target outside of $[0, V)$ a kernel reads `logits[row, target]` all the same: another row's number, and a plausible loss.

# %%
logits, ignored = torch.randn(4, 6, requires_grad=True), torch.full((4,), -100)
for f in (F.cross_entropy, liger_fn.cross_entropy):
    loss = f(logits, ignored)
    print(f"all ignored, {f.__module__}: loss {float(loss.detach())}, largest gradient {float(grad(loss, logits)[0].abs().max())}")
print("a kernel that masks a row by a factor of 0, and scales it by 1/n:", float(torch.tensor(0.0) * (1 / torch.tensor(0.0))))

# %% [markdown]
# PyTorch skips ignored rows, so only its loss is NaN. In a kernel that computes $0 \cdot \infty$, the gradient is, too, and the optimizer carries it into
# every weight. In the library the mean over no row is 0; `return_aux=True` also gives the number of rows that counted, so that it need not hide.
#
# ### Exercise 10.5
# **Specification.** `check_loss(loss) -> None`: `loss(logits: [N, V], target: [N], reduction) -> Tensor`, reduction "mean" (the default), "sum" or "none"; −100 is
# ignored. PyTorch is the truth where some row counts. All ignored: 0, and a gradient of 0. A target of V: ValueError. Look at gradients too: with
# "none", each row has a cotangent of its own. (The library raises it on a CPU. On a GPU looking makes the host wait: there such a loss is NaN.)


# %%
def check_loss(loss):
    raise NotImplementedError  # your code here


course.check("10.5", check_loss)

# %% [markdown]
# **Partial rotary** (lesson 5). Some models turn only the first W of D channels, with tables of W. This function pairs channel $i$ with
# $i + D/2$ in place of $i + W/2$. Where W is $D/2$, it reads all of the tables: no error, plausible numbers. A test by *properties*
# catches it without any reference: channels past W keep their bits, and a turned pair keeps its length.


# %%
def rope_of_all(q, cos, sin):
    half = q.shape[-1] // 2
    a, b, c, s = q[..., :half], q[..., half:], cos[..., :half], sin[..., :half]
    return torch.cat((a * c - b * s, b * c + a * s), -1)


def check_rope(rope):
    angle = torch.rand(5, 2).repeat(1, 2)  # W = 4: the pairs are channels 0 and 2, 1 and 3
    q = torch.randn(1, 3, 5, 8)
    y = rope(q, angle.cos(), angle.sin())
    assert torch.equal(y[..., 4:], q[..., 4:]), "channels past the tables were changed"
    assert torch.allclose(torch.hypot(y[..., :2], y[..., 2:4]), torch.hypot(q[..., :2], q[..., 2:4])), "a pair changed its length"
    return "passes"


def ask(what, call):
    try:
        print(f"{what}: {call()}")
    except Exception as error:
        print(f"{what}: {type(error).__name__}, {str(error).strip().splitlines()[-1][:90]}")


ask("rope_of_all", lambda: check_rope(rope_of_all))
ask("the library's", lambda: check_rope(lambda q, cos, sin: liger_fn.rope(q, None, cos, sin)))

# %% [markdown]
# ## Room 6: right, and slow
# Faults of cost have tests too. Most need no GPU.
#
# - **fp64 by accident.** One fp64 factor makes all that it touches fp64 (`torch.compile` has passed Python floats so). `tl.static_assert` is a test.
# - **The host waits.** `.item()` asks the GPU for a number. Meta tensors have shapes and no numbers, so on them every such question is an error.
# - **Compiled anew for each length.** Count the different keys. A `tl.constexpr` that is the sequence length is one kernel a length.
# - **A gradient that nobody asked for.** Count the work with the head frozen.


# %%
@triton.jit
def scaled_kernel(x_ptr, factor_ptr):
    y = tl.load(x_ptr) * tl.load(factor_ptr)
    tl.static_assert(y.dtype == tl.float32, "the product is not fp32")
    tl.store(x_ptr, y)


double = torch.tensor(2.0, dtype=torch.float64, device=DEVICE)
ask("an fp64 factor", lambda: scaled_kernel[(1,)](torch.ones(1, device=DEVICE), double))
ask("a loss with .item()", lambda: torch.ones(3, device="meta").sum().item())
keys = {n: triton.next_power_of_2(n) for n in range(1000, 1064)}
print(f"kernels for 64 lengths, keyed by the length: {len(keys)}, by its power of two: {len(set(keys.values()))}")
dy, x, w = torch.randn(8, 32), torch.randn(8, 16), torch.randn(32, 16)
with FlopCounterMode(display=False) as counter:
    _ = dy @ w, dy.T @ x  # dx and dw of a head y = x wᵀ; its w is frozen
print(f"a frozen head: {counter.get_total_flops():,} FLOPs, where {2 * 8 * 16 * 32:,} were wanted")

# %% [markdown]
# ## The list
# Each fault, and the library's test that fails if it comes back. The cell looks every name up, so that the list cannot go stale.

# %%
LIST = {
    "contract.py": {
        "an input is written to": "test_inputs_untouched", "scaled twice": "test_second_backward", "expanded dy": "test_expanded_cotangent",
        "other strides": "test_strided_inputs", "offsets past 2³¹": "test_more_than_2_31_elements", "a sum in bf16": "test_numerics",
        "overflow, NaN": "test_hostile_values", "the wrong formula": "test_float64_against_finite_differences",
        "no gradient where frozen": "test_only_wanted_gradients", "paid for, unwanted": "test_unwanted_gradients_cost_nothing",
        "second derivative 0": "test_second_derivative_is_refused", "the host waits": "test_the_host_never_waits",
        "the wrong device": "test_a_device_that_is_not_current", "other bits each run": "test_same_bits_every_time",
    },
    "compose.py": {"wrong when compiled": "test_compile", "compiled for each size": "test_compile_dynamic"},
    "liger_fn/test_cross_entropy.py": {"all ignored": "test_all_ignored", "wrong target": "test_target_out_of_range"},
    "liger_fn/test_rope.py": {"partial rotary": "test_interleaved_is_a_product_of_complex_numbers"},
    "test_recompilation.py": {"a kernel for each length": "test_lengths_share_their_kernels"}, "conftest.py": {"memory never written": "uninitialised_memory_is_nan"},
}  # fmt: skip
for file, tests in LIST.items():
    text = (course.ROOT / "tests" / file).read_text()
    for fault, test in tests.items():
        assert f"def {test}(" in text, f"{file} has no {test}"
        print(f"{fault:<26} {file:<32} {test}")

# %% [markdown]
# ## Summary
#
# - Compare bytes for purity, fp64 for numbers, properties where there is no reference; NaN must fail.
# - Ask twice, with a cotangent that is neither 1 nor dense, with each input frozen in turn.
# - Choose the sizes that a fault needs: past $2^{31}$, thousands of rows, a remainder, none at all.
#
# Next, lesson 11: once it is right, fast.
