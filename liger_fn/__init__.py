"""Triton kernels for training language models, as pure functions.

Each function is stateless, differentiable, and carries its parts: `op.fwd`, `op.bwd`, `op.reference`.
"""

from ._backend import backend, use_backend
from .cross_entropy import cross_entropy
from .glu import swiglu
from .linear_cross_entropy import linear_cross_entropy
from .rms_norm import rms_norm
from .rope import rope

__all__ = ["backend", "cross_entropy", "linear_cross_entropy", "rms_norm", "rope", "swiglu", "use_backend"]
