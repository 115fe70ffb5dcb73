"""The entry of a model that nobody has described: every description that could fit is tried, and those that are proved are kept.

Norms are proved in fp32, and in bf16, where the casts differ; of several that hold, the one whose bits are the original's is chosen.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from itertools import permutations, product
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from . import _proof
from ._find import Places, _experts, _glu, _norm, causal_lm, parts
from ._modules import NormForward, act_of
from ._proof import Disagreement
from ._proof_experts import prove_experts
from ._rope import KINDS, RopeForward
from ._spec import GLU, Arch, Experts, Head, Norm, Rope
from ._view import globals_of

Part = TypeVar("Part", Norm, GLU, Rope, Experts, Head)
CAPS = ("config.final_logit_softcapping", "config.final_logits_softcapping", "config.logits_soft_cap", "config.output_logit_softcap")
SCALES = ("logit_scale", "config.logit_scale", "config.logits_scaling", "config.lm_head_multiplier")


@dataclass(frozen=True)
class Suggestion:
    """An entry for a model, of what could be proved. Prints as the code that registers it.

    Attributes:
        arch: the entry of the model's own type.
        left: classes of modules that hold parameters themselves, or rotary functions, and that nothing was found for.
    """

    arch: Arch
    left: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"liger_patch.register({written(self.arch)})"]
        if self.left:
            lines.append(f"# stock: {', '.join(self.left)}")
        return "\n".join(lines)


def suggest(model: nn.Module) -> Suggestion:
    """Write the registry entry of a model of a type that has none.

    Its modules' classes, their sources' rotary functions and its output layer are matched with all that an entry can say, and each match
    is proved on small random inputs, as `auto` does before it patches. Nothing is changed or registered. Parts of a composite model
    whose own types have entries are described by those.

    Args:
        model: a transformers model, or a wrapper around one. A small one of random weights says as much as a large one.

    Returns:
        The entry. `print` it; its `arch` can be registered.

    Raises:
        PatchError: there is no transformers model, or several.

    Examples:
        >>> print(liger_patch.suggest(model))  # doctest: +SKIP
    """
    root = causal_lm(model, "suggest")
    blank = Arch(root.config.model_type)
    places = next(found for arch, found in parts(root, blank) if arch is blank)
    classes = {type(module).__name__: module for _, module in places}
    norms = {name: norm for name, module in classes.items() if (norm := _first(_norms(name, module)))}
    mlps = {name: mlp for name, module in classes.items() if (mlp := _first(_mlps(name, module)))}
    ropes = list(_ropes(places))
    head = _first(_heads(root)) if isinstance(root, PreTrainedModel) else None
    experts = next((found for name, module in classes.items() if (found := _first(_mixtures(name, module)))), None)
    described = {"norm": _few(norms.values()), "mlp": _few(mlps.values()), "rope": _few(ropes), "experts": experts}
    arch = Arch(root.config.model_type, head=head, **described)
    named = {*norms, *mlps, "Linear", "Embedding"} | ({experts.class_name} if experts else set())
    left = [n for n, module in classes.items() if n not in named and (module._parameters or "Norm" in n or "MLP" in n)]
    return Suggestion(arch, tuple(left))


def _few(found: Iterable[Part]) -> Any:
    unique = tuple(dict.fromkeys(found))
    return None if not unique else unique[0] if len(unique) == 1 else unique


def _first(tried: Iterator[tuple[Part, Any]]) -> Part | None:
    """The first description whose proof holds."""
    for spec, prove in tried:
        try:
            prove()
        except Disagreement:
            continue
        return spec
    return None


def _norms(name: str, module: nn.Module) -> Iterator[tuple[Norm, Any]]:
    if any(True for _ in module.children()) or not ("norm" in name.lower() or set(module._parameters) & {"weight", "scale", "gamma"}):
        return
    twin = copy.deepcopy(module).to(torch.bfloat16)
    weight = next((n for n in ("weight", "scale", "gamma") if n in module._parameters), "weight")
    casts = ("llama", "gemma") if _keeps_dtype(twin, weight) else ("llama", "none")
    specs = [Norm(name, weight=weight, offset=o, cast=c) for o, c in product((0.0, 1.0), casts)]  # type: ignore[arg-type]
    specs += [Norm(name, "layer", weight=weight, offset=offset) for offset in (0.0, 1.0)]
    swaps = [(spec, swap) for spec in specs if not isinstance(swap := _norm(twin, spec), str)]
    for spec, swap in sorted(swaps, key=lambda each: not _same_bits(each[1])):
        yield spec, partial(_both, swap, NormForward(copy.deepcopy(module).float(), spec, swap.eps))


def _both(*swaps: NormForward) -> None:
    for swap, dtype in zip(swaps, (torch.bfloat16, torch.float32), strict=True):
        _proof.prove_norm(swap, (dtype, _proof.where(swap.module)[1]))


def _keeps_dtype(module: nn.Module, weight: str) -> bool:
    """Whether rows of bf16 stay so under a weight of fp32."""
    own = getattr(module, weight, None)
    if own is None or own.dim() != 1:
        return True
    twin = _proof.stand_in(module, parameters={weight: nn.Parameter(own.float())})
    try:
        return bool(type(module).forward(twin, torch.ones(2, len(own), dtype=torch.bfloat16)).dtype is torch.bfloat16)
    except Exception:
        return True


def _same_bits(swap: NormForward) -> bool:
    """Whether it rounds where the original does."""
    module, generator = swap.module, torch.Generator().manual_seed(0)
    weight = getattr(module, swap.spec.weight, None)
    size = 64 if weight is None else len(weight)
    own = {} if weight is None else {swap.spec.weight: torch.rand(size, generator=generator).add(0.5).bfloat16()}
    twin, x = _proof.stand_in(module, parameters=own), torch.randn(64, size, generator=generator).bfloat16()
    try:
        return torch.equal(type(module).forward(twin, x), swap.run(twin, x))
    except Exception:
        return False


def _mlps(name: str, module: nn.Module) -> Iterator[tuple[GLU, Any]]:
    linears = [n for n, child in module.named_children() if isinstance(child, nn.Linear)]
    acts = [n for n in ("act_fn", "activation_fn", "act", "activation", "hidden_act") if callable(getattr(module, n, None))]
    if not acts or len(linears) not in (2, 3):
        return
    act = act_of(getattr(module, acts[0]))
    if act is None:
        return
    for order in permutations(linears):
        names = {"gate": order[0], "up": order[1], "down": order[2]} if len(linears) == 3 else {"packed": order[0], "down": order[1]}
        if act == "relu_squared":
            names = {"gate": "", "up": order[0], "down": order[1]}
        for gate, down in product((*_numbers(module, "gate"), None), (*_numbers(module, "down"), None)):
            spec = GLU(name, act, act_fn=acts[0], gate_multiplier=gate, down_multiplier=down, **names)  # type: ignore[arg-type]
            swap = _glu(module, spec)
            if not isinstance(swap, str):
                yield spec, partial(_proof.prove_glu, swap, _proof.where(module))


def _mixtures(name: str, module: nn.Module) -> Iterator[tuple[Experts, Any]]:
    if not any(parameter.dim() == 3 for parameter in module._parameters.values() if parameter is not None):
        return
    numbers = [n for n, value in vars(module).items() if isinstance(value, float)]
    limits, alphas = ([n for n in numbers if word in n] for word in ("limit", "alpha"))
    specs = [Experts(name), Experts(name, act="silu")]
    specs += [Experts(name, act, limit=limit) for act in (None, "silu") for limit in limits]
    specs += [Experts(name, "clamped_swiglu", limit=limit, alpha=alpha) for limit in limits for alpha in alphas]
    for spec in specs:
        swap = _experts(module, spec)
        if not isinstance(swap, str):
            yield spec, partial(prove_experts, swap, _proof.where(module))


def _numbers(module: nn.Module, name: str) -> list[str]:
    return [n for n, value in vars(module).items() if isinstance(value, float) and name in n and "multiplier" in n]


def _ropes(places: Places) -> Iterator[Rope]:
    seen: set[tuple[type, str]] = set()
    for _, module in places:
        for function in globals_of(type(module).forward):
            if ("rotary" not in function and "rope" not in function) or (type(module), function) in seen:
                continue
            seen.add((type(module), function))
            spec = _first(_turns(module, function))
            if spec:
                yield spec


def _turns(module: nn.Module, function: str) -> Iterator[tuple[Rope, Any]]:
    for kind in KINDS:
        spec = Rope(function, kind)
        try:
            swap = RopeForward(module, spec)
        except ValueError:
            continue
        yield spec, partial(_proof.prove_rope, swap, _proof.where(module))


def _heads(root: PreTrainedModel) -> Iterator[tuple[Head, Any]]:
    for name, child in root.named_children():
        if isinstance(child, nn.Linear):
            caps, scales = ((None, *(path for path in paths if _number(root, path))) for paths in (CAPS, SCALES))
            for cap, scale, divides in product(caps, scales, (False, True)):
                spec = Head(name, softcap=cap, scale=None if divides else scale, divide=scale if divides else None)
                yield spec, partial(_proof.prove_head, root, spec, True, True)


def _number(root: nn.Module, path: str) -> bool:
    try:
        return isinstance(attrgetter(path)(root), (int, float))
    except AttributeError:
        return False


def written(arch: Arch) -> str:
    """An entry as code."""

    def code(value: Any) -> str:
        if isinstance(value, tuple):
            return f"({', '.join(map(code, value))})"
        if not hasattr(value, "__dataclass_fields__"):
            return repr(value)
        given = [f for f in fields(value) if getattr(value, f.name) != f.default]
        plain = [f.name for f in fields(value) if f.name in ("class_name", "model_type", "function")]
        parts = [code(getattr(value, f.name)) if f.name in plain else f"{f.name}={code(getattr(value, f.name))}" for f in given]
        return f"{type(value).__name__}({', '.join(parts)})"

    return code(arch)
