"""rope: the contract, and its oddities."""

from tests import cases
from tests.contract import Contract


class TestRope(Contract):
    table = cases.ROPE
