"""The same function from each library: this one, plain PyTorch eager and compiled, PyTorch's own kernel, and liger-kernel if installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import liger_fn

Providers = dict[str, Callable[..., Any]]


def _llama_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _plain(name: str) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """(eager code as Hugging Face writes it, PyTorch's native function where there is one)."""

    def rope(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)

        def half(x: Any) -> Any:
            a, b = x.chunk(2, -1)
            return torch.cat((-b, a), -1)

        return q * c + half(q) * s, k * c + half(k) * s

    return {
        "rms_norm": (_llama_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-6)),
        "swiglu": (lambda gate, up: F.silu(gate) * up, None),
        "rope": (rope, None),
        "cross_entropy": (lambda logits, target: F.cross_entropy(logits.float(), target), None),
        "linear_cross_entropy": (lambda x, w, target: F.cross_entropy((x @ w.T).float(), target), None),
    }[name]


def _liger_kernel(name: str) -> Callable[..., Any] | None:
    try:
        from liger_kernel import ops
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return None

    return {
        "rms_norm": lambda x, w: ops.LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False),
        "swiglu": ops.LigerSiLUMulFunction.apply,
        # its kernel turns q and k where they are: the copies keep the inputs of the next call as they were
        "rope": lambda q, k, cos, sin: ops.LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin),
        "cross_entropy": lambda logits, target: LigerCrossEntropyFunction.apply(logits.clone(), target, None)[0],
        "linear_cross_entropy": lambda x, w, target: LigerFusedLinearCrossEntropyFunction.apply(x, w, target)[0],
    }[name]


def uncompiled(name: str) -> Providers:
    """Every implementation of `name` there is here but the compiled one, ours first."""
    eager, native = _plain(name)
    found = {"liger_fn": getattr(liger_fn, name), "eager": eager, "native": native, "liger-kernel": _liger_kernel(name)}
    return {k: f for k, f in found.items() if f is not None}


def providers(name: str) -> Providers:
    """The same, and eager code compiled, each shape for itself."""
    torch._dynamo.reset()
    found = uncompiled(name)
    return found | {"compile": torch.compile(found["eager"], dynamic=False)}
