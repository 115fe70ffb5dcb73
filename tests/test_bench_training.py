"""The benchmark of training steps: what it measures on a CPU, what it keeps, and what it says of it."""

from __future__ import annotations

import multiprocessing
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import liger_fn
from tests.bench import report as whole
from tests.bench.training import bars, profile, store
from tests.bench.training.__main__ import main
from tests.bench.training.models import LIGER, MODELS, OURS, OURS_COMPILE, PROVIDERS, STOCK, STOCK_COMPILE
from tests.bench.training.step import Step, answer, measure

CPU = torch.device("cpu")
LLAMA = MODELS[0]
MACHINE = {"device": "GPU", "date": "2026-01-02", "torch": "2.0", "transformers": "5.0", "sources": "abc"}


def row(provider: str, tokens: float | None = 100.0, peak: float = 10.0, loss: float = 12.0, **changes: object) -> Step:
    found = Step(LLAMA.name, LLAMA.shape, provider, tokens, 5.0, peak, 1.0, (loss, loss - 1))
    return replace(found, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void cudnn::fusion::fmha_reduce_head<true>", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedOptimizer", "optimizer"),
        ("_loss_rows_kernel", "loss"),
        ("_head_gradient_kernel", "loss"),
        ("liger_cross_entropy_kernel", "loss"),
        ("_rms_norm_fwd_kernel", "norms"),
        ("_norm_bwd_kernel", "norms"),
        ("_rms_norm_backward_kernel", "norms"),
        ("_glu_bwd_kernel", "gated units"),
        ("_swiglu_forward_kernel", "gated units"),
        ("_rope_kernel", "rotary embedding"),
        ("_experts_up_kernel", "experts"),
        ("_route_places_kernel", "routing"),
        ("_moe_router_fwd_kernel", "routing"),
        ("Memcpy DtoH (Device -> Pinned)", "copies and fills"),
        ("void at::native::vectorized_elementwise_kernel<8, CUDAFunctor_add", "other elementwise"),
    ],
)
def test_a_kernel_is_told_by_its_name(kernel: str, kind: str) -> None:
    assert profile.kind(kernel) == kind


def test_shares_are_all_of_a_step() -> None:
    assert sum(profile.shares({"nvjet_a": 3.0, "nvjet_b": 1.0, "_rope_kernel": 0.5, "?": 0.25}).values()) == 4.75


def test_every_kernel_of_the_library_is_named_for_what_it_is() -> None:
    """Those of a training step are no "other elementwise" work."""
    found = {
        name
        for path in (store.results.ROOT / "liger_fn").glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)
    }
    assert len(found) > 20
    assert not [name for name in found if profile.kind(name) == "other elementwise"]


def test_bars_are_ratios_of_one_model() -> None:
    rows = [row(STOCK, 70.0), row(STOCK_COMPILE, 120.0), row(LIGER, 100.0, peak=10.0), row(OURS, 106.5, peak=10.31)]
    rows += [row(OURS_COMPILE, 125.0, loss=12.0012), row(OURS, 900.0, model="another")]
    found = [v for v in bars.verdicts(rows) if v.model == LLAMA.name]
    assert [round(v.found or 0, 4) for v in found] == [1.065, 1.031, 1.0417, 0.0001]
    assert [v.met for v in found] == [True, False, False, True]
    assert {v.model for v in bars.verdicts(rows)} == {LLAMA.name}, "a model that was not run has no verdict"
    found = [v for v in bars.verdicts(rows[:1] + rows[2:]) if v.model == LLAMA.name]
    assert [v.met for v in found] == [True, False, None, True], "the best of peers that were not all measured"
    assert bars.verdicts([]) == []


def test_what_is_kept_is_read_again_and_added_to(tmp_path: Path) -> None:
    first = store.Steps(MACHINE, [row(STOCK, kernels_ms={"a" * 200: 1.23456, "b": 0.001}), row(OURS)])
    path = store.save(first, tmp_path)
    assert path == store.save(store.Steps(MACHINE, [row(OURS, 111.0)]), tmp_path)
    read = store.load(path)
    assert {r.provider: r.tokens_per_s for r in read.rows} == {STOCK: 100.0, OURS: 111.0}
    assert read.rows[0].kernels_ms == {"a" * 90: 1.235}
    assert read.machine == MACHINE
    other = store.save(store.Steps(MACHINE | {"sources": "abd"}, [row(LIGER)]), tmp_path)
    assert (other.name, len(store.load(path).rows)) == (f"{path.stem}-2.json", 2)


def test_the_page_shows_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    rows = [row(STOCK, None, note="out of memory"), row(LIGER), row(OURS, 105.0, kernels_ms={"nvjet": 3.0, "_rope_kernel": 1.0})]
    store.save(store.Steps(MACHINE, rows), tmp_path / "results" / "training")
    written = whole.write(tmp_path / "results", tmp_path / "docs")
    text = written[0].read_text()
    assert "| Llama 1B | 4x4096 | stock | out of memory | – | – | – |" in text
    assert "| Llama 1B | 4x4096 | liger_fn | **105** | × 1.050 | 10.00 | 12.0000, 11.0000 |" in text
    assert "| Llama 1B | 4x4096 | tokens/s, liger_fn ÷ liger-kernel | ≥ 1.06 | 1.05 | **no** |" in text
    assert "| Llama 1B | 4x4096 | liger_fn | 4.0 | 3.0 (75%) | 1.0 (25%) |" in text  # kinds of which there are any
    assert written[1].exists()
    assert f"figures/{written[1].name}" in text


def test_steps_of_the_patched_model_are_the_stock_models() -> None:
    with liger_fn.use_backend("reference"):
        stock, ours = (measure(LLAMA.tiny(), provider, CPU) for provider in (STOCK, OURS))
    assert (stock.patched, ours.patched > 10) == (0, True)
    assert ours.losses == pytest.approx(stock.losses, rel=1e-5)
    assert stock.losses[0] > stock.losses[-1]
    assert stock.tokens_per_s == pytest.approx(1e3 * 32 / (stock.step_ms or 0))


def test_a_failure_ends_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    answer(LLAMA, LIGER, sender)
    found = receiver.recv()
    assert found.key == (LLAMA.name, LLAMA.shape, LIGER)
    assert found.note.startswith("failed: ")
    assert "liger_kernel" in found.note


def test_a_name_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--models", "llama-7b"])
    assert "llama-7b: not one of llama-1b-4x4096" in capsys.readouterr().err


def test_every_model_is_named_once() -> None:
    assert len({model.key for model in MODELS}) == len(MODELS)
    assert set(bars.OF_LIGER) == {model.name for model in MODELS if model.providers == PROVIDERS}
