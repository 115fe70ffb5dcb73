"""Does a patched model train to where the stock one does? `python -m tests.convergence` trains both and compares: see train.py."""

import sys
from pathlib import Path

# The corpus, its tokenizer and the presets are the quickstart's.
_EXAMPLES = str(Path(__file__).parents[2] / "examples")
if _EXAMPLES not in sys.path:
    sys.path.append(_EXAMPLES)
