# %% [markdown]
# # 1. Pure functions with explicit gradients
#
# At the end you can write a function's backward by hand, prove it against fp64 and finite differences, and say what it keeps in between.
# You need Python, PyTorch and derivatives. No kernel yet: those begin in lesson 3. 20 minutes.
#
# **How the course works.** Each part has a formula, a picture, a specification, and a stub: a function whose body you write. The last line of
# the stub's cell runs a check on what you wrote. It says what is wrong, not only that it is. Solutions are in
# `notebooks/course/solutions`; look there after you tried.

# %%
import course  # first, always: it chooses between the GPU and Triton's interpreter
import torch
import torch.nn.functional as F

import liger_fn

_ = torch.manual_seed(0)

# %% [markdown]
# ## A pair of pure functions
#
# A **pure** function's result depends on its arguments alone, and it changes nothing: no input, no hidden state. Call it twice, and you get
# the same bits.
#
# To train, we need its **backward**: given how the loss changes with the output, how does it change with each input? For
# $y = f(a, b)$ and $dy = \partial L/\partial y$ the chain rule gives the **vector-Jacobian product**
#
# $$da = dy^T \frac{\partial y}{\partial a}.$$
#
# What the backward needs from the forward are **residuals**. So a differentiable function is a pair:
#
# $$(y, res) = fwd(a, b), \qquad (da, db) = bwd(res, dy).$$
#
# **Picture.** The Jacobian $\partial y / \partial x$ of an elementwise function of 8 numbers, and of softmax: $y_i$ in row $i$, $x_j$ in column
# $j$. Which of the two needs a sum in its backward?

# %%
x = torch.randn(8, dtype=torch.float64)
fig, axes = course.figure(7, 2.8, columns=2)
for ax, (name, fn) in zip(axes, {"silu": F.silu, "softmax": lambda t: t.softmax(0)}.items(), strict=True):
    jacobian = torch.autograd.functional.jacobian(fn, x)
    limit = float(jacobian.abs().max())
    image = ax.imshow(jacobian, cmap="RdBu", vmin=-limit, vmax=limit)
    fig.colorbar(image, ax=ax, shrink=0.8)
    ax.set(title=f"∂y/∂x of {name}", xlabel="input", ylabel="output")
fig

# %% [markdown]
# The elementwise one is a diagonal: each gradient is one product. Softmax fills the matrix: each gradient is a sum down a column. Either way
# the backward is a row $dy^T$ times this matrix. Here is that product for softmax, and what `torch.func.vjp` gives.

# %%
dy = torch.randn(8, dtype=torch.float64)
jacobian = torch.autograd.functional.jacobian(lambda t: t.softmax(0), x)
dx = dy @ jacobian
(by_vjp,) = torch.func.vjp(lambda t: t.softmax(0), x)[1](dy)
print("the product and torch.func.vjp differ by at most", f"{float((dx - by_vjp).abs().max()):.0e}")
fig, axes = course.figure(7, 2.6, columns=3)
for ax, t, title in zip(axes, (dy[None], jacobian, dx[None]), ("dy, a row", "times ∂y/∂x", "is dx, a row"), strict=True):
    limit = float(t.abs().max())
    ax.imshow(t, cmap="RdBu", vmin=-limit, vmax=limit)
    ax.set(title=title, xticks=[], yticks=[])
fig

# %% [markdown]
# Nobody builds the matrix. For 8192 tokens of width 14336, as in a Llama 8B, how many numbers would it have? Count first.

# %%
n = 8192 * 14336
print(f"{n:,} numbers in, as many out: a matrix of {n * n:.1e}")

# %% [markdown]
# ## SwiGLU
#
# **Formula.** Half of a Llama's MLP, elementwise, with $\sigma(a) = 1/(1 + e^{-a})$:
#
# $$y = silu(gate) \cdot up, \qquad silu(a) = a\,\sigma(a).$$
#
# For the backward we need $silu'$. By the product rule and $\sigma' = \sigma(1 - \sigma)$:
#
# $$silu'(a) = \sigma(a) + a\,\sigma(a)(1 - \sigma(a)) = \sigma(a)\,(1 + a\,(1 - \sigma(a))).$$
#
# Hence $dup = dy \cdot silu(gate)$ and $dgate = dy \cdot up \cdot silu'(gate)$.

# %%
a = torch.linspace(-8, 8, 200, dtype=torch.float64)
sigma = torch.sigmoid(a)
fig, ax = course.figure(7, 2.8)
ax.plot(a, a * sigma, label="silu(a)")
ax.plot(a, sigma * (1 + a * (1 - sigma)), label="silu'(a)")
ax.axhline(0, color=course.INK, linewidth=0.6)
ax.legend()
ax.set(xlabel="a", title="silu dips below 0; its slope exceeds 1")
fig

# %% [markdown]
# ### Exercise 1.1
#
# **Specification.** `forward(gate, up) -> (y, residuals)`: tensors of any one shape; residuals are a tuple of what your backward will read, and
# no more than two tensors of that shape. Change neither input.


# %%
def forward(gate, up):
    raise NotImplementedError  # your code here


course.check("1.1", forward)

# %% [markdown]
# ### Exercise 1.2
#
# **Specification.** `backward(residuals, dy) -> (dgate, dup)`, where `residuals = (gate, up)`. Use the formulas above, not autograd; compute in the
# dtype that came. It must hold for a `dy` that is not 1.


# %%
def backward(residuals, dy):
    gate, up = residuals
    raise NotImplementedError  # your code here


course.check("1.2", backward)

# %% [markdown]
# What does a wrong answer look like? Here is one that forgot that silu is a product, and its check:


# %%
def forgot_the_product_rule(residuals, dy):
    gate, up = residuals
    s = torch.sigmoid(gate)
    return dy * up * s * (1 - s), dy * gate * s


course.check(key="1.2", answer=forgot_the_product_rule)

# %% [markdown]
# ## How do we know?
#
# **Finite differences.** The derivative's definition, with a step that is small, but not too small:
#
# $$\frac{\partial L}{\partial a_i} \approx \frac{L(a + h e_i) - L(a - h e_i)}{2h}.$$
#
# Its own error is about $h^2$ from the curve, plus $u/h$ from rounding, where $u$ is the dtype's rounding unit. Predict: where is the best
# $h$ in fp64, with $u \approx 10^{-16}$? And in fp32, with $u \approx 6 \cdot 10^{-8}$?

# %%
steps = torch.logspace(-12, 0, 49, dtype=torch.float64)
fig, ax = course.figure(7, 3)
for dtype, name in ((torch.float64, "fp64"), (torch.float32, "fp32")):
    point = torch.tensor(0.7, dtype=dtype)
    true = torch.func.grad(F.silu)(torch.tensor(0.7, dtype=torch.float64))
    error = [abs(float((F.silu(point + h.to(dtype)) - F.silu(point - h.to(dtype))) / (2 * h.to(dtype))) - float(true)) for h in steps]
    ax.plot(steps, [max(e, 1e-17) for e in error], label=name)
ax.set(xscale="log", yscale="log", xlabel="step h", ylabel="error of the slope", title="too large a step: curvature; too small: rounding")
ax.legend()
fig

# %% [markdown]
# At the best step fp64 gives some eleven digits, and fp32 some five: too few to tell a right gradient from a nearly right one. So the **truth** in this
# course is fp64, and a function in fp32 or bf16 is compared with that.
#
# **How near is near enough?** The library's rule: error at most that of plain PyTorch in the same dtype, plus one rounding of the result.
# No tolerance to choose, none to loosen.
#
# ### Exercise 1.3
#
# **Specification.** `slope(loss, a, h) -> tensor of a's shape`: central differences of a function `loss(a) -> scalar`, in a's dtype, without changing a.


# %%
def slope(loss, a, h=1e-5):
    raise NotImplementedError  # your code here


course.check("1.3", slope)

# %% [markdown]
# ## The library's pair
#
# `liger_fn.swiglu` carries its parts. `fwd` and `bwd` are explicit; the function itself is differentiable, also under `torch.func`.

# %%
gate, up = torch.randn(2, 3, 4)
y, residuals = liger_fn.swiglu.fwd(gate, up)
print("residuals:", residuals._fields)
dgate, dup = liger_fn.swiglu.bwd(residuals, torch.ones_like(y))
by_func = torch.func.grad(lambda g: liger_fn.swiglu(g, up).sum())(gate)
print("bwd = torch.func.grad?", torch.equal(dgate, by_func))
per_row = torch.func.vmap(torch.func.grad(lambda g, u: liger_fn.swiglu(g, u).sum()))(gate, up)
print("vmap(grad):", tuple(per_row.shape))

# %% [markdown]
# How one is declared. `custom_vjp` takes the residuals' type, the pair for kernels, the pair in plain PyTorch, and the reference; the body of
# the public function only checks its arguments.

# %%
course.show_source("glu.py", "_glu", "_reference")

# %% [markdown]
# What it makes of the pair, where nothing but plain autograd is at work. Read `forward` and `backward` below: `pairs[backend]` holds the pure
# functions. `save_for_backward` keeps the residuals that are tensors, `ctx.rest` the others. `needs` says which gradients are wanted at all.
# And where the graph is freed by this backward, `not keep_graph()` tells `bwd` that nobody reads what `fwd` computed again. (`seen` is the other
# path, for compilers and transforms such as `vmap`.)

# %%
course.show_source("_vjp.py", "_lean")

# %% [markdown]
# ## Purity, and donation
#
# Why so strict? Autograd hands one tensor to many readers. If a backward writes over `gate` to save memory, the next reader of `gate` gets
# another tensor. A kernel writes by address, so PyTorch's version counter, which guards its own in-place functions, notices nothing:

# %%
gate = torch.randn(4, requires_grad=True)
z = gate * 1.0
loss = (z * z).sum() + F.silu(z).sum()  # two readers of z
with torch.no_grad():
    z.detach().numpy()[:] = 0  # what a kernel's write looks like to PyTorch: nothing happened
loss.backward()
print("gradient:", gate.grad.tolist())
print("expected:", torch.func.grad(lambda g: (g * g).sum() + F.silu(g).sum())(gate.detach()).tolist())

# %% [markdown]
# No error, and a wrong gradient. Where memory must be reused, the caller has to say that nobody reads it again. JAX calls that **donation**;
# here it is `donate=True`. `swiglu`'s backward then writes `dgate` over `gate` where it may, and *raises its version*. So a second reader that
# kept `gate` gets an error instead of a wrong number. Predict what each of the two lines prints:

# %%
for donate in (False, True):
    leaf, up = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    gate = leaf.clone()
    square = (gate * gate).sum()  # the second reader
    liger_fn.swiglu(gate, up, donate=donate).sum().backward()
    try:
        square.backward()
        said = "the second reader has its gradient"
    except RuntimeError as error:
        said = str(error).split(":")[0]
    print(f"donate={donate}: gate's version is {gate._version}; {said}")

# %% [markdown]
# ## Summary
#
# - A differentiable function is a pair of pure functions, and residuals between them.
# - The truth is fp64. Finite differences prove a formula, and fp64 proves a dtype.
# - Writing over a tensor is a promise about every other reader. Donation makes the caller give that promise.
#
# Next, lesson 2: what such a function costs on a GPU, before any is written.
