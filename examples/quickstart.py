"""Train a small language model twice from one seed, stock and patched with liger_patch, and compare loss, speed and memory.

    python examples/quickstart.py            # about two minutes on two CPU cores; on a large GPU, Llama-1B shapes in bf16
    python examples/quickstart.py --help

`train` is the part to copy: an ordinary training loop, and the one line that patches. The corpus (_corpus.py), the measuring (_runs.py)
and the report (_report.py, _figure.py) are beside it.
"""

import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from transformers import GenerationConfig, PreTrainedModel

import _figure
import _report
import liger_patch
from _corpus import SEPARATOR, batches, load_tokenizer, prepare
from _model import causal_lm
from _options import Options, parse
from _progress import Display
from _runs import Meter, Run, RunFailed, execute

PROMPT = "def"


def train(run: Run, meter: Meter) -> None:
    """Build, train and, when patched, write a few lines. Runs in a process of its own."""
    torch.manual_seed(run.seed)
    model = causal_lm(run.preset, run.device, run.model_type)
    if run.patched:
        meter.result.report = str(liger_patch.auto(model))  # <- the one line
    forward = torch.compile(model) if run.compiled else model

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.preset.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=max(1, run.preset.steps // 5))
    for ids in meter.steps(batches(run.folder, run.preset, run.seed, run.device)):
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        meter.log(loss)

    if run.patched:
        meter.result.sample = generate(model, run)


def generate(model: PreTrainedModel, run: Run, tokens: int = 64) -> str:
    """What the model writes after `PROMPT`."""
    tokenizer = load_tokenizer(run.folder)
    config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_k=40,
        max_new_tokens=min(tokens, run.preset.seq // 2),
        pad_token_id=SEPARATOR,
        eos_token_id=SEPARATOR,
        use_cache=True,
        # A head wider than the vocabulary has rows that stand for no text.
        suppress_tokens=list(range(tokenizer.get_vocab_size(), run.preset.head)) or None,
    )
    ids = torch.tensor([tokenizer.encode(PROMPT).ids], device=run.device)
    torch.manual_seed(run.seed)
    model.eval()
    written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return tokenizer.decode(written[0].tolist())


def plan(options: Options) -> list[Run]:
    """The runs of one comparison, stock first."""

    def run(name: str, patched: bool, compiled: bool) -> Run:
        return Run(name, patched, compiled, options.model_type, options.preset, options.device, options.seed, options.out / "corpus")

    runs = [run("stock", False, options.compile), run("patched", True, options.compile)]
    if options.baseline_compile:
        runs.append(run("stock, eager" if options.compile else "stock, compiled", False, not options.compile))
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; 0 if the patched losses are the stock losses within rounding, 1 if not or if a run failed."""
    options = parse(argv, liger_patch.supported(), __doc__)
    console = Console(width=None if sys.stdout.isatty() else 110)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with Display(console) as display:
            corpus = prepare(options.preset, options.out / "corpus")
            display.say(_report.headline(options, corpus))
            results = [
                execute(train, run, options.out / f"{run.name.replace(', ', '-')}.log", display.run(run.name, options.preset))
                for run in plan(options)
            ]
    except RunFailed as error:
        console.print(f"quickstart: {error}", style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("quickstart: interrupted")
        return 130
    comparison = _report.compare(options, corpus, results)
    _report.show(console, comparison)
    _report.write(comparison, options.out / "results.json")
    _figure.draw(comparison, options.out / "quickstart.png")
    failed = comparison.verdict.passed is False
    console.print(f"\nWritten to {options.out}: quickstart.png, results.json", markup=False, highlight=False, soft_wrap=True)
    console.print(comparison.verdict.line, style="red" if failed else "green", markup=False, highlight=False, soft_wrap=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
