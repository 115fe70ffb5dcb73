"""What makes Triton's interpreter faster changes no number, no type and no error."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

import liger_fn  # noqa: F401  (the interpreter is mended after its import)
from tests.conftest import BACKENDS

if "interpreter" not in BACKENDS:
    pytest.skip("no interpreter here", allow_module_level=True)

import triton.language as tl
from triton.runtime import interpreter

QUICK: Any = interpreter.interpreter_semantic
if type(QUICK).__name__ == "TritonSemantic":
    pytest.skip("this version is as it comes", allow_module_level=True)
STOCK = type(QUICK).__mro__[1](interpreter.interpreter_builder)


def tensor(dtype: Any, *shape: int) -> Any:
    """Numbers of a dtype; without a shape a scalar, which is an array of one to the interpreter."""
    data = np.arange(1, 1 + int(np.prod(shape))).reshape(shape or 1).astype(interpreter._get_np_dtype(dtype))
    return tl.tensor(interpreter.TensorHandle(data, dtype), tl.block_type(dtype, list(shape)) if shape else dtype)


DTYPES = (tl.float32, tl.float64, tl.float16, tl.bfloat16, tl.int32, tl.int64, tl.uint32, tl.int1)
NUMBERS = (0.0, -0.0, 0.1, float("nan"), float("inf"), 1e300, 1e-300, 3, -1, 2**31 - 1, 2**31, -(2**40), 2**63, 2**70, True)
TENSORS = (
    *(tensor(dtype, *shape) for dtype in DTYPES for shape in ((), (8,), (2, 4), (2, 1))),
    tensor(tl.float32, 1, 4),
    tensor(tl.float32, 16),
    tensor(tl.pointer_type(tl.float32)),
    tensor(tl.pointer_type(tl.float32), 8),
)


def outcome(fn: Any, *args: Any) -> tuple[Any, ...]:
    """What came of it, to the last bit."""
    try:
        made = fn(*args)
    except Exception as error:
        return type(error), str(error)
    kinds = [(str(t.type), str(t.dtype), [int(n) for n in t.shape], int(t.numel), str(t.handle.dtype)) for t in made]
    return kinds, [(t.handle.data.dtype.str, t.handle.data.shape, t.handle.data.tobytes()) for t in made]


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("division", [False, True])
def test_two_operands(division: bool) -> None:
    """Each with each: which dtypes they take, how they are spread, and what is refused."""
    for a, b in product((*TENSORS, *NUMBERS), repeat=2):
        for pointers in (False, True):
            options = a, b, pointers, pointers, True, division
            want = outcome(STOCK.binary_op_type_checking_impl, *options)
            assert outcome(QUICK.binary_op_type_checking_impl, *options) == want, f"{a!r} and {b!r}"


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.skipif(not hasattr(STOCK, "ternary_op_type_checking_impl"), reason="this version takes them two by two")
def test_three_operands() -> None:
    some = [t for t in TENSORS if str(t.dtype) in ("fp32", "bf16", "int32")]
    for a, b, c in product((*some, 0.5, -0.0, 2, 2**40), repeat=3):
        want = outcome(STOCK.ternary_op_type_checking_impl, a, b, c)
        assert outcome(QUICK.ternary_op_type_checking_impl, a, b, c) == want, f"{a!r}, {b!r} and {c!r}"


def test_types_of_one_key_are_their_own() -> None:
    """What is kept by name or shape is what each would have had."""
    for dtype in (*DTYPES, tl.pointer_type(tl.bfloat16), tl.pointer_type(tl.float32)):
        for shape in ([8], [2, 4], [4, 2]):
            block = tl.block_type(dtype, shape)
            assert (list(block.shape), int(block.numel), block.element_ty) == (shape, 8, dtype)
            assert str(block) == f"<{block.shape}, {dtype}>"
            t = tensor(dtype, *shape)
            assert ([int(n) for n in t.shape], int(t.numel.value), t.dtype, t.type) == (shape, 8, dtype, block)
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(tl.float32, [3])
