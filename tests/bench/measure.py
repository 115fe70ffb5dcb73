"""How the benchmarks measure: device time by replaying a CUDA graph, memory by the allocator's peak, the host's cost in pairs.

Every provider is captured in a graph if it can be. One that makes the host wait somewhere cannot: it is timed between events around plain
calls, and its figure says so. The GPU's clocks are brought up before anything is timed.

A replay may find what the one before it left in the L2 cache (50 MB on an H100): part of the inputs where they are not much larger. All
providers find it alike. Whoever writes over its inputs is given them anew before each replay, outside of what is timed, so that it never
computes on its own results, which would grow from replay to replay.

Without a GPU, device time is wall clock and there is no peak: that proves the harness and says nothing of speed.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.sample import flat

Fn = Callable[..., Any]
Run = Callable[[], Any]
MIB = 2**20
WARM_MS, TIMED_MS = 30.0, 20.0  # device time of replays that bring the clocks up, and of those that are timed
REPLAYS = 20, 200  # how many are timed, at least and at most
HEAD_START = 4_000_000  # cycles, about 2 ms, by which the host may be behind: no call measured without a graph takes it that long to issue
A_REPLAYS_START = 40_000  # cycles, about 20 µs: what the host takes to issue one replay and its events


def _detached(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.detach() if isinstance(t, Tensor) else t for t in args)


def _cotangents(fn: Fn, args: tuple[Any, ...]) -> list[Tensor]:
    """Random numbers for each output; 1 for a loss, as `loss.backward()` has it."""
    ys = flat(forward(fn, args)())
    draw = torch.Generator(ys[0].device).manual_seed(0)  # its own: a capture that failed leaves PyTorch's default one unusable
    return [torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=draw) if y.dim() else torch.ones_like(y) for y in ys]


def forward(fn: Fn, args: tuple[Any, ...]) -> Run:
    """A call of `fn` that wants no gradients, as in evaluation."""
    plain = _detached(args)

    def run() -> Any:
        with torch.no_grad():
            return fn(*plain)

    return run


def forward_backward(fn: Fn, args: tuple[Any, ...]) -> Run:
    """A call of `fn` and of its backward, with cotangents drawn once; what it makes is returned so that nothing is skipped."""
    inputs, dy = [t for t in args if t.requires_grad], _cotangents(fn, args)

    def run() -> Any:
        return torch.autograd.grad(flat(fn(*args)), inputs, dy)

    return run


def step(fn: Fn, args: tuple[Any, ...]) -> Run:
    """A call and its backward as a training loop makes them: gradients are added to the leaves'."""
    dy = _cotangents(fn, args)
    if len(dy) == 1:
        return lambda: fn(*args).backward(dy[0])
    return lambda: torch.autograd.backward(fn(*args), dy)


def renewable(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Run]:
    """Arguments for a call that writes over them: copies, no leaves, since nobody may write to a leaf; and what makes them new again.

    They are made on the stream of captures: autograd makes a gradient wait for the stream that its tensor was made on.
    """
    on_gpu = any(isinstance(t, Tensor) and t.is_cuda for t in args)
    if on_gpu:
        _side().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(_side()) if on_gpu else nullcontext():
        copies = tuple(t.clone() if isinstance(t, Tensor) and t.requires_grad else t for t in args)
    if on_gpu:
        torch.cuda.current_stream().wait_stream(_side())
    pairs = [(new.detach(), old.detach()) for new, old in zip(copies, args, strict=True) if new is not old]

    def renew() -> None:
        for new, old in pairs:
            new.copy_(old)

    return copies, renew


# --- device time ------------------------------------------------------------------------------------------------------------------------


class Timed(NamedTuple):
    """Microseconds of device time of one call, of calls one after the other, as training makes them; whether they lie between events
    around plain calls, for want of a graph.
    """

    us: float
    by_events: bool = False


class Uncapturable(RuntimeError):
    """A call that had to be captured in a CUDA graph, and cannot be."""


def device_us(
    run: Run, device: torch.device, *, renew: Run | None = None, must_capture: bool = False, replays: tuple[int, int] = REPLAYS
) -> Timed:
    """Device time of one call: the median over replays of a CUDA graph of it, which leaves out the host.

    Args:
        run: the call.
        device: where it runs; on a CPU the result is wall clock.
        renew: called before each call and replay, outside of what is timed.
        must_capture: raise `Uncapturable` where the call cannot be captured, instead of timing plain calls between events. Each of those
            begins behind a pause of the device, so that the host is ahead of it unless the call makes it wait.
        replays: how many are timed, at least and at most; between them, about TIMED_MS of device time.
    """
    renew = renew or _nothing
    if device.type != "cuda":
        renew()
        run()
        return Timed(median(_renewed_seconds(run, renew) for _ in range(3)) * 1e6)
    _warm(run)
    graph, held, why = None, None, _host_waits(run)
    if not why:
        graph, held, why = _captured(run)
    if why and must_capture:
        raise Uncapturable(f"cannot be captured in a CUDA graph: {why}")
    again = run if graph is None else graph.replay
    try:
        once = max(median(_times(again, renew, 3, by_events=graph is None)), 1e-3)
        for _ in range(_between(WARM_MS / once, 1, 3000)):
            renew()
            again()
        times = _times(again, renew, _between(TIMED_MS / once, *replays), by_events=graph is None)
    finally:
        del held
        if graph is not None:
            graph.reset()
    return Timed(median(times) * 1e3, graph is None)


def _nothing() -> None: ...


def _between(n: float, least: int, most: int) -> int:
    return max(least, min(most, int(n)))


@cache
def _side() -> torch.cuda.Stream:
    """The stream of all captures: what libraries allocate once for each stream is there before the first."""
    return torch.cuda.Stream()


def _warm(run: Run) -> None:
    """Compile, choose, and allocate all that happens once, on the stream of captures."""
    _side().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(_side()):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(_side())


def _host_waits(run: Run) -> str:
    """Where a call makes the host wait for the device, as PyTorch puts it; empty where it does not.

    Asked before a capture is tried: a capture that fails can be cleaned up only in part.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            return _first_line(error)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return ""


def _captured(run: Run) -> tuple[torch.cuda.CUDAGraph | None, Any, str]:
    """(the graph, what its call returned, why there is none)."""
    graph, pool, why = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), ""
    try:
        # The outer block puts the stream back: torch.cuda.graph does not where the capture fails.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool, stream=_side()):
            held = run()
        return graph, held, ""
    except RuntimeError as error:
        why = _first_line(error.__context__ or error)  # the end of a broken capture raises too, and hides what broke it
    _abandon(pool)
    return None, None, why


def _abandon(pool: Any) -> None:
    """After a capture that failed: PyTorch's allocator may believe that it goes on. End it there, and give its memory back."""
    torch.cuda.synchronize()
    index = torch.cuda.current_device()
    with suppress(RuntimeError, AttributeError):  # the first raises where PyTorch has done both by itself
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    gc.collect()
    torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _times(again: Run, renew: Run, n: int, *, by_events: bool) -> list[float]:
    """Milliseconds of `n` calls or replays, the host ahead of the device."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    if not by_events:
        torch.cuda._sleep(A_REPLAYS_START * n)
    for start, end in events:
        renew()
        if by_events:
            torch.cuda._sleep(HEAD_START)
        start.record()
        again()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


# --- memory and limits ------------------------------------------------------------------------------------------------------------------


def peak_mib(run: Run, device: torch.device) -> float | None:
    """MiB allocated at the peak of one call, over what was allocated before it; None where nobody counts."""
    if device.type != "cuda":
        return None
    run()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    held = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del held
    return peak / MIB


LARGE, SMALL = 2048, 64  # MiB: so much that starting and ending take no share of it; what a norm of 8192 × 4096 reads


def copy_gbs(device: torch.device, mib: int = LARGE) -> float:
    """GB/s of reading one array and writing another, read and written bytes both counted: what a memory-bound kernel can reach."""
    mib = mib if device.type == "cuda" else 4
    a = torch.randn(mib * MIB // 4, device=device)
    b = torch.empty_like(a)
    timed = device_us(lambda: torch.neg(a, out=b), device)  # a kernel: in a graph, copy_ becomes the copy engine's
    return 2 * a.numel() * 4 / timed.us / 1e3


def matmul_tflops(device: torch.device) -> float:
    """TFLOP/s of an n³ bf16 matrix product on random numbers: what a matrix-bound function can reach."""
    n = 8192 if device.type == "cuda" else 128
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / device_us(lambda: a @ b, device).us / 1e6


# --- the host's cost --------------------------------------------------------------------------------------------------------------------


class Paired(NamedTuple):
    """What calls cost the host, in µs; and the ratios of their turns, in order."""

    ours: float
    theirs: float
    ratios: list[float]


def paired(ours: Run, theirs: Run, *, pairs: int, turns: int) -> Paired:
    """In pairs of short turns, so that what else the machine does meets both: a busy host's minima are luck."""
    for run in (ours, theirs):
        _seconds(run, min(100, 2 * turns))
    found = [(_seconds(ours, turns) / turns, _seconds(theirs, turns) / turns) for _ in range(pairs)]
    a, b = zip(*found, strict=True)
    return Paired(median(a) * 1e6, median(b) * 1e6, sorted(x / y for x, y in found))


def _seconds(run: Run, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - start


def _renewed_seconds(run: Run, renew: Run) -> float:
    renew()
    return _seconds(run, 1)
