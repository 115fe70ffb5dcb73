"""The models that are planned for, as data: shapes of the published Llamas, and how many parameters a rank of tensor parallelism has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tests.bench.training.models import LLAMA3_ROPE

STOCK, OURS = "stock", "liger_fn"
PROVIDERS = (STOCK, OURS)


@dataclass(frozen=True)
class Shape:
    """A decoder. `tp` are the degrees of tensor parallelism whose share of a layer is measured: as a layer with so much fewer heads."""

    name: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    tp: tuple[int, ...] = (1,)

    def matrices(self, tp: int = 1) -> tuple[tuple[int, int], ...]:
        """Rows and columns of a layer's weights on a rank: q, k, v, o, gate, up, down, and the norms, which are not cut."""
        h, q, kv, mlp = self.hidden, self.heads * self.head_dim // tp, max(1, self.kv_heads // tp) * self.head_dim, self.mlp // tp
        return (q, h), (kv, h), (kv, h), (h, q), (mlp, h), (mlp, h), (h, mlp), (h, 1), (h, 1)

    def layer(self, tp: int = 1, shard: int = 1) -> int:
        """Parameters of one layer on a rank, where `shard` ranks have rows of each: the first have a row more where they do not divide."""
        return _rows(self.matrices(tp), shard)

    def head(self, tp: int = 1) -> int:
        """Of the output layer, cut along the vocabulary."""
        return self.vocab // tp * self.hidden

    @property
    def embedding(self) -> int:
        """Whole on every rank of tensor parallelism; the same matrix as the output layer's where they are tied."""
        return self.vocab * self.hidden

    def root(self, tp: int = 1, shard: int = 1) -> int:
        """All that is in no layer: embedding, last norm, output layer."""
        head = () if self.tied else ((self.vocab // tp, self.hidden),)
        return _rows(((self.vocab, self.hidden), (self.hidden, 1), *head), shard)

    def parameters(self, tp: int = 1, shard: int = 1) -> int:
        return self.layers * self.layer(tp, shard) + self.root(tp, shard)

    def cut(self, tp: int) -> dict[str, Any]:
        """The sizes of a whole model that has one rank's share of each layer and of the output layer."""
        return {
            "hidden_size": self.hidden, "intermediate_size": self.mlp // tp, "num_attention_heads": self.heads // tp,
            "num_key_value_heads": max(1, self.kv_heads // tp), "head_dim": self.head_dim, "vocab_size": self.vocab // tp,
            "tie_word_embeddings": self.tied, "rope_parameters": LLAMA3_ROPE,
        }  # fmt: skip

    def tiny(self) -> Shape:
        """The same kind in a few thousand parameters: it proves the harness without a GPU."""
        return replace(self, hidden=32, mlp=64, layers=3, heads=8, kv_heads=8, head_dim=8, vocab=256)


def _rows(matrices: tuple[tuple[int, int], ...], shard: int) -> int:
    return sum(-(-rows // shard) * columns for rows, columns in matrices)


LLAMA_1B = Shape("Llama 1B", 2048, 8192, 16, 32, 8, 64, 128256, tied=True)  # planned for no cluster: whole steps of it are there to compare
LLAMA_8B = Shape("Llama 8B", 4096, 14336, 32, 32, 8, 128, 128256, tp=(1, 2, 8))
LLAMA_70B = Shape("Llama 70B", 8192, 28672, 80, 64, 8, 128, 128256, tp=(1, 8))
LLAMA_405B = Shape("Llama 405B", 16384, 53248, 126, 128, 8, 128, 128256, tp=(8,))
PLANNED = (LLAMA_8B, LLAMA_70B, LLAMA_405B)
BY_NAME = {shape.name: shape for shape in (LLAMA_1B, *PLANNED)}
