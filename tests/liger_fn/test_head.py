"""Chunks, policies and fused kernels of a head, through linear_cross_entropy."""

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import liger_fn
from liger_fn import _head, _head_kernels
from liger_fn._kept_rows import Kept, cut
from tests import cases
from tests.liger_fn.test_linear_cross_entropy import SMALL, V, grads_and_loss, inputs
from tests.numerics import assert_near, assert_same_bits


@pytest.mark.parametrize(
    ("n", "fit", "sizes"), [(0, 5, []), (100, 100, [100]), (1000, 1000, [1000]), (130, 100, [64, 64, 2]), (7, 3, [3, 3, 1])]
)
def test_rows_are_cut_into_whole_tiles_where_they_are_cut(n: int, fit: int, sizes: list[int]) -> None:
    assert [at.stop - at.start for at in cut(n, fit)] == sizes


@pytest.mark.parametrize(
    ("n", "h", "v", "options", "how"),
    [
        (512, 4096, 128256, {}, "weight"),
        (512, 4096, 128256, {"accumulate": "exact"}, "weight"),  # a single chunk is exact
        (16384, 4096, 128256, {}, "weight"),
        (16380, 4096, 128256, {}, "weight"),
        (32768, 4096, 128256, {}, "weight"),
        (32769, 4096, 128256, {}, "fp32"),
        (32769, 16384, 128256, {}, "exact"),
        (65536, 16384, 128256, {}, "fp32"),
        (32768, 2304, 256000, {}, "fp32"),
        (32768, 2304, 256000, {"accumulate": "weight"}, "weight"),
        (32768, 2304, 256000, {"memory_budget": 2**28}, "exact"),
        (32768, 2304, 256000, {"memory_budget": 2**32}, "weight"),
        (10**6, 512, 32000, {"memory_budget": 2**26}, "fp32"),
    ],
)
def test_how_the_gradient_of_the_weight_is_summed(n: int, h: int, v: int, options: dict[str, Any], how: str) -> None:
    weight = torch.empty(v, h, dtype=torch.bfloat16, device="meta")
    options = {"accumulate": "auto", "memory_budget": 0} | options
    assert _head.settle(_head.Head(weight, weight), Kept(n, None), **options)[0] == how


@pytest.mark.parametrize(
    ("m", "h", "v", "budget", "width", "rows"),
    [
        (8192, 4096, 128256, 250, 15872, 8192),
        (16384, 4096, 128256, 250, 7936, 16384),
        (32768, 2304, 256000, 500, 8192, 9728),  # 224 MiB beside 288 for dx, less those of dw
        (16384, 2048, 32000, 128, 4096, 16384),
        (40, 8, 1000, 1, 1000, 40),
        (40, 8, 1000, 2**-20, 1000, 1),
    ],
)
def test_what_exact_takes_at_a_time(m: int, h: int, v: int, budget: float, width: int, rows: int) -> None:
    """`budget` is in MiB: dx and the logits are together 512 MiB at most, where that leaves the logits enough."""
    weight = torch.empty(v, h, dtype=torch.bfloat16, device="meta")
    assert _head.sliced(_head.Head(weight, weight), m, int(budget * 2**20), dx=True) == (width, rows)


@pytest.mark.parametrize("ignored", [0, 4])
def test_aux_of_many_chunks(backend: str, ignored: int, device: torch.device) -> None:
    """Of every row, whether rows are dropped or not."""
    x, weight, target = inputs(device, rows=20)
    target[:ignored] = -100
    _, aux = liger_fn.linear_cross_entropy(x, weight, target, return_aux=True, **SMALL)
    _, want = liger_fn.cross_entropy(x @ weight.T, target, return_aux=True)
    for name, a, b in zip(want._fields, aux, want, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_ignored_rows_enter_no_product(backend: str, reduction: str, device: torch.device) -> None:
    """So what they hold reaches no gradient; on a GPU, where the logits take more than one chunk."""
    x, weight, target = inputs(device, rows=20)
    target[::3] = -100
    want = grads_and_loss(x, weight, target, reduction=reduction, **SMALL)
    x[::3] = math.nan
    assert_same_bits(grads_and_loss(x, weight, target, reduction=reduction, **SMALL), want, "gradients and loss")


@pytest.mark.parametrize("accumulate", cases.ACCUMULATE)
def test_a_weight_that_also_made_x(backend: str, accumulate: str, device: torch.device) -> None:
    """Tied embeddings: both shares of the gradient arrive."""
    _, weight, target = inputs(device, rows=20)
    weight = weight.requires_grad_()
    ids = torch.arange(20, device=device)

    def loss(fn: Any) -> Tensor:
        return torch.autograd.grad(fn(weight[ids].sin()), weight)[0]

    ours = loss(lambda x: liger_fn.linear_cross_entropy(x, weight, target, accumulate=accumulate, **SMALL))
    torch.testing.assert_close(ours, loss(lambda x: F.cross_entropy(x @ weight.T, target)))


def test_each_policy_takes_the_memory_it_says(backend: str, device: torch.device) -> None:
    """Only "fp32" makes an fp32 tensor of the weight's size."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(n, 8, device=device, generator=generator).bfloat16() for n in (40, 9000))
    target = torch.arange(40, device=device)
    made = {}
    for accumulate in cases.ACCUMULATE:
        sizes: set[tuple[torch.dtype, torch.Size]] = set()

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                if isinstance(out, Tensor):
                    sizes.add((out.dtype, out.shape))  # noqa: B023
                return out

        with Watch():
            liger_fn.linear_cross_entropy.fwd(x, weight, target, accumulate=accumulate, memory_budget=8 * 9000 * 2)
        made[accumulate] = (torch.float32, weight.shape) in sizes
    assert made == {"weight": False, "fp32": True, "exact": False}


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_the_logits_never_exist(backend: str, reduction: str, device: torch.device) -> None:
    """No tensor that forward or backward allocates is as large as the logits would be."""
    largest = 0

    class Watch(TorchFunctionMode):  # a dispatch mode would see the operator alone, not what it does
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    x, weight, target = inputs(device, rows=100)
    options = {"reduction": reduction, "memory_budget": 16 * V * 4}
    with Watch():
        _, residuals = liger_fn.linear_cross_entropy.fwd(x, weight, target, **options)
        dy = torch.ones(100 if reduction == "none" else (), device=device)
        liger_fn.linear_cross_entropy.bwd(residuals, dy)
    assert x.numel() <= largest < 100 * V


FUSED = {"z_loss": 0.01, "logit_scale": 0.5, "temperature": 0.8}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("way", ["gradients", "gradients, but dx by tokens", "no gradients"])
def test_the_fused_kernels_do_what_the_chunks_do(
    backend: str, reduction: str, way: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Exact gradients and losses alone, by the kernels that write no logits, on a GPU that they are for and in the interpreter."""
    if backend == "reference":
        pytest.skip("has no kernels")
    taken: set[str] = set()
    for name in ("statistics", "gradient"):
        kernel = getattr(_head_kernels, name)
        monkeypatch.setattr(_head_kernels, name, lambda *args, name=name, kernel=kernel: (taken.add(name), kernel(*args)))
    dtype, (n, h, v) = torch.float16, (45, 64, 600)
    if device.type == "cpu":
        monkeypatch.setattr(sys.modules["liger_fn.linear_cross_entropy"], "fits", lambda x, weight: True)
    elif torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("they are for Hopper")
    else:
        n, h, v, dtype = 1000, 264, 5003, torch.bfloat16
    g = torch.Generator(device).manual_seed(0)
    options = FUSED | {
        "class_weight": torch.rand(v, device=device, generator=g) + 0.5, "token_weight": torch.rand(n, device=device, generator=g) + 0.5,
        "reduction": reduction, "accumulate": "exact", "memory_budget": 9 * v * 2,
    }  # fmt: skip

    grad, by_tokens = way != "no gradients", way == "gradients, but dx by tokens"
    if by_tokens:
        monkeypatch.setattr(_head, "DX_SUM", 0)
        options |= {"z_loss": 0.0, "class_weight": None}

    def run(fn: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_(grad) for t in (x, weight)]
        loss = fn(*leaves, target, **options)
        return [loss.detach(), *(torch.autograd.grad(loss.sum(), leaves) if grad else ())]

    found, fn = [], liger_fn.linear_cross_entropy
    for _ in range(8):  # the rounding of one loss is luck
        x, weight = (torch.randn(k, h, device=device, generator=g).mul_(s).to(dtype) for k, s in ((n, 1), (v, 4 / h**0.5)))
        target = torch.randint(v, (n,), device=device, generator=g)
        target[::4] = -100
        target[1], target[2] = 0, v - 1
        found.append((run(fn, dtype), run(fn.reference, dtype), run(fn.reference, torch.float64)))
    one_by_one = reduction == "none"  # their gradients are made in backward
    assert taken == (
        {"gradient"} if by_tokens and not one_by_one else {"statistics", "gradient"} if grad and not one_by_one else {"statistics"}
    )
    for i, name in enumerate(("loss", "dx", "dweight")[: len(found[0][0])]):
        assert_near(*(torch.stack([each[who][i] for each in found]) for who in range(3)), name)
