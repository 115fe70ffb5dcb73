"""Compile in parallel what a peer's autotuner is going to try: liger-kernel's experts compile some 160 kernels, one after the other, which
takes many minutes. What it then measures and chooses is its own.

    python -m tests.bench.ahead 128 8 2048 768      E k H I; the compiled kernels go into Triton's cache on disk
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from typing import Any

TOKENS = 512  # no kernel is compiled for a number of tokens


def _share(i: int, n: int, sizes: Sequence[int]) -> None:
    """The configurations i, i + n, … of each kernel: compiled, and launched once instead of timed."""
    import torch
    from liger_kernel.ops import fused_moe_kernels
    from triton.runtime.autotuner import Autotuner

    from .peers import liger_experts

    def once(call: Any, **options: Any) -> list[float]:
        call()
        return [1.0, 1.0, 1.0]

    for kernel in vars(fused_moe_kernels).values():
        if isinstance(kernel, Autotuner):
            kernel.configs, kernel.do_bench = kernel.configs[i::n] or kernel.configs[:1], once
    e, k, h, inner = sizes

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    x, gate_up, down = normal(TOKENS, h), normal(e, 2 * inner, h), normal(e, h, inner)
    index = torch.rand(TOKENS, e, device="cuda").topk(k, -1).indices
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.rand(TOKENS, k, device="cuda").to(dtype).requires_grad_()
        y = liger_experts(x, gate_up, down, index, weight)
        y.backward(torch.randn_like(y))
    torch.cuda.synchronize()


def compile_ahead(sizes: Sequence[int], processes: int | None = None) -> list[int | None]:
    """Do it for (E, k, H, I), in as many processes as cores and memory allow; their exit codes. What one leaves, the tuner compiles."""
    import torch

    experts, _, h, inner = sizes
    each = 2**30 + 4 * 3 * experts * h * inner  # a context; weights and gradients in bf16
    room = torch.cuda.mem_get_info()[0] // each if torch.cuda.is_available() else 1
    n = processes or max(1, min((os.cpu_count() or 2) - 1, room))
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_share, args=(i, n, tuple(sizes))) for i in range(n)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    codes = [process.exitcode for process in started]
    if any(codes):
        print(f"compiled ahead, but some processes failed: {codes}", file=sys.stderr)
    return codes


if __name__ == "__main__":
    print(compile_ahead([int(n) for n in sys.argv[1:]]))
