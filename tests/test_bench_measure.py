"""How the benchmarks measure: what is captured and replayed, what is timed by events, and whose inputs are made anew."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

import liger_fn
from tests.bench import measure, peers, table
from tests.bench.peers import DONATE, EAGER, OURS
from tests.bench.run import Run
from tests.bench.table import Bench

CPU = torch.device("cpu")


def bench_of(op: str) -> Bench:
    return next(b for b in table.ALL if b.op == op)


class FakeGraph:
    """What `measure` uses of a CUDA graph."""

    def __init__(self, replay: measure.Run) -> None:
        self.replay, self.resets = replay, 0

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """`measure` without CUDA: a replay takes 0.1 ms, a plain call 2 ms; returns what was done, in order."""
    done: list[str] = []

    def times(again: measure.Run, renew: measure.Run, n: int, *, by_events: bool, idle: bool = False) -> list[float]:
        for _ in range(n):
            renew()
            again()
        return [2.0 if by_events else 0.1] * n

    graph = FakeGraph(lambda: done.append("replay"))
    monkeypatch.setattr(measure, "_warm", lambda run: run())
    monkeypatch.setattr(measure, "_host_waits", lambda run: "")
    monkeypatch.setattr(measure, "_captured", lambda run: (graph, run(), ""))
    monkeypatch.setattr(measure, "_times", times)
    yield done
    assert graph.resets == ("replay" in done)


GPU = torch.device("cuda")


def test_a_graph_is_replayed_until_clocks_are_up(fake_gpu: list[str]) -> None:
    timed = measure.device_us(lambda: fake_gpu.append("call"), GPU)
    assert timed == (100.0, False)
    assert fake_gpu[:2] == ["call"] * 2  # warm-up, capture
    assert set(fake_gpu[2:]) == {"replay"}
    assert len(fake_gpu[2:]) == pytest.approx(3 + 300 + 200, abs=2)  # an estimate, 30 ms, 20 ms


@pytest.mark.parametrize("where", ["_host_waits", "_captured"])
def test_a_call_that_makes_the_host_wait_is_timed_by_events(monkeypatch: pytest.MonkeyPatch, fake_gpu: list[str], where: str) -> None:
    why = {"_host_waits": "item()", "_captured": (None, None, "item()")}[where]
    monkeypatch.setattr(measure, where, lambda run: why)
    assert measure.device_us(lambda: fake_gpu.append("call"), GPU) == (2000.0, True)
    assert set(fake_gpu) == {"call"}
    with pytest.raises(measure.Uncapturable, match=r"cannot be captured in a CUDA graph: item\(\)"):
        measure.device_us(lambda: None, GPU, must_capture=True)


def test_ours_must_be_capturable_and_a_peer_need_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[Any, bool] = {}

    def device_us(call: measure.Run, *_: Any, must_capture: bool, **__: Any) -> measure.Timed:
        asked[current[0]] = must_capture
        return measure.Timed(1.0, by_events=not must_capture)

    run, bench, current = Run(CPU), bench_of("swiglu"), [""]
    run.limits  # noqa: B018  measured before device_us is replaced
    once = run._device
    monkeypatch.setattr(measure, "device_us", device_us)
    monkeypatch.setattr(
        run, "_device", lambda b, s, mode, provider, fn: (current.__setitem__(0, provider), once(b, s, mode, provider, fn))[1]
    )
    rows = run.speed(bench, bench.tiny)
    assert asked == {OURS: True, DONATE: True, EAGER: False}
    assert {r.provider for r in rows if r.by_events} == {EAGER}


def test_who_writes_over_its_inputs_is_given_them_anew(fake_gpu: list[str]) -> None:
    leaf, fixed = torch.ones(3, requires_grad=True), torch.zeros(3)
    (x, other), renew = measure.renewable((leaf, fixed))
    assert other is fixed
    assert not x.is_leaf
    assert x.requires_grad
    seen = []

    def spoil() -> None:
        seen.append(x.detach().clone())
        x.detach().mul_(1e30)

    measure.device_us(spoil, CPU, renew=renew)
    assert all(torch.equal(t, torch.ones(3)) for t in seen)
    assert len(seen) == 4
    assert torch.equal(leaf, torch.ones(3))
    measure.device_us(lambda: None, GPU, renew=lambda: fake_gpu.append("renew"))
    assert fake_gpu == ["renew", "replay"] * (len(fake_gpu) // 2)


@pytest.mark.parametrize("op", peers.DONATING)
def test_donation_is_taken_up(op: str, device: torch.device) -> None:
    """Otherwise its rows would be those of a plain call."""
    if liger_fn.backend(torch.empty(0, device=device)) == "reference" and op != "cross_entropy":
        pytest.skip("plain PyTorch writes over nothing")
    run, bench = Run(device), bench_of(op)
    args, renew = measure.renewable(run._arguments(bench, bench.tiny))
    before = args[0].detach().clone()
    grads = measure.forward_backward(peers.donating(op)[DONATE], args)()
    assert grads[0].data_ptr() == args[0].data_ptr()
    assert not torch.equal(args[0], before)
    renew()
    assert torch.equal(args[0], before)


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_cuda_usable(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether PyTorch foresees it, or the capture itself breaks."""
    x = torch.ones(2**20, device=device)

    def waits() -> torch.Tensor:
        return x * x.sum().item()

    for foreseen in (True, False):
        if not foreseen:
            monkeypatch.setattr(measure, "_host_waits", lambda run: "")
        before = torch.cuda.current_stream()
        timed = measure.device_us(waits, device)
        assert timed.by_events
        assert timed.us > 0
        assert torch.cuda.current_stream() == before
        with pytest.raises(measure.Uncapturable):
            measure.device_us(waits, device, must_capture=True)
        after = measure.device_us(lambda: x + 1, device, must_capture=True)
        assert after.us > 0
        assert not after.by_events
        assert measure.forward_backward(lambda t: 2 * t, (x.clone().requires_grad_(),))()[0].shape == x.shape
        assert torch.equal(x + 1, torch.full_like(x, 2.0))


@pytest.mark.gpu
@pytest.mark.parametrize("bench", [pytest.param(b, id=b.op) for b in table.present()])
def test_ours_is_captured(device: torch.device, bench: Bench) -> None:
    run = Run(device)
    for fn in (peers.uncompiled(bench.op, device)[OURS], *peers.donating(bench.op).values()):
        args, renew = measure.renewable(run._arguments(bench, bench.tiny))
        options = bench.options(*bench.tiny)
        call = measure.forward_backward(partial(fn, **options), args)
        assert not measure.device_us(call, device, renew=renew, must_capture=True, replays=(2, 2)).by_events


def test_host_cost_is_the_median_of_paired_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One disturbed pair of three moves neither the ratio nor the times."""
    ours, theirs, clock = (lambda: None), (lambda: None), iter([9.0, 9.0, 2.0, 4.0, 50.0, 5.0, 3.0, 6.0])  # the first two are warm-up
    asked = []

    def seconds(run: measure.Run, times: int) -> float:
        asked.append(run)
        return next(clock)

    monkeypatch.setattr(measure, "_seconds", seconds)
    cost = measure.paired(ours, theirs, pairs=3, turns=1)
    assert asked == [ours, theirs] * 4
    assert cost == (3e6, 5e6, [0.5, 0.5, 10.0])
