"""PEFT: adapters on a patched model, and patches on an adapted one.

LoRA on every linear, and on `lm_head`: tests/liger_patch/test_hostile.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import liger_patch
from tests.liger_patch.models import agree, is_fused, llama, one_step

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT reads what transformers has renamed

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The output layer's row of the report says for what reason its loss is the stock one, where it is.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_bias": False},
    "dora": {"use_dora": True},
    "dora on lm_head": {"use_dora": True, "target_modules": [*LINEARS, "lm_head"]},
    "lm_head saved": {"modules_to_save": ["lm_head"]},
    "norms saved": {"modules_to_save": ["norm", "input_layernorm"]},
}
LOGITS = ("dora on lm_head", "lm_head saved")  # whose output layer is the adapter's


def adapted(model: nn.Module, kind: str) -> Any:
    """With adapters that do something, in training."""
    torch.manual_seed(3)
    options = {"r": 4, "init_lora_weights": False, "target_modules": LINEARS, "task_type": "CAUSAL_LM"} | KINDS[kind]
    model = peft.get_peft_model(model, peft.LoraConfig(**options)).train()
    with torch.no_grad():  # a saved module is a copy: it must be seen that the copy is used
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.1)
    return model


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_merged_and_kept(kind: str, when: str, tmp_path: Path) -> None:
    stock, ours = adapted(llama(), kind), llama()
    if when == "before":
        liger_patch.auto(ours)
    ours = adapted(ours, kind)
    report = liger_patch.auto(ours)
    assert {row.status for row in report if row.op in ("rms_norm", "swiglu", "rope")} <= {"patched", "already"}
    left = {row.path for row in report.where("left")}
    assert left == ({"lm_head"} if kind in LOGITS else set()), str(report)
    assert is_fused(ours) is (kind not in LOGITS)
    agree(one_step(ours), one_step(stock))

    for model, name in ((ours, "ours"), (stock, "stock")):
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    base = llama()
    liger_patch.auto(base)
    loaded = [peft.PeftModel.from_pretrained(base, tmp_path / "stock", is_trainable=True).train()]
    loaded.append(peft.PeftModel.from_pretrained(llama(), tmp_path / "ours", is_trainable=True).train())
    for each in loaded:
        agree(one_step(each), one_step(stock))
    assert is_fused(loaded[0]) is (kind not in LOGITS)

    merged, expected = (model.merge_and_unload().train() for model in (ours, stock))
    assert merged.state_dict().keys() == expected.state_dict().keys() == llama().state_dict().keys()
    for model in (merged, expected):
        model.requires_grad_(True)
    agree(one_step(merged), one_step(expected))


@pytest.mark.parametrize(
    ("kind", "when"),
    [
        *((kind, "after") for kind in LOGITS),
        ("dora on lm_head", "before"),
        ("lm_head saved", "before"),
    ],
)
def test_an_output_layer_that_was_the_adapters(kind: str, when: str) -> None:
    """Merged, it is a plain linear again, and `auto` makes its loss without logits."""
    ours = llama()
    if when == "before":
        liger_patch.auto(ours)
    ours = adapted(ours, kind)
    liger_patch.auto(ours)
    merged = ours.merge_and_unload().train()
    liger_patch.auto(merged)
    assert is_fused(merged)
    liger_patch.revert(merged)
    assert not any("_liger_patch" in module.__dict__ or "forward" in module.__dict__ for module in merged.modules())
