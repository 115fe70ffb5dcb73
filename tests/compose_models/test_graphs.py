"""A whole training step of a patched model in a CUDA graph."""

from __future__ import annotations

import copy

import pytest
import torch

import liger_patch
from tests.liger_patch.models import llama, tokens


@pytest.mark.gpu
def test_a_captured_step_is_the_eager_step(device: torch.device) -> None:
    """Forward, backward and SGD are replayed on data that is copied in: nothing of a step may wait for the host, or depend on it."""
    model = llama().to(device)
    liger_patch.auto(model)
    eager, begun = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    ids = tokens().to(device)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, eager)]

    def step(which: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = which(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # kernels are compiled, and libraries take their workspaces
            step(model, optimizers[0], ids)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(model, optimizers[0], ids)
    with torch.no_grad():  # in place: the graph reads where the weights lay
        for name, value in model.state_dict().items():
            value.copy_(begun[name])

    losses = []
    for seed in range(4):
        batch = tokens(seed=seed).to(device)
        ids.copy_(batch)
        graph.replay()
        torch.testing.assert_close(loss, step(eager, optimizers[1], batch), rtol=1e-6, atol=0)
        losses.append(loss.item())
    assert len(set(losses)) == 4, "the model must have moved"
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=name)
