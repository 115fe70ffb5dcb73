"""Triton kernels for training language models, as pure functions.

Each function is stateless, differentiable, and carries its parts: `op.fwd`, `op.bwd`, `op.reference`.
"""

from ._backend import backend, use_backend
from .add_rms_norm import add_rms_norm
from .cross_entropy import cross_entropy
from .expert_parallel import expert_parallel_moe_experts
from .glu import geglu, reglu, swiglu
from .glu_packed import geglu_packed, swiglu_packed
from .group_norm import group_norm
from .layer_norm import layer_norm
from .linear_cross_entropy import linear_cross_entropy
from .linear_distill import linear_distill
from .linear_log_prob import linear_log_prob
from .moe_experts import moe_experts
from .moe_losses import moe_load_balancing_loss, moe_z_loss
from .moe_permute import moe_permute
from .moe_router import moe_router
from .moe_unpermute import moe_unpermute
from .relu_squared import relu_squared
from .rms_norm import rms_norm
from .rope import rope, rope_complex
from .softmax import softmax
from .swiglu_mlp import swiglu_mlp
from .vocab_parallel import vocab_parallel_linear_cross_entropy
from .vocab_parallel_distill import vocab_parallel_linear_distill
from .vocab_parallel_log_prob import vocab_parallel_linear_log_prob

__all__ = [
    "add_rms_norm",
    "backend",
    "cross_entropy",
    "expert_parallel_moe_experts",
    "geglu",
    "geglu_packed",
    "group_norm",
    "layer_norm",
    "linear_cross_entropy",
    "linear_distill",
    "linear_log_prob",
    "moe_experts",
    "moe_load_balancing_loss",
    "moe_permute",
    "moe_router",
    "moe_unpermute",
    "moe_z_loss",
    "reglu",
    "relu_squared",
    "rms_norm",
    "rope",
    "rope_complex",
    "softmax",
    "swiglu",
    "swiglu_mlp",
    "swiglu_packed",
    "use_backend",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_linear_distill",
    "vocab_parallel_linear_log_prob",
]
