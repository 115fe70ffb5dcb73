"""swiglu: the contract, and its oddities."""

from tests import cases
from tests.contract import Contract


class TestSwiGLU(Contract):
    table = cases.SWIGLU
