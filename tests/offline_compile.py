"""Compile every kernel that ships for GPUs that are not here, and read from the result what it will take of them.

The launches are those that the ops make at the sizes of `tests.cases` (`Table.launches`) on meta tensors. Each is compiled as Triton's
runtime would: the same signature, the same specialisation on sizes that 16 divides and on ones. Nothing is run.

    python -m tests.offline_compile            print what each kernel takes, as JSON: bytes, registers a thread, bytes spilled, threads
    python -m tests.offline_compile --write    record it in tests/offline_compile.json: the budget that the test holds kernels to

Run it in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import liger_fn
from liger_fn import _launch
from tests.cases import BF16, FP32, TABLES, Case, Maker, Table
from tests.sample import flat

BUDGET = Path(__file__).with_name("offline_compile.json")
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
SHORT = {torch.float64: "fp64", FP32: "fp32", BF16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}
Usage = dict[str, int]


class Job(NamedTuple):
    """One kernel as the compiler sees it: all that decides the machine code but the target."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


def launches(table: Table, case: Case, dtype: torch.dtype) -> list[_launch.Launch]:
    """What `op` would ask of a GPU for this case: forward, and backward with every gradient and with each alone."""
    op = getattr(liger_fn, table.op)
    inputs = case.make(Maker(torch.device("meta"), dtype))
    present = [inputs.get(k) is not None for k in table.diff]
    alone = [tuple(i == j for j in range(len(present))) for i, p in enumerate(present) if p]
    with ranks(table.ranks), liger_fn.use_backend("triton"), _launch.record() as made, torch.no_grad():
        y = op(**inputs, **case.options)
        _, residuals = op.fwd(**inputs, **case.options)
        dy = tuple(map(torch.empty_like, flat(y)))
        dy = dy if op.n_out > 1 else dy[0]
        for needs in dict.fromkeys((tuple(present), *alone)):
            op.bwd(residuals, dy, needs=needs)
    return made


@contextmanager
def ranks(n: int) -> Iterator[None]:
    """As the first of `n`, which send each other nothing."""
    if n == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    try:
        yield
    finally:
        dist.destroy_process_group()


def job(launch: _launch.Launch) -> Job:
    """The launch as Triton's runtime would specialise it: None and 1 are constants, multiples of 16 are known to be."""
    kernel, meta = launch.kernel, dict(launch.meta)
    counts = {p.name for p in kernel.params if p.do_not_specialize}
    options = tuple((k, meta.pop(k)) for k in ("num_warps", "num_stages", "num_ctas", "maxnreg") if k in meta)
    signature, constants, divisible = [], [], []
    for name, value in (*zip(kernel.arg_names, launch.args, strict=False), *meta.items()):
        kind = ("i32" if value < 2**31 else "i64") if name in counts else _kind(value)
        if name in meta or kind == "constexpr":
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        signature.append((name, kind))
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and name not in counts):
            divisible.append(name)
    assert len(signature) == len(kernel.arg_names), f"{kernel.__name__}: {len(signature)} of {len(kernel.arg_names)} arguments"
    return Job(kernel.fn.__module__, kernel.fn.__name__, tuple(signature), tuple(constants), tuple(divisible), options)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + SHORT[value.dtype]
    if isinstance(base := getattr(value, "base", None), Tensor):  # blocks of it
        return f"tensordesc<{SHORT[base.dtype]}{list(value.block_shape)}>"
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, bool):
        return "i1"
    return "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"


def jobs() -> dict[str, dict[str, Job]]:
    """Every different kernel, for each target, by a name that says where it first came from: op, kernel, case, dtype, a number."""
    named: dict[str, dict[str, Job]] = {}
    for table in TABLES.values():
        for case in table.launches:
            for dtype in (BF16, FP32):
                for made in zip(*(as_on(target, table, case, dtype) for target in TARGETS), strict=True):
                    one = {target: job(launch) for target, launch in zip(TARGETS, made, strict=True)}
                    if one not in named.values():
                        base = name = f"{table.op}{one['sm_80'].kernel.removesuffix('_kernel')}-{case.name}-{str(dtype)[6:]}"
                        while name in named:
                            name = f"{base}-{int(name.removeprefix(base).lstrip('-') or 1) + 1}"
                        named[name] = one
    return named


# What decides on launches: warps of a block at most (AMD's are 64 wide), NVIDIA or not, an engine that copies blocks.
KINDS = {"sm_80": (32, True, False), "sm_90": (32, True, True), "sm_100": (32, True, True), "gfx942": (16, False, False)}


def as_on(target: str, table: Table, case: Case, dtype: torch.dtype) -> list[_launch.Launch]:
    """The launches that are made on such a GPU."""
    return _as_on(KINDS[target], table.op, case.name, dtype)


@cache
def _as_on(kind: tuple[int, bool, bool], op: str, name: str, dtype: torch.dtype) -> list[_launch.Launch]:
    table = TABLES[op]
    here = _launch.MAX_WARPS, _launch.NVIDIA, _launch.ENGINE
    _launch.MAX_WARPS, _launch.NVIDIA, _launch.ENGINE = kind
    _forget_plans()
    try:
        return launches(table, next(c for c in table.launches if c.name == name), dtype)
    finally:
        _launch.MAX_WARPS, _launch.NVIDIA, _launch.ENGINE = here
        _forget_plans()


def _forget_plans() -> None:
    """They were made for the GPU that this process has."""
    for name, module in list(sys.modules.items()):
        if name.startswith("liger_fn"):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def compile_for(one: Job, target: str) -> Usage:
    """Compile one kernel for one target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(one.module), one.kernel)
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=dict(one.signature),
        constexprs={(index[k],): v for k, v in one.constants},
        attrs={(index[k],): [["tt.divisibility", 16]] for k in one.divisible},
    )
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(one.options))
    if "cubin" in compiled.asm:
        registers, spilled = _cuda_usage(compiled.asm["cubin"])
    else:
        registers, spilled = _amd_usage(compiled.asm["amdgcn"])
    threads = compiled.metadata.num_warps * TARGETS[target][2]
    return {"shared": int(compiled.metadata.shared), "registers": registers, "spilled": spilled, "threads": threads}


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """What the disassembler says: a kernel without arrays of its own has a stack only for spilled registers."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd_usage(assembly: str) -> tuple[int, int]:
    found = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count): +(\d+)", assembly)}
    return found["vgpr_count"], 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])


def _attempt(name: str, one: Job, target: str) -> tuple[str, str, Usage | str]:
    try:
        return name, target, compile_for(one, target)
    except Exception as error:
        return name, target, f"{type(error).__name__}: {error}"


def measure() -> dict[str, dict[str, Usage | str]]:
    """{kernel: {target: usage, or what the compiler said}}."""
    found: dict[str, dict[str, Usage | str]] = {}
    work = [(name, one, target) for name, targets in jobs().items() for target, one in targets.items()]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        for name, target, usage in pool.map(_attempt, *zip(*work, strict=True), chunksize=4):
            found.setdefault(name, {})[target] = usage
    return found


def lines(found: dict[str, dict[str, Usage | str]]) -> Iterator[str]:
    import triton

    yield f'{{\n"triton": "{triton.__version__}",\n"kernels": {{\n'
    yield ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items())
    yield "\n}}\n"


def main(arguments: list[str]) -> None:
    text = "".join(lines(measure()))
    if arguments == ["--write"]:
        BUDGET.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
