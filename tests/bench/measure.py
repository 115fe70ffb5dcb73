"""How the benchmarks measure: device time by replaying a CUDA graph, memory by the allocator's peak."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch

Fn = Callable[..., Any]
MIB = 2**20


def forward_backward(fn: Fn, args: tuple[Any, ...], diff: int) -> Callable[[], Any]:
    """A call of `fn` and of its backward, with cotangents drawn once; what it makes is returned so that nothing is skipped."""
    inputs = [t for t in args[:diff] if t.requires_grad]
    with torch.no_grad():
        shapes = fn(*args)
    dy = [torch.randn_like(t) for t in (shapes if isinstance(shapes, tuple) else (shapes,))]

    def run() -> Any:
        y = fn(*args)
        return torch.autograd.grad(y, inputs, dy)

    return run


def device_us(run: Callable[[], Any], *, graph: bool = True, replays: int = 20) -> float:
    """Microseconds of device time of one call: the median over replays of a CUDA graph of it, which leaves out the host.

    `graph=False` measures plain calls between events, for calls of many milliseconds that make the host wait and so cannot be captured.
    """
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
        start.record()
        again()
        end.record()
    torch.cuda.synchronize()
    del held
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3


def peak_mib(run: Callable[[], Any]) -> float:
    """MiB allocated at the peak of one call, over what was allocated before it."""
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


def copy_gbs(mib: int = 2048) -> float:
    """GB/s of reading one array and writing another, read and written bytes both counted: what a memory-bound kernel can reach."""
    a = torch.randn(mib * MIB // 4, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / device_us(lambda: torch.neg(a, out=b)) / 1e3  # a kernel: in a graph, copy_ becomes the slower copy engine's


def matmul_tflops(n: int = 8192) -> float:
    """TFLOP/s of an n³ bf16 matrix product on random numbers: what a matrix-bound function can reach."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / device_us(lambda: a @ b) / 1e6
