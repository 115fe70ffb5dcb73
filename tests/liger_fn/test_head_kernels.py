"""The head's own matrix products: statistics and gradient as `_loss_rows` defines them, on a Hopper GPU and in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from liger_fn import _head_kernels, _launch
from liger_fn._head_kernels import fits, gradient, rows_in, statistics
from liger_fn._loss_rows import Terms, plain_rows
from tests.numerics import assert_near, assert_same_bits, untouched

BF16, FP16 = torch.bfloat16, torch.float16
IGNORED = -100
CEILING, Z = 0.75, 0.01


@pytest.fixture(autouse=True)
def _where_they_run(request: pytest.FixtureRequest, device: torch.device) -> None:
    if _head_kernels.TensorDescriptor is None or not (_launch.INTERPRETED if device.type == "cpu" else _head_kernels._hopper(device)):
        pytest.skip("needs a Hopper GPU, or Triton's interpreter")


class Data(NamedTuple):
    x: Tensor
    weight: Tensor
    target: Tensor
    scale: Tensor


class Made(NamedTuple):
    """Of all rows: m and s, log p_y, and the gradient."""

    stats: Tensor
    log_prob: Tensor
    grad: Tensor


def data(device: torch.device, n: int = 149, h: int = 72, v: int = 523, dtype: torch.dtype = FP16, sharp: float = 3.0) -> Data:
    """Rows of x lie 8 elements apart; of targets the first class and the last are there, and every seventh row is ignored."""
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, h + 8, device=device, generator=g).to(dtype)[:, :h]
    weight = (torch.randn(v, h, device=device, generator=g) * (sharp / h**0.5)).to(dtype)
    target = torch.randint(v, (n,), device=device, generator=g)
    target[1], target[2], target[n - 1] = 0, v - 1, v - 1
    target[3::7] = IGNORED
    return Data(x, weight, target, torch.rand(n, device=device, generator=g))


def ours(d: Data, width: int = 0, z: float = Z) -> Made:
    """By slices of `width` classes, all at once for 0; loss + z lse², each row times its scale."""
    n, v = d.x.shape[0], d.weight.shape[0]
    stats, log_prob = d.scale.new_empty(n, 2), d.scale.new_empty(n)
    statistics(d.x, d.weight, d.target, IGNORED, CEILING, stats, log_prob)
    hot = (d.scale * CEILING).masked_fill(d.target == IGNORED, 0.0)
    warm = torch.where(hot == 0, 0.0, 2.0 * z * stats.sum(-1) * hot) if z else None
    buffer, grads = d.x.new_empty(n * (8 + (width or v))), []
    for first in range(0, v, width or v):
        some = d.weight[first : first + (width or v)]
        out = rows_in(buffer, n, some.shape[0])
        gradient(d.x, some, d.target, first, out, stats, log_prob, hot, warm, CEILING)
        grads.append(out.clone())
    return Made(stats, log_prob, torch.cat(grads, 1))


def plain(d: Data, dtype: torch.dtype, z: float = Z) -> Made:
    """From logits in `dtype`, in fp64 where that is the dtype, else in fp32 with a gradient in the dtype."""
    a = d.x.to(dtype) @ d.weight.to(dtype).T
    scale = d.scale.double() if dtype is torch.float64 else d.scale
    stats, loss, aux, grad = scale.new_empty(len(a), 2), torch.empty_like(scale), scale.new_empty(4, len(a)), torch.empty_like(a)
    plain_rows(a, d.target, IGNORED, Terms(z=z, outer=CEILING), stats=stats, loss=loss, aux=aux, grad=grad, scale=scale)
    counted = d.target != IGNORED
    return Made(stats.where(counted.unsqueeze(-1), 0.0), aux[1], grad)


def assert_right(d: Data, made: Made, z: float = Z) -> None:
    naive, truth = plain(d, d.x.dtype, z), plain(d, torch.float64, z)
    for o, n, t, name in zip(made, naive, truth, ("statistics", "log_prob", "gradient"), strict=True):
        assert_near(o, n, t, name)
    assert_near(*(m.stats.sum(-1) for m in (made, naive, truth)), "lse")


GPU = pytest.mark.gpu
SIZES = [
    pytest.param(149, 72, 523, id="small"),
    pytest.param(128, 64, 512, id="whole-tiles"),
    pytest.param(131, 8, 257, id="one-column-over"),
    pytest.param(1008, 264, 20003, marks=GPU, id="ragged"),
    pytest.param(1001, 264, 32000, marks=GPU, id="odd-rows"),
    pytest.param(128, 2048, 20003, marks=GPU, id="one-block-of-rows"),
    pytest.param(4097, 2048, 32000, marks=GPU, id="long"),
    pytest.param(4097, 2048, 20003, marks=GPU, id="long-ragged"),
]


@pytest.mark.parametrize("dtype", [pytest.param(BF16, marks=GPU), FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("n", "h", "v"), SIZES)
def test_numerics(n: int, h: int, v: int, dtype: torch.dtype, device: torch.device) -> None:
    """By slices that end within a tile, the last of an odd width."""
    d = data(device, n, h, v, dtype)
    with untouched(d):
        made = ours(d, 264 if v < 1024 else 8192)
    assert_right(d, made)


def test_the_same_bits_twice_and_by_any_slices(device: torch.device) -> None:
    d = data(device)
    first = ours(d)
    assert_same_bits(ours(d), first, "again")
    assert_same_bits(ours(d, 256), first, "by slices")


def test_without_a_second_factor(device: torch.device) -> None:
    d = data(device)
    assert_right(d, ours(d, z=0.0), z=0.0)


def test_statistics_in_blocks_of_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    d = data(device, n=300)
    whole = ours(d)
    monkeypatch.setattr(_head_kernels, "PARTIALS", 1)
    calls: list[Any] = []
    product = _head_kernels._product
    monkeypatch.setattr(_head_kernels, "_product", lambda *args: (calls.append(args), product(*args)))
    assert_same_bits(ours(d), whole, "in blocks")
    assert len(calls) == 3 + 1


@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0])
def test_a_certain_model_keeps_its_digits(gap: float, device: torch.device) -> None:
    """Logits are exact: `gap / CEILING` for the target, 0 for every other class. 1 − p_y rounds to 0 in fp32 for a gap of 20."""
    n, v = 130, 600
    target = torch.arange(n, device=device) * 4
    x, weight = torch.zeros(n, 8, device=device, dtype=FP16), torch.zeros(v, 8, device=device, dtype=FP16)
    x[:, 0] = 1.0
    rows = torch.arange(n, device=device)
    weight[target[5], 0], target[:] = gap / CEILING, target[5].item()
    gap = float(weight[target[5], 0]) * CEILING
    stats, log_prob = torch.empty(n, 2, device=device), torch.empty(n, device=device)
    statistics(x, weight, target, IGNORED, CEILING, stats, log_prob)
    want = math.log1p((v - 1) * math.exp(-gap))
    torch.testing.assert_close(stats, torch.tensor([gap, want], device=device).expand(n, 2), rtol=3e-6, atol=0.0)
    torch.testing.assert_close(log_prob, torch.full_like(log_prob, -want), rtol=3e-6, atol=0.0)
    out = rows_in(x.new_empty(n * v), n, v)
    lift = torch.full_like(log_prob, 2.0**-4 / -math.expm1(-want))  # into fp16's range
    gradient(x, weight, target, 0, out, stats, log_prob, lift, None, CEILING)
    torch.testing.assert_close(out[rows, target].float(), torch.full_like(log_prob, -(2.0**-4)), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("bad", [523, 2**32 + 3, -1])
def test_target_out_of_range(bad: int, device: torch.device) -> None:
    d = data(device)
    d.target[4] = bad
    made = ours(d, 264)
    assert bool(made.stats[4, 1].isnan())
    assert bool(made.log_prob[4].isnan())
    assert bool(made.grad[4].isnan().all())
    assert_right(d._replace(target=d.target.index_fill(0, torch.tensor(4, device=device), IGNORED)), _without(made, 4))


def _without(made: Made, row: int) -> Made:
    """As if the row were ignored."""
    at = torch.tensor([row], device=made.stats.device)
    return Made(*(t.index_fill(0, at, 0.0) for t in made))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_ignored_rows_are_zero_whatever_they_hold(value: float, device: torch.device) -> None:
    d = data(device)
    want = ours(d)
    d.x[3::7] = value
    made = ours(d)
    assert_same_bits(made, want, "with hostile rows")
    for t in made:
        assert not t[3::7].any()


@pytest.mark.parametrize(
    ("hot", "warm", "want"), [(0.0, 0.0, 0.0), (0.0, None, 0.0), (math.nan, None, math.nan), (0.0, math.nan, math.nan)]
)
def test_rows_of_zero_and_nan_factors(hot: float, warm: float | None, want: float, device: torch.device) -> None:
    d = data(device)
    d.x[0] = math.nan
    stats, log_prob = d.scale.new_empty(149, 2), d.scale.new_empty(149)
    statistics(d.x, d.weight, d.target, IGNORED, CEILING, stats, log_prob)
    first, second = torch.ones_like(d.scale), None if warm is None else torch.ones_like(d.scale)
    for row in (0, 1):
        first[row] = hot
        if second is not None and warm is not None:
            second[row] = warm
    out = rows_in(d.x.new_empty(149 * 528), 149, 523)
    gradient(d.x, d.weight, d.target, 0, out, stats, log_prob, first, second, CEILING)
    assert torch.equal(out[:2].nan_to_num(7.0), torch.full_like(out[:2], 7.0 if math.isnan(want) else 0.0))
    assert bool(out[4:].isfinite().all())


def test_a_nan_class_makes_every_row_nan(device: torch.device) -> None:
    d = data(device)
    d.weight[300] = math.nan
    made, counted = ours(d), d.target != IGNORED
    assert torch.equal(made.stats[:, 1].isnan(), counted)
    assert torch.equal(made.log_prob.isnan(), counted)
    assert torch.equal(made.grad.isnan(), counted.unsqueeze(-1).expand_as(made.grad))


@pytest.mark.parametrize(
    "masked", [slice(0, 256), slice(200, 523), slice(512, 523), slice(0, 523)], ids=["a-tile", "most", "the-last", "all"]
)
def test_minus_infinity(masked: slice, device: torch.device) -> None:
    """Masked classes, targets among them: statistics of the others, log p_y −∞ there; NaN where all are masked."""
    d = data(device)
    d.x[:, 0] = 1.0
    d.weight[masked, 0] = -math.inf
    assert_right(d, ours(d, 256, z=0.0), z=0.0)


@pytest.mark.parametrize("classes", [slice(300, 301), slice(1, 2)])
def test_plus_infinity(classes: slice, device: torch.device) -> None:
    """The others' and a row's own: all of it NaN, as ∞ − ∞ is."""
    d = data(device)
    d.x[:, 0] = 1.0
    d.target[0] = 1
    d.weight[classes, 0] = math.inf
    made, truth = ours(d, z=0.0), plain(d, torch.float64, 0.0)
    assert torch.equal(made.log_prob.isnan(), truth.log_prob.isnan())
    assert torch.equal(made.grad.isnan(), truth.grad.isnan())


def test_many_parts_are_merged(device: torch.device) -> None:
    """More than one walk over them takes, rising and falling; as a vocabulary of 38400 has them."""
    parts, n, v = 150, 37, 150 * 256
    tops, sums, a_y = torch.randn(parts, n, device=device) * 5, torch.rand(parts, n, device=device) + 1, torch.randn(n, device=device)
    tops[140, 0], tops[:70, 1] = 50.0, -math.inf
    stats, log_prob, target = a_y.new_empty(n, 2), torch.empty_like(a_y), torch.zeros(n, dtype=torch.int64, device=device)
    _launch.launch(
        _head_kernels._head_merge_kernel,
        (2,),
        device,
        tops,
        sums,
        a_y,
        target,
        stats,
        log_prob,
        n,
        v,
        parts,
        IGNORED,
        R=32,
        AT_ONCE=64,
        num_warps=8,
    )
    every = torch.cat((tops.double() + sums.double().log(), a_y.double().unsqueeze(0)))
    torch.testing.assert_close(stats[:, 0], tops.amax(0).maximum(a_y), rtol=0.0, atol=0.0)
    torch.testing.assert_close(stats.double().sum(-1), every.logsumexp(0), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(log_prob.double(), a_y.double() - every.logsumexp(0), rtol=1e-6, atol=0.0)


def test_no_rows(device: torch.device) -> None:
    d = data(device)
    none = d.scale[:0]
    statistics(d.x[:0], d.weight, d.target[:0], IGNORED, CEILING, none.view(0, 2), none)
    gradient(d.x[:0], d.weight, d.target[:0], 0, d.x.new_empty(0, 523), none.view(0, 2), none, none, None, CEILING)


def test_a_gradient_that_cannot_be_written(device: torch.device) -> None:
    d = data(device)
    n, v, row = 149, 523, d.scale
    with pytest.raises(ValueError, match=r"gradient: the rows of out .* 16 bytes .* strides \[523, 1\] .* rows_in\(buffer, 149, 523\)"):
        gradient(d.x, d.weight, d.target, 0, d.x.new_empty(n, v), row.new_empty(n, 2), row, row, None, CEILING)


def test_rows_in_a_buffer() -> None:
    buffer = torch.zeros(1000, dtype=BF16)
    out = rows_in(buffer, 5, 33)
    assert (out.shape, out.stride(), out.data_ptr()) == ((5, 33), (40, 1), buffer.data_ptr())


def test_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(128, 72, dtype=BF16), torch.zeros(1024, 72, dtype=BF16)
    assert not fits(x, weight)  # not a Hopper GPU
    monkeypatch.setattr(_head_kernels, "_hopper", lambda device: True)
    assert fits(x, weight)
    assert fits(x.half(), weight.half())
    wide, tall = torch.zeros(128, 80, dtype=BF16), torch.zeros(1024, 80, dtype=BF16)
    assert fits(wide[:, :72], tall[:, 8:])
    for other, matrix in (
        (x[:127], weight), (x, weight[:1023]), (x.half(), weight), (x.float(), weight.float()),
        (x[:, :70], torch.zeros(1024, 70, dtype=BF16)), (torch.zeros(72, 128, dtype=BF16).T, weight), (x[:1].expand(128, 72), weight),
        (x, torch.zeros(72, 1024, dtype=BF16).T), (wide[:, 1:73], weight), (x, tall[:, 1:73]),
    ):  # fmt: skip
        assert not fits(other, matrix)


@pytest.mark.gpu
def test_in_a_cuda_graph(device: torch.device) -> None:
    """Replayed with other inputs in the same memory, ignored rows among them."""
    d = data(device, 1008, 264, 20003, BF16)
    made = ours(d, 8192)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ours(d, 8192)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = ours(d, 8192)
    graph.replay()
    assert_same_bits(again, made, "replayed")
    d.x.mul_(0.5)
    d.target.copy_(d.target.roll(1))
    graph.replay()
    assert_same_bits(again, ours(d, 8192), "replayed with other inputs")


@pytest.mark.gpu
def test_ten_lengths_compile_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel, for one width and one vocabulary, whatever the number of rows."""
    from triton import knobs

    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **kwargs: compiled.append(kwargs["fn"].name))
    ours(data(device, 128, 136, 2056, BF16))
    known = list(compiled)
    for n in (256, 512, 1008, 1536, 129, 145, 201, 333, 999):
        ours(data(device, n, 136, 2056, BF16))
    assert compiled == known
