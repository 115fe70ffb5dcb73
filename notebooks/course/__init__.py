"""What every lesson imports: the checks of its exercises, its pictures, and times of a GPU.

`import course` comes before `import triton`: without a GPU it switches Triton's interpreter on, and Triton reads that switch once.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "notebooks"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default, said aloud, so that Triton 3.9 does not warn about it

import numpy as np
import torch

warnings.filterwarnings("ignore", "IProgress not found")  # tqdm misses a widget that no lesson uses
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from tests import interpreter

    # It rounds to bf16 as a GPU does, counts loops under NumPy 2.4, and is faster.
    interpreter.mend()
    np.seterr(all="ignore")  # where a GPU says inf or NaN in silence, NumPy would warn
    warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)

from .compare import Wrong, near, same
from .exercises import Report, check, exercise, mistake, solution
from .picture import INK, PALETTE, access, figure, roofline
from .reading import show_source
from .timing import Time, clock, machine, table, timed

__all__ = [
    "DEVICE", "GPU", "INK", "INTERPRETED", "PALETTE", "ROOT",
    "Report", "Time", "Wrong",
    "access", "check", "clock", "exercise", "figure", "machine", "mistake", "near", "roofline", "same", "show_source", "solution", "table", "timed",
]  # fmt: skip
