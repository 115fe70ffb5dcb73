# %% [markdown]
# # 9. Patching a model that somebody else wrote
#
# At the end you can put a function into one instance of a model and take it out again, exchange a name inside a function without touching its
# module, prove a replacement before it is made, and describe an architecture as data. You need lessons 4 and 8, and have used Hugging Face
# models. 25 minutes.
#
# Lessons 4 to 8 made functions. A model does not call them: its code says `self.norm(x)`, in a file that you did not write and do not want to copy.

# %%
import copy
import dis
import inspect
import math
from dataclasses import replace
from types import MethodType

import course  # before triton
import torch
import transformers
from course.models09 import course_model, draw_answers, draw_kept, kept, train
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import liger_fn
import liger_patch
from liger_patch import _head, _rope, _swap, _view

transformers.logging.set_verbosity_error()


def plainly():
    """`with plainly():` runs liger_fn's functions by their definitions in plain PyTorch. Interpreted kernels would take half a minute here."""
    return liger_fn.use_backend("reference")


# %% [markdown]
# ## 1. Where to cut
#
# **Formula.** `module(x)` ends in `module.forward(x)`, and Python looks for `forward` in this order:
#
# $$\text{the instance's } \texttt{\_\_dict\_\_} \;\rightarrow\; \text{its class} \;\rightarrow\; \text{the classes that this inherits from.}$$
#
# So there are three places to change what `model.norm(x)` computes:
#
# 1. **the class**: `Norm.forward = mine`;
# 2. **the module tree**: another module in its place, `model.norm = Mine(model.norm.weight)`;
# 3. **the instance**: `model.norm.forward = MethodType(mine, model.norm)`, a method in this one object's `__dict__`. It hides the class's.
#
# A toy model, and seven questions to ask of each way after model A was patched. Write down which of the 21 answers are bad before you run it.


# %%
class Norm(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return 2 * self.weight * x


class Mine(Norm):
    def forward(self, x):
        return mine(self, x)


def mine(module, x):
    return 3 * module.weight * x


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Norm(nn.Parameter(torch.ones(4)))

    def forward(self, x):
        return self.norm(x)


WAYS = {
    "class": lambda model: setattr(Norm, "forward", mine),
    "tree": lambda model: setattr(model, "norm", Mine(model.norm.weight)),
    "instance": lambda model: setattr(model.norm, "forward", MethodType(mine, model.norm)),
}


def questions(patch):
    """What is so after A was patched: question → good?"""
    stock, x, calls = Norm.forward, torch.ones(4), []
    a, b = Toy(), Toy()
    held, names = a.norm, list(a.state_dict())
    a.norm.register_forward_hook(lambda *_: calls.append(1))
    patch(a)
    c = Toy()
    found = {
        "A computes the new function": a(x)[0] == 3,
        "B, made before, is stock": b(x)[0] == 2,
        "C, made later, is stock": c(x)[0] == 2,
        "parameters keep their names": list(a.state_dict()) == names,
        "type(A.norm) is Norm": type(a.norm) is Norm,
        "A's hook still runs": len(calls) == 1,
        "whoever holds A.norm has it patched": held is a.norm,
    }
    Norm.forward = stock
    return {question: bool(good) for question, good in found.items()}


answers = {way: questions(patch) for way, patch in WAYS.items()}
draw_answers(answers)

# %% [markdown]
# **By class**, B changes, which may be the reference that you compare with, and so do models that are made later. **By tree**, hooks are lost, and an `isinstance` or a list
# somewhere still means the old module. **By instance**, all is well. It has one trap: with `lambda x: mine(model.norm, x)` in place of a method, all
# seven answers are the same, but a deep copy (an EMA, a reference policy) computes with the *original's* weights. A method is copied with its object; what a
# lambda closes over is not.
#
# ### Exercise 9.1
#
# **Specification.** `patch(module, function) -> undo`. From now on this instance's `forward(*args, **kwargs)` is `function(module, *args, **kwargs)`; a deep copy of it is
# patched too, and computes with its own parameters. `undo()` makes the instance what it was, also if it had a `forward` of its own before. No other
# instance sees any of it.


# %%
def patch(module, function):
    raise NotImplementedError  # your code here


course.check("9.1", patch)

# %% [markdown]
# The library's. `Swap` is one attribute of one module. `before` is a tuple, since "nothing stood here" must differ from "None stood here", also after
# a copy. `remove` either puts the old value back or deletes the entry, so that the class's forward shows again; its middle branch is for
# accelerate, which may have moved the forward to another name meanwhile. `_method` makes what is put there: a function with the class's *signature*,
# because trainers ask `inspect.signature(model.forward)` which columns of a data set it takes, and `*args` would tell them nothing.

# %%
print(inspect.getsource(_swap.Swap.__init__), inspect.getsource(_swap.Swap.remove), sep="\n")
course.show_source("_swap.py", "_method", package="liger_patch")

# %% [markdown]
# ## 2. A name inside a function: views
#
# RoPE is no module. Attention's forward calls a function that it finds by name in its file:

# %%
source = inspect.getsource(modeling_llama.LlamaAttention.forward).splitlines()
print(*(line for line in source if "apply_rotary_pos_emb" in line), sep="\n")
print("lines of that forward:", len(source))

# %% [markdown]
# To set `modeling_llama.apply_rotary_pos_emb` is patching by class again: it changes every Llama in the process. To copy the forward is to maintain those
# lines for every architecture and every release. There is a third way.
#
# **Formula.** A Python function is
#
# $$\text{function} = \text{code} + \text{globals} + \text{defaults} + \text{closure},$$
#
# where *code* is the compiled body, *globals* the dictionary in which it looks up names of its module, and *closure* holds the variables of functions around
# it. `types.FunctionType(code, globals, name, defaults, closure)` puts the same code over another dictionary: a **view** of the module, in which one name means something
# else.
#
# Here are the names that attention's forward looks up, and what they mean to the original and to the function that `liger_patch` makes of it.

# %%
original = modeling_llama.LlamaAttention.forward
rebound = _view.rebind(original, "apply_rotary_pos_emb", _rope.half)
print("the same code object:", rebound.__code__ is original.__code__)
for name in dict.fromkeys(i.argval for i in dis.get_instructions(original) if i.opname == "LOAD_GLOBAL"):
    for who, function in (("original", original), ("view", rebound)):
        value = function.__globals__[name]
        print(f"{name:<24} {who:<9} {value.__module__}.{getattr(value, '__qualname__', type(value).__name__)}")

# %% [markdown]
# ### Exercise 9.2
#
# **Specification.** `rebind(function, name: str, replacement) -> function`: the same function in which the global `name` means `replacement`. The original and its module stay as they
# are. Defaults of arguments, also of keyword-only ones, the closure and all other globals are kept.


# %%
def rebind(function, name, replacement):
    raise NotImplementedError  # your code here


course.check("9.2", rebind)

# %% [markdown]
# The library's is that, and two things more. A view is registered in `sys.modules`, because `torch.compile` finds a function's globals there; and there is one
# for each module and replacement, however many layers use it. `_refresh` brings it up to date, should the module have changed since.

# %%
course.show_source("_view.py", "_over_view", "_clone", "_view", package="liger_patch")

# %% [markdown]
# ## 3. Prove it first
#
# A new release of the model's library may have changed its math. Then a swap computes another model, and nothing crashes. So run the original
# and the replacement, and swap only if they agree.
#
# **Formula.** For values and for every gradient, with the truth from the original in fp64 and $u$ one rounding of the dtype:
#
# $$\lVert ours - truth \rVert \;\le\; \lVert original - truth \rVert + u \, \lVert truth \rVert.$$
#
# On which inputs? Three wrong replacements of an RMSNorm (another epsilon; its weight forgotten; Gemma's, which scales by $1 + w$) on three choices of
# inputs. Predict: which of the nine would a comparison in bf16 miss?

# %%
torch.manual_seed(0)
H, norm = 32, liger_fn.rms_norm.reference
unit, ones, some = torch.randn(64, H).double(), torch.ones(H).double(), torch.randn(H).double()
wrong = {
    "epsilon 1e-5, not 1e-6": lambda x, w: norm(x, w, 1e-5),
    "the weight forgotten": lambda x, w: norm(x, None, 1e-6),
    "Gemma's: 1 + weight": lambda x, w: norm(x, w, 1e-6, offset=1.0),
}
inputs = {
    "fresh weights, rows of size 1": (unit, ones),
    "random weights, rows of size 1": (unit, some),
    "random weights, rows of size 0.001": (unit / 1e3, some),
}
fig, ax = course.figure(8.5, 3.2)
for n, (what, (x, w)) in enumerate(inputs.items()):
    truth = norm(x, w, 1e-6)
    gaps = [max(float((fn(x, w) - truth).norm() / truth.norm()), 1e-17) for fn in wrong.values()]
    ax.bar([i + 0.26 * (n - 1) for i in range(3)], gaps, 0.24, bottom=1e-17, label=what, color=course.PALETTE[n])
for dtype, name in ((torch.bfloat16, "bf16"), (torch.float64, "fp64")):
    ax.axhline(torch.finfo(dtype).eps / 2, color=course.INK, linewidth=0.9, linestyle=":")
    ax.text(2.47, torch.finfo(dtype).eps / 2 * 1.6, f"one rounding of {name}", fontsize=8)
ax.set_xticks(range(3), list(wrong))
ax.set(yscale="log", ylim=(1e-17, 1e4), xlim=(-0.5, 3.1), ylabel="relative difference", title="what a proof can see: bars above the line")
ax.legend(fontsize=8, loc="upper left", ncols=3, columnspacing=1.0, handlelength=1.2)
fig

# %% [markdown]
# A fresh norm's weight is all ones: forgetting it changes nothing. An epsilon counts only in rows that are about as small. And bf16 hides under its
# rounding what fp64 shows. A proof gives the parameters other values, takes rows of many sizes, and computes in fp64.
#
# ### Exercise 9.3
#
# **Specification.** `proved(module, function, width) -> bool`: does `function(module, x)` compute what `module(x)` does, for x `[..., width]`: values, and gradients with respect to x? In fp64, to
# 1e-9 of the value. The module's parameters may be all ones or zeros now: try others, and leave them as you found them.


# %%
def proved(module, function, width):
    raise NotImplementedError  # your code here


course.check("9.3", proved)

# %% [markdown]
# The library's proof of a norm. `stand_in` is a shallow copy with small random parameters, so that a proof costs the same for a model of any size,
# and works where weights are sharded, quantised or not loaded yet. `scale` makes rows from 1e-4 to 30. `compare` is the formula above, in the model's own dtype;
# its truth runs under `InDouble`, which turns the casts to fp32 in the model's code into casts to fp64.

# %%
course.show_source("_proof.py", "prove_norm", "InDouble", package="liger_patch")

# %% [markdown]
# ## 4. An architecture is data
#
# What differs between models are names and a few numbers: which class is the norm, is its weight stored around 0 or 1, what are the MLP's projections called.
# A registry has one entry a model type, and code that honours every field; no function per architecture.
#
# The first entries of Gemma's family; `like` fills in the names that a Llama-like model has, `GemmaRMSNorm` and so on:

# %%
print("\n".join(inspect.getsource(liger_patch.archs.gemma).splitlines()[:16]))

# %% [markdown]
# **A model of your own.** Built like Llama, with a norm and an MLP that no entry knows. Read it for three things: the name of the norm's weight, what it
# is stored around, and which of `w1`, `w2`, `w3` is the gate.

# %%
course.show_source("models09.py", "CourseNorm", "CourseMLP", package="notebooks/course")

# %%
torch.manual_seed(0)
model = course_model("course_lesson")
try:
    liger_patch.auto(model)
except liger_patch.PatchError as error:
    print("refused:", error)

# %% [markdown]
# ### Exercise 9.4
#
# **Specification.** `entry(model_type: str) -> liger_patch.Arch` with this model's norm (`liger_patch.Norm`), MLP (`liger_patch.GLU`) and `head=liger_patch.Head()`. What they can state is in
# `help(liger_patch.Norm)` and `help(liger_patch.GLU)`. The check registers your entry, patches a model by it, and compares losses and gradients with stock.


# %%
def entry(model_type):
    raise NotImplementedError  # your code here


course.check("9.4", entry)

# %% [markdown]
# **The library writes the entry itself.** `suggest` tries what an entry can say and keeps what it can prove. Then, in order: `register` makes it known, `plan` says what
# would be done, `verify` proves every swap and a copy of the whole model, `auto` patches, `revert` undoes.

# %%
ids = torch.randint(64, (2, 16))
with plainly():
    suggestion = liger_patch.suggest(model)
    print(suggestion, end="\n\n")
    liger_patch.register(suggestion.arch)
    print(liger_patch.plan(model), end="\n\n")
    print(liger_patch.verify(model).rows[-1].note, "is the last row of verify: the whole model", end="\n\n")
    before = float(model(input_ids=ids, labels=ids).loss.detach())
    liger_patch.auto(model)
    patched = float(model(input_ids=ids, labels=ids).loss.detach())
    model = liger_patch.revert(model)
after = float(model(input_ids=ids, labels=ids).loss.detach())
print(f"loss: stock {before:.7f}, patched {patched:.7f}, reverted {after:.7f}, the same bits as stock: {after == before}")
print("forwards left in instances:", sum("forward" in m.__dict__ for m in model.modules()))

# %% [markdown]
# ### One wrong number
#
# This entry says that the norm scales by $w$, where the model scales by $1 + w$: Gemma's offset, forgotten. What would happen without a proof? `verify=False` is for this
# experiment. Both models begin with the same weights and see the same text (the source of a file of this course; `train` is a plain loop over it, in `course/models09.py`). Predict the two curves.

# %%
wrong_arch = replace(suggestion.arch, model_type="course_wrong", norm=replace(suggestion.arch.norm, offset=0.0))
liger_patch.register(wrong_arch)
broken = course_model("course_wrong")
broken.load_state_dict(model.state_dict())
text = torch.tensor(list((course.ROOT / "notebooks/course/compare.py").read_bytes())) % 64
with plainly():
    liger_patch.auto(broken, verify=False)
    curves = {"stock": train(copy.deepcopy(model), text), "patched by the wrong entry": train(broken, text)}
fig, ax = course.figure(7.5, 2.8)
for n, (name, losses) in enumerate(curves.items()):
    ax.plot(losses, label=name, color=course.PALETTE[1 - n])
ax.axhline(math.log(64), color=course.INK, linewidth=0.7, linestyle=":")
ax.text(60, math.log(64) + 0.03, "a guess among 64", fontsize=8, ha="right")
ax.set(xlabel="step", ylabel="loss", title="two different models; neither curve looks broken")
ax.legend()
fig

# %% [markdown]
# With its weight at 0 the wrong norm returns 0, so that training begins from nothing; and then the curve falls like any other. A loss that goes down proves nothing. The proof:

# %%
with plainly():
    try:
        liger_patch.auto(course_model("course_wrong"))
    except liger_patch.PatchError as error:
        print(error)

# %% [markdown]
# With `strict=False` the parts that are proved are patched, and the report says which are left and why.
#
# ## 5. The head
#
# The largest gain is no module's: the loss, made without the logits (lesson 8). The model's own forward says `logits = self.lm_head(hidden)`, then `self.loss_function(logits, labels)`.
# Three instances are patched: the model's forward remembers the labels for the length of the call; `lm_head` then returns not logits but a small object with
# the finished loss; `loss_function` takes the loss out of it.
#
# **Picture.** What is kept for the backward, by autograd's own hook: arrays whose last axis is the vocabulary, and all others.

# %%
V = 4096
config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=V)
model, ids = LlamaForCausalLM(config).train(), torch.randint(V, (2, 64))
with plainly():
    stock, sizes = kept(model, ids)
    liger_patch.auto(model)
    ours, sizes_ours = kept(model, ids)
    logits = ours.logits + 0  # whoever computes with them gets them, made now
print(f"loss: stock {float(stock.loss.detach()):.6f}, patched {float(ours.loss.detach()):.6f}")
print(
    f"outputs.logits is a {type(ours.logits).__name__}; computed with, the largest difference is {float((logits - stock.logits).detach().abs().max()):.1e}"
)
draw_kept(stock=sizes, patched=sizes_ours)

# %% [markdown]
# What it keeps in place of logits is the gradient of the weight, which the loss makes in the forward; that has the weight's size, whatever the number of tokens. Read in
# `HeadForward.run` below when it does *not* do so: no labels or no training (`request is None`), somebody's hook who wants the gradient of logits, a weight that is quantised
# or split. In doubt the module's own forward runs.

# %%
print(inspect.getsource(_head.HeadForward.run))
model = liger_patch.revert(model)

# %% [markdown]
# ## Summary
#
# - Patch instances by a method in their `__dict__`, not classes; undoing is part of patching.
# - A name inside a function: the same code over a view of its globals.
# - Prove every swap in fp64, on weights and rows that could tell. A falling loss is no proof.
# - Names and numbers are data. What an entry cannot say is a reason to extend entries, for all.
#
# Next, lesson 10: what goes wrong in kernels that look right.
