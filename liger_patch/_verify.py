"""Prove a model: swap by swap, and end to end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ._apply import auto, refusal, refuted, report, revert, survey
from ._errors import PatchError
from ._find import Find
from ._proof import Disagreement, DoesNotRun, compare, where
from ._report import ALREADY, FAILED, PLANNED, PROVED, UNVERIFIED, Report, Row

MEMORY_LIMIT = 2 * 2**30  # bytes of a model in fp64 above which no copy of it is made
BATCHES = 4  # the original's loss of one may be exact by luck
END_TO_END_SLACK = 2.0  # rounding errors of many layers do not add up in order, so ours may lie on the other side of the truth


def verify(model: nn.Module, **which: bool) -> Report:
    """Prove that the patches of a model compute what the model computed, whether or not they are made yet.

    Every swap runs against the original on small random inputs (see `auto`). Then copies of the whole model, stock and patched, run on a
    few random tokens, and the loss and all gradients are held against the stock model in fp64. The model itself, its gradients and the
    random state stay untouched.

    Args:
        model: as for `auto`; patched or not.
        **which: as for `auto`.

    Returns:
        A report with rows "proved", "left" and "not verified". The last row is the whole model; it is not verified if it is too large to
        copy, its weights are not all here (on the meta device, sharded, quantised), or the original itself does not run on such tokens.

    Raises:
        TypeError: an operation's name is not known, or its value is not a bool.
        PatchError: the model's type is not supported, or a swap or the whole model does not agree.

    Examples:
        >>> print(liger_patch.verify(model))  # doctest: +SKIP
    """
    root, finds = survey("verify", model, which, verify=False)
    outcomes: dict[Any, str] = {}
    for i, f in enumerate(finds):
        if f.row.status in (PLANNED, ALREADY):
            why = refuted(f, outcomes)
            finds[i] = f.failed(why) if why else replace(f, row=replace(f.row, status=PROVED))
    if not any(f.row.status == FAILED for f in finds):
        finds.append(Find(_end_to_end(root, which, finds)))
    failures = [f for f in finds if f.row.status == FAILED]
    if failures:
        raise PatchError(refusal("verify", root, failures))
    return report(root, finds)


def _end_to_end(root: PreTrainedModel, which: Mapping[str, bool], finds: Sequence[Find]) -> Row:
    row = Row("the whole model", "verify", type(root).__name__, "patched", PROVED)
    if why := _not_runnable(root):
        return replace(row, status=UNVERIFIED, why=why)
    dtype, device = where(root)

    def run(change: Callable[[nn.Module], Any]) -> Callable[[torch.dtype], Mapping[str, Tensor]]:
        def values(held: torch.dtype) -> Mapping[str, Tensor]:
            twin = copy.deepcopy(root).to(held)
            change(twin)
            # Training, for the fused loss, but with no dropout in any layer: two runs must be comparable.
            twin.eval().requires_grad_()
            twin.training = True
            if any(find.row.op == "experts" for find in finds):
                twin.set_experts_implementation("eager")  # products in groups know no fp64
            vocab = root.config.get_text_config().vocab_size
            ids = torch.randint(vocab, (BATCHES, 2, 7), generator=torch.Generator().manual_seed(0), device="cpu").to(device)
            losses = torch.stack([twin(input_ids=each, labels=each, use_cache=False).loss for each in ids])
            parameters = [p for p in twin.parameters() if p.is_floating_point()]
            grads = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
            # One vector of all gradients: a single small parameter's error is chance, the whole is not.
            return {"loss": losses, "gradient": torch.cat([g.flatten() for g in grads if g is not None])}

        return values

    def patch(twin: nn.Module) -> None:
        auto(twin, verify=False, **which)

    try:
        compare(run(revert), run(patch), dtype, device, slack=END_TO_END_SLACK)
    except DoesNotRun as original:
        return replace(row, status=UNVERIFIED, why=str(original))
    except Disagreement as disagreement:
        return replace(row, status=FAILED, why=str(disagreement))
    return row


def _not_runnable(root: nn.Module) -> str:
    """Why copies of a model cannot be run here; empty if they can."""
    tensors = [*root.parameters(), *root.buffers()]
    if any(t.device.type == "meta" for t in tensors):
        return "weights are on the meta device"
    if any(type(t) not in (Tensor, nn.Parameter) or hasattr(t, "ds_id") for t in tensors):
        return "weights are sharded, or of a tensor subclass"
    if any(not t.is_floating_point() for t in root.parameters()):
        return "weights are quantised"
    if len({t.device for t in root.parameters()}) > 1:
        return "weights are on several devices"
    if (size := 8 * sum(t.numel() for t in tensors)) > MEMORY_LIMIT:
        return f"a copy in fp64 takes {size / 2**30:.1f} GiB, over the limit of {MEMORY_LIMIT / 2**30:.0f}; every swap was proved by itself"
    return ""
