"""Thin `torch.nn` modules over `liger_fn`: parameters and one call, no math."""

from .distill import LinearDistillLoss
from .loss import CrossEntropyLoss, LinearCrossEntropyLoss, LinearLogProb
from .mlp import SwiGLUMLP
from .rms_norm import RMSNorm
from .vocab_parallel import VocabParallelLinearCrossEntropyLoss, VocabParallelLinearDistillLoss, VocabParallelLinearLogProb

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LinearDistillLoss",
    "LinearLogProb",
    "RMSNorm",
    "SwiGLUMLP",
    "VocabParallelLinearCrossEntropyLoss",
    "VocabParallelLinearDistillLoss",
    "VocabParallelLinearLogProb",
]
