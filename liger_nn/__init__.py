"""Thin `torch.nn` modules over `liger_fn`: parameters and one call, no math."""

from .distill import LinearDistillLoss
from .loss import CrossEntropyLoss, LinearCrossEntropyLoss, LinearLogProb
from .mlp import SwiGLUMLP
from .moe import Experts, MoEMLP
from .rms_norm import RMSNorm
from .vocab_parallel import VocabParallelLinearCrossEntropyLoss, VocabParallelLinearDistillLoss, VocabParallelLinearLogProb

__all__ = [
    "CrossEntropyLoss",
    "Experts",
    "LinearCrossEntropyLoss",
    "LinearDistillLoss",
    "LinearLogProb",
    "MoEMLP",
    "RMSNorm",
    "SwiGLUMLP",
    "VocabParallelLinearCrossEntropyLoss",
    "VocabParallelLinearDistillLoss",
    "VocabParallelLinearLogProb",
]
