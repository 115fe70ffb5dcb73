# %% [markdown]
# # 1. Pure functions with explicit gradients
#
# At the end you can write a function's backward by hand, check it against finite differences and fp64, and say what it keeps in between.
# You need Python, PyTorch and derivatives. No kernel yet: those begin in lesson 3. 25 minutes.
#
# **How the course works.** Each part has a formula, a picture, a specification, and a stub: a function whose body you write. The last line of
# the stub's cell runs a check on what you wrote. It says what is wrong, not only that it is. Before you begin, it shows a hint. Solutions are
# in `notebooks/course/solutions`; look there after you tried.

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
# $y = f(a, b)$ and a loss $L$, write $dy$ for $\partial L/\partial y$, and $da$, $db$ for the other two gradients. With tensors read as columns of
# numbers, the chain rule is a product of a row and the matrix of all partial derivatives, the Jacobian: the **vector-Jacobian product**
#
# $$da^T = dy^T \frac{\partial y}{\partial a}.$$
#
# What the backward needs from the forward are **residuals**. So a differentiable function is a pair:
#
# $$(y, res) = fwd(a, b), \qquad (da, db) = bwd(res, dy).$$
#
# **Picture.** The Jacobian $\partial y / \partial x$ of two functions of 8 numbers: silu, which takes each number alone, and softmax. $y_i$ is in
# row $i$, $x_j$ in column $j$; blue is positive, red negative, white zero. Which of the two needs a sum in its backward?

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
# silu's is a diagonal: each gradient is one product. Softmax fills the matrix: each gradient is a sum down a column. Either way the backward
# is the row $dy^T$ times this matrix. Here is that product for softmax (each panel with a colour scale of its own), and what
# `torch.func.vjp` gives.

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
# Nobody builds the matrix. In the MLP of Llama 3 8B a token is 14336 numbers wide. For silu of 8192 tokens, how many numbers would the
# Jacobian have? Count first.

# %%
n = 8192 * 14336
print(f"{n:,} numbers in, as many out: a matrix of {n * n:.1e}")

# %% [markdown]
# ## SwiGLU
#
# **Formula.** A Llama's MLP multiplies its input by two matrices, which gives $gate$ and $up$, tensors of one shape. SwiGLU joins the two,
# element by element, with $\sigma(a) = 1/(1 + e^{-a})$:
#
# $$y = silu(gate) \cdot up, \qquad silu(a) = a\,\sigma(a).$$
#
# For the backward we need $silu'$. By the product rule and $\sigma' = \sigma(1 - \sigma)$:
#
# $$silu'(a) = \sigma(a) + a\,\sigma(a)(1 - \sigma(a)) = \sigma(a)\,(1 + a\,(1 - \sigma(a))).$$
#
# From $y = silu(gate) \cdot up$ and $silu'$ write down $dgate$ and $dup$ on paper. Exercise 1.2 asks for them.

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
# **Specification.** `forward(gate, up) -> (y, residuals)`: tensors of any one shape. `residuals` is a tuple of what both of your gradients
# read besides $dy$: two tensors of that shape are enough, and more are too many. Change neither input.


# %%
def forward(gate, up):
    raise NotImplementedError  # your code here


course.check("1.1", forward)

# %% [markdown]
# ### Exercise 1.2
#
# **Specification.** `backward(residuals, dy) -> (dgate, dup)`, where `residuals = (gate, up)` and all are tensors of one shape and dtype; so
# are the results. Use your formulas, not autograd; compute in the dtype that came.


# %%
def backward(residuals, dy):
    gate, up = residuals
    raise NotImplementedError  # your code here


course.check("1.2", backward)

# %% [markdown]
# What does a wrong answer look like? Here is one that forgot that silu is a product, and its check. *Its error* is $\lVert got - truth \rVert$,
# the root of the sum of squares; the other number is what rounding alone may make of it.


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
# Here $e_i$ is 1 at element $i$ and 0 elsewhere. The error is about $h^2$ from the curve, plus $u/h$ from rounding, where $u$ is the largest
# relative error of one rounding: $10^{-16}$ in fp64, $6 \cdot 10^{-8}$ in fp32. Predict: at which $h$ is the sum smallest, in each?

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
# The two parts are equal where $h^3 = u$: at $5 \cdot 10^{-6}$ in fp64, at $4 \cdot 10^{-3}$ in fp32. The error there is about $u^{2/3}$: eleven
# digits are right in fp64, five in fp32. (Left of $3 \cdot 10^{-8}$, half the spacing of fp32 at 0.7, $a + h$ rounds to $a$: the difference is
# 0, and the error is the slope itself.)
#
# Five digits are too few to tell a right gradient from a nearly right one. So the check has two steps. Finite differences in fp64 check the
# formula. Then the formula in fp64 is the **truth** with which fp32 or bf16 is compared.
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
# `liger_fn.swiglu` carries its pair, `fwd` and `bwd`. The function itself is differentiable, also under `torch.func`. Its residuals are `gate`
# and `up`, as yours, and the options of the call.

# %%
gate, up = torch.randn(2, 3, 4)
y, residuals = liger_fn.swiglu.fwd(gate, up)
print("residuals:", residuals._fields)
dgate, dup = liger_fn.swiglu.bwd(residuals, torch.ones_like(y))
by_func = torch.func.grad(lambda g: liger_fn.swiglu(g, up).sum())(gate)
print("bwd gives what torch.func.grad gives:", torch.equal(dgate, by_func))
per_row = torch.func.vmap(torch.func.grad(lambda g, u: liger_fn.swiglu(g, u).sum()))(gate, up)
print("so does the gradient of each row alone, by torch.func.vmap:", torch.equal(dgate, per_row))

# %% [markdown]
# How is such a function declared? `swiglu` has the decorator `_glu`, printed below; its own body only checks its arguments. `custom_vjp` takes
# the residuals' type, the pair over kernels, the pair in plain PyTorch, and the definition, `reference`. `diff=2`: the first two arguments have
# gradients. `outputs`, `gradients` and `cotangents` tell a compiler the shapes of $y$, of the gradients and of $dy$.

# %%
course.show_source("glu.py", "_glu", "_reference")

# %% [markdown]
# How does a pair become something that `.backward()` can walk through? PyTorch's way is a class with two static methods. `ctx` carries the
# residuals from one to the other:


# %%
class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        y, residuals = liger_fn.swiglu.fwd(gate, up)
        ctx.save_for_backward(*residuals[:2])
        ctx.kind, ctx.options = type(residuals), residuals[2:]
        return y

    @staticmethod
    def backward(ctx, dy):
        return liger_fn.swiglu.bwd(ctx.kind(*ctx.saved_tensors, *ctx.options), dy)


leaf = gate.clone().requires_grad_()
SwiGLU.apply(leaf, up).sum().backward()
print("through autograd, the same:", torch.equal(leaf.grad, dgate))

# %% [markdown]
# The library writes this class once for all its functions. Find the same lines below: `pairs[backend]` holds the pair;
# `save_for_backward` keeps the residuals that are tensors, `ctx.rest` the others. What is new:
#
# - `needs` says which gradients are wanted at all; the others are not computed.
# - `not keep_graph()` is true where this backward frees the graph: then `bwd` may write over what `fwd` computed, as nobody reads it again.
# - `seen` takes another path, for compilers and transforms such as `vmap`.
# - Below `_grad_enabled()`, `refuse` makes a second derivative an error. Without it, autograd would take the gradients for constants.

# %%
course.show_source("_vjp.py", "_lean")

# %% [markdown]
# ## Purity, and donation
#
# Why so strict? Autograd hands one tensor to many readers. If a backward writes over `gate` to save memory, the next reader of `gate` finds
# other numbers. PyTorch guards its own in-place functions: each raises the tensor's **version**, a count, and a backward that finds another
# version than its forward saw is an error. But a kernel writes by address and raises nothing:

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
# No error, and a wrong gradient: both readers found zeros, and $2 \cdot 0 + silu'(0) = 0.5$. Where memory must be reused, the caller has to
# say that nobody reads it again. JAX calls that **donation**; here it is `donate=True`. `swiglu`'s backward then writes `dgate` over `gate`
# (never over a leaf, so the cell clones one) and *raises its version*. A second reader that kept `gate` gets an error instead of a wrong
# number. Predict what each of the two lines prints:

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
# - Finite differences in fp64 check a formula. The formula in fp64 is the truth for every other dtype.
# - Writing over a tensor is a promise about every other reader. Donation makes the caller give that promise.
#
# Next, lesson 2: what such a function costs on a GPU, before any is written.
