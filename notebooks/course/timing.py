"""Times of a GPU: measured where there is one, and shown as recorded on an H100 where there is none.

`python -m notebooks record` on a GPU runs every lesson and writes what its `timed` calls measured into `recorded.json`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

KEPT = Path(__file__).with_name("recorded.json")
UNRECORDED = "COURSE_UNRECORDED"  # set while a lesson is written: a time that nobody has recorded yet is NaN
RECORD = "COURSE_RECORD"  # the file that measured times are written to, when it is set


@dataclass(frozen=True)
class Time:
    """Device time of one call in µs, where it was measured, and the bytes and FLOPs that the reader counted for it."""

    us: float
    machine: str
    recorded: bool
    bytes: int = 0
    flops: int = 0

    @property
    def gb_per_s(self) -> float:
        """The bytes over the time, in GB/s (10⁹)."""
        return self.bytes / self.us / 1e3

    @property
    def tflop_per_s(self) -> float:
        """The FLOPs over the time, in TFLOP/s (10¹²)."""
        return self.flops / self.us / 1e6

    def __repr__(self) -> str:
        rates = [f"{self.gb_per_s:,.0f} GB/s"] if self.bytes else []
        rates += [f"{self.tflop_per_s:,.0f} TFLOP/s"] if self.flops else []
        return ", ".join([f"{self.us:,.1f} µs", *rates]) + f" ({'recorded on' if self.recorded else 'measured on'} {self.machine})"


def machine() -> str:
    """The GPU and versions that `timed` speaks of: this machine's, or those of the recorded figures."""
    if not torch.cuda.is_available():
        return str(_kept().get("machine", "nothing recorded yet"))
    import triton

    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"


def clock(call: Callable[[], object], *, repeat: int = 30) -> float:
    """Median device time of `call` in µs, by CUDA events, after a warm-up, with L2 flushed before each call."""
    for _ in range(3):
        call()
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) * 1e3 for start, end in pairs)[repeat // 2]


def timed(key: str, prepare: Callable[[], Callable[[], object]], *, bytes: int = 0, flops: int = 0) -> Time:
    """The device time of what `prepare()` returns: measured on a GPU, and otherwise what was recorded under `key` on an H100.

    Args:
        key: names the figure in the records, for all lessons: "4 rms_norm naive 8192 x 4096".
        prepare: makes the inputs (large ones: it runs on a GPU alone) and returns the call to time.
        bytes, flops: what one call must move and compute, as the reader counts them; for the rates.

    Raises:
        KeyError: no GPU, and no figure of this name is recorded.
    """
    if not torch.cuda.is_available():
        kept = _kept()
        if UNRECORDED in os.environ:
            return Time(kept.get("us", {}).get(key, math.nan), kept.get("machine", "nothing"), True, bytes, flops)
        if key not in kept.get("us", {}):
            raise KeyError(f"timed: {key!r} is not among the recorded figures; on a GPU, `python -m notebooks record` adds it")
        return Time(kept["us"][key], kept["machine"], True, bytes, flops)
    time = Time(clock(prepare()), machine(), False, bytes, flops)
    if path := os.environ.get(RECORD):
        _record(Path(path), key, time)
    return time


def table(rows: Sequence[tuple[str, Time]], floor: float | None = None) -> str:
    """Lines of name, µs, rates and, with `floor` in µs, how many times the floor each takes."""
    width = max(len(name) for name, _ in rows)
    lines = []
    for name, time in rows:
        rates = f"{time.gb_per_s:9,.0f} GB/s" if time.bytes else ""
        rates += f"{time.tflop_per_s:9,.0f} TFLOP/s" if time.flops else ""
        times = f"{time.us / floor:8.2f} × the floor" if floor else ""
        lines.append(f"{name:<{width}} {time.us:12,.1f} µs {rates}{times}")
    first = rows[0][1]
    return "\n".join([*lines, f"{'recorded on' if first.recorded else 'measured on'} {first.machine}"])


def _kept() -> dict:
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def _record(path: Path, key: str, time: Time) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    known["machine"] = time.machine
    known.setdefault("us", {})[key] = round(time.us, 2)
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
