# %% [markdown]
# # 6. Gated units: fusing, keeping, forgetting
#
# At the end you can derive the gradient of any gate, measure what a layer keeps for its backward, write an MLP that keeps half of that, and say
# when a backward may write over its inputs. You need lessons 1 and 3. 25 minutes.
#
# A Llama's **MLP** takes $x$ `[N, H]` (N tokens) through three matrix products, with one elementwise function between them:
#
# $$g = x W_g^T, \qquad u = x W_u^T, \qquad h = \mathrm{silu}(g) \cdot u, \qquad y = h\, W_d^T.$$
#
# $g$ and $u$ are called gate and up; $h$ is a **gated linear unit** (GLU). All three are `[N, I]`, where $I$ is 3.5 H in Llama 3: the widest
# arrays of a layer. So this is where memory goes.

# %%
from functools import partial

import course  # before triton
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from einops import rearrange
from torch.utils.checkpoint import checkpoint

import liger_fn

_ = torch.manual_seed(0)
DEVICE = course.DEVICE

# %% [markdown]
# ## Gradients of a gate
#
# **Formula.** For $y = act(g) \cdot u$, elementwise, the product rule gives
#
# $$dg = dy \; u \; act'(g), \qquad du = dy \; act(g).$$
#
# Only $act$ and its slope $act'$ differ between gates. **silu** is $a\,\sigma(a)$ with $\sigma(a) = 1/(1 + e^{-a})$. First $\sigma$:
#
# $$\sigma' = \frac{e^{-a}}{(1 + e^{-a})^2} = \sigma\,(1 - \sigma), \qquad\text{since}\qquad 1 - \sigma = \frac{e^{-a}}{1 + e^{-a}} = \sigma(-a).$$
#
# Then the product rule: $\mathrm{silu}' = \sigma + a\,\sigma\,(1 - \sigma)$.
#
# **gelu** is $a\,\Phi(a)$, where $\Phi$ is the share of a normal distribution below $a$. The slope of $\Phi$ is the density $\varphi$, so
#
# $$\mathrm{gelu}' = \Phi + a\,\varphi, \qquad \Phi(a) = \tfrac12\left(1 + \mathrm{erf}\tfrac{a}{\sqrt2}\right), \qquad
#   \varphi(a) = \tfrac{1}{\sqrt{2\pi}}\,e^{-a^2/2}.$$
#
# Gemma uses an approximation, $\Phi \approx \tfrac12 (1 + \tanh v)$ with $v = \sqrt{2/\pi}\,(a + 0.044715\,a^3)$. Because
# $\tfrac12 (1 + \tanh v) = \sigma(2v)$, that is silu's form again: $a\,\sigma(p)$ with $p = 2v$, and slope $\sigma + a\,\sigma\,(1 - \sigma)\,p'$.
#
# **Picture.** The gates, their slopes, and what the approximation is off by. Predict: can a slope be above 1?

# %%
a = torch.linspace(-5, 5, 400, dtype=torch.float64, requires_grad=True)
gates = {"silu": F.silu, "gelu": F.gelu, "gelu by tanh": lambda a: F.gelu(a, approximate="tanh")}
p, dp = (8 / torch.pi) ** 0.5 * (a + 0.044715 * a**3), (8 / torch.pi) ** 0.5 * (1 + 3 * 0.044715 * a**2)
normal, density = 0.5 * (1 + torch.erf(a / 2**0.5)), torch.exp(-(a**2) / 2) / (2 * torch.pi) ** 0.5
s, sp = torch.sigmoid(a), torch.sigmoid(p)
by_hand = {"silu": s + a * s * (1 - s), "gelu": normal + a * density, "gelu by tanh": sp + a * sp * (1 - sp) * dp}
fig, axes = course.figure(8.5, 2.7, columns=3)
for n, (name, act) in enumerate(gates.items()):
    slope = torch.autograd.grad(act(a).sum(), a)[0]
    print(f"{name:<13} formula − autograd: at most {float((by_hand[name] - slope).detach().abs().max()):.0e}")
    style = {"linestyle": "--" if n == 2 else "-", "label": name}
    axes[0].plot(a.detach(), act(a).detach(), **style)
    axes[1].plot(a.detach(), slope, **style)
off = (gates["gelu by tanh"](a) - F.gelu(a)).detach()
axes[2].plot(a.detach(), off * 1e4, color=course.PALETTE[2])
for ax, title in zip(axes, ("gate", "slope", "tanh − exact, in 10⁻⁴"), strict=True):
    ax.set(title=title, xlabel="a")
axes[0].legend(fontsize=8)
fig

# %% [markdown]
# It can: silu's reaches 1.10 near 2.4, gelu's 1.13 at √2. The approximation is off by less than 5 · 10⁻⁴: little at the
# right, but at a = −2.7, where gelu itself is −0.009, one part in 20. A model needs the one it was trained with.
#
# Notice what the formulas need: $g$, $u$ and $dy$. Neither $act(g)$ nor $y$. A kernel that has loaded $g$ computes the activation again for nothing:
# it waits for memory anyway.
#
# ### Exercise 6.1
#
# **Specification.** `geglu_backward(gate: [n], up: [n], dy: [n]) -> (dgate: [n], dup: [n])`: one kernel, fp32, for the exact gelu. `tl.erf` and
# `tl.exp` are there. n is any number: mask the last block.


# %%
@triton.jit
def geglu_backward_kernel(gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, n, BLOCK: tl.constexpr):
    pass  # your code here


def geglu_backward(gate, up, dy):
    raise NotImplementedError  # remove this line when the kernel is written
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    n = gate.numel()
    geglu_backward_kernel[(triton.cdiv(n, 64),)](gate, up, dy, dgate, dup, n, BLOCK=64)
    return dgate, dup


course.check("6.1", geglu_backward)

# %% [markdown]
# The library's activations, all of them in one function that returns the value and the slope:

# %%
course.show_source("_glu_rows.py", "_activation")

# %% [markdown]
# - `ACT` is a `tl.constexpr`: the branch is taken when the kernel is compiled, and one gate's code is left. A forward that throws the slope away
#   does not compute it either: the compiler removes what nobody reads.
# - The last branch is $a\,\sigma(p)$ for both silu ($p = a$, $p' = 1$) and gelu by tanh, as derived above.
# - `t = exp(-|p|)` is at most 1: nothing overflows, whichever sign $p$ has.
# - `t * r` is $\sigma(-p)$, written out. `1 - s` is the same number on paper. In fp32, where $s$ is close to 1, it is what rounding left. Predict
#   $1 - \sigma(a)$ for $a = 20$ in fp32, where $\sigma(-20) \approx 2 \cdot 10^{-9}$ and the spacing below 1 is $6 \cdot 10^{-8}$.

# %%
for value in (5.0, 10.0, 20.0):
    at = torch.tensor(value)
    print(f"a = {value:>4}:  1 − σ(a) = {float(1 - torch.sigmoid(at)):.6e}    σ(−a) = {float(torch.sigmoid(-at)):.6e}")

# %% [markdown]
# The backward kernel that calls it serves all gates, packed or not, and the backward of the whole MLP too:

# %%
course.show_source("_glu_rows.py", "_glu_bwd_kernel")

# %% [markdown]
# - The comment says what makes donation possible, below: all loads stand before all stores.
# - `_place` gives this program's row and columns. Strides, one for each tensor, let a row be half of a longer one.
# - `PACKED`: gate and up are halves of each row; one pointer moved by `H` is all it takes.
# - `if dgate_ptr is not None`: a gradient that nobody wants is a pointer that is None, known at compile time: neither computed nor written. `dup` alone
#   does not even load up.
# - `y_ptr`: the forward's result, made again. Its reader is the next section.
#
# ## What a layer keeps
#
# Eager PyTorch runs the gate as two functions, $a = \mathrm{silu}(g)$ and $h = a \cdot u$. Count arrays of `[N, I]` that move forward: read g, write a, read a
# and u, write h: 5. One fused kernel reads g and u and writes h: 3.
#
# And what stays in memory until backward? Every function saves what its own backward will read (lesson 1: the residuals). Predict, before the
# next cell, how many arrays of `[N, I]` each of these keeps:
#
# - `eager`: F.silu, a product, and F.linear around them. (What does the backward of a product of two tensors need? Of `h @ W_d.T`?)
# - `fused`: `liger_fn.swiglu` in the middle.
# - `one function`: `liger_fn.swiglu_mlp`, the whole MLP, which makes h again in its backward.
# - `checkpoint`: PyTorch's function that keeps the inputs alone, and runs the forward a second time when backward comes.
#
# `saved_tensors_hooks` hands us each tensor that autograd saves:


# %%
def kept(fn, *inputs):
    """The bytes that autograd holds when `fn` has run, beyond its inputs; each memory counts once."""
    own = {t.untyped_storage().data_ptr() for t in inputs}
    found = {}

    def pack(t):
        memory = t.untyped_storage()
        if memory.data_ptr() not in own:
            found[memory.data_ptr()] = (memory.nbytes(), t)  # t is held, or its address could be given to another
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fn(*inputs)
    return sum(size for size, _ in found.values())


def eager(x, w_gate, w_up, w_down):
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def fused(x, w_gate, w_up, w_down):
    return F.linear(liger_fn.swiglu(F.linear(x, w_gate), F.linear(x, w_up)), w_down)


checkpointed = partial(checkpoint, eager, use_reentrant=False)
N, H, I = 32, 64, 224
inputs = [torch.randn(n, m, device=DEVICE, requires_grad=True) for n, m in ((N, H), (I, H), (I, H), (H, I))]
ways = {"eager": eager, "fused": fused, "one function": liger_fn.swiglu_mlp, "checkpoint": checkpointed}
products = {"eager": 9, "fused": 9, "one function": 9, "checkpoint": 11}  # matrix products, forward and backward
arrays = {name: kept(fn, *inputs) / (N * I * 4) for name, fn in ways.items()}

fig, ax = course.figure(7.5, 2.6)
bars = ax.barh(list(ways), list(arrays.values()), color=course.PALETTE[1])
ax.bar_label(bars, [f"{arrays[n]:.0f} kept, {products[n]} matrix products" for n in ways], padding=4)
ax.invert_yaxis()
ax.set(xlabel="arrays of [N, I] kept for backward", xlim=(0, 6))
fig

# %% [markdown]
# - **eager, 4**: g (for silu), a and u (for the product: each factor's gradient needs the other), h (for $dW_d = dy^T h$).
# - **fused, 3**: a is gone. h stays: it is an input of the next matrix product, and that is another function.
# - **one function, 2**: the product is inside, so h can go too. One elementwise pass is little beside matrix products.
# - **checkpoint, 0**: but $g$ and $u$ are matrix products, and to make them again costs 2 more beside 9 (3 forward, 6 backward): 22% more
#   arithmetic. (It stops before the third: nobody needs y.)
#
# **Recomputation** is that trade: what is cheap to make again, beside reading it, is not worth keeping. In numbers, for all layers of a Llama of 8B parameters:

# %%
tokens, inner, layers = 8192, 14336, 32
for name, count in arrays.items():
    print(f"{name:<13} {count * layers * tokens * inner * 2 / 2**30:5.1f} GiB in bf16, for {tokens} tokens and {layers} layers")

# %% [markdown]
# ### Exercise 6.2
#
# **Formula.** The backward of the MLP. (A product $c = a\,b^T$ has $da = dc\,b$ and $db = dc^T a$.)
#
# $$dh = dy\,W_d, \qquad dg,\ du \text{ from } dh \text{ as above}, \qquad dx = dg\,W_g + du\,W_u,$$
# $$dW_d = dy^T h, \qquad dW_g = dg^T x, \qquad dW_u = du^T x.$$
#
# **Specification.** `mlp(x: [N, H], w_gate: [I, H], w_up: [I, H], w_down: [H, I]) -> y: [N, H]`, differentiable in all four, in PyTorch, as a
# `torch.autograd.Function`. Beyond its inputs it keeps two arrays of `[N, I]`, by `ctx.save_for_backward`: what stands on `ctx` as an attribute is
# seen neither by hooks nor by those who offload memory with them. Derivatives by the formulas, not by autograd.


# %%
class MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_gate, w_up, w_down):
        raise NotImplementedError  # your code here

    @staticmethod
    def backward(ctx, dy):
        raise NotImplementedError  # your code here: (dx, dw_gate, dw_up, dw_down)


def mlp(x, w_gate, w_up, w_down):
    return MLP.apply(x, w_gate, w_up, w_down)


course.check("6.2", mlp)

# %% [markdown]
# The library's. Find the six products of the backward, and where h comes from:

# %%
course.show_source("swiglu_mlp.py", "_kernel_grads", "_bwd")

# %% [markdown]
# - `_kernel_grads` calls the kernel above. `h = dh if needs[2]`: h is written *over dh*, which this function made itself and needs no more.
# - `dg, du`: over `g` and `u` if `donate` says that nobody will read them again; here they are the function's own residuals, which autograd frees
#   after this backward. So a backward of three results takes one array of `[N, I]` of its own: dh.
# - `inner` says which of dg, du and h are wanted at all: with frozen weights (LoRA), h and three products go.
#
# ## Packed halves
#
# Some models (Phi-3) make gate and up by one product: $x W^T$ is `[N, 2I]`, with gate in the left half of each row and up in the right.
# `einops` says it as a view, and a kernel that takes a stride reads each half where it is:

# %%
packed = torch.randn(4, 2 * 6)
gate, up = rearrange(packed, "n (half i) -> half n i", half=2)
print("rows of gate are", gate.stride(0), "apart;", "up begins", up.storage_offset(), "later; contiguous:", gate.is_contiguous())
fig, ax = course.figure(6, 2.0)
place = rearrange(torch.arange(48).view(4, 12), "n (half i) -> half (n i)", half=2)
course.access(ax, place.tolist(), 12, "0: gate, 1: up; a line is a row")
fig

# %% [markdown]
# The gradient has to be packed in the same way, since the projection has one gradient. Two separate gradients and a `torch.cat` would do. Count
# first: how many arrays of `[N, I]` does the backward move at the least (read gate, up, dy; write two), and how many does `cat` add?
#
# ### Exercise 6.3
#
# **Specification.** `packed_backward(gate_up: [N, 2I], dy: [N, I]) -> dgate_up: [N, 2I]`, for SwiGLU, in PyTorch, any float dtype. Allocate the
# result once and write each half into a view of it. No `torch.cat`: it reads two arrays and writes two, 4 beside 5.


# %%
def packed_backward(gate_up, dy):
    raise NotImplementedError  # your code here


course.check("6.3", packed_backward)

# %% [markdown]
# ## Writing over the inputs: donation
#
# The backward reads gate, up and dy, and writes dgate and dup: 5 arrays at once. Element by element, so each result fits where an input was:
# 3 arrays. It is right if nobody reads gate and up again, and only the caller knows. **Donation** is the caller's word for it: in
# `liger_fn.swiglu(gate, up, donate=True)`. A patched MLP gives it where plain linear layers without hooks made gate and up: who else could have them?
#
# Predict for each line of the next cell whether dgate lies in gate's memory: a plain call; a donated one; a donated one whose graph is kept for a second
# backward (`retain_graph`); a donated one of a gate that is a **leaf** (made by the caller, as a parameter is).


# %%
def in_its_memory(leaf=False, donate=True, retain_graph=False):
    gate, up = (torch.randn(8, 64, device=DEVICE, requires_grad=True) for _ in range(2))
    if not leaf:
        gate, up = gate * 1.0, up * 1.0
    y = liger_fn.swiglu(gate, up, donate=donate)
    dgate, _ = torch.autograd.grad(y.sum(), (gate, up), retain_graph=retain_graph)
    return dgate.data_ptr() == gate.data_ptr()


for how in ({"donate": False}, {}, {"retain_graph": True}, {"leaf": True}):
    print(in_its_memory(**how), how or "donated")

# %% [markdown]
# And if the word was wrong? Here `gate * gate` saved gate too. A kernel writes by address, which PyTorch's version counter does not see (lesson
# 1). So the library counts the version up itself, and the other reader raises an error in place of a wrong gradient:

# %%
leaf = torch.randn(8, 64, device=DEVICE, requires_grad=True)
gate, up = leaf * 1.0, leaf * 2.0
other = (gate * gate).sum()
(liger_fn.swiglu(gate, up, donate=True).sum()).backward(inputs=[leaf])
try:
    other.backward()
except RuntimeError as error:
    print(str(error).split(":")[0])

# %%
course.show_source("glu.py", "_bwd")
course.show_source("_glu_rows.py", "reusable", "overwritten")

# %% [markdown]
# - `donate and mine`: `mine` is the caller's word, `donate` is autograd's: the graph is freed by this backward.
# - `reusable` refuses a copy (`rows` is not the tensor's own memory), rows that overlap (`stride(0) < h`: an expanded tensor), a leaf, and memory
#   that another tensor of this kernel shares: a program would read what another has written.
# - `overwritten` counts the versions up.
#
# ### Exercise 6.4
#
# **Specification.** `in_place(gate: [n], up: [n], dh: [n]) -> (dgate, dup, h)`, fp32, SwiGLU, one kernel, no new memory: dgate over gate, dup over up,
# and h, the forward's result made again, over dh. This is what the backward of the whole MLP runs. Nothing beyond the n elements may be written.


# %%
@triton.jit
def in_place_kernel(gate_ptr, up_ptr, dh_ptr, n, BLOCK: tl.constexpr):
    pass  # your code here


def in_place(gate, up, dh):
    raise NotImplementedError  # remove this line when the kernel is written
    n = gate.numel()
    in_place_kernel[(triton.cdiv(n, 64),)](gate, up, dh, n, BLOCK=64)
    return gate, up, dh


course.check("6.4", in_place)

# %% [markdown]
# ## On a GPU
#
# Forward and backward move 8 arrays at the least (2 in, 1 out; 3 in, 2 out). Eager backward runs two products and one function for silu: count what it
# moves, and predict how many times the floor it takes. The floor is 8 arrays at 3.35 TB/s; the arrays are 8192 x 14336, in bf16.


# %%
def prepare(fn):
    def ready():
        g, u, dy = torch.randn(3, 8192, 14336, device="cuda", dtype=torch.bfloat16)
        g, u = g.requires_grad_(), u.requires_grad_()
        return lambda: torch.autograd.grad(fn(g, u), (g, u), dy)

    return ready


moved = 8 * 2 * 8192 * 14336
rows = [
    ("F.silu(gate) * up", course.timed("6 swiglu eager", prepare(lambda g, u: F.silu(g) * u), bytes=moved)),
    ("liger_fn.swiglu", course.timed("6 swiglu", prepare(liger_fn.swiglu), bytes=moved)),
]
print(course.table(rows, floor=moved / 3.35e6))

# %% [markdown]
# Eager's count: forward 5, as above. Backward: two products of 3 arrays, and silu's backward, which reads two and writes one: 9. Together 14 where 8 are the
# least. Both rates are of the 8 arrays, so what eager moves beyond them shows as a lower rate.
#
# ## Summary
#
# - A gate's gradients follow from gate, up and dy: its backward computes the activation again, and keeps nothing more.
# - An input of a matrix product is kept, unless the function includes the product. Measure it with `saved_tensors_hooks`.
# - Recompute what is cheap beside reading it: h, yes; g and u cost 22% more arithmetic.
# - Views need strides, in the gradient as in the forward. Memory is written over only where its owner gave it away.
#
# Next, lesson 7: a row so long that no program holds it whole, and the largest array of all, the logits.
