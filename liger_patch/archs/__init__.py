"""The entries that ship, a family a file. Data only."""

from . import llama

ARCHS = (*llama.ARCHS,)

__all__ = ["ARCHS"]
