"""linear_log_prob: the contract, and its oddities."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import liger_fn
from tests import cases
from tests.contract import Contract, wrong

H, V = 24, 63


class TestLinearLogProb(Contract):
    table = cases.LINEAR_LOG_PROB
    wrong_calls = (
        wrong("int-x", TypeError, "x must be float32", "torch.int64", ".to(", x=torch.Tensor.long),
        wrong("weight-transposed", ValueError, "weight must be [V, 24]", "[24, 63]", weight=lambda w: w.T),
        wrong("bias-shape", ValueError, "bias must have shape [63]", "[62]", bias=lambda b: b[1:]),
        wrong("target-shape", ValueError, "target must have shape [2, 5]", "[10]", target=torch.Tensor.flatten),
        wrong("accumulate", ValueError, "accumulate must be one of", "'bf16'", accumulate="bf16"),
        wrong("temperature", ValueError, "temperature must be a number above 0", "0", temperature=0),
        wrong("softcap", ValueError, "softcap must be a number above 0", "None", softcap=0.0),
        wrong("budget", ValueError, "memory_budget", "at least 1", "0", memory_budget=0),
    )


def inputs(device: torch.device, rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(n, H, device=device, generator=generator) for n in (rows, V))
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(V, (rows,), device=device, generator=generator)


def test_is_log_softmax(backend: str, device: torch.device) -> None:
    x, weight, target = inputs(device)
    log_prob, aux = liger_fn.linear_log_prob(x, weight, target, temperature=0.5)
    logits = (x @ weight.T) / 0.5
    want = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(log_prob, want.log_prob(target))
    torch.testing.assert_close(aux.entropy, want.entropy())
    torch.testing.assert_close(aux.lse, logits.logsumexp(-1))


def test_a_preference_loss_is_made_of_it(backend: str, device: torch.device) -> None:
    """DPO over pairs of sequences: the same gradient as from whole logits."""
    x, weight, target = inputs(device, rows=24)
    x, target = x.detach().view(4, 6, H).requires_grad_(), target.view(4, 6)
    target[:, 4:] = -100

    def dpo(log_prob: Tensor) -> Tensor:
        chosen, rejected = log_prob.sum(-1).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    ours = torch.autograd.grad(dpo(liger_fn.linear_log_prob(x, weight, target, memory_budget=V * 16)[0]), (x, weight))
    logits = (x @ weight.T).log_softmax(-1)
    picked = logits.gather(-1, target.clamp(0)[..., None])[..., 0].masked_fill(target == -100, 0.0)
    for a, b in zip(ours, torch.autograd.grad(dpo(picked), (x, weight)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("which", ["lse", "entropy"])
def test_each_output_alone(backend: str, which: str, device: torch.device) -> None:
    """One output is used, the others have no cotangent."""
    x, weight, target = inputs(device)
    ours = torch.autograd.grad(getattr(liger_fn.linear_log_prob(x, weight, target)[1], which).sum(), (x, weight))
    want = getattr(liger_fn.linear_log_prob.reference(x, weight, target)[1], which)
    for a, b in zip(ours, torch.autograd.grad(want.sum(), (x, weight)), strict=True):
        torch.testing.assert_close(a, b)
