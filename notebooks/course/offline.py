"""Compile kernels for an H100 that is not here, and read what they would take of it.

Triton decides once, when it is imported, whether it interprets or compiles. A lesson without a GPU interprets, so the compiler runs in a
process of its own: this file, as a script, with TRITON_INTERPRET=0. It gets the kernels' source text, and answers in JSON.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple


class Compiled(NamedTuple):
    """What the compiler made of a kernel for sm_90."""

    ptx: str
    loads: dict[int, int]  # bits that a thread loads from memory by one instruction → how many such instructions
    stores: dict[int, int]
    registers: int  # of 32 bits, for a thread
    spilled: int  # bytes a thread that had no register
    shared: int  # bytes a program
    warps: int


def job(kernel: Any, *, warps: int = 4, divisible: bool = True, fp32: Sequence[str] = (), **constants: Any) -> str:
    """A question to the compiler, as text.

    Args:
        kernel: a `@triton.jit` function that uses nothing but `triton`, `tl` and its arguments.
        warps: of 32 threads, for a program.
        divisible: the compiler may rely on it that 16 divides all addresses (in bytes) and integers. Triton looks at a launch whether it is so.
        fp32: pointers to fp32. Others are to bf16; an argument without `_ptr` is an int32, or fp32 if it is called `eps`.
        constants: the values of its `tl.constexpr`s.
    """
    fn = kernel.fn
    names = list(inspect.signature(fn).parameters)
    kinds = {
        n: "constexpr" if n in constants else "*fp32" if n in fp32 else "*bf16" if n.endswith("_ptr") else "fp32" if n == "eps" else "i32"
        for n in names
    }
    even = [n for n, kind in kinds.items() if divisible and kind not in ("constexpr", "fp32") and n not in _unspecialised(kernel)]
    source = textwrap.dedent(inspect.getsource(fn))
    return json.dumps({"name": fn.__name__, "source": source, "kinds": kinds, "even": even, "constants": constants, "warps": warps})


def _unspecialised(kernel: Any) -> tuple[str, ...]:
    """Arguments that `@triton.jit(do_not_specialize=…)` names; the interpreter's function does not keep them, but its source does."""
    found = re.search(r"do_not_specialize=\[([^\]]*)\]", inspect.getsource(kernel.fn))
    return tuple(re.findall(r"\w+", found[1])) if found else ()


def kernel_of(launcher: Any) -> Any:
    """The kernel that a function of Python launches: the first global that it names and that is one.

    Raises:
        LookupError: it names none.
    """
    for name in launcher.__code__.co_names:
        if callable(getattr(found := launcher.__globals__.get(name), "fn", None)):
            return found
    raise LookupError(f"{launcher.__name__} launches no kernel: it names none that is a @triton.jit function")


@cache
def compiled(*jobs: str) -> list[Compiled]:
    """Compile each `job`, all in one process that has the compiler.

    Raises:
        RuntimeError: one did not compile; its last line says why.
    """
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, __file__], input="\n".join(jobs), capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"it did not compile: {done.stderr.strip().splitlines()[-1]}")
    return [Compiled(**_widths(raw)) for raw in map(json.loads, done.stdout.splitlines())]


def _widths(raw: dict[str, Any]) -> dict[str, Any]:
    """JSON has no integers for keys."""
    return raw | {kind: {int(bits): n for bits, n in raw[kind].items()} for kind in ("loads", "stores")}


def _compile(asked: dict[str, Any], path: Path) -> Compiled:
    """One job, in the process that has the compiler. Triton reads a kernel's text from its file, so there has to be one."""
    import importlib.util

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    path.write_text(f"import triton\nimport triton.language as tl\n\n\n{asked['source']}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel, kinds = getattr(module, asked["name"]), asked["kinds"]
    place = {n: (i,) for i, n in enumerate(kinds)}
    made = triton.compile(
        ASTSource(
            fn=kernel,
            signature=kinds,
            constexprs={place[n]: v for n, v in asked["constants"].items()},
            attrs={place[n]: [["tt.divisibility", 16]] for n in asked["even"]},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": asked["warps"]},
    )
    ptx = made.asm["ptx"]
    registers, spilled = _resources(made.asm["cubin"], path.with_suffix(".cubin"))
    return Compiled(ptx, _count(ptx, "ld"), _count(ptx, "st"), registers, spilled, int(made.metadata.shared), asked["warps"])


def _count(ptx: str, kind: str) -> dict[int, int]:
    """How many instructions of each width: `ld.global.v4.b32` is 4 times 32 bits."""
    found: dict[int, int] = {}
    for vector, bits in re.findall(rf"\b{kind}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx):
        width = int(vector or 1) * int(bits)
        found[width] = found.get(width, 0) + 1
    return found


def _resources(cubin: bytes, path: Path) -> tuple[int, int]:
    """Registers, and bytes of stack, as the disassembler reads them from the machine code."""
    from triton import knobs

    path.write_bytes(cubin)
    text = subprocess.run([knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for n, line in enumerate(sys.stdin):
            print(json.dumps(_compile(json.loads(line), Path(folder) / f"kernel{n}.py")._asdict()))
