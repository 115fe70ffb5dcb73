"""How the benchmarks measure: device time by replaying a CUDA graph, memory by the allocator's peak, the host's cost in pairs.

Without a GPU, device time is wall clock and there is no peak: that proves the harness and says nothing of speed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

Fn = Callable[..., Any]
Run = Callable[[], Any]
MIB = 2**20
HEAD_START = 4_000_000  # cycles, about 2 ms, by which the host may be behind: no call measured without a graph takes it that long to issue


def _astuple(y: Any) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


def _detached(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.detach() if isinstance(t, Tensor) else t for t in args)


def _cotangents(fn: Fn, args: tuple[Any, ...]) -> list[Tensor]:
    """Random numbers for each output; 1 for a loss, as `loss.backward()` has it."""
    return [torch.randn_like(y) if y.dim() else torch.ones_like(y) for y in _astuple(forward(fn, args)())]


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
        return torch.autograd.grad(_astuple(fn(*args)), inputs, dy)

    return run


def step(fn: Fn, args: tuple[Any, ...]) -> Run:
    """A call and its backward as a training loop makes them: gradients are added to the leaves'."""
    dy = _cotangents(fn, args)
    if len(dy) == 1:
        return lambda: fn(*args).backward(dy[0])
    return lambda: torch.autograd.backward(fn(*args), dy)


def device_us(run: Run, device: torch.device, *, graph: bool = True, replays: int = 20) -> float:
    """Microseconds of device time of one call: the median over replays of a CUDA graph of it, which leaves out the host.

    `graph=False` measures plain calls between events, for functions that make the host wait somewhere and so cannot be captured. Each
    begins behind a pause of the device, so that the host is ahead of it unless the call makes it wait.
    """
    if device.type != "cuda":
        run()
        return median(_seconds(run, 1) for _ in range(3)) * 1e6
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    again, held = run, None
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            held = run()
        again = captured.replay
        again()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in events:
        if not graph:
            torch.cuda._sleep(HEAD_START)
        start.record()
        again()
        end.record()
    torch.cuda.synchronize()
    del held
    return median(start.elapsed_time(end) for start, end in events) * 1e3


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


def copy_gbs(device: torch.device) -> float:
    """GB/s of reading one array and writing another, read and written bytes both counted: what a memory-bound kernel can reach."""
    mib = 2048 if device.type == "cuda" else 4
    a = torch.randn(mib * MIB // 4, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / device_us(lambda: torch.neg(a, out=b), device) / 1e3  # a kernel: in a graph, copy_ becomes the copy engine's


def matmul_tflops(device: torch.device) -> float:
    """TFLOP/s of an n³ bf16 matrix product on random numbers: what a matrix-bound function can reach."""
    n = 8192 if device.type == "cuda" else 128
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / device_us(lambda: a @ b, device) / 1e6


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
