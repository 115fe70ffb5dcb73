"""The model sizes the quickstart can train, as a table."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Preset:
    """A model, the batches it sees and how long it trains. Sizes in elements, `corpus` in bytes."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    head: int  # width of lm_head: the vocabulary the model could predict
    vocab: int  # tokens the tokenizer learns; a wider head has rows that no text names
    tied: bool  # one matrix for the embedding and the head
    batch: int
    seq: int
    steps: int
    warmup: int  # first steps that are trained and logged, but not timed
    every: int  # losses are read, and shown, once in so many steps
    lr: float
    corpus: int
    dtype: torch.dtype = torch.float32
    gpu_gib: tuple[float, float] | None = None  # (fixed, per sequence) memory of the stock run; None: small enough for any machine

    def gib(self, batch: int) -> float:
        """GPU memory the stock run needs at this batch."""
        fixed, each = self.gpu_gib or (0.0, 0.0)
        return fixed + each * batch


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "tiny", hidden=64, layers=2, heads=2, kv_heads=1, mlp=128, head=512, vocab=512, tied=False,
            batch=2, seq=64, steps=20, warmup=1, every=2, lr=3e-3, corpus=200_000,
        ),
        Preset(
            "small", hidden=192, layers=4, heads=6, kv_heads=2, mlp=512, head=4096, vocab=4096, tied=False,
            batch=8, seq=256, steps=60, warmup=5, every=6, lr=2e-3, corpus=3_000_000,
        ),
        # The shapes of Llama 3.2 1B. Its head is what fills the memory of stock training: 4 × 4096 × 128256 logits.
        Preset(
            "1b", hidden=2048, layers=16, heads=32, kv_heads=8, mlp=8192, head=128_256, vocab=32_768, tied=True,
            batch=4, seq=4096, steps=50, warmup=10, every=5, lr=3e-4, corpus=9_000_000,
            dtype=torch.bfloat16, gpu_gib=(16.0, 12.5),
        ),
    )
}  # fmt: skip
