# %% [markdown]
# # 10. The failure gallery
#
# At the end you know ten ways in which a kernel is fast and wrong, and can write the test that catches each. You need lessons 1, 4, 7 and 8.
# 25 minutes.
#
# Every fault below was seen in released code. Each passes a test of the kind "values close to PyTorch's, tolerance 0.01, one shape". You write
# the tests here: a check runs **your test** on a right implementation, which must pass, and on wrong ones, each of which it must catch.

# %%
import course  # before triton
import torch
import torch.nn.functional as F

import liger_fn

torch.manual_seed(0)

# %% [markdown]
# ## 1. The neighbour's memory
#
# A backward that writes over what it was given. The gradient it returns is right; the tensor that somebody else reads next is not.


# %%
class GreedySwiglu(torch.autograd.Function):
    """Writes its gradients over gate and up, in silence."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        s = torch.sigmoid(gate)
        dgate, dup = dy * up * s * (1 + gate * (1 - s)), dy * gate * s
        gate.detach().numpy(force=True)[:] = dgate.numpy(force=True)  # a kernel's store: no version changes
        up.detach().numpy(force=True)[:] = dup.numpy(force=True)
        return torch.from_numpy(gate.numpy(force=True)), torch.from_numpy(up.numpy(force=True))


leaf = torch.randn(5, requires_grad=True)
gate, up = leaf * 1.0, torch.randn(5)
y = GreedySwiglu.apply(gate, up).sum()
y.backward(retain_graph=True)
first = leaf.grad.clone()
leaf.grad = None
y.backward()
print("first backward :", first.tolist())
print("second backward:", leaf.grad.tolist())

# %% [markdown]
# ### Exercise 10.1
#
# **Specification.** `pure(fn, *inputs) -> None`: raise AssertionError if a call of `fn(*inputs)` and its backward change the bytes of any input, or if a second
# backward through the same graph (`retain_graph=True` at the first) gives other bits. `fn` returns one tensor; inputs are float tensors, which require grad or are
# made to. Bytes, not closeness: NaN must equal itself.


# %%
def pure(fn, *inputs):
    raise NotImplementedError  # your code here


course.check("10.1", pure)

# %% [markdown]
# ## 2. An upstream gradient other than 1
#
# A loss that makes its gradient in forward must multiply it by what comes from above; and must do so once. `loss.backward()` gives 1, so a
# test that calls only that sees nothing. `(3 * loss).backward()` does, and calling it twice sees the second fault.


# %%
class ScalesInPlace(torch.autograd.Function):
    """The gradient is made in forward, and scaled in place in backward: right once."""

    @staticmethod
    def forward(ctx, z, target):
        dz = z.softmax(1)
        dz[torch.arange(len(z)), target] -= 1
        ctx.dz = dz / len(z)
        return F.cross_entropy(z, target)

    @staticmethod
    def backward(ctx, g):
        ctx.dz.mul_(g)
        return ctx.dz.clone(), None


z, target = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
loss = ScalesInPlace.apply(z, target) * 3
sizes = []
for _ in range(4):
    (dz,) = torch.autograd.grad(loss, z, retain_graph=True)
    sizes.append(float(dz.norm()))
fig, ax = course.figure(6, 2.2)
ax.bar(range(1, 5), sizes)
ax.set(xlabel="backward through the same graph", ylabel="‖dz‖", yscale="log", xticks=range(1, 5), title="scaled once more each time")
fig

# %% [markdown]
# ### Exercise 10.2
#
# **Specification.** `linear_in_the_cotangent(fn, x) -> None`: raise AssertionError unless the gradient of `fn(x)` (a scalar) for an upstream gradient of 3 is three times that for 1, and
# the same when asked again through one graph. Compare with `torch.allclose`.


# %%
def linear_in_the_cotangent(fn, x):
    raise NotImplementedError  # your code here


course.check("10.2", linear_in_the_cotangent)

# %% [markdown]
# ## 3. Cotangents that are not contiguous
#
# `y.sum().backward()` hands the backward an *expanded* tensor: one number, all strides 0. A kernel that takes it for contiguous reads what lies
# behind that number. And `y.T` hands it a transposed one.

# %%
y = torch.randn(2, 3, requires_grad=True)
seen = []
hooked = y * 1
hooked.register_hook(lambda g: seen.append((tuple(g.shape), g.stride())))
hooked.sum().backward()
print("the cotangent of a sum: shape", seen[0][0], "strides", seen[0][1])

# %% [markdown]
# ### Exercise 10.3
#
# **Specification.** `takes_any_strides(op, x) -> None`: `op` has `op.fwd(x) -> (y, res)` and `op.bwd(res, dy) -> dx`. Raise AssertionError unless `bwd` gives the same for a dy of ones that is
# contiguous, expanded, and transposed in memory; and unless `fwd` gives the same for an x of other strides.


# %%
def takes_any_strides(op, x):
    raise NotImplementedError  # your code here


course.check("10.3", takes_any_strides)

# %% [markdown]
# ## 4. Offsets of 32 bits
#
# `row * stride` is a product of two 32-bit numbers in a kernel, unless one is widened. For logits of 128,256 words, which row is the first to
# come out negative? Count, then look:

# %%
V = 128256
rows = torch.tensor([16743, 16744], dtype=torch.int32)
print("row · V in 32 bits:", (rows * V).tolist(), " in 64:", (rows.long() * V).tolist())
print("first row beyond 2³¹:", -(-(2**31) // V))

# %% [markdown]
# ## 5. Sums of 16 bits
#
# Lesson 8: a sum over many chunks in bf16. Here the error of `dw` of 4096 rows, by the block of rows that one bf16 addition takes, against plain
# PyTorch's own error: the rule says where it is too much, with no tolerance chosen.

# %%
rows64 = torch.randn(4096, 32, dtype=torch.float64)
exact = rows64.sum(0)
blocks = [1, 4, 16, 64, 256, 1024, 4096]
errors = []
for block in blocks:
    total = torch.zeros(32, dtype=torch.bfloat16)
    for part in rows64.bfloat16().float().split(block):
        total = total + part.sum(0).bfloat16()
    errors.append(float((total.double() - exact).norm() / exact.norm()))
plain = float((rows64.bfloat16().sum(0).double() - exact).norm() / exact.norm())
fig, ax = course.figure(7, 2.6)
ax.plot(blocks, errors, "o-", label="sum of blocks, in bf16")
ax.axhline(plain + 2**-9, color=course.INK, linestyle="--", linewidth=0.8, label="allowed: plain PyTorch + one rounding")
ax.set(xscale="log", yscale="log", xlabel="rows in a block", ylabel="error against fp64")
ax.legend()
fig

# %% [markdown]
# ### Exercise 10.4
#
# **Specification.** `exact_enough(ours, naive, truth) -> None`: the library's rule, for one tensor: raise AssertionError unless
# $\|ours - truth\| \le \|naive - truth\| + u \|truth\|$ with $u$ half of `torch.finfo(ours.dtype).eps`, all in fp64; and unless ours has naive's dtype and shape, and NaN
# nowhere where truth has none. (NaN compares false with everything: write the comparison so that it fails.)


# %%
def exact_enough(ours, naive, truth):
    raise NotImplementedError  # your code here


course.check("10.4", exact_enough)

# %% [markdown]
# ## 6 to 10, in a line each
#
# - **A batch with every target ignored**: 0/0 is NaN, and the optimizer spreads it. A silent 0 from code that never looked is luck.
# - **A target out of range** reads somebody's memory: a plausible loss. Here: an error on a CPU, NaN on a GPU.
# - **Frozen inputs**: with x frozen, W still needs its gradient, and a frozen W must cost nothing.
# - **Partial rotary** with tables for the whole head: broadcasting makes it run, and wrong. Check the tables' width.
# - **A second derivative** that returns zeros. It must raise.
#
# The library, asked for each:

# %%
x, W = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
print("all ignored:", float(liger_fn.linear_cross_entropy(x, W, torch.full((3,), -100)).detach()))


def ask(what, call):
    try:
        call()
        print(f"{what}: no error")
    except (ValueError, RuntimeError, IndexError) as error:
        print(f"{what}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")


ask("target 7 of 5", lambda: liger_fn.linear_cross_entropy(x, W, torch.tensor([0, 7, 1])))
ask("wide tables", lambda: liger_fn.rope(torch.randn(1, 2, 3, 8), None, *torch.randn(2, 1, 3, 16)))
dy = torch.ones(3, 4, requires_grad=True)
(dx,) = torch.autograd.grad(liger_fn.rms_norm(x), x, dy, create_graph=True)
ask("twice differentiated", lambda: dx.sum().backward())
liger_fn.linear_cross_entropy(x.detach(), W, torch.tensor([0, 1, 2])).backward()
print("x frozen, W's gradient is there:", W.grad is not None)

# %% [markdown]
# The library's own tests of these kinds are one list that every function passes, the *contract*. Its rule for numbers is short; read it
# beside your 10.4:

# %%
course.show_source("numerics.py", "assert_near", package="tests")

# %% [markdown]
# ## Summary
#
# - Compare bytes for purity, and fp64 for numbers.
# - Ask twice, with an upstream gradient of 3, through strides that are not yours.
# - A test that has never failed has shown nothing: break the code, and see it fail.
#
# Next, lesson 11: once it is right, fast.
