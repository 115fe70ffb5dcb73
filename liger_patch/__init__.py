"""Put the functions of `liger_fn` into a Hugging Face model, one instance at a time.

    report = liger_patch.auto(model)      # patch; print(report) says what was done, place by place
    liger_patch.plan(model)               # what would be done
    liger_patch.verify(model)             # prove it, swap by swap and end to end
    liger_patch.revert(model)             # the exact original again
    with liger_patch.patched(model): ...  # for the length of a block

    liger_patch.supported()               # model types and their operations
    liger_patch.register(Arch(...))       # add one
    print(liger_patch.suggest(model))     # the entry of a model of another type, proved

    liger_patch.provide_liger_kernel()    # trainers' own use_liger_kernel=True, served by auto

A patched model can be saved, copied and pickled: its state dict and `save_pretrained` are the stock model's; a deep copy or an unpickled
model is patched too, by itself, and can be reverted by itself.
"""

from ._apply import auto, patched, plan, revert
from ._errors import PatchError
from ._provide import provide_liger_kernel
from ._registry import register, supported
from ._report import Report, Row
from ._spec import GLU, Arch, Experts, Head, Norm, Rope
from ._suggest import Suggestion, suggest
from ._verify import verify

__all__ = [
    "GLU",
    "Arch",
    "Experts",
    "Head",
    "Norm",
    "PatchError",
    "Report",
    "Rope",
    "Row",
    "Suggestion",
    "auto",
    "patched",
    "plan",
    "provide_liger_kernel",
    "register",
    "revert",
    "suggest",
    "supported",
    "verify",
]
