"""The modules of a head whose vocabulary is sharded over a process group: each rank has its own rows of the weight."""

from __future__ import annotations

from typing import Any

from .distill import LinearDistillLoss
from .loss import LinearCrossEntropyLoss, LinearLogProb


class _Sharded:
    """Which classes this rank has, beside the other options; all optional. See `liger_fn.vocab_parallel_linear_cross_entropy`."""

    options: dict[str, Any]

    def __init__(self, *, group: Any = None, vocab_start: int | None = None, vocab_size: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.options |= {"group": group, "vocab_start": vocab_start, "vocab_size": vocab_size}


class VocabParallelLinearCrossEntropyLoss(_Sharded, LinearCrossEntropyLoss):
    """`liger_fn.vocab_parallel_linear_cross_entropy` with its options held: those of `LinearCrossEntropyLoss`, and the shard."""

    function = "vocab_parallel_linear_cross_entropy"


class VocabParallelLinearLogProb(_Sharded, LinearLogProb):
    """`liger_fn.vocab_parallel_linear_log_prob` with its options held: those of `LinearLogProb`, and the shard."""

    function = "vocab_parallel_linear_log_prob"


class VocabParallelLinearDistillLoss(_Sharded, LinearDistillLoss):
    """`liger_fn.vocab_parallel_linear_distill` with its options held: those of `LinearDistillLoss`, and the shard."""

    function = "vocab_parallel_linear_distill"
