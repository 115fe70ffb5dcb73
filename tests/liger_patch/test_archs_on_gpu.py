"""Every entry of the registry with the kernels themselves: each swap proved on the GPU, and training as the original trains."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

import liger_fn
import liger_patch
from tests.liger_patch.test_archs import TYPES, inputs, loss_of, same_gradients
from tests.liger_patch.tiny import build

STEPS = 5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", TYPES)
def test_an_entry_is_the_model_on_a_gpu(model_type: str, dtype: torch.dtype) -> None:
    try:
        stock = build(model_type).to("cuda", dtype)
        given = {name: t.cuda() for name, t in inputs(stock).items()}
        curve = train(stock, given) if given else None
    except Exception as error:
        pytest.skip(f"the original does not run here: {type(error).__name__}: {error}"[:200])
    model = build(model_type).to("cuda", dtype)
    with liger_fn.use_backend("triton"):
        report = liger_patch.auto(model)
        assert report.where("patched"), report
        if curve is not None:
            ours = train(model, given)
            # Noise of the dtype grows from step to step, in either.
            limit = 2e-4 if dtype is torch.float32 else 3e-2
            assert float((ours - curve).abs().max()) <= limit * float(curve.abs().max()), (ours, curve)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("model_type", TYPES)
def test_every_patched_model_compiles_where_the_stock_one_does(model_type: str) -> None:
    try:
        stock, model = (without_dropout(build(model_type)).to("cuda") for _ in range(2))
        given = {name: t.cuda() for name, t in inputs(stock).items()}
        if not given:
            pytest.skip("it does not run on tokens alone")
        torch.compiler.reset()
        want = loss_of(torch.compile(stock, backend="aot_eager", fullgraph=True), **given)  # type: ignore[arg-type]
        same_gradients(stock, want, stock, loss_of(stock, **given))
    except Exception as error:
        pytest.skip(f"the original does not compile here: {type(error).__name__}: {error}"[:200])
    with liger_fn.use_backend("triton"):
        liger_patch.auto(model)
        torch.compiler.reset()
        got = loss_of(torch.compile(model, backend="aot_eager", fullgraph=True), **given)  # type: ignore[arg-type]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        same_gradients(model, got, stock, loss_of(stock, **given))


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with nothing random in it: compiled, dropout draws other numbers than in eager mode."""
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            for name, value in list(vars(owner).items()) if owner is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(owner, name, 0.0)
        if isinstance(module, _DropoutNd):
            module.p = 0.0
    return model


def train(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The losses of some steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, eps=1e-4)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model, **given)  # type: ignore[arg-type]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
    return torch.stack(losses)
