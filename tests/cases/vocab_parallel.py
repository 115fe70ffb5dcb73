"""The vocabulary-parallel forms of the head's losses, on a rank alone: more ranks are in their own test file."""

from dataclasses import replace

from .distill import LINEAR_DISTILL
from .losses import LINEAR_CROSS_ENTROPY, LINEAR_LOG_PROB

VOCAB_PARALLEL_LINEAR_CROSS_ENTROPY = replace(
    LINEAR_CROSS_ENTROPY, op="vocab_parallel_linear_cross_entropy", cases=(), hostile=(), launches=(), on_gpu=()
)
VOCAB_PARALLEL_LINEAR_LOG_PROB = replace(LINEAR_LOG_PROB, op="vocab_parallel_linear_log_prob", cases=(), hostile=(), launches=(), on_gpu=())
VOCAB_PARALLEL_LINEAR_DISTILL = replace(LINEAR_DISTILL, op="vocab_parallel_linear_distill", cases=(), hostile=(), on_gpu=(), ranks=2)
