"""How many different kernels the ops ask a GPU for over ten sequence lengths, from the launches they make on meta tensors.

    python -m tests.recompilation            print, as JSON, for each op: kernels at the first length, over ten alike, and with ten odd ones

Run it in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import json

from tests.cases import BF16, TABLES, Table
from tests.offline_compile import Job, job, launches

LENGTHS = (128, 256, 512, 1008, 1536, 2048, 3072, 4096, 8192, 12288)
ODD = (129, 145, 201, 333, 999, 1001, 2047, 3001, 4095, 8191)


def kernels(table: Table, lengths: tuple[int, ...]) -> set[Job]:
    """What Triton would compile for batches of these lengths, forward and backward."""
    return {job(launch) for n in lengths for launch in launches(table, table.sized(n), BF16)}


def main() -> None:
    found = {}
    for name, table in TABLES.items():
        first, alike = kernels(table, LENGTHS[:1]), kernels(table, LENGTHS)
        found[name] = {"first": len(first), "alike": len(alike), "odd": len(alike | kernels(table, ODD))}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
