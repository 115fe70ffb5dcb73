"""The entries that ship, a family a file. Data only."""

from . import composite, gemma, layer_norm, llama, mixtures, variants

ARCHS = (*composite.ARCHS, *gemma.ARCHS, *layer_norm.ARCHS, *llama.ARCHS, *mixtures.ARCHS, *variants.ARCHS)

__all__ = ["ARCHS"]
