"""Out of memory in a head: PyTorch's own error, with a note whose remedy works, and nothing lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import liger_fn
from liger_fn import _head, _memory
from tests.memory import LIMIT, REFUSED, arguments, budget_in, failing, noted, scarce, summed, trained

HEADS: dict[str, dict[str, Any]] = {
    "linear_cross_entropy": {},
    "linear_log_prob": {},
    "linear_distill": {},
    "vocab_parallel_linear_cross_entropy": {},
    "vocab_parallel_linear_log_prob": {},
    "vocab_parallel_linear_distill": {},
}
CALLS = {
    **{f"{name}, forward": (name, {}, "forward") for name in HEADS},
    "exact, forward": ("linear_cross_entropy", {"accumulate": "exact"}, "forward"),
    "none, backward": ("linear_cross_entropy", {"reduction": "none"}, "backward"),
    "recompute, backward": ("linear_cross_entropy", {"save": "recompute"}, "backward"),
    "linear_log_prob, backward": ("linear_log_prob", {}, "backward"),
    "jsd, backward": ("linear_distill", {"divergence": "jsd", "reduction": "none"}, "backward"),
}


@pytest.mark.parametrize("row", CALLS)
def test_the_remedy_works(row: str, backend: str):
    name, options, when = CALLS[row]
    given = arguments(name)
    expected = trained(lambda: summed(name, given, **options), given)
    note = failing(lambda: summed(name, given, **options), when, given)
    assert note.startswith(f"{name.removeprefix('vocab_parallel_')}: out of memory in {when}, with ")  # a rank alone is the other function
    assert ('save="recompute"' in note) == (when == "forward" and not name.endswith("log_prob"))
    assert ("liger_patch.auto(model, memory_budget=" in note) == name.endswith("cross_entropy")
    budget = budget_in(note)
    with scarce(LIMIT):
        got = trained(lambda: summed(name, given, **options, memory_budget=budget), given)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.linalg.vector_norm(mine - theirs) <= 1e-6 * torch.linalg.vector_norm(theirs)  # sums of fp32 in another order


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_through_a_compiler(when: str, fresh_compiler: None):
    """Whose operators are C++'s: the error and its note come through."""
    name, options = "linear_cross_entropy", {} if when == "forward" else {"reduction": "none"}
    given = arguments(name)
    run = torch.compile(lambda budget: summed(name, given, memory_budget=budget, **options), backend="aot_eager", fullgraph=True)
    expected = trained(lambda: run(None), given)
    note = failing(lambda: run(None), when, given)
    assert note.startswith(f"{name}: out of memory in {when}, with 0.1 MiB of logits at a time")
    got = trained(lambda: run(budget_in(note)), given)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)  # fp32


@pytest.mark.parametrize(
    ("name", "remedy"), [("linear_cross_entropy", "exact"), ("linear_log_prob", "exact"), ("linear_distill", "weight")]
)
def test_a_sum_in_fp32_can_be_done_without(name: str, remedy: str):
    given = arguments(name, torch.bfloat16, n=8, v=16384, h=4)
    options, when, limit = {"memory_budget": 65536}, "backward" if name.endswith("log_prob") else "forward", 140_000
    note = failing(lambda: summed(name, given, accumulate="fp32", **options), when, given, limit)
    assert f'accumulate="{remedy}", which does without a sum in fp32 of 0.2 MiB' in note
    with scarce(limit):
        trained(lambda: summed(name, given, accumulate=remedy, **options), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_backward_that_failed_can_be_run_again(dtype: torch.dtype, backend: str):
    """Gradients that forward made are scaled in their own memory: none is where there is too little for another."""
    given = arguments("linear_cross_entropy", dtype)
    leaves, keep = (given["x"], given["weight"]), dtype is torch.float32
    expected = torch.autograd.grad(summed("linear_cross_entropy", given), leaves, torch.tensor(3.0))
    loss = summed("linear_cross_entropy", given)
    with scarce(6_000), pytest.raises(torch.OutOfMemoryError) as caught:
        torch.autograd.grad(loss, leaves, torch.tensor(3.0), retain_graph=keep)  # kept, all are made anew; fp16's of the weight always is
    assert noted(caught.value).startswith("linear_cross_entropy: out of memory in backward, which makes gradients from the ")
    got = torch.autograd.grad(loss, leaves, torch.tensor(3.0))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))


def test_the_largest_gradient_is_scaled_first():
    """So that one that does not fit leaves the others, which would be written over, as they are."""
    made = torch.ones(2), torch.ones(8), None

    def scale(t: Tensor, factor: Tensor, out: Tensor) -> None:
        if t.numel() > 2:
            raise torch.OutOfMemoryError(REFUSED)
        out.copy_(t * factor)

    with pytest.raises(torch.OutOfMemoryError):
        _head.scaled("linear_cross_entropy", made, torch.float32, torch.tensor(3.0), (True,) * 3, True, scale)
    assert made[0].eq(1).all()


@pytest.mark.parametrize(("when", "half"), [("forward", 4096), ("backward", 2048)])
def test_exact_has_other_logits_in_backward(when: str, half: int):
    """A forward looks at 4 rows of 512 classes; a backward, which sums the weight's gradient for all of them, has 2 rows at a time."""
    given, options = arguments("linear_cross_entropy"), {"accumulate": "exact", "save": "recompute" if when == "backward" else "grads"}
    with liger_fn.use_backend("reference"):
        note = failing(lambda: summed("linear_cross_entropy", given, memory_budget=8192, **options), when, given, limit=12_000)
    assert budget_in(note) == half


def test_nothing_is_advised_that_is_of_no_use():
    """One row at a time already, sums in the weight's dtype, gradients in backward."""
    given = arguments("linear_cross_entropy")
    options = {"memory_budget": 1, "reduction": "none"}
    note = failing(lambda: summed("linear_cross_entropy", given, **options), "backward", given, limit=12_000)
    assert "memory_budget" not in note
    assert "accumulate" not in note
    assert note.endswith("It takes less for fewer rows")


def test_without_notes(monkeypatch: pytest.MonkeyPatch):
    """Python 3.10: in the text, after PyTorch's own."""
    monkeypatch.setattr(_memory.sys, "version_info", (3, 10))
    error = torch.OutOfMemoryError(REFUSED)
    _memory.note(error, "what to do")
    assert str(error) == f"{REFUSED}\nwhat to do"


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_on_a_gpu_that_is_full(compiled: bool, device: torch.device, fresh_compiler: None):
    """Each note is followed until memory suffices."""
    name, n, v, h = "linear_cross_entropy", 8192, 65536, 256  # of which logits take more than gradients
    given = arguments(name, torch.bfloat16, device, n, v, h)

    def run(budget: int | None) -> Tensor:
        return summed(name, given, memory_budget=budget)

    call = torch.compile(run) if compiled else run
    expected = [t.float() for t in trained(lambda: call(None), given)]
    torch.cuda.reset_peak_memory_stats()
    trained(lambda: call(None), given)
    room = torch.cuda.max_memory_allocated() - 48 * 2**20
    torch.cuda.empty_cache()
    budgets: list[int | None] = [None]
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(device).total_memory)
    try:
        while True:
            try:
                got = trained(lambda: call(budgets[-1]), given)
                break
            except torch.OutOfMemoryError as error:
                note = "\n".join(getattr(error, "__notes__", [])) or str(error)
            assert "memory_budget=" in note, note
            assert len(budgets) < 6, note
            budgets.append(budget_in(note))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(budgets) > 1, "there was room for all"
    for mine, theirs in zip((t.float() for t in got), expected, strict=True):
        assert torch.linalg.vector_norm(mine - theirs) <= 2**-7 * torch.linalg.vector_norm(theirs)  # sums of chunks, rounded to bf16
