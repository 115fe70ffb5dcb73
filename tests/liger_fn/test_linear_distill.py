"""linear_distill: the contract, and its oddities."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import liger_fn
from liger_fn._distill_kernel import kernel_rows
from liger_fn._distill_rows import DIVERGENCES, STATS, Distance, plain_rows
from tests import cases
from tests.cases import Case
from tests.contract import Contract, wrong
from tests.numerics import assert_near, assert_same_bits

H, V = 24, 63
TABLE = cases.LINEAR_DISTILL


class TestLinearDistill(Contract):
    table = TABLE
    wrong_calls = (
        wrong("int-x", TypeError, "x must be float32", "torch.int64", ".to(", x=torch.Tensor.long),
        wrong("0-d", ValueError, "x must have at least 1 axes", "[]", x=lambda x: x.sum()),
        wrong("weight-transposed", ValueError, "weight must be [V, 24]", "[24, 63]", weight=lambda w: w.T),
        wrong("weight-dtype", TypeError, "weight must be torch.float32", "torch.bfloat16", ".to(", weight=torch.Tensor.bfloat16),
        wrong("bias-shape", ValueError, "bias must have shape [63]", "[62]", bias=lambda b: b[1:]),
        wrong("other-rows", ValueError, "x_teacher must have the rows of x, [2, 5, H]", "[1, 5, 40]", x_teacher=lambda x: x[:1]),
        wrong("other-sizes", ValueError, "weight_teacher must be [V, 40]", "[63, 39]", weight_teacher=lambda w: w[:, 1:]),
        wrong("other-classes", ValueError, "the 63 rows of weight", "62", "vocabulary", weight_teacher=lambda w: w[1:], bias_teacher=None),
        wrong("bias-of-teacher", ValueError, "bias_teacher must have shape [63]", "[62]", bias_teacher=lambda b: b[1:]),
        wrong("trained-teacher", ValueError, "no gradient is computed for weight_teacher", ".detach()",
              weight_teacher=lambda w: w.clone().requires_grad_()),
        wrong("trained-states", ValueError, "no gradient is computed for x_teacher", x_teacher=lambda x: x.clone().requires_grad_()),
        wrong("float-target", TypeError, "integer dtype", "torch.float32", ".long()", target=torch.Tensor.float),
        wrong("target-shape", ValueError, "target must have shape [2, 5]", "[10]", target=torch.Tensor.flatten),
        wrong("token-weight", ValueError, "token_weight must have shape [2, 5]", "[5]", token_weight=lambda w: w[0]),
        wrong("device", ValueError, "x_teacher must be on", "meta", ".to(",
              x_teacher=lambda x: x.to("meta"), weight_teacher=lambda w: w.to("meta"), bias_teacher=None),
        wrong("divergence", ValueError, "'kl', 'reverse_kl', 'jsd', 'tvd'", "'forward'", divergence="forward"),
        wrong("beta-0", ValueError, "beta must be between 0 and 1", "0.0", beta=0),
        wrong("beta-2", ValueError, "beta must be a number from 0 to 1", "2", beta=2),
        wrong("cold", ValueError, "temperature must be a number above 0", "0", temperature=0),
        wrong("items", ValueError, "num_items", "'none'", num_items=3),
        wrong("exact", ValueError, "'auto', 'weight', 'fp32'", "'exact'", accumulate="exact"),
        wrong("save", ValueError, "'grads', 'recompute'", "'both'", save="both"),
        wrong("budget", ValueError, "memory_budget", "at least 1", "0", memory_budget=0),
    )  # fmt: skip


class TestReducedLinearDistill(Contract):
    """A reduced loss takes another way: its gradients are made in forward, and scaled in backward."""

    table = replace(
        TABLE,
        typical=Case("reduced", TABLE.typical.make, {"divergence": "reverse_kl", "memory_budget": cases.SMALL_BUDGET}, draws=8),
        cases=(), hostile=(), on_gpu=(), launches=(),
    )  # fmt: skip
    wrong_calls = ()


def inputs(device: torch.device, rows: int = 6) -> tuple[Tensor, ...]:
    """x, weight, x_teacher, weight_teacher, target."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight, x_teacher, weight_teacher = (
        torch.randn(n, h, device=device, generator=generator) / 2 for h in (H, H + 8) for n in (rows, V)
    )
    return x, weight, x_teacher, weight_teacher, torch.randint(V, (rows,), device=device, generator=generator)


def of_logits(a: Tensor, t: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The divergence of these very logits, `[V]` each, and its gradient with respect to them."""
    bias, nothing = a.clone().requires_grad_(), a.new_zeros(len(a), 1)
    y = liger_fn.linear_distill(a.new_zeros(1, 1), nothing, a.new_zeros(1, 1), nothing, None, bias, t, reduction="sum", **options)
    return y.detach(), torch.autograd.grad(y, bias)[0]


def grads_and_loss(x: Tensor, weight: Tensor, *rest: Tensor | None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    loss = liger_fn.linear_distill(*leaves, *rest, **options)
    return *torch.autograd.grad(loss.sum(), leaves), loss.detach()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_is_torchs_divergence_of_logits(backend: str, temperature: float, device: torch.device) -> None:
    x, weight, x_teacher, weight_teacher, _ = inputs(device)
    log_p, log_q = ((a / temperature).log_softmax(-1) for a in (x @ weight.T, x_teacher @ weight_teacher.T))
    m = (0.3 * log_q.exp() + 0.7 * log_p.exp()).log()

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, reduction="batchmean", log_target=True)

    want = {
        "kl": kl(log_q, log_p),
        "reverse_kl": kl(log_p, log_q),
        "jsd": 0.3 * kl(log_q, m) + 0.7 * kl(log_p, m),
        "tvd": (log_p.exp() - log_q.exp()).abs().sum(-1).mean() / 2,
    }
    for name, value in want.items():
        options = {"divergence": name, "beta": 0.3, "temperature": temperature}
        torch.testing.assert_close(liger_fn.linear_distill(x, weight, x_teacher, weight_teacher, **options), value)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", cases.HALVES)
def test_a_teacher_like_the_student(backend: str, divergence: str, dtype: torch.dtype, device: torch.device) -> None:
    """No loss and no gradient, exactly."""
    x, weight, *_ = (t.to(dtype) for t in inputs(device))
    for t in grads_and_loss(x, weight, x, weight, divergence=divergence, reduction="sum"):
        assert not t.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_nearly_like_the_student(backend: str, divergence: str, device: torch.device) -> None:
    """Losses of 1e-8 keep their digits, where those of plain PyTorch are nothing but rounding."""
    a = 2 * torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(device)
    t = a + 1e-4 * torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(device)
    found, grad = of_logits(a, t, divergence=divergence)
    with liger_fn.use_backend("reference"):
        truth, true_grad = of_logits(a.double(), t.double(), divergence=divergence)
    assert abs(float(found / truth) - 1) < (1e-3 if divergence == "tvd" else 1e-5)
    assert float((grad - true_grad).norm()) < 2e-2 * float(true_grad.norm())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_logits_leave_small_differences(backend: str, divergence: str, device: torch.device) -> None:
    """Two logits as large as each other: nothing is rounded at the size of the logits."""
    a, t = (torch.tensor(z, device=device) for z in ([700.0, 700.0, 0.0], [-300.0, -420.0, -900.0]))
    found, grad = of_logits(a, t, divergence=divergence)
    with liger_fn.use_backend("reference"):
        truth, true_grad = of_logits(a.double(), t.double(), divergence=divergence)
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-6, atol=1e-30)


def test_jsd_is_symmetric(backend: str, device: torch.device) -> None:
    x, weight, x_teacher, weight_teacher, _ = inputs(device)
    one = liger_fn.linear_distill(x, weight, x_teacher, weight_teacher, divergence="jsd")
    torch.testing.assert_close(liger_fn.linear_distill(x_teacher, weight_teacher, x, weight, divergence="jsd"), one)
    other = liger_fn.linear_distill(x, weight, x_teacher, weight_teacher, divergence="jsd", beta=0.2)
    torch.testing.assert_close(liger_fn.linear_distill(x_teacher, weight_teacher, x, weight, divergence="jsd", beta=0.8), other)
    assert abs(float(other - one)) > 1e-3


@pytest.mark.parametrize("low", [-math.inf, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits(backend: str, low: float, dtype: torch.dtype, device: torch.device) -> None:
    """What a probability of 0 makes of the divergences; one too small for its dtype is none, unless it meets one."""
    a, t, both = (torch.tensor(z, device=device, dtype=dtype) for z in ([0.0, 0.0, low], [0.0, -math.inf, 0.0], [0.0, low, -math.inf]))
    half, log_2 = torch.tensor([0.5, 0.5, 0.0], device=device, dtype=dtype), math.log(2)
    q = half[[0, 2, 1]]
    loss, grad = of_logits(a, t)
    assert float(loss) == math.inf if low == -math.inf else abs(float(loss) - 5e3 + log_2 * 0) < 1
    torch.testing.assert_close(grad, half - q)
    assert float(of_logits(a, t, divergence="reverse_kl")[0]) == math.inf
    loss, grad = of_logits(a, t, divergence="jsd")
    torch.testing.assert_close(loss, loss.new_tensor(log_2 / 2))
    torch.testing.assert_close(grad, grad.new_tensor([-log_2 / 8, log_2 / 8, 0.0]))
    loss, grad = of_logits(a, t, divergence="tvd")
    torch.testing.assert_close(loss, loss.new_tensor(0.5))
    torch.testing.assert_close(grad, grad.new_tensor([-0.125, 0.125, 0.0]))
    assert float(of_logits(both, torch.tensor([0.0, -1e4, 0.0], device=device, dtype=dtype))[0]) == math.inf
    if low == -math.inf:  # the teacher has a little where the student has nothing
        assert float(of_logits(a, torch.tensor([0.0, 0.0, -1e4], device=device, dtype=dtype))[0]) == math.inf
        for name in DIVERGENCES:
            assert not any(z.any() for z in of_logits(a, a, divergence=name))


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_all_ignored(backend: str, reduction: str, device: torch.device) -> None:
    x, weight, x_teacher, weight_teacher, target = inputs(device)
    for t in grads_and_loss(x, weight, x_teacher, weight_teacher, torch.full_like(target, -100), reduction=reduction):
        assert not t.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_that_do_not_count_among_those_that_do(backend: str, divergence: str, device: torch.device) -> None:
    """As the kernel has them where nobody asked the GPU how many rows count."""
    run, distance = plain_rows if backend == "reference" else kernel_rows, Distance(divergence, 0.5, 1.0)
    target = torch.tensor([0, -100, 0], device=device)
    a, t = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0)).to(device)
    a[1], found = math.nan, {}
    for name, some in (("all", slice(None)), ("alone", slice(None, None, 2))):
        g = a[some].clone()
        loss = g.new_full((len(g),), 7.0)
        run(g, t[some].contiguous(), target[some], -100, distance, stats=g.new_empty(len(g), STATS), loss=loss, grad=True)
        found[name] = g, loss
    for whole, alone in zip(found["all"], found["alone"], strict=True):
        assert not whole[1].any()
        assert torch.equal(whole[::2], alone)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_ignored_rows_have_no_loss_and_no_gradient(backend: str, value: float, reduction: str, device: torch.device) -> None:
    """Whatever they hold; and the others have theirs as if they were alone."""
    x, weight, x_teacher, weight_teacher, target = inputs(device)
    target[2] = -100
    dx, _, loss = grads_and_loss(x, weight, x_teacher, weight_teacher, target, reduction=reduction)
    x[2], x_teacher[2] = value, value
    again, _, loss_again = grads_and_loss(x, weight, x_teacher, weight_teacher, target, reduction=reduction)
    assert_same_bits((again, loss_again), (dx, loss), "dx and loss")
    assert not dx[2].any()
    some = [0, 1, 3, 4, 5]
    alone, _, loss_alone = grads_and_loss(x[some], weight, x_teacher[some], weight_teacher, reduction=reduction)
    torch.testing.assert_close(dx[some], alone)
    torch.testing.assert_close(loss[some] if reduction == "none" else loss, loss_alone)


def test_targets_only_say_which_rows_count(backend: str, device: torch.device) -> None:
    x, weight, x_teacher, weight_teacher, target = inputs(device)
    want = grads_and_loss(x, weight, x_teacher, weight_teacher)
    assert_same_bits(grads_and_loss(x, weight, x_teacher, weight_teacher, target + 10**9), want, "with any targets")
    assert_same_bits(grads_and_loss(x, weight, x_teacher, weight_teacher, num_items=6), want, "with as many items as rows")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_saved_or_made_again(backend: str, reduction: str, device: torch.device) -> None:
    given, some = inputs(device), {"reduction": reduction, "memory_budget": 2 * 2 * V * 4}
    for got, want in zip(grads_and_loss(*given, save="recompute", **some), grads_and_loss(*given, **some), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_the_logits_never_exist(backend: str, reduction: str, device: torch.device) -> None:
    """No tensor that forward or backward allocates is as large as the logits would be; those of both heads share the budget."""
    largest, rows = 0, []

    class Watch(TorchFunctionMode):  # a dispatch mode would see the operator alone, not what it does
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            if getattr(func, "__name__", "") == "mm" and out.shape[-1] == V:
                rows.append(len(out))
            return out

    x, weight, x_teacher, weight_teacher, _ = inputs(device, rows=100)
    options = {"reduction": reduction, "memory_budget": 2 * 16 * V * 4}
    with Watch():
        _, residuals = liger_fn.linear_distill.fwd(x, weight, x_teacher, weight_teacher, **options)
        liger_fn.linear_distill.bwd(residuals, torch.ones(100 if reduction == "none" else (), device=device))
    assert x_teacher.numel() <= largest < 100 * V
    assert max(rows) <= 16
    assert sum(rows) == 100 * (4 if reduction == "none" else 2)


@pytest.mark.parametrize("confidence", [16, 24])
def test_fp16_keeps_small_probabilities_under_loss_scaling(backend: str, confidence: int, device: torch.device) -> None:
    """Confident models in fp16: nearly every probability is subnormal, and a loss scale is there to keep them."""
    g = torch.Generator().manual_seed(0)
    head = (torch.randint(0, 2, (1024, 64), generator=g) * 0.25 - 0.125).to(device, torch.float16)  # logits without errors
    x = head[torch.randint(1024, (32,), generator=g).to(device)] * confidence

    def grads(fn: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, head)]
        return torch.autograd.grad(fn(*leaves, (x / 2).to(dtype), head.to(dtype)) * 65536.0, leaves)

    ours, naive = grads(liger_fn.linear_distill, torch.float16), grads(liger_fn.linear_distill.reference, torch.float16)
    truth = grads(liger_fn.linear_distill.reference, torch.float64)
    for o, n, t, name in zip(ours, naive, truth, ("x", "weight"), strict=True):
        assert_near(o, n, t, f"fp16 gradient of {name} under loss scaling")


def test_the_teacher_is_constant(backend: str, device: torch.device) -> None:
    """Also where a transform hides that its gradient is wanted."""
    x, weight, x_teacher, weight_teacher, _ = inputs(device)
    with pytest.raises(ValueError, match=r"linear_distill: no gradient is computed for .*weight_teacher"):
        torch.func.grad(lambda w: liger_fn.linear_distill(x, weight, x_teacher, w))(weight_teacher)
    with torch.no_grad():
        liger_fn.linear_distill(x, weight, x_teacher.requires_grad_(), weight_teacher.requires_grad_())
