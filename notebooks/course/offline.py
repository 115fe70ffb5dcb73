"""Compile a kernel of kernels11 for an H100 that is not here, and read what it takes: `python -m course.offline` in a process without the interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1]
BF16 = {"x_ptr", "w_ptr", "y_ptr", "dy_ptr"}


def compiled(kernel: str, *, block: int, warps: int = 4, divisible: bool = True, **constants: int) -> dict[str, Any]:
    """PTX and resource use of a kernel for sm_90: its text, loads by width in bits, registers a thread, bytes spilled.

    Args:
        kernel: a name in `course/kernels11.py`. block: its BLOCK. warps: of 32 threads, for a program.
        divisible: the compiler is told that pointers and sizes are multiples of 16, as Triton finds at a launch where it is so.
        constants: further arguments whose value is known when it is compiled.
    """
    asked = {"kernel": kernel, "block": block, "warps": warps, "divisible": divisible, "constants": constants}
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(FOLDER)}
    done = subprocess.run([sys.executable, __file__, json.dumps(asked)], capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"compiled: {kernel} did not compile: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _compile(kernel: str, block: int, warps: int, divisible: bool, constants: dict[str, int]) -> dict[str, Any]:
    import importlib.util

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    spec = importlib.util.spec_from_file_location("kernels11", FOLDER / "course" / "kernels11.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fn = getattr(module, kernel)
    known = constants | {"BLOCK": block}
    kinds = {
        n: "constexpr" if n in known else "*bf16" if n in BF16 else "*fp32" if n.endswith("_ptr") else "fp32" if n == "eps" else "i32"
        for n in fn.arg_names
    }
    places = {n: (i,) for i, n in enumerate(fn.arg_names)}
    attrs = {places[n]: [["tt.divisibility", 16]] for n, kind in kinds.items() if divisible and kind not in ("constexpr", "fp32")}
    made = triton.compile(
        ASTSource(fn=fn, signature=kinds, constexprs={places[n]: v for n, v in known.items()}, attrs=attrs),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps},
    )
    ptx = made.asm["ptx"]
    return {"ptx": ptx, "loads": _loads(ptx), **_resources(made.asm["cubin"])}


def _loads(ptx: str) -> dict[str, int]:
    """How many load instructions of each width."""
    found: dict[str, int] = {}
    for vector, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)", ptx):
        width = str(int(vector or 1) * int(bits))
        found[width] = found.get(width, 0) + 1
    return found


def _resources(binary: bytes) -> dict[str, int]:
    """Registers a thread, and the bytes of local memory that held what found no register."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        asked = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    return {"registers": int(re.search(r"REG:(\d+)", said)[1]), "spilled": int(re.search(r"LOCAL:(\d+)", said)[1])}


if __name__ == "__main__":
    print(json.dumps(_compile(**json.loads(sys.argv[1]))))
