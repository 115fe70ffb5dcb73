"""cross_entropy: the contract, and its oddities."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import liger_fn
from liger_fn.cross_entropy import CrossEntropyAux
from tests import cases
from tests.contract import Contract, wrong
from tests.numerics import assert_same_bits


class TestCrossEntropy(Contract):
    table = cases.CROSS_ENTROPY
    wrong_calls = (
        wrong("int-logits", TypeError, "logits must be float32", "torch.int64", ".to(", logits=torch.Tensor.long),
        wrong("0-d", ValueError, "logits must have at least 1 axes", "[]", logits=lambda a: a.sum()),
        wrong("no-classes", ValueError, "at least 1 element", "0", logits=lambda a: a[..., :0]),
        wrong("float-target", TypeError, "integer dtype", "torch.float32", ".long()", target=torch.Tensor.float),
        wrong("bool-target", TypeError, "integer dtype", "torch.bool", target=torch.Tensor.bool),
        wrong("list-target", TypeError, "target must be a torch.Tensor", "list", target=torch.Tensor.tolist),
        wrong("target-shape", ValueError, "target must have shape [2, 5]", "[10]", target=torch.Tensor.flatten),
        wrong("probabilities", TypeError, "integer dtype", "torch.float32", target=lambda t: torch.rand(2, 5, 63)),
        wrong("device", ValueError, "target must be on", "meta", ".to(", target=lambda t: t.to("meta")),
        wrong("weight-shape", ValueError, "weight must have shape [63]", "[62]", weight=lambda w: w[1:]),
        wrong("weight-int", TypeError, "weight must be float32", "torch.int64", weight=lambda _: torch.ones(63, dtype=torch.int64)),
        wrong("weight-grad", ValueError, "no gradient is computed for weight", "detach", weight=lambda w: w.clone().requires_grad_()),
        wrong("smoothing", ValueError, "label_smoothing must be a number from 0 to 1", "1.5", label_smoothing=1.5),
        wrong("z", ValueError, "z_loss must be a number of at least 0", "-1", z_loss=-1),
        wrong("softcap", ValueError, "softcap must be a number above 0", "0", "None", softcap=0),
        wrong("items-sum", ValueError, "num_items is what a mean divides by", "'sum'", reduction="sum"),
        wrong("items-shape", ValueError, "num_items must be a number or a tensor of one", "[2]", num_items=torch.ones(2)),
        wrong("items-float", ValueError, "num_items must be an integer", "2.5", num_items=2.5),
        wrong("reduction", ValueError, "'mean', 'sum', 'none'", "'average'", reduction="average"),
    )


def inputs(device: torch.device, rows: int = 6, classes: int = 63) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    target = torch.randint(classes, (rows,), device=device, generator=generator)
    return torch.randn(rows, classes, device=device, generator=generator), target


def grad_and_loss(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = liger_fn.cross_entropy(leaf, target, **options)
    return torch.autograd.grad(loss.sum(), leaf)[0], loss.detach()


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_is_torchs_cross_entropy(backend: str, reduction: str, device: torch.device) -> None:
    logits, target = inputs(device)
    target[::3] = -100
    torch.testing.assert_close(
        liger_fn.cross_entropy(logits, target, reduction=reduction), F.cross_entropy(logits, target, reduction=reduction)
    )


@pytest.mark.parametrize("dtype", cases.HALVES)
def test_loss_is_fp32(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    logits, target = inputs(device)
    for reduction in cases.REDUCTIONS:
        assert liger_fn.cross_entropy(logits.to(dtype), target, reduction=reduction).dtype is torch.float32


@pytest.mark.parametrize("bad", [63, -1, 2**40, -(2**40), -99])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_target_out_of_range(backend: str, bad: int, reduction: str, device: torch.device) -> None:
    """An error on a CPU. On a GPU, where looking would make the host wait, NaN in that row, its gradient, and any sum over it."""
    logits, target = inputs(device)
    target[2] = bad
    if device.type == "cpu":
        with pytest.raises(ValueError, match=rf"cross_entropy: every target must be in \[0, 63\) or be ignore_index=-100, got {bad} "):
            liger_fn.cross_entropy(logits, target, reduction=reduction)
        return
    grad, loss = grad_and_loss(logits, target, reduction=reduction)
    others = torch.arange(6, device=device) != 2
    assert bool(grad[2].isnan().all())
    assert bool(grad[others].isfinite().all())
    assert torch.equal(loss.isnan(), ~others) if reduction == "none" else bool(loss.isnan())


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_all_ignored(backend: str, reduction: str, device: torch.device) -> None:
    logits, target = inputs(device)
    grad, loss = grad_and_loss(logits, torch.full_like(target, -100), reduction=reduction)
    assert not loss.any()
    assert not grad.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_ignored_rows_may_hold_anything(backend: str, value: float, reduction: str, device: torch.device) -> None:
    logits, target = inputs(device)
    target[2] = -100
    clean = grad_and_loss(logits, target, reduction=reduction)
    logits[2] = value
    assert_same_bits(grad_and_loss(logits, target, reduction=reduction), clean, "gradient and loss")
    assert not clean[0][2].any()
    leaf = logits.clone().requires_grad_()
    loss = liger_fn.cross_entropy.reference(leaf, target, reduction=reduction)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), leaf)[0], clean[0])


def test_infinite_logits_are_not_hidden(backend: str, device: torch.device) -> None:
    """A row with a logit at +inf has no finite loss; the other rows do not notice."""
    logits, target = inputs(device)
    clean = grad_and_loss(logits, target, reduction="none")
    logits[2, (target[2] + 1) % 63] = math.inf
    grad, loss = grad_and_loss(logits, target, reduction="none")
    others = torch.arange(6, device=device) != 2
    assert not bool(loss[2].isfinite())
    assert not bool(grad[2].isfinite().all())
    assert_same_bits((grad[others], loss[others]), (clean[0][others], clean[1][others]), "other rows")


def test_each_row_honours_its_own_cotangent(backend: str, device: torch.device) -> None:
    logits, target = inputs(device)
    leaf = logits.requires_grad_()
    each = liger_fn.cross_entropy(leaf, target, reduction="none")
    scale = torch.arange(6.0, device=device)
    (grad,) = torch.autograd.grad(each, leaf, scale)
    want = scale[:, None] * (logits.softmax(-1) - F.one_hot(target, 63))
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_narrow_targets_do_not_wrap(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """-100 is 156 in uint8, and a vocabulary of 50257 is negative in int16."""
    target = torch.tensor([100, 0, 3] if dtype is torch.int8 else [156, 0, 3], device=device)
    logits = torch.randn(3, 50257, device=device)
    want = liger_fn.cross_entropy(logits, target, reduction="none")
    assert bool((want > 0).all())
    assert torch.equal(liger_fn.cross_entropy(logits, target.to(dtype), reduction="none"), want)


@pytest.mark.parametrize("confidence", [8.0, 16.0, 24.0, 60.0])
def test_a_confident_row_keeps_its_gradient(backend: str, confidence: float, device: torch.device) -> None:
    """p_y − 1 in fp32 would keep no digit once the others' share is below 6e-8."""
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 999, 512, 7])
    logits[torch.arange(4), target] += confidence

    def grad(fn: Any, dtype: torch.dtype) -> Tensor:
        leaf = logits.to(device, dtype).requires_grad_()
        fn(leaf, target.to(device)).backward()
        assert leaf.grad is not None
        return leaf.grad[torch.arange(4), target].double()

    others = torch.softmax(logits.double(), -1).scatter(-1, target[:, None], 0.0).sum(-1).to(device)
    torch.testing.assert_close(grad(liger_fn.cross_entropy, torch.float32), -others / 4, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_weights_and_smoothing_are_torchs(backend: str, reduction: str, smoothing: float, device: torch.device) -> None:
    logits, weight = torch.randn(9, 63, device=device), torch.rand(63, device=device)
    target = torch.randint(63, (9,), device=device)
    target[3] = -100
    options: Any = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    torch.testing.assert_close(liger_fn.cross_entropy(logits, target, **options), F.cross_entropy(logits, target, **options))


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_micro_batches_add_up(backend: str, kind: Any, device: torch.device) -> None:
    """The gradients of two halves, each divided by the number of rows of both, are the gradient of the whole."""
    logits, target = torch.randn(8, 63, device=device), torch.randint(63, (8,), device=device)
    target[5:] = -100
    whole, halves = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    liger_fn.cross_entropy(whole, target).backward()
    items = kind(5) if kind is int else kind(5, device=device)
    for part in (slice(0, 4), slice(4, 8)):
        liger_fn.cross_entropy(halves[part], target[part], num_items=items).backward()
    torch.testing.assert_close(halves.grad, whole.grad)


def test_no_items_divide_nothing(backend: str, device: torch.device) -> None:
    logits = torch.randn(2, 63, device=device).requires_grad_()
    loss = liger_fn.cross_entropy(logits, torch.full((2,), -100, device=device), num_items=0)
    loss.backward()
    assert loss == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_z_loss_by_hand(backend: str, device: torch.device) -> None:
    logits, target = torch.randn(5, 63, device=device), torch.randint(63, (5,), device=device)
    with_z = liger_fn.cross_entropy(logits, target, z_loss=0.5, reduction="none")
    torch.testing.assert_close(with_z, F.cross_entropy(logits, target, reduction="none") + 0.5 * logits.logsumexp(-1) ** 2)


def test_softcap_is_the_models(backend: str, device: torch.device) -> None:
    logits, target = 30 * torch.randn(5, 63, device=device), torch.randint(63, (5,), device=device)
    torch.testing.assert_close(
        liger_fn.cross_entropy(logits, target, softcap=30.0), F.cross_entropy(torch.tanh(logits / 30) * 30, target), rtol=1e-5, atol=1e-6
    )


def _aux_by_hand(logits: Tensor, target: Tensor, z: float) -> CrossEntropyAux:
    keep = target != -100
    p = logits.double().softmax(-1)
    lse, log_p = logits.double().logsumexp(-1), logits.double().log_softmax(-1)
    own = log_p.gather(-1, target.clamp(0)[..., None]).squeeze(-1)
    entropy = -(p * log_p).sum(-1)
    best = logits.amax(-1) == logits.gather(-1, target.clamp(0)[..., None]).squeeze(-1)
    return CrossEntropyAux(*(t * keep for t in (lse, own, z * lse**2, entropy)), best & keep, keep.sum())


def _each_aux(backend: str, device: torch.device) -> Any:
    logits, target = 3 * torch.randn(3, 5, 63, device=device), torch.randint(63, (3, 5), device=device)
    target[1, 2], target[0, 0] = -100, logits[0, 0].argmax()
    return logits, target, {"z_loss": 0.25, "return_aux": True}


def _assert_aux(got: CrossEntropyAux, logits: Tensor, target: Tensor) -> None:
    for name, a, b in zip(got._fields, got, _aux_by_hand(logits, target, 0.25), strict=True):
        assert not a.requires_grad, name
        torch.testing.assert_close(a, b.to(a.dtype), msg=lambda m, name=name: f"{name}: {m}")
    assert got.correct.dtype is torch.bool


@pytest.mark.parametrize("how", ["eager", "no-grad", "fwd", "reference", "compiled", "grad", "vmap", "40000"])
def test_aux(backend: str, how: str, device: torch.device, fresh_compiler: None) -> None:
    logits, target, options = _each_aux(backend, device)
    if how == "40000":
        logits, target = 3 * torch.randn(2, 40000, device=device), torch.randint(40000, (2,), device=device)
    alone = liger_fn.cross_entropy(logits, target, z_loss=0.25)
    if how in ("eager", "40000"):
        leaf = logits.clone().requires_grad_()
        loss, aux = liger_fn.cross_entropy(leaf, target, **options)
        (grad,) = torch.autograd.grad(loss, leaf)
        other = logits.clone().requires_grad_()
        assert_same_bits([grad], torch.autograd.grad(liger_fn.cross_entropy(other, target, z_loss=0.25), other), "gradient")
    elif how == "no-grad":
        with torch.no_grad():
            loss, aux = liger_fn.cross_entropy(logits, target, **options)
    elif how == "fwd":
        (loss, aux), residuals = liger_fn.cross_entropy.fwd(logits, target, **options)
        assert liger_fn.cross_entropy.bwd(residuals, torch.ones_like(loss))[0].shape == logits.shape
    elif how == "reference":
        loss, aux = liger_fn.cross_entropy.reference(logits, target, **options)
        torch.testing.assert_close(loss, alone)
        alone = loss
    elif how == "compiled":
        fn = torch.compile(lambda a: liger_fn.cross_entropy(a, target, **options), fullgraph=True, backend="aot_eager")
        loss, aux = fn(logits.clone().requires_grad_())
    elif how == "grad":
        _, (loss, aux) = torch.func.grad_and_value(lambda a: liger_fn.cross_entropy(a, target, **options), has_aux=True)(logits)
    else:
        _, aux = torch.func.vmap(lambda a, t: liger_fn.cross_entropy(a, t, **options))(logits, target)
        aux, loss = aux._replace(num_valid=aux.num_valid.sum()), alone
    assert_same_bits([loss.detach()], [alone], "loss")
    _assert_aux(aux, logits, target)


def test_aux_of_all_ignored_and_infinite_rows(backend: str, device: torch.device) -> None:
    logits, target = torch.randn(3, 63, device=device), torch.tensor([-100, 5, 5], device=device)
    logits[0], logits[1, 6:] = math.nan, -math.inf
    _, aux = liger_fn.cross_entropy(logits, target, return_aux=True)
    assert [float(t[0]) for t in aux[:5]] == [0.0] * 5
    assert aux.num_valid == 2
    torch.testing.assert_close(aux.entropy[1:], torch.distributions.Categorical(logits=logits[1:]).entropy())


def _donating(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits that are nobody's leaf, and targets."""
    x = torch.randn(7, 1000, device=device, dtype=dtype).requires_grad_()
    target = torch.randint(1000, (7,), device=device)
    target[2] = -100
    return x, target


def test_aux_of_hostile_rows(backend: str, device: torch.device) -> None:
    """All −inf: lse is −inf. NaN beside the target, which has the maximum of the rest: nothing is known, and it is not correct."""
    logits, target = torch.zeros(2, 63, device=device), torch.full((2,), 5, device=device)
    logits[0], logits[1, 5], logits[1, 40] = -math.inf, 9.0, math.nan
    loss, aux = liger_fn.cross_entropy(logits, target, reduction="none", return_aux=True)
    assert loss.isnan().all()
    assert aux.lse[0] == -math.inf
    assert aux.lse[1].isnan()
    assert not aux.correct.any()


@pytest.mark.parametrize("dtype", cases.HALVES)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_donated_logits_become_their_gradient(backend: str, reduction: str, dtype: torch.dtype, device: torch.device) -> None:
    x, target = _donating(device, dtype)
    want = liger_fn.cross_entropy(x * 2, target, reduction=reduction)
    (want_grad,) = torch.autograd.grad(want.sum(), x)
    logits = x * 2
    before = logits.detach().clone()
    loss = liger_fn.cross_entropy(logits, target, reduction=reduction, donate=True)
    donated = reduction != "none" and dtype is not torch.float16
    assert torch.equal(logits, before) is not donated
    seen: list[Tensor] = []
    logits.register_hook(lambda g: seen.append(g))
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert_same_bits([loss.detach(), grad], [want.detach(), want_grad], "loss and gradient")
    assert (seen[0].data_ptr() == logits.data_ptr()) is donated


def test_a_donated_graph_that_is_kept_stays_right(backend: str, device: torch.device) -> None:
    x, target = _donating(device)
    logits = x * 2
    loss = liger_fn.cross_entropy(logits, target, donate=True)
    first = torch.autograd.grad(loss, x, torch.tensor(2.0, device=device), retain_graph=True)[0]
    again = torch.autograd.grad(loss, x, torch.tensor(1.0, device=device))[0]
    assert_same_bits([first], [2 * again], "gradients")


def test_who_kept_donated_logits_hears_of_it(backend: str, device: torch.device) -> None:
    x, target = _donating(device)
    logits = x.exp()  # exp keeps its result for its backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        liger_fn.cross_entropy(logits, target, donate=True).backward()


def test_nothing_is_donated_where_it_cannot_be(backend: str, device: torch.device, fresh_compiler: None) -> None:
    """No gradient, a strided view, a compiler: the logits are only read."""
    x, target = _donating(device)
    logits, wide = (x * 2).detach(), (torch.randn(7, 2000, device=device).requires_grad_() * 2)[:, ::2]
    compiled = torch.compile(lambda a: liger_fn.cross_entropy(a, target, donate=True), fullgraph=True, backend="aot_eager")
    leaf = logits.clone().requires_grad_()
    for t, call in ((logits, liger_fn.cross_entropy), (wide, liger_fn.cross_entropy), (leaf, lambda a, _, donate: compiled(a))):
        before = t.detach().clone()
        call(t, target, donate=True)
        assert torch.equal(t, before)
    torch.func.grad(lambda a: liger_fn.cross_entropy(a, target, donate=True))(logits)
    assert torch.equal(logits, leaf)
