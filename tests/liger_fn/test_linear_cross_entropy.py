"""linear_cross_entropy: the contract, and its oddities."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import liger_fn
from tests import cases
from tests.cases import Case
from tests.contract import Contract, wrong
from tests.numerics import assert_near, assert_same_bits

H, V = 24, 63


class TestLinearCrossEntropy(Contract):
    table = cases.LINEAR_CROSS_ENTROPY
    wrong_calls = (
        wrong("int-x", TypeError, "x must be float32", "torch.int64", ".to(", x=torch.Tensor.long),
        wrong("0-d", ValueError, "x must have at least 1 axes", "[]", x=lambda x: x.sum()),
        wrong("weight-transposed", ValueError, "weight must be [V, 24]", "[24, 63]", weight=lambda w: w.T),
        wrong("weight-1d", ValueError, "weight must be [V, 24]", "[24]", weight=lambda w: w[0]),
        wrong("no-classes", ValueError, "weight must be [V, 24]", "[0, 24]", weight=lambda w: w[:0]),
        wrong("weight-dtype", TypeError, "weight must be torch.float32", "torch.bfloat16", ".to(", weight=torch.Tensor.bfloat16),
        wrong("bias-shape", ValueError, "bias must have shape [63]", "[62]", bias=lambda b: b[1:]),
        wrong("bias-dtype", TypeError, "bias must be torch.float32", "torch.float16", bias=torch.Tensor.half),
        wrong("float-target", TypeError, "integer dtype", "torch.float32", ".long()", target=torch.Tensor.float),
        wrong("target-shape", ValueError, "target must have shape [2, 5]", "[10]", target=torch.Tensor.flatten),
        wrong("device", ValueError, "weight must be on", "meta", ".to(", weight=lambda w: w.to("meta")),
        wrong("reduction", ValueError, "'mean', 'sum', 'none'", "'average'", reduction="average"),
        wrong("budget", ValueError, "memory_budget", "at least 1", "0", memory_budget=0),
        wrong("class-weight", ValueError, "class_weight must have shape [63]", "[62]", class_weight=lambda w: w[1:]),
        wrong("token-weight", ValueError, "token_weight must have shape [2, 5]", "[10]", token_weight=torch.Tensor.flatten),
        wrong(
            "token-grad",
            ValueError,
            "no gradient is computed for token_weight",
            "detach",
            token_weight=lambda w: w.clone().requires_grad_(),
        ),
        wrong("smoothing", ValueError, "label_smoothing must be a number from 0 to 1", "1.5", label_smoothing=1.5),
        wrong("z", ValueError, "z_loss must be a number of at least 0", "-1", z_loss=-1),
        wrong("softcap", ValueError, "softcap must be a number above 0", "None", softcap=0),
        wrong("scale", ValueError, "logit_scale must be a number above 0", "0", logit_scale=0),
        wrong("temperature", ValueError, "temperature must be a number above 0", "nan", temperature=math.nan),
        wrong("items-none", ValueError, "num_items is what a mean divides by", "'none'", num_items=3),
        wrong("save", ValueError, "save must be one of", "'everything'", save="everything"),
        wrong("accumulate", ValueError, "accumulate must be one of", "'bf16'", accumulate="bf16"),
    )


class TestReducedLinearCrossEntropy(Contract):
    """A reduced loss takes another way: its gradients are made in forward, and scaled in backward."""

    table = replace(
        cases.LINEAR_CROSS_ENTROPY,
        typical=Case("reduced", cases.LINEAR_CROSS_ENTROPY.typical.make, {"memory_budget": cases.SMALL_BUDGET}, draws=8),
        cases=(), hostile=(), on_gpu=(), launches=(),
    )  # fmt: skip
    wrong_calls = ()


def inputs(device: torch.device, rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(n, H, device=device, generator=generator) for n in (rows, V))
    return x, weight, torch.randint(V, (rows,), device=device, generator=generator)


def grads_and_loss(x: Tensor, weight: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    loss = liger_fn.linear_cross_entropy(*leaves, target, **options)
    return *torch.autograd.grad(loss.sum(), leaves), loss.detach()


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_is_torchs_cross_entropy_of_logits(backend: str, reduction: str, device: torch.device) -> None:
    x, weight, target = inputs(device)
    target[::3] = -100
    want = F.cross_entropy(x @ weight.T, target, reduction=reduction)
    torch.testing.assert_close(liger_fn.linear_cross_entropy(x, weight, target, reduction=reduction), want)


SMALL = {"memory_budget": 3 * V * 4}  # three rows at a time


@pytest.mark.parametrize("accumulate", cases.ACCUMULATE)
def test_every_option_against_whole_logits(backend: str, accumulate: str, device: torch.device) -> None:
    """Value, gradients and aux are those of the same formula over all logits."""
    x, weight, target = inputs(device, rows=20)
    target[::4] = -100
    class_weight, token_weight = torch.rand(V, device=device) + 0.5, torch.rand(20, device=device) + 0.5
    leaves = [t.requires_grad_() for t in (x, weight)]
    loss, aux = liger_fn.linear_cross_entropy(
        x, weight, target, class_weight=class_weight, token_weight=token_weight, label_smoothing=0.1, z_loss=0.01, softcap=7.0,
        logit_scale=0.5, temperature=0.7, num_items=11, return_aux=True, accumulate=accumulate, **SMALL,
    )  # fmt: skip
    logits = 7.0 * torch.tanh(0.5 * (x @ weight.T) / 7.0) / 0.7
    each = F.cross_entropy(logits, target, class_weight, reduction="none", label_smoothing=0.1)
    each = (each + 0.01 * logits.logsumexp(-1).square() * (target != -100)) * token_weight
    torch.testing.assert_close(loss, each.sum() / 11)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(each.sum() / 11, leaves), strict=True):
        torch.testing.assert_close(a, b)
    _, want = liger_fn.cross_entropy(logits.detach(), target, z_loss=0.01, return_aux=True)
    for name, a, b in zip(want._fields, aux, want, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("option", ["class_weight", "token_weight", "logit_scale", "temperature"])
def test_fp16_gradients_stay_finite_under_large_factors(backend: str, option: str, device: torch.device) -> None:
    """What keeps small probabilities in fp16 must not push large gradients out of its range."""
    x, weight, target = inputs(device)
    x, weight = x.half() / 16, weight.half() / 16
    value = {"class_weight": torch.full((V,), 100.0, device=device), "token_weight": torch.full((6,), 100.0, device=device)}
    options: dict[str, Any] = {option: value.get(option, {"logit_scale": 100.0, "temperature": 0.01}.get(option)), "reduction": "mean"}

    def grads(fn: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
        return torch.autograd.grad(fn(*leaves, target, **options), leaves)

    fn = liger_fn.linear_cross_entropy
    each = (grads(fn, torch.float16), grads(fn.reference, torch.float16), grads(fn.reference, torch.float64))
    for name, ours, naive, truth in zip(("dx", "dweight"), *each, strict=True):
        assert_near(ours, naive, truth, name)


def test_a_double_weight_of_tokens_leaves_the_loss_fp32(backend: str, device: torch.device) -> None:
    x, weight, target = inputs(device)
    assert (
        liger_fn.linear_cross_entropy(x, weight, target, token_weight=torch.ones(6, dtype=torch.float64, device=device)).dtype
        is torch.float32
    )


def test_shift_is_of_labels_and_weights(backend: str, device: torch.device) -> None:
    x, weight, target = inputs(device, rows=12)
    x, target = x.view(3, 4, H), target.view(3, 4)
    target[1, 2] = -100
    token_weight = torch.rand(3, 4, device=device)
    ours = liger_fn.linear_cross_entropy(x, weight, target, token_weight=token_weight, shift=True, reduction="none", **SMALL)
    want = F.cross_entropy((x[:, :-1] @ weight.T).mT, target[:, 1:], reduction="none") * token_weight[:, 1:]
    torch.testing.assert_close(ours, F.pad(want, (0, 1)))


@pytest.mark.parametrize("dtype", cases.HALVES)
def test_loss_is_fp32(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, target = inputs(device)
    for reduction in cases.REDUCTIONS:
        assert liger_fn.linear_cross_entropy(x.to(dtype), weight.to(dtype), target, reduction=reduction).dtype is torch.float32


@pytest.mark.parametrize("bad", [V, -1, 2**40])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_target_out_of_range(backend: str, bad: int, reduction: str, device: torch.device) -> None:
    x, weight, target = inputs(device)
    target[2] = bad
    if device.type == "cpu":
        with pytest.raises(ValueError, match=rf"linear_cross_entropy: every target must be in \[0, {V}\) .*, got {bad} "):
            liger_fn.linear_cross_entropy(x, weight, target, reduction=reduction)
        return
    dx, dweight, loss = grads_and_loss(x, weight, target, reduction=reduction)
    others = torch.arange(6, device=device) != 2
    assert bool(dx[2].isnan().all())
    assert bool(dx[others].isfinite().all())
    assert bool(dweight.isnan().all())  # every class's gradient sums over all rows
    assert torch.equal(loss.isnan(), ~others) if reduction == "none" else bool(loss.isnan())


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_all_ignored(backend: str, reduction: str, device: torch.device) -> None:
    x, weight, target = inputs(device)
    for t in grads_and_loss(x, weight, torch.full_like(target, -100), reduction=reduction):
        assert not t.any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_ignored_rows_have_no_loss_and_no_gradient(backend: str, value: float, reduction: str, device: torch.device) -> None:
    """Whatever they hold: loss and dx are as with any other content."""
    x, weight, target = inputs(device)
    target[2] = -100
    dx, _, loss = grads_and_loss(x, weight, target, reduction=reduction)
    x[2] = value
    hostile_dx, _, hostile_loss = grads_and_loss(x, weight, target, reduction=reduction)
    assert_same_bits((hostile_dx, hostile_loss), (dx, loss), "dx and loss")
    assert not dx[2].any()


def test_frozen_states_leave_the_head_trainable(backend: str, device: torch.device) -> None:
    """The usual first stage of adapting a model; peers return no gradient for the head then."""
    x, weight, target = inputs(device)
    _, want, _ = grads_and_loss(x, weight, target)
    head = weight.clone().requires_grad_()
    liger_fn.linear_cross_entropy(x, head, target).backward()
    assert head.grad is not None
    assert torch.equal(head.grad, want)


def test_a_transform_makes_only_the_gradients_it_asks_for(backend: str, device: torch.device) -> None:
    x, weight, target = inputs(device)

    def loss(x: Tensor) -> Tensor:
        return liger_fn.linear_cross_entropy(x, weight, target)

    with made() as shapes:
        torch.func.grad(loss)(x)
    assert shapes == {"dx"}
    with made() as shapes:
        torch.func.vmap(loss)(torch.stack([x, x]))
    assert shapes == set()
    with made() as shapes:
        torch.func.vmap(torch.func.grad(lambda w, x: liger_fn.linear_cross_entropy(x, w, target), argnums=0), in_dims=(None, 0))(
            weight, torch.stack([x, x])
        )
    assert shapes == {"dweight"}


@contextmanager
def made() -> Iterator[set[str]]:
    """Which gradients forwards made, inside the block."""
    op, names = liger_fn.linear_cross_entropy, set()
    stock = op.run_fwd

    def watched(*args: Any) -> Any:
        y, residuals = stock(*args)
        names.update(k for k in ("dx", "dweight", "dbias") if getattr(residuals, k) is not None)
        return y, residuals

    op.run_fwd = watched
    try:
        yield names
    finally:
        del op.run_fwd


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_are_scaled_in_their_own_memory_once_the_graph_is_freed(backend: str, keep: bool, device: torch.device) -> None:
    """What forward made is what backward returns, unless the graph is kept for another backward: half the memory of a copy."""
    x, weight, target = (t.requires_grad_() if t.is_floating_point() else t for t in inputs(device))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = liger_fn.linear_cross_entropy(x, weight, target)
    made = {t.data_ptr() for t in saved}
    grads = torch.autograd.grad(loss, (x, weight), retain_graph=keep)
    assert all((g.data_ptr() in made) is not keep for g in grads)


@pytest.mark.parametrize("confidence", [16, 20, 24])
def test_fp16_keeps_small_probabilities_under_loss_scaling(backend: str, confidence: int, device: torch.device) -> None:
    """A confident model in fp16: nearly every probability is subnormal, and a loss scale is there to keep them."""
    g = torch.Generator().manual_seed(0)
    head = (torch.randint(0, 2, (4096, 64), generator=g) * 0.25 - 0.125).to(
        device, torch.float16
    )  # exact logits, whose errors would hide it
    target = torch.randint(4096, (64,), generator=g).to(device)
    x = head[target] * confidence

    def grads(fn: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, head)]
        return torch.autograd.grad(fn(*leaves, target) * 65536.0, leaves)

    ours, naive = grads(liger_fn.linear_cross_entropy, torch.float16), grads(liger_fn.linear_cross_entropy.reference, torch.float16)
    truth = grads(liger_fn.linear_cross_entropy.reference, torch.float64)
    for o, n, t, name in zip(ours, naive, truth, ("x", "weight"), strict=True):
        assert_near(o, n, t, f"fp16 gradient of {name} under loss scaling")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_gradient_made_in_forward_is_no_constant(backend: str, reduction: str, device: torch.device) -> None:
    """With a frozen head nothing that backward reads asks for a gradient: a gradient penalty would silently vanish."""
    x, weight, target = inputs(device)
    x = x.requires_grad_()
    loss = liger_fn.linear_cross_entropy(x, weight.detach(), target, reduction=reduction)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"linear_cross_entropy.reference"):
        (loss + grad.square().sum()).backward()
