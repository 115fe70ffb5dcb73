"""What would change in a model: the entry's names looked up in the instance, each find with its swaps and its proof.

Nothing is changed here. A place that the entry promises but that is not as promised is a row "failed"; a place where the user's own choice
(an adapter, a loss of their own, a switch) stands in the way is a row "left". Only the first is an error under `strict`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from . import _proof
from ._errors import PatchError
from ._experts import ExpertsForward, ScaledExpertsForward, activation, users_choice, why_not
from ._head import CausalLMForward, CausalLMLoss, HeadForward, has_backward_hooks, multiplies_itself, output_layer
from ._mask import MaskForward, names_read
from ._modules import PACKED, SEPARATE, GLUForward, NormForward, act_of, is_hooked
from ._proof_experts import prove_experts
from ._registry import known
from ._report import ALREADY, FAILED, LEFT, PLANNED, Row
from ._rope import RopeForward
from ._sharded_head import by_transformers, is_sharded
from ._spec import GLU, GLU_OPS, OPS, Arch, Experts, Head, Norm, Rope
from ._swap import Forward, Swap, installed, is_stock, recorded
from ._view import uses_global


class Left(str):
    """Why a place is left as it is by the user's own choice. A plain string is why it is not as the entry promises."""

    __slots__ = ()


@dataclass(frozen=True)
class Find:
    """A row of the report, the swaps that would make it true, and the proof that they may.

    Attributes:
        row: what the report says.
        swaps: what to install. Empty unless the row is planned.
        prove: runs the proof. None where there is nothing to prove.
        proof_key: equal keys have equal proofs; one is run for all layers alike.
    """

    row: Row
    swaps: tuple[Swap, ...] = ()
    prove: Callable[[], None] | None = None
    proof_key: Hashable = None

    def failed(self, why: str) -> Find:
        return Find(replace(self.row, status=FAILED, why=why, now=self.row.was))


def wanted(which: Mapping[str, Any], who: str) -> dict[str, bool]:
    """Every operation, and whether it was asked for. `who` is the public function that errors speak for, here and below."""
    for name, value in which.items():
        if name not in OPS:
            raise TypeError(f"{who}: unknown operation {name!r}; known are {', '.join(OPS)}")
        if not isinstance(value, bool):
            raise TypeError(f"{who}: {name} must be True or False, got {value!r}")
    return {op: which.get(op, True) for op in OPS}


def causal_lm(model: nn.Module, who: str) -> PreTrainedModel:
    """The one transformers model inside whatever wraps it (PEFT, DDP, a compiler). Models inside that model are parts of it."""
    held: dict[str, PreTrainedModel] = {}
    if isinstance(model, nn.Module):
        for path, module in model.named_modules():
            if isinstance(module, PreTrainedModel) and getattr(module.config, "model_type", None):
                held[path] = module
    # By what contains what, and not by paths: a wrapper may hold a model and, under another name, a part of it.
    parts = {id(part) for outer in held.values() for part in outer.modules() if part is not outer}
    outermost = {path: module for path, module in held.items() if id(module) not in parts}
    if len(outermost) > 1:
        names = ", ".join(f"{path} ({type(module).__name__})" for path, module in outermost.items())
        raise PatchError(f"{who}: {type(model).__name__} holds several transformers models: {names}. Pass the one that is meant")
    if outermost:
        return next(iter(outermost.values()))
    raise PatchError(
        f"{who}: {type(model).__name__} holds no transformers model with a config.model_type. "
        "Pass a model such as AutoModelForCausalLM gives, or call the functions of liger_fn in your own modules"
    )


def find(root: PreTrainedModel, arch: Arch, asked: Mapping[str, bool]) -> list[Find]:
    """Every place that the entry speaks of, and the entries of models within this one, in the order of operations."""
    finds: list[Find] = []
    for part, places in parts(root, arch):
        for norm in part.norms:
            finds += _modules(places, root, norm.op, norm.class_name, asked, partial(_norm, spec=norm))
        for mlp in part.mlps:
            finds += _modules(places, root, mlp.op, mlp.class_name, asked, partial(_glu, spec=mlp))
        if part.ropes:
            finds += _rope(places, root, part.ropes, asked)
        finds += _masks(places, root, arch, asked)
        if part.experts is not None:
            finds += _modules(places, root, "experts", part.experts.class_name, asked, partial(_experts, spec=part.experts))
    if arch.head is not None:
        finds += _head(root, arch.head, asked)
    return sorted(finds, key=lambda find: OPS.index(find.row.op))


Places = list[tuple[str, nn.Module]]


def parts(root: PreTrainedModel, arch: Arch) -> list[tuple[Arch, Places]]:
    """The entries that describe this model's modules, the root's first, and which modules each describes."""
    found: dict[str, tuple[Arch, Places]] = {arch.model_type: (arch, [])}
    described: dict[str, Arch] = {"": arch}  # by the path of a transformers model
    for path, module in root.named_modules():
        inner = known(module.config.model_type) if path and isinstance(module, PreTrainedModel) else None
        outer = max((p for p in described if not p or path == p or path.startswith(f"{p}.")), key=len)
        described[path] = here = inner or described[outer]
        if here is described[outer] and path != outer:
            del described[path]
        found.setdefault(here.model_type, (here, []))[1].append((path, module))
    return list(found.values())


# --- modules ----------------------------------------------------------------------------------------------------------------------------


def _modules(
    places: Places, root: nn.Module, op: str, name: str, asked: Mapping[str, bool], make: Callable[[nn.Module], Any]
) -> Iterator[Find]:  # fmt: skip
    found = False
    for path, module in places:
        if is_of(module, name):
            found = True
            yield _forward(Row(path, op, name, f"liger_fn.{op}", PLANNED), module, root, asked, make)
    if not found and asked[op]:
        row = Row(name, op, "–", "–", LEFT, f"no module of class {name} in {type(root).__name__}")
        # Not every configuration has all classes of its type's code. One that the code has not, the entry names in error.
        there = any(hasattr(sys.modules[type(module).__module__], name) for _, module in places)
        yield Find(row if there else replace(row, status=FAILED))


def is_of(module: nn.Module, name: str) -> bool:
    """Whether a module runs the forward of a class of this name: sharding libraries subclass a module's class on the fly."""
    return any(cls.__name__ == name and getattr(cls, "forward", None) is type(module).forward for cls in type(module).__mro__)


def _forward(row: Row, module: nn.Module, root: nn.Module, asked: Mapping[str, bool], make: Callable[[nn.Module], Any]) -> Find:
    present = installed(module, "forward")
    if isinstance(present, Forward) and present.kind == kind_of(row.op):
        row = replace(row, op=present.op, now=present.now)
        return Find(replace(row, status=ALREADY), (), *_proof_of(present, root))
    if not is_stock(module):
        if not asked[row.op]:
            return Find(replace(row, now=row.was, status=LEFT, why=f"{row.op}=False"))
        return Find(row).failed(f"its forward was replaced on this instance by {_title(module.__dict__['forward'])}")
    swap = make(module)
    if isinstance(swap, Swap):
        row = replace(row, op=swap.op, now=swap.now)
    if not asked[row.op]:
        return Find(replace(row, now=row.was, status=LEFT, why=f"{row.op}=False"))
    if isinstance(swap, Left):
        return Find(replace(row, now=row.was, status=LEFT, why=str(swap)))
    return Find(row).failed(swap) if isinstance(swap, str) else Find(row, (swap,), *_proof_of(swap, root))


def kind_of(op: str) -> str:
    """Operations that stand in the same place of a module share a kind."""
    return "mlp" if op in GLU_OPS.values() else "norm" if op.endswith("_norm") else op


def _takes_one(module: nn.Module) -> bool:
    """Whether a module's forward has one input and no options."""
    return len(inspect.signature(type(module).forward).parameters) == 2


def _norm(module: nn.Module, spec: Norm) -> NormForward | str:
    if not _takes_one(module):
        return "its forward takes more than one input"
    weight = getattr(module, spec.weight, None)
    if weight is not None and (not isinstance(weight, torch.Tensor) or (weight.dim() != 1 and weight.numel())):
        return f"its {spec.weight} is no vector"
    if isinstance(spec.eps, float):
        return NormForward(module, spec, spec.eps)
    names = [spec.eps] if spec.eps else ["variance_epsilon", "eps", "norm_eps", "epsilon"]
    held = [name for name in names if isinstance(getattr(module, name, None), (int, float))]
    return NormForward(module, spec, held[0]) if held else f"it has no eps under the name {' or '.join(names)}"


def _glu(module: Any, spec: GLU) -> GLUForward | str:
    if not _takes_one(module):
        return "its forward takes more than one input"
    missing = [name for name in (*spec.projections, spec.act_fn) if not callable(getattr(module, name, None))]
    if missing:
        return f"it has no {', '.join(missing)}"
    function = getattr(module, spec.act_fn)
    if is_hooked(function):
        return Left(f"there are hooks on its {spec.act_fn}, which is called for them")
    act = act_of(function)
    served = ("relu_squared",) if not spec.gate else PACKED if spec.packed else SEPARATE
    if act is None or act not in served:
        config = getattr(getattr(module, "config", None), "hidden_act", "?")
        return f"its {spec.act_fn} is {_title(function)} (hidden_act={config!r}), there are functions for {', '.join(served)}"
    return GLUForward(module, spec, act)


def _experts(module: Any, spec: Experts) -> ExpertsForward | str:
    if spec.stock:
        return Left(spec.stock)
    inner = module.experts if spec.scaled else module
    if len(inspect.signature(type(module).forward).parameters) != (2 if spec.scaled else 4):
        if not hasattr(inner, "down_proj"):  # Aria's were two modules of their own
            return Left("in this release of transformers its weights are held in another way")
        return "its forward does not take hidden states, the chosen experts and their weights"
    if why := why_not(inner, spec):
        return why
    if why := users_choice(inner):
        return Left(why)
    act = activation(inner, spec)
    if act is None:
        return f"its act_fn is {_title(getattr(inner, 'act_fn', None))}, which liger_fn.moe_experts does not know"
    return (ScaledExpertsForward if spec.scaled else ExpertsForward)(module, spec, act)


# --- the rotary function ----------------------------------------------------------------------------------------------------------------


def _rope(places: Places, root: nn.Module, specs: tuple[Rope, ...], asked: Mapping[str, bool]) -> Iterator[Find]:
    found: set[str] = set()
    attention = {}
    for path, module in places:
        read = tuple(spec for spec in specs if uses_global(type(module).forward, spec.function))
        if read:
            names = [spec.function for spec in read]
            found.update(names)
            row = Row(path, "rope", " and ".join(names), "liger_fn.rope", PLANNED)
            yield _forward(row, module, root, asked, partial(_turning, specs=read))
        elif "Attention" in type(module).__name__:
            attention[type(module).__name__] = type(module).forward
    for spec in specs:
        if spec.function not in found and asked["rope"]:
            seen = "; ".join(f"{name}.forward is {_title(forward)}" for name, forward in attention.items()) or "no attention module"
            yield Find(Row(spec.function, "rope", "–", "–", FAILED, f"no module's forward reads a global of this name ({seen})"))


def _turning(module: nn.Module, specs: tuple[Rope, ...]) -> RopeForward | str:
    try:
        return RopeForward(module, *specs)
    except ValueError as error:
        return str(error)


# --- the causal mask --------------------------------------------------------------------------------------------------------------------


def _masks(places: Places, root: PreTrainedModel, arch: Arch, asked: Mapping[str, bool]) -> Iterator[Find]:
    """No entry names these: models make their masks by transformers' own functions, all alike."""
    headed = arch.head is not None and output_layer(root, arch.head) is not None  # whose forward is to remember labels
    for path, module in places:
        names = names_read(module) if isinstance(module, PreTrainedModel) and not (headed and module is root) else ()
        if not names:
            continue
        row = Row(path, "causal_mask", " and ".join(names), MaskForward.now, PLANNED)
        implementation = getattr(module.config, "_attn_implementation", None)
        if not is_stock(module) and not isinstance(installed(module, "forward"), MaskForward):
            yield Find(replace(row, now=row.was, status=LEFT, why="its forward was replaced on this instance"))
        elif implementation != "sdpa":
            yield Find(replace(row, now=row.was, status=LEFT, why=f"attention is {implementation}, not sdpa, and wants the mask"))
        else:
            yield _forward(row, module, root, asked, partial(_masking, names=names))


def _masking(module: nn.Module, names: tuple[str, ...]) -> MaskForward | Left:
    try:
        return MaskForward(module, names)
    except ValueError as error:
        return Left(error)  # of help only to speed


# --- the head ---------------------------------------------------------------------------------------------------------------------------


def _head(root: PreTrainedModel, spec: Head, asked: Mapping[str, bool]) -> Iterator[Find]:
    row = Row(spec.name, "linear_cross_entropy", "Linear", "liger_fn.linear_cross_entropy", PLANNED)
    loss_row = Row("loss_function", "cross_entropy", "ForCausalLMLoss", "liger_fn.cross_entropy", PLANNED)
    layer = output_layer(root, spec)
    if layer is None:
        # A bare base model or a classifier is a fair use; a causal LM with its head elsewhere is not what the entry describes.
        status = FAILED if type(root).__name__.endswith("ForCausalLM") else LEFT
        why = f"{type(root).__name__} has no {spec.name}"
        for each in (row, loss_row):
            yield Find(replace(each, was="–", now="–", status=status if asked[each.op] else LEFT, why=why))
        return

    loss = installed(root, "_loss_function")
    theirs = "" if loss is not None or root.loss_function is ForCausalLMLoss else f"the loss function is {_title(root.loss_function)}"
    plain_already = isinstance(loss, CausalLMLoss) and loss.cross_entropy
    plain = plain_already or (asked["cross_entropy"] and not theirs)

    def left(row: Row, why: str, was: str) -> Find:
        return Find(replace(row, was=was, now=was, status=LEFT, why=why))

    def proof(head: bool) -> tuple[Callable[[], None], Hashable]:
        key = ("head", id(root), spec, head, plain)
        return lambda: _proof.prove_head(root, spec, head, plain), key

    row = replace(row, was=type(layer).__name__)
    ours = next((swap for swap in recorded(root) if isinstance(swap, CausalLMForward)), None)
    if ours is not None and ours.head is installed(layer, "forward"):  # and not of a layer that has since been put in its place
        yield Find(replace(row, status=ALREADY), (), *proof(head=True))
    elif not asked["linear_cross_entropy"]:
        yield left(row, "linear_cross_entropy=False", row.was)
    elif why := theirs or _not_a_plain_linear(root, layer):
        yield left(row, why, _title(layer))
    elif "labels" not in inspect.signature(type(root).forward).parameters:
        yield Find(row).failed(f"{type(root).__name__}.forward takes no labels")
    else:
        head = HeadForward(layer)
        yield Find(row, (head, CausalLMForward(root, head, spec), CausalLMLoss(root, plain)), *proof(head=True))

    if plain_already:
        yield Find(replace(loss_row, status=ALREADY), (), *proof(head=False))
    elif not asked["cross_entropy"]:
        yield left(loss_row, "cross_entropy=False", loss_row.was)
    elif theirs:
        yield left(loss_row, "it is the user's own", _title(root.loss_function))
    else:
        yield Find(loss_row, (CausalLMLoss(root, plain),), *proof(head=False))


def _not_a_plain_linear(root: PreTrainedModel, layer: nn.Module) -> str:
    """Why the output layer's logits are not `x @ weight.T + bias` of one whole weight, or are wanted; empty if there is no reason."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return f"the output layer is a {_title(layer)}, whose logits are not those of its weight alone"
    if multiplies_itself(layer.weight) and not is_sharded(layer.weight):
        return f"the output layer's weight is a {_title(layer.weight)}, which no function of liger_fn reads"
    split = by_transformers(layer, layer.__dict__.get("forward"))
    again = isinstance(installed(layer, "forward"), HeadForward) and isinstance(installed(root, "forward"), CausalLMForward)
    if not (is_stock(layer) or split or again):
        return f"the output layer's forward was replaced on this instance by {_title(layer.__dict__['forward'])}"
    if has_backward_hooks(layer):
        return "the output layer has backward hooks, which want the gradient of its logits"
    if getattr(root, "_tp_size", None) not in (None, 1) and not split:
        return "the output layer is split over devices (tensor parallel), and not along the vocabulary"
    return ""


# --- proofs -----------------------------------------------------------------------------------------------------------------------------


def _proof_of(swap: Swap, root: nn.Module) -> tuple[Callable[[], None], Hashable]:
    """The proof of a module's swap, and what decides its outcome."""
    module = swap.module
    at = _proof.where(module, root)
    like = type(module), *at
    if isinstance(swap, NormForward):
        eps = getattr(module, swap.eps) if isinstance(swap.eps, str) else swap.eps
        weights = tuple(getattr(getattr(module, name, None), "shape", None) for name in (swap.spec.weight, "bias"))
        return lambda: _proof.prove_norm(swap, at), (swap.op, *like, swap.spec, eps, weights)
    if isinstance(swap, GLUForward):
        numbers = tuple(getattr(module, name) for name in (swap.spec.gate_multiplier, swap.spec.down_multiplier) if name)
        return lambda: _proof.prove_glu(swap, at), (swap.op, *like, swap.spec, type(swap.act_fn), numbers)
    if isinstance(swap, ExpertsForward):
        inner = module.experts if swap.spec.scaled else module
        numbers = tuple(getattr(inner, name) for name in (swap.spec.limit, swap.spec.alpha) if name)
        return lambda: prove_experts(swap, at), (swap.op, *like, swap.spec, swap.act, numbers)
    if isinstance(swap, MaskForward):
        return lambda: _proof.prove_mask(swap), (swap.op, *like, swap.names)
    assert isinstance(swap, RopeForward)
    return lambda: _proof.prove_rope(swap, at), (swap.op, *like, swap.specs)


def _title(value: Any) -> str:
    """What a thing is, in a word or two: a function's name, or an object's class."""
    name = getattr(value, "__qualname__", None) if not isinstance(value, nn.Module) else None
    return f"{value.__module__}.{name}" if name else f"{type(value).__module__}.{type(value).__qualname__}"
