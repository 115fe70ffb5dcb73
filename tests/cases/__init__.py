"""Named shapes, dtypes and options for every op, as data: tests, the offline compiler and benchmarks all draw from here.

A new op is a `Table` in its family's file: what it is called, which arguments have gradients, and its cases. A case makes the arguments by
name, from a `Maker` that knows the device, the dtype and the seed; on the "meta" device the same case is shapes alone.
"""

from .glu import SWIGLU
from .losses import CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, REDUCTIONS, SMALL_BUDGET
from .norms import RMS_NORM
from .rope import ROPE
from .table import BF16, FP16, FP32, FP64, HALVES, IGNORED, Case, Inputs, Maker, Table

TABLES = {t.op: t for t in (RMS_NORM, SWIGLU, ROPE, CROSS_ENTROPY, LINEAR_CROSS_ENTROPY)}

__all__ = [
    "BF16",
    "CROSS_ENTROPY",
    "FP16",
    "FP32",
    "FP64",
    "HALVES",
    "IGNORED",
    "LINEAR_CROSS_ENTROPY",
    "REDUCTIONS",
    "RMS_NORM",
    "ROPE",
    "SMALL_BUDGET",
    "SWIGLU",
    "TABLES",
    "Case",
    "Inputs",
    "Maker",
    "Table",
]  # fmt: skip
