"""`provide_liger_kernel`: the switch that trainers have, served by `liger_patch.auto`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from transformers.utils import is_liger_kernel_available

import liger_patch
from liger_patch import _provide
from tests.liger_patch.models import is_fused, llama

from .runs import LOSS, losses, same, trainer

pytest.importorskip("accelerate")
if importlib.util.find_spec("liger_kernel") is not None:
    pytest.skip("liger-kernel itself is installed", allow_module_level=True)


@pytest.fixture
def provided() -> Iterator[_provide.Provided]:
    with liger_patch.provide_liger_kernel() as handle:
        yield handle


def patched(report: liger_patch.Report) -> set[str]:
    return {row.op for row in report.where("patched")}


ALL = {"rms_norm", "swiglu", "rope", "causal_mask", "linear_cross_entropy", "cross_entropy"}


# --- trainers ---------------------------------------------------------------------------------------------------------------------------


def test_the_trainers_switch(provided, tmp_path):
    # Asked before: transformers keeps its answer, which must not be the one from before the stand-in came.
    provided.remove()
    assert not is_liger_kernel_available()
    stock = trainer(llama(), tmp_path)
    stock.train()
    with liger_patch.provide_liger_kernel() as provided:
        ours = trainer(llama(), tmp_path, {"use_liger_kernel": True, "prediction_loss_only": True})
        ours.train()
        # In evaluation the switch hands the model one argument more, skip_logits.
        assert ours.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=LOSS)
    (report,) = provided.reports
    assert patched(report) == ALL
    assert len(report.where("patched")) == 12  # 5 norms, 2 MLPs, 2 rotations, 1 mask, the head and the loss
    assert is_fused(ours.model.train())
    same(losses(ours), losses(stock))


@pytest.mark.parametrize(
    ("told", "left"),
    [
        ({"rope": False}, ["rope"]),
        ({"rms_norm": False, "swiglu": False}, ["rms_norm", "swiglu"]),
        ({"fused_linear_cross_entropy": False, "cross_entropy": True, "geglu": True}, ["linear_cross_entropy"]),
        ({"cross_entropy": False}, ["cross_entropy"]),
        ({"causal_mask": False}, ["causal_mask"]),
    ],
    ids=str,
)
def test_what_it_is_told_to_leave(provided, told, left):
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    assert patched(_apply_liger_kernel_to_instance(model=llama(), **told)) == ALL - set(left)


@pytest.mark.parametrize(("told", "chosen"), [({"swiglu": False}, False), ({"swiglu": False, "experts": True}, True), ({}, None)], ids=str)
def test_its_swiglu_is_that_of_a_mixtures_experts_too(told, chosen):
    assert _provide.chosen(told).get("experts") is chosen


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"mlp": True}, r"unknown keyword 'mlp'; known are rms_norm, .*fused_linear"),
        ({"rope": 1}, "rope must be True or False"),
    ],
)
def test_what_it_cannot_be_told(provided, tmp_path, told, words):
    model = llama()
    with pytest.raises(TypeError, match=f"_apply_liger_kernel_to_instance: {words}"):
        trainer(model, tmp_path, {"use_liger_kernel": True, "liger_kernel_config": told}).train()
    assert {row.status for row in liger_patch.plan(model, verify=False)} == {"planned"}
    assert provided.reports == []


@pytest.mark.filterwarnings("ignore:.*use_liger_kernel=True. is deprecated:FutureWarning")  # TRL's word on its own option
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # what TRL sets is renamed in transformers
def test_the_switch_of_trl(provided, tmp_path):
    trl = pytest.importorskip("trl")
    from .texts import QUESTIONS, model_for, options, tokenizer

    def train(**switch: bool) -> list[float]:
        settings = trl.SFTConfig(**options(tmp_path), **switch)
        run = trl.SFTTrainer(model_for(), settings, train_dataset=QUESTIONS, processing_class=tokenizer())
        run.train()
        return losses(run)

    same(train(use_liger_kernel=True), train())
    # TRL computes log-probabilities with a head of its own, and asks for all but ours.
    assert [patched(report) for report in provided.reports] == [ALL - {"linear_cross_entropy"}]


# --- the stand-in itself ----------------------------------------------------------------------------------------------------------------


def test_it_is_found_by_whoever_looks(provided):
    import liger_kernel
    import liger_kernel.transformers
    from packaging.version import Version

    assert importlib.util.find_spec("liger_kernel") is liger_kernel.__spec__
    assert is_liger_kernel_available()
    # At least what transformers and TRL 1.16 ask for; the part after the + says whose it is.
    assert Version(liger_kernel.__version__) >= Version("0.8.2")
    assert Version(liger_kernel.__version__).local == "liger.fn"
    assert "liger_patch" in repr(liger_kernel)
    assert "liger_patch" in liger_kernel.__doc__


def test_what_it_has_not_is_said(provided):
    import liger_kernel.transformers

    with pytest.raises(AttributeError, match=r"^liger_kernel.transformers has no 'LigerRMSNorm': .*stands in .*auto\(model\)"):
        liger_kernel.transformers.LigerRMSNorm  # noqa: B018
    assert not hasattr(liger_kernel, "ops")
    for statement in (
        "from liger_kernel.transformers import apply_liger_kernel_to_llama",
        "from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss",
        "import liger_kernel.ops.rms_norm",
    ):
        with pytest.raises(ImportError, match=r"^there is no liger_kernel\.\w+.*: .*stands in for liger-kernel"):
            exec(statement)


def test_it_comes_once_and_goes():
    before = list(sys.meta_path)
    handle = liger_patch.provide_liger_kernel()
    try:
        assert liger_patch.provide_liger_kernel() is handle
        assert len(sys.meta_path) == len(before) + 1
        model = llama()
        sys.modules["liger_kernel.transformers"]._apply_liger_kernel_to_instance(model=model)
    finally:
        handle.remove()
    handle.remove()
    assert sys.meta_path == before
    assert not any(name.split(".")[0] == "liger_kernel" for name in sys.modules)
    assert importlib.util.find_spec("liger_kernel") is None
    assert not is_liger_kernel_available()
    assert is_fused(model), "a model stays as it was patched"
    with liger_patch.provide_liger_kernel() as again:
        handle.remove()
        assert liger_patch.provide_liger_kernel() is again, "an old handle takes away only its own"


@pytest.mark.parametrize("spec", [ModuleSpec("liger_kernel", None, origin="/somewhere"), None], ids=["installed", "by hand"])
def test_a_real_one_is_not_hidden(spec, monkeypatch):
    real = ModuleType("liger_kernel")
    real.__spec__ = spec
    monkeypatch.setitem(sys.modules, "liger_kernel", real)
    where = "at /somewhere" if spec else "in sys.modules"
    with pytest.raises(liger_patch.PatchError, match=rf"provide_liger_kernel: liger_kernel is there already, {where}.*liger_patch\.auto"):
        liger_patch.provide_liger_kernel()
    assert sys.modules["liger_kernel"] is real


def test_a_real_one_on_the_path_is_not_hidden(tmp_path):
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel/__init__.py").write_text("")
    sys.path.insert(0, str(tmp_path))
    try:
        importlib.invalidate_caches()
        with pytest.raises(liger_patch.PatchError, match=r"liger_kernel/__init__\.py, and a stand-in would hide it"):
            liger_patch.provide_liger_kernel()
    finally:
        sys.path.remove(str(tmp_path))
        importlib.invalidate_caches()
