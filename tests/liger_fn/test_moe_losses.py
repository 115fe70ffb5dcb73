"""moe_load_balancing_loss and moe_z_loss: the contract, and their oddities."""

from __future__ import annotations

import pytest
import torch

import liger_fn
from tests import cases
from tests.contract import Contract, wrong
from tests.numerics import assert_near, assert_same_bits
from tests.sample import Sample

OF_BOTH = (
    wrong("int", TypeError, "logits must be float32", "torch.int64", ".to(", logits=torch.Tensor.long),
    wrong("list", TypeError, "logits must be a torch.Tensor", "list", logits=torch.Tensor.tolist),
    wrong("0-d", ValueError, "logits must have at least 1 axes", "[]", logits=lambda x: x.sum()),
    wrong("no-experts", ValueError, "1 to 1024 experts", "[2, 5, 0]", "reshape", logits=lambda x: x[..., :0]),
    wrong("float-mask", TypeError, "mask must be of an integer dtype", "torch.float32", ".long()", mask=torch.Tensor.float),
    wrong("list-mask", TypeError, "mask must be a torch.Tensor", "list", mask=torch.Tensor.tolist),
    wrong("mask-shape", ValueError, "mask must have shape [5]", "[4]", mask=lambda m: m[1:]),
    wrong("mask-axes", ValueError, "mask must have shape [2, 5]", "[3, 2, 5]", mask=lambda m: m.expand(3, 2, 5)),
    wrong("mask-device", ValueError, "mask must be on", "meta", ".to(", mask=lambda m: m.to("meta")),
)


class OneScalar(Contract):
    """A mean has no rows: the numerics rule over 2³¹ elements is that of the last two rows, which alone count."""

    @pytest.mark.large
    def test_more_than_2_31_elements(self, backend: str, device: torch.device) -> None:
        if backend == "reference":
            pytest.skip("its offsets are torch's own")
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(device)[0] < 48 * 2**30:
            pytest.skip("needs 48 GiB of free device memory")
        s = Sample(self.table, self.table.large, torch.bfloat16, device)
        assert s.tensors[0].numel() > 2**31
        values, (grad,) = s.ours()
        last, before = grad[-2:].clone(), bool(grad[:-2].any())
        del grad
        s.inputs = {k: None if t is None else t[-2:].clone() for k, t in s.inputs.items()}
        (naive, (naive_grad,)), (truth, (truth_grad,)) = s.naive(), s.truth()
        assert not before
        assert_near(values[0], naive[0], truth[0], "value")
        assert_near(last, naive_grad, truth_grad, "gradient")


class TestLoadBalancingLoss(OneScalar):
    table = cases.MOE_LOAD_BALANCING_LOSS
    wrong_calls = (
        *OF_BOTH,
        wrong("float-index", TypeError, "index must be of an integer dtype", "torch.float32", ".long()", index=torch.Tensor.float),
        wrong("list-index", TypeError, "index must be a torch.Tensor", "list", index=torch.Tensor.tolist),
        wrong("index-shape", ValueError, "index must have shape [2, 5, 'k']", "[2, 4, 2]", index=lambda i: i[:, 1:]),
        wrong("index-axes", ValueError, "index must have shape [2, 5, 'k']", "[5, 2]", index=lambda i: i[0]),
        wrong("index-device", ValueError, "index must be on", "meta", ".to(", index=lambda i: i.to("meta")),
        wrong("num_experts", ValueError, "num_experts must be an integer of at least 1", "0", num_experts=0),
    )


class TestZLoss(OneScalar):
    table = cases.MOE_Z_LOSS
    wrong_calls = OF_BOTH


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 2, 6])
def test_is_transformers(backend: str, k: int, masked: bool, device: torch.device) -> None:
    """Three layers of its routers' logits, with its attention mask and without, value and gradient."""
    theirs = pytest.importorskip("transformers.models.mixtral.modeling_mixtral").load_balancing_loss_func
    logits = torch.randn(3, 2 * 11, 8, device=device, requires_grad=True)
    mask = (torch.arange(11, device=device) >= torch.tensor([[0], [5]], device=device)).long() if masked else None
    torch.use_deterministic_algorithms(False)  # theirs may not be
    want = theirs(tuple(logits), 8, k, mask)
    _, index = liger_fn.moe_router(logits, k)
    got = liger_fn.moe_load_balancing_loss(logits, index, 8, mask=mask if mask is None else mask.flatten())
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y, logits)[0] for y in (got, want)))
    by_batch = liger_fn.moe_load_balancing_loss(logits.view(3, 2, 11, 8), index.view(3, 2, 11, k), mask=mask)
    assert_same_bits([by_batch], [got], "the mask by batch and position")


def test_z_loss_is_its_definition(backend: str, device: torch.device) -> None:
    logits = 3 * torch.randn(40, 60, device=device)
    torch.testing.assert_close(liger_fn.moe_z_loss(logits), logits.logsumexp(-1).square().mean())
    mask = torch.arange(40, device=device) % 3 > 0
    torch.testing.assert_close(liger_fn.moe_z_loss(logits, mask=mask), logits[mask].logsumexp(-1).square().mean())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_a_mask_counts_what_is_not_zero(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Of any integer dtype, as if the other tokens were not there, even were they NaN."""
    logits, index = torch.randn(9, 60, device=device), torch.randint(60, (9, 3), device=device)
    mask = torch.tensor([1, 0, 2, 1, 0, 1, 1, 0, 3], device=device).to(dtype)
    here = mask != 0
    logits[~here] = torch.nan
    for loss, with_index in ((liger_fn.moe_load_balancing_loss, True), (liger_fn.moe_z_loss, False)):
        leaf = logits.clone().requires_grad_()
        got = loss(leaf, index, mask=mask) if with_index else loss(leaf, mask=mask)
        want = loss(logits[here], index[here]) if with_index else loss(logits[here])
        torch.testing.assert_close(got, want)
        (grad,) = torch.autograd.grad(got, leaf)
        assert not grad[~here].any()
        assert not grad.isnan().any()


def test_choices_of_no_expert(backend: str, device: torch.device) -> None:
    """An index out of range is no choice; int32 does as well; num_experts is the factor alone."""
    logits, index = torch.randn(9, 60, device=device), torch.randint(60, (9, 3), device=device)
    want = liger_fn.moe_load_balancing_loss(logits, index)
    wider = torch.cat((index, torch.full((9, 1), -1, device=device), torch.full((9, 1), 60, device=device)), -1)
    for same in (wider, index.int()):
        assert_same_bits([liger_fn.moe_load_balancing_loss(logits, same)], [want], "loss")
    torch.testing.assert_close(liger_fn.moe_load_balancing_loss(logits, index, 30), want / 2)


def test_equal_use_costs_k(backend: str, device: torch.device) -> None:
    logits, index = torch.zeros(60, 60, device=device), torch.arange(180, device=device).view(60, 3) % 60
    assert float(liger_fn.moe_load_balancing_loss(logits, index)) == pytest.approx(3.0, rel=1e-6)
