"""cross_entropy: the contract, and its oddities."""

from tests import cases
from tests.contract import Contract


class TestCrossEntropy(Contract):
    table = cases.CROSS_ENTROPY
