"""Patch a model, say what would be patched, and undo it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import transformers
from torch import nn
from transformers import PreTrainedModel

from liger_fn._head import budget

from . import _swap
from ._errors import PatchError
from ._find import Find, causal_lm, find, wanted
from ._head import CausalLMForward, HeadForward
from ._proof import Disagreement
from ._registry import entry
from ._report import ALREADY, FAILED, LEFT, PATCHED, PLANNED, Report, Row

Model = TypeVar("Model", bound=nn.Module)


def auto(model: nn.Module, *, strict: bool = True, verify: bool = True, memory_budget: int | None = None, **which: bool) -> Report:
    """Put the functions of `liger_fn` into this model.

    Only this instance changes: no class, module or other model sees anything of it. Parameters, the state dict, hooks, adapters and
    sharding stay as they are. Every swap is proved against the original before any is made, so an error leaves the model as it was. Calling
    it again changes nothing that is patched already.

    In training with labels the loss comes from `liger_fn.linear_cross_entropy`, and `outputs.logits` is an object that computes the logits
    when they are asked for. Otherwise logits are ordinary tensors. Where every label is ignored the loss is 0 (the original: NaN).

    Hooks and wrappers act as on the original. One that takes the values of the logits before the loss does, or wants their gradient, makes
    that step compute logits, and the loss from them.

    Adapters on the output layer (LoRA, `modules_to_save`) and a `loss_function` of the user's own are respected: the report says that they
    were left.

    Attention runs over the names of its module as they are now: one that is rebound there later (a kernel exchanged by hand) is seen after
    `revert` and `auto`. A patched model must not run forward in two threads at once, and `nn.DataParallel`, which does that with replicas
    of it, is not supported: use DistributedDataParallel.

    Args:
        model: a transformers model of a supported type, or a wrapper (PEFT, DDP, `torch.compile`) around one.
        strict: make it an error if something that the registry entry promises is not there or cannot be proved. If False, that part is left
            as it was and the report says why.
        verify: prove every swap before it is made.
        memory_budget: bytes of logits that the loss of the output layer may have at a time, as in `liger_fn.linear_cross_entropy`. Less is
            slower. A model that is patched already takes the new number. None: what their sizes suggest, or what was given before.
        **which: operations to leave out (`rope=False`) or in: those that the report names.

    Returns:
        What was done, place by place. `print` it.

    Raises:
        TypeError: an operation's name is not known, or its value is not a bool.
        ValueError: `memory_budget` is no integer of at least 1.
        PatchError: the model's type is not supported, or `strict` and a part is not as the entry promises, or there is a `memory_budget`
            for an output layer that stays stock.

    Examples:
        >>> report = liger_patch.auto(model)                # doctest: +SKIP
        >>> print(report)                                   # doctest: +SKIP
        >>> liger_patch.auto(model, strict=False, rope=False)  # doctest: +SKIP
    """
    return apply("auto", model, strict, verify, memory_budget, which)


def apply(who: str, model: nn.Module, strict: bool, verify: bool, memory_budget: int | None, which: Mapping[str, object]) -> Report:
    """`auto`, for whichever public function its errors shall name."""
    budget(who, memory_budget)
    root, finds = survey(who, model, which, verify)
    failures = [f for f in finds if f.row.status == FAILED]
    if strict and failures:
        raise PatchError(refusal(who, root, failures))
    head = head_of(root, finds)
    if memory_budget is not None and head is not None:
        head.memory_budget = memory_budget
    elif memory_budget is not None and strict:
        raise PatchError(
            f"{who}: memory_budget is of the loss that the output layer makes, and that of this {type(root).__name__} stays stock, where "
            "all logits are made at once; leave memory_budget out, or pass strict=False"
        )
    finds = budgeted(finds, head, memory_budget)
    _swap.install(root, [swap for f in finds if f.row.status == PLANNED for swap in f.swaps])
    done = {PLANNED: PATCHED, FAILED: LEFT}
    return report(root, [replace(f, row=replace(f.row, status=done.get(f.row.status, f.row.status))) for f in finds])


def plan(model: nn.Module, *, verify: bool = True, memory_budget: int | None = None, **which: bool) -> Report:
    """What `auto` would do. Changes nothing, and does not raise for parts that would fail: their rows say "failed" and why.

    Args:
        model: as for `auto`.
        verify: run the proofs too.
        memory_budget: as for `auto`.
        **which: as for `auto`.

    Returns:
        The report, with rows "planned", "already", "left" and "failed".

    Raises:
        TypeError: an operation's name is not known, or its value is not a bool.
        ValueError: as for `auto`.
        PatchError: the model's type is not supported.
    """
    budget("plan", memory_budget)
    root, finds = survey("plan", model, which, verify)
    return report(root, budgeted(finds, head_of(root, finds), memory_budget))


def revert(model: Model) -> Model:
    """Undo `auto`: the model's modules are again exactly what they were. Does nothing to a model that is not patched.

    Args:
        model: the model, or a wrapper around it.

    Returns:
        The same model.

    Raises:
        PatchError: someone has since wrapped a forward that `auto` had replaced, so it cannot be taken out from under the wrapper.
            Nothing is undone then.
    """
    root = causal_lm(model, "revert")
    paths = {id(module): path or "the model" for path, module in root.named_modules()}
    theirs = [swap for swap in _swap.recorded(root) if swap.wrapped and id(swap.module) in paths]
    if theirs:
        raise PatchError(
            f"revert: a patched forward has been wrapped since, on {', '.join(paths[id(swap.module)] for swap in theirs)}. "
            "Remove the wrapper first (accelerate: accelerator.unwrap_model(model, keep_fp32_wrapper=False)), then revert"
        )
    # Modules that have since been taken out of the model (an output layer that made room for another) get their originals back too.
    gone = [swap for swap in _swap.recorded(root) if id(swap.module) not in paths and not swap.wrapped]
    for swap in [*_swap.swaps(root), *gone]:
        swap.remove()
    root.__dict__.pop(_swap.RECORD, None)
    return model


@contextmanager
def patched(model: Model, *, strict: bool = True, verify: bool = True, memory_budget: int | None = None, **which: bool) -> Iterator[Model]:
    """`with liger_patch.patched(model):` patches for the length of the block, and reverts also when the block raises.

    Args:
        model: as for `auto`.
        strict: as for `auto`.
        verify: as for `auto`.
        memory_budget: as for `auto`.
        **which: as for `auto`.

    Yields:
        The same model. What was patched before the block stays patched after it.

    Raises:
        TypeError, ValueError: as for `auto`.
        PatchError: as for `auto` and `revert`.
    """
    root = causal_lm(model, "patched")
    before = _swap.recorded(root)
    budgets = [(swap, swap.memory_budget) for swap in before if isinstance(swap, HeadForward)]
    apply("patched", model, strict, verify, memory_budget, which)
    try:
        yield model
    finally:
        revert(model)
        _swap.install(root, before)
        for head, number in budgets:
            head.memory_budget = number


def refusal(who: str, root: PreTrainedModel, failures: list[Find]) -> str:
    """The text of an error that lists what failed, each place with its reason, and the ways out."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for f in failures:
        places.setdefault((f.row.op, f.row.was, f.row.why), []).append(f.row.path)
    lines = []
    for (op, was, why), paths in places.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        lines.append(f"  {op}: {was} at {paths[0]}{more}: {why}")
    off = ", ".join(f"{op}=False" for op in dict.fromkeys(f.row.op for f in failures))
    return (
        f"{who}: {type(root).__name__} of transformers {transformers.__version__} is not what the entry for {root.config.model_type!r} "
        "describes, and nothing was changed.\n"
        + "\n".join(lines)
        + f"\nLeave it stock with {off} or strict=False, or describe the model as it is with liger_patch.register(..., replace=True)."
    )


def survey(who: str, model: nn.Module, which: Mapping[str, object], verify: bool) -> tuple[PreTrainedModel, list[Find]]:
    """Every find in a model, those that are planned proved if `verify`."""
    asked = wanted(which, who)
    root = causal_lm(model, who)
    finds = find(root, entry(root.config.model_type, who), asked)
    if not verify:
        return root, finds
    outcomes: dict[Hashable, str] = {}
    for i, f in enumerate(finds):
        if f.row.status == PLANNED and (why := refuted(f, outcomes)):
            finds[i] = f.failed(why)
    return root, finds


def refuted(f: Find, outcomes: dict[Hashable, str]) -> str:
    """Why a swap is not the function that it would replace; empty if it is. Equal layers are proved once."""
    if f.prove is None:
        return ""
    if f.proof_key not in outcomes:
        try:
            f.prove()
            outcomes[f.proof_key] = ""
        except Disagreement as disagreement:
            outcomes[f.proof_key] = f"{f.row.now} does not compute what {f.row.was} does here: {disagreement}"
    return outcomes[f.proof_key]


def head_of(root: PreTrainedModel, finds: Iterable[Find]) -> HeadForward | None:
    """What makes the loss in the output layer, planned or there already; None where that is stock."""
    for f in finds:
        if f.row.op == HeadForward.op and f.row.status in (PLANNED, ALREADY):
            return next(swap.head for swap in (*f.swaps, *_swap.recorded(root)) if isinstance(swap, CausalLMForward))
    return None


def budgeted(finds: Iterable[Find], head: HeadForward | None, memory_budget: int | None) -> list[Find]:
    """The finds, whose row of the output layer names its budget of memory, if it has or would have one."""
    number = memory_budget if memory_budget is not None or head is None else head.memory_budget

    def named(row: Row) -> Row:
        is_head = row.op == HeadForward.op and row.status in (PLANNED, ALREADY)
        return replace(row, now=f"{row.now}(memory_budget={number})") if is_head and number is not None else row

    return [replace(f, row=named(f.row)) for f in finds]


def report(root: PreTrainedModel, finds: Iterable[Find]) -> Report:
    return Report(root.config.model_type, type(root).__name__, tuple(f.row for f in finds))
