"""Named shapes, dtypes and options for every op, as data: tests, the offline compiler and benchmarks all draw from here.

A new op is a `Table` in its family's file: what it is called, which arguments have gradients, and its cases. A case makes the arguments by
name, from a `Maker` that knows the device, the dtype and the seed; on the "meta" device the same case is shapes alone.
"""

from .distill import LINEAR_DISTILL
from .glu import GEGLU, GEGLU_PACKED, REGLU, RELU_SQUARED, SWIGLU, SWIGLU_MLP, SWIGLU_PACKED
from .group_norm import GROUP_NORM
from .losses import ACCUMULATE, CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, LINEAR_LOG_PROB, REDUCTIONS, SMALL_BUDGET, SOFTMAX
from .moe import MOE_LOAD_BALANCING_LOSS, MOE_ROUTER, MOE_Z_LOSS
from .moe_experts import EXPERT_PARALLEL_MOE_EXPERTS, MOE_EXPERTS
from .moe_permute import MOE_PERMUTE, MOE_UNPERMUTE
from .norms import ADD_RMS_NORM, LAYER_NORM, RMS_NORM
from .rope import ROPE
from .table import BF16, FP16, FP32, FP64, HALVES, IGNORED, Case, Inputs, Maker, Table
from .vocab_parallel import VOCAB_PARALLEL_LINEAR_CROSS_ENTROPY, VOCAB_PARALLEL_LINEAR_DISTILL, VOCAB_PARALLEL_LINEAR_LOG_PROB

TABLES = {
    t.op: t
    for t in (
        RMS_NORM,
        ADD_RMS_NORM,
        LAYER_NORM,
        GROUP_NORM,
        SWIGLU,
        GEGLU,
        REGLU,
        RELU_SQUARED,
        SWIGLU_PACKED,
        GEGLU_PACKED,
        SWIGLU_MLP,
        ROPE,
        CROSS_ENTROPY,
        LINEAR_CROSS_ENTROPY,
        LINEAR_LOG_PROB,
        LINEAR_DISTILL,
        SOFTMAX,
        MOE_EXPERTS,
        MOE_PERMUTE,
        MOE_UNPERMUTE,
        MOE_ROUTER,
        MOE_LOAD_BALANCING_LOSS,
        MOE_Z_LOSS,
        VOCAB_PARALLEL_LINEAR_CROSS_ENTROPY,
        VOCAB_PARALLEL_LINEAR_LOG_PROB,
        VOCAB_PARALLEL_LINEAR_DISTILL,
        EXPERT_PARALLEL_MOE_EXPERTS,
    )
}

__all__ = [
    "ACCUMULATE",
    "ADD_RMS_NORM",
    "BF16",
    "CROSS_ENTROPY",
    "EXPERT_PARALLEL_MOE_EXPERTS",
    "FP16",
    "FP32",
    "FP64",
    "GEGLU",
    "GEGLU_PACKED",
    "GROUP_NORM",
    "HALVES",
    "IGNORED",
    "LAYER_NORM",
    "LINEAR_CROSS_ENTROPY",
    "LINEAR_DISTILL",
    "LINEAR_LOG_PROB",
    "MOE_EXPERTS",
    "MOE_LOAD_BALANCING_LOSS",
    "MOE_PERMUTE",
    "MOE_ROUTER",
    "MOE_UNPERMUTE",
    "MOE_Z_LOSS",
    "REDUCTIONS",
    "REGLU",
    "RELU_SQUARED",
    "RMS_NORM",
    "ROPE",
    "SMALL_BUDGET",
    "SOFTMAX",
    "SWIGLU",
    "SWIGLU_MLP",
    "SWIGLU_PACKED",
    "TABLES",
    "VOCAB_PARALLEL_LINEAR_CROSS_ENTROPY",
    "VOCAB_PARALLEL_LINEAR_DISTILL",
    "VOCAB_PARALLEL_LINEAR_LOG_PROB",
    "Case",
    "Inputs",
    "Maker",
    "Table",
]  # fmt: skip
