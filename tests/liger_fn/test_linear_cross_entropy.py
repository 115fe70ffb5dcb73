"""linear_cross_entropy: the contract, and its oddities."""

from tests import cases
from tests.contract import Contract


class TestLinearCrossEntropy(Contract):
    table = cases.LINEAR_CROSS_ENTROPY
