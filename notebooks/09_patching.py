# %% [markdown]
# # 9. Patching a model that somebody else wrote
#
# At the end you can put a function into one instance of a model and take it out again, prove a replacement before it is made, and describe an
# architecture as data. You need lessons 1 and 4, and have used Hugging Face models. 20 minutes.

# %%
import course  # before triton
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import liger_fn
import liger_patch

transformers.logging.set_verbosity_error()
plain = liger_fn.use_backend("reference")  # proofs run in plain PyTorch here: in the interpreter each would take half a minute
plain.__enter__()
_ = torch.manual_seed(0)

# %% [markdown]
# ## Where to cut
#
# There are three places to change what `model.model.norm(x)` computes:
#
# 1. **the class**: `LlamaRMSNorm.forward = mine`. Every model in the process that uses it changes, also those that are made later, also somebody else's
#    reference model;
# 2. **the module tree**: put another module in its place. Names, hooks, FSDP's view of parameters and `isinstance` change;
# 3. **the instance**: `module.forward = mine.__get__(module)` puts a method into this one object's dictionary. Python finds it before the class's.
#    Parameters, names and hooks stay, and deleting the entry undoes it.
#
# **Picture.** Which of three models are changed by patching model A: by class, and by instance.

# %%
fig, axes = course.figure(8, 1.8, columns=2)
for ax, title, changed in ((axes[0], "by class", [1, 1, 1]), (axes[1], "by instance", [1, 0, 0])):
    ax.bar(
        ["A, patched", "B, a reference", "C, made later"], [1] * 3, color=[course.PALETTE[0] if c else course.PALETTE[7] for c in changed]
    )
    ax.set(title=f"{title}; red: changed", yticks=[])
fig


# %%
class Norm(nn.Module):
    def forward(self, x):
        return x


a, b = Norm(), Norm()
Norm.forward = lambda self, x: x + 1
print("b after the class was patched for a:", b(torch.zeros(1)).item())
Norm.forward = lambda self, x: x

# %% [markdown]
# ### Exercise 9.1
#
# **Specification.** `patch(module, function) -> undo`: from now on this instance's `forward(*args)` is `function(module, *args)`; `undo()` makes it as it was, also if the
# instance had a forward of its own before. Change nothing that another instance sees.


# %%
def patch(module, function):
    raise NotImplementedError  # your code here


course.check("9.1", patch)

# %% [markdown]
# ## Prove it first
#
# A new release of the model's library may have changed the math: another epsilon, a weight stored around 0. Then a swap computes another
# model, and the loss looks plausible. So: run the original and the replacement on random inputs, in fp32 and fp64, and swap only if the
# replacement errs no more than rounding. Inputs matter: with `weight = 1`, a forgotten weight passes.
#
# **Picture.** Four replacements of a norm, and how far each is from the original: with the weights of a fresh model, and with random ones. One wrong
# replacement shows nothing in a fresh model.

# %%
x, weight = torch.randn(64, 32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
norm = liger_fn.rms_norm.reference
kinds = {
    "right": lambda w: norm(x, w, 1e-6),
    "another epsilon": lambda w: norm(x, w, 1e-3),
    "no weight": lambda w: norm(x, None, 1e-6),
    "weight + 1": lambda w: norm(x, w, 1e-6, offset=1.0),
}
fig, ax = course.figure(8, 2.6)
for n, (name, w) in enumerate({"weights of a fresh model: ones": torch.ones_like(weight), "random weights": weight}.items()):
    gaps = [max(float((fn(w) - norm(x, w, 1e-6)).abs().max()), 1e-17) for fn in kinds.values()]
    ax.bar([i + 0.4 * n - 0.2 for i in range(4)], gaps, 0.4, label=name)
ax.set_xticks(range(4), list(kinds))
ax.set(yscale="log", ylabel="largest difference")
ax.legend()
fig

# %% [markdown]
# ### Exercise 9.2
#
# **Specification.** `proved(module, function, width) -> bool`: does `function(module, x)` compute what `module(x)` does, for x `[..., width]`, values and gradients with respect to x? In fp64,
# to 1e-9. The module's parameters may be all ones or zeros now: try others, and leave them as you found them.


# %%
def proved(module, function, width):
    raise NotImplementedError  # your code here


course.check("9.2", proved)

# %% [markdown]
# ## An architecture is data
#
# What differs between models are names and a few numbers: which class is the norm, is its weight stored around 0 or 1, what are the MLP's
# projections called. `liger_patch` has these as entries:

# %%
print("\n".join((course.ROOT / "liger_patch/archs/gemma.py").read_text().splitlines()[:40]))

# %% [markdown]
# **A model of your own.** Built like Llama, with a norm and an MLP that no entry knows: the weight is called `scale` and stored around 0, the
# projections are `w1`, `w3`, `w2`.

# %%
course.show_source("models09.py", "CourseNorm", "CourseMLP", "course_model", package="notebooks/course")

# %%
from course.models09 import course_model

model = course_model("course_lesson")
try:
    liger_patch.auto(model)
except liger_patch.PatchError as error:
    print("refused:", str(error)[:300])

# %% [markdown]
# ### Exercise 9.3
#
# **Specification.** `entry(model_type: str) -> liger_patch.Arch` with a norm and an MLP for that model (`liger_patch.Norm`, `liger_patch.GLU`; `help(liger_patch.Norm)` says what they can state), and
# `head=liger_patch.Head()`. The check registers it, patches a model of it strictly, and compares losses and gradients with stock.


# %%
def entry(model_type):
    raise NotImplementedError  # your code here


course.check("9.3", entry)

# %% [markdown]
# The library can find such an entry itself: `print(liger_patch.suggest(model))` tries what an entry can say, keeps what it can prove, and
# writes the line to add. It takes half a minute, so it is not run here.

# %% [markdown]
# ## The proof at work
#
# An entry with one wrong number: this norm's weight is said to be stored around 1. In the fresh model it is all zeros; the proof gives it
# other values, and refuses.

# %%
wrong = liger_patch.Arch("course_wrong", norm=liger_patch.Norm("CourseNorm", weight="scale", eps="epsilon", cast="gemma", offset=0.0))
liger_patch.register(wrong)
try:
    liger_patch.auto(course_model("course_wrong"))
except liger_patch.PatchError as error:
    print(str(error)[:500])

# %% [markdown]
# ## The head
#
# The largest gain is not a module: it is the loss, made in the head, without logits (lesson 8). The model's own forward calls
# `self.lm_head(hidden)` and then a loss function. `liger_patch` lets `lm_head` return an object that remembers hidden states and weight; the loss
# function takes it and calls `linear_cross_entropy`; anybody else who looks at it makes the logits. So `outputs.logits` still answers.

# %%
config = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256
)
model = LlamaForCausalLM(config).train()
ids = torch.randint(256, (2, 16))
stock = model(input_ids=ids, labels=ids).loss
print(liger_patch.auto(model))
out = model(input_ids=ids, labels=ids)
print("loss, stock and patched:", float(stock.detach()), float(out.loss.detach()))
print("logits, when asked for:", tuple(out.logits.shape))
liger_patch.revert(model)

# %% [markdown]
# ## Summary
#
# - Patch instances, not classes; make undoing part of it.
# - Prove every swap on inputs and weights that could tell, in fp64.
# - Names and numbers are data. What an entry cannot say is a reason to extend entries, for all.
#
# Next, lesson 10: what goes wrong in kernels that look right.
