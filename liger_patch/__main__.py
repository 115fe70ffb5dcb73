"""`python -m liger_patch`: what is supported; `python -m liger_patch explain MODEL_TYPE`: what would be done to such a model.

python -m liger_patch                       types and their operations, as a table
python -m liger_patch --markdown            the same, as docs/architectures.md has it
python -m liger_patch explain llama         the plan for a model of the type's default configuration, without its weights
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import _registry
from ._errors import PatchError
from ._spec import OPS

SHORT = {
    "rms_norm": "RMSNorm", "layer_norm": "LayerNorm", "swiglu": "SwiGLU", "geglu": "GeGLU", "reglu": "ReGLU", "relu_squared": "ReLU²",
    "rope": "RoPE", "experts": "experts", "linear_cross_entropy": "linear CE", "cross_entropy": "CE",
}  # fmt: skip
PAGE = """# Architectures

Made by `python -m liger_patch --markdown > docs/architectures.md`: edit `liger_patch/archs` instead.

`liger_patch.auto(model)` finds the entry of `model.config.model_type`. {count} types have one, {heads} of them with the loss of
their output layer. Every cell is proved twice: on the model at hand, by `auto`, before it is patched; and in the tests
(`tests/liger_patch/test_archs.py`), on a tiny random model of the type, where loss, logits, every gradient and 20 steps of training must
be the original's, and undone bit for bit.

A model of several parts is described by the entries of all of them: a vision-language model has its own row for the output layer, one for
its language model and one for its tower. "stock" under experts: a mixture's experts run as they are.

No column shows `causal_mask`, which no entry names: every model whose masks are made by transformers' own functions is spared them in
training, where neither positions nor a mask are given and attention runs by `sdpa`.

"""


def table() -> list[tuple[str, ...]]:
    """A line for each type, under a heading."""
    shown = [op for op in OPS if op in SHORT]
    lines = [("type", *(SHORT[op] for op in shown))]
    for model_type, ops in _registry.supported().items():
        stock = {"experts"} if _registry.entry(model_type, "table").experts else set()
        lines.append((model_type, *("✓" if op in ops else "stock" if op in stock else "" for op in shown)))
    return lines


def as_text() -> str:
    lines = table()
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, "", f"{len(lines) - 1} types"])


def as_markdown() -> str:
    head, *lines = table()
    heads = sum("linear_cross_entropy" in ops for ops in _registry.supported().values())
    rows = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *((f"`{line[0]}`", *line[1:]) for line in lines))]
    return PAGE.format(count=len(lines), heads=heads) + "\n".join(rows)


def explain(model_type: str) -> str:
    """The plan for a model of this type's default configuration, on the meta device, and so without proofs."""
    import torch
    import transformers
    from transformers.models.auto import modeling_auto

    from ._apply import plan

    _registry.entry(model_type, "explain")
    if model_type not in transformers.CONFIG_MAPPING:
        return f"{model_type}: a part of other models, of which transformers {transformers.__version__} makes none alone"
    names = (
        ("AutoModelForImageTextToText", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("AutoModel", modeling_auto.MODEL_MAPPING_NAMES),
    )
    auto = next((name for name, mapping in names if model_type in mapping), None)
    if auto is None:
        return f"{model_type}: a part of other models, of which transformers {transformers.__version__} makes none alone"
    with torch.device("meta"):
        model = getattr(transformers, auto).from_config(transformers.CONFIG_MAPPING[model_type]())
    return str(plan(model, verify=False))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m liger_patch", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--markdown", action="store_true", help="print the page docs/architectures.md")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("explain", help="what would be done to a model of a type").add_argument("model_type")
    given = parser.parse_args(arguments)
    try:
        print(explain(given.model_type) if given.command else as_markdown() if given.markdown else as_text())  # noqa: T201
    except PatchError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
