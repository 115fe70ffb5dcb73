"""Thin `torch.nn` modules over `liger_fn`: parameters and one call, no math."""

from .loss import CrossEntropyLoss, LinearCrossEntropyLoss
from .mlp import SwiGLUMLP
from .rms_norm import RMSNorm

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss", "RMSNorm", "SwiGLUMLP"]
