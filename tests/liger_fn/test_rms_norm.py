"""rms_norm: the contract, and its oddities."""

from tests import cases
from tests.contract import Contract


class TestRMSNorm(Contract):
    table = cases.RMS_NORM
