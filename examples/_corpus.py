"""A corpus that every Python already has: the sources of its own standard library, as tokens of a BPE learned from them."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from _presets import Preset

# Tests repeat themselves, site-packages differ between machines, and the rest is tables rather than language.
SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}

SEPARATOR = 0  # the token between two files


@dataclass(frozen=True)
class Corpus:
    """Where the tokens and the tokenizer lie, and how much text they stand for."""

    folder: Path
    files: int
    characters: int
    tokens: int


def sources(limit: int) -> list[str]:
    """Texts of the standard library's modules, in the order of their paths, up to `limit` characters in all."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: list[str] = []
    room = limit
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if SKIPPED.isdisjoint(path.relative_to(root).parts) and room > 0:
            text = path.read_text(encoding="utf-8", errors="replace")[:room]
            texts.append(text)
            room -= len(text)
    if room > limit // 2:
        raise SystemExit(f"corpus: {root} holds too few .py sources to train on; use a Python that has its library as sources")
    return texts


def prepare(preset: Preset, folder: Path) -> Corpus:
    """Learn a byte-level BPE of `preset.vocab` tokens from the corpus, and leave tokenizer and tokens in `folder`."""
    texts = sources(preset.corpus)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=preset.vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|file|>"],  # takes the first id
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids += [SEPARATOR, *encoding.ids]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.save(torch.tensor(ids, dtype=torch.int32), folder / "tokens.pt")
    return Corpus(folder, len(texts), sum(map(len, texts)), len(ids))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `prepare` learned."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def batches(folder: Path, preset: Preset, seed: int, device: str) -> Iterator[torch.Tensor]:
    """`preset.steps` batches of token ids `[batch, seq]`: windows of the corpus that the seed alone chooses."""
    tokens = torch.load(folder / "tokens.pt").long().to(device)
    generator = torch.Generator().manual_seed(seed)
    within = torch.arange(preset.seq, device=device)
    for _ in range(preset.steps):
        starts = torch.randint(len(tokens) - preset.seq, (preset.batch, 1), generator=generator)
        yield tokens[starts.to(device) + within]
