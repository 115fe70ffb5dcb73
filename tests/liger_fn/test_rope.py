"""rope: the contract, and its oddities."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import liger_fn
from liger_fn import _launch
from liger_fn.rope import rope_complex
from tests import cases
from tests.cases.rope import ROPE_ALONE
from tests.contract import LAYOUTS, Contract, restride, wrong
from tests.numerics import assert_same_bits
from tests.sample import Sample


class TestRope(Contract):
    table = cases.ROPE
    wrong_calls = (
        wrong("int-q", TypeError, "q must be float32", "torch.int64", ".to(", q=torch.Tensor.long),
        wrong("int-k", TypeError, "k must be float32", "torch.int64", ".to(", k=torch.Tensor.long),
        wrong("3-d", ValueError, "q must be [batch, heads, length", "[3, 5, 10]", q=lambda q: q[0]),
        wrong("k-length", ValueError, "k must be [2, k_heads, 5, 10]", "[2, 1, 4, 10]", k=lambda k: k[:, :, 1:]),
        wrong("k-by-token", ValueError, "k must be [2, 3, k_heads, 10]", "[2, 1, 5, 10]", unsqueeze_dim=2),
        wrong("k-dtype", TypeError, "k must be torch.float32", "torch.bfloat16", ".to(", k=torch.Tensor.bfloat16),
        wrong("partial-cos", ValueError, "sin must be [2 or 1, 5, 6]", "[2, 5, 10]", cos=lambda c: c[..., :6]),
        wrong("partial-sin", ValueError, "sin must be [2 or 1, 5, 10]", "[2, 5, 6]", sin=lambda s: s[..., :6]),
        wrong("odd-tables", ValueError, "rotary_dim", "even", "at most 10", "got 5", "pass twice", cos=lambda c: c[..., :5]),
        wrong("no-tables", ValueError, "rotary_dim", "at least 2", "got 0", cos=lambda c: c[..., :0]),
        wrong("wide-tables", ValueError, "rotary_dim", "at most 10", "got 12", cos=lambda c: c.new_ones(2, 5, 12)),
        wrong("longer-tables", ValueError, "cos must be", "[2, 6, 10]", cos=lambda c: c.new_ones(2, 6, 10)),
        wrong("4-d-tables", ValueError, "cos must be", "[2, 1, 5, 10]", cos=lambda c: c[:, None]),
        wrong("1-d-tables", ValueError, "cos must have at least 2 axes", "[10]", cos=lambda c: c[0, 0]),
        wrong("other-batch", ValueError, "sin must be [2 or 1, 5, 10]", "[3, 5, 10]", sin=lambda s: s.new_ones(3, 5, 10)),
        wrong("rotary-dim", ValueError, "cos must be [2 or 1, 5, 6 or 3]", "[2, 5, 10]", rotary_dim=6),
        wrong("rotary-dim-float", ValueError, "rotary_dim must be an integer", "5.0", rotary_dim=5.0),
        wrong("layout", ValueError, "'half', 'interleaved'", "'pairs'", layout="pairs"),
        wrong("section-order", ValueError, "'blocked', 'interleaved'", "'thw'", section_order="thw"),
        wrong("sections-sum", ValueError, "add up to rotary_dim/2 = 5", "(2, 1, 1)", sections=(2, 1, 1)),
        wrong("sections-number", ValueError, "3 numbers", "got 5", sections=5),
        wrong("sections-negative", ValueError, "each of sections", "-1", sections=(3, -1, 3)),
        wrong("sections-tables", ValueError, "cos must be [3, 2 or 1, 5, 10]", "[2, 5, 10]", sections=(2, 1, 2)),
        wrong("unsqueeze-dim", ValueError, "unsqueeze_dim must be 1", "2", "got -2", unsqueeze_dim=-2),
        wrong("device", ValueError, "cos must be on", "meta", ".to(", cos=lambda c: c.to("meta")),
        wrong("learned-cos", ValueError, "no gradient is computed for cos", "cos.detach()", cos=lambda c: c.clone().requires_grad_()),
    )


class TestRopeAlone(Contract):
    """q alone, with every option: one output where there were two."""

    table = ROPE_ALONE
    wrong_calls = (
        wrong("3-d", ValueError, "q must be [batch, length, heads", "[5, 3, 24]", q=lambda q: q[0]),
        wrong("no-sections", ValueError, "cos must be [2 or 1, 5, 20]", "[3, 1, 5, 20]", sections=None),
        wrong("two-axes", ValueError, "cos must be [3, 2 or 1, 5, 20]", "[2, 1, 5, 20]", cos=lambda c: c[:2]),
    )


def test_is_a_rotation_of_pairs(backend: str, device: torch.device) -> None:
    """By complex numbers: channel i and channel i + D/2 are one, which turns by its angle."""
    q, k = torch.randn(2, 3, 5, 10, device=device), torch.randn(2, 1, 5, 10, device=device)
    angle = torch.randn(2, 5, 5, device=device)
    table = torch.cat((angle, angle), -1)
    for x, y in zip((q, k), liger_fn.rope(q, k, table.cos(), table.sin()), strict=True):
        turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[:, None]
        torch.testing.assert_close(y, torch.cat((turned.real, turned.imag), -1))


@pytest.mark.parametrize("which", ["first", "second"])
def test_one_output_used(backend: str, which: str, device: torch.device) -> None:
    """The cotangent of an output that nobody reads is zeros, not an error."""
    s = Sample(cases.ROPE, cases.ROPE.typical, torch.float32, device)
    i = ("first", "second").index(which)
    leaves = [t.detach().requires_grad_() for t in s.tensors]
    grads = torch.autograd.grad(s.f()(*leaves)[i], leaves, s.cots[i])
    assert torch.equal(grads[i], s.ours()[1][i])
    assert not grads[1 - i].any()


def test_layout_is_kept(backend: str, device: torch.device) -> None:
    """A transposed view in, a transposed view out: attention's reshape after it then copies nothing."""
    s = Sample(cases.ROPE, cases.ROPE.sized(5), torch.float32, device)
    values, grads = s.ours()
    assert [v.stride() for v in values] == [t.stride() for t in s.tensors]
    assert all(g.shape == t.shape for g, t in zip(grads, s.tensors, strict=True))


def test_a_table_differentiated_under_a_transform_is_refused(backend: str, device: torch.device) -> None:
    """vmap hides that cos is differentiated; a gradient of zero would be wrong."""
    q, cos = torch.randn(3, 1, 2, 4, 6, device=device), torch.randn(3, 1, 4, 6, device=device)

    def loss(cos: Tensor) -> Tensor:
        return torch.func.vmap(lambda q, c: liger_fn.rope(q, q, c, c)[0])(q, cos).sum()

    with pytest.raises(ValueError, match=r"^rope: no gradient is computed for cos"):
        torch.func.grad(loss)(cos)


def test_interleaved_is_a_product_of_complex_numbers(backend: str, device: torch.device) -> None:
    """Channel 2i and channel 2i + 1 are one number; what lies beyond the tables passes through, bit for bit."""
    q, k = torch.randn(2, 3, 5, 14, device=device), torch.randn(2, 1, 5, 14, device=device)
    angle = torch.randn(2, 5, 5, device=device)
    for options, width in (({}, 2), ({"rotary_dim": 10}, 1)):
        table = angle.repeat_interleave(width, -1)
        for x, y in zip((q, k), liger_fn.rope(q, k, table.cos(), table.sin(), layout="interleaved", **options), strict=True):
            turned = torch.view_as_complex(x[..., :10].unflatten(-1, (5, 2))) * torch.polar(torch.ones_like(angle), angle)[:, None]
            torch.testing.assert_close(y[..., :10], torch.view_as_real(turned).flatten(-2))
            assert torch.equal(y[..., 10:], x[..., 10:])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("order", ["blocked", "interleaved"])
def test_sections_pick_by_pair(backend: str, layout: Any, order: Any, device: torch.device) -> None:
    """The tables of three axes, merged by hand, pair by pair: the very same bits."""
    q, k = torch.randn(2, 3, 5, 22, device=device), torch.randn(2, 1, 5, 22, device=device)
    sections = (5, 3, 2)
    cos, sin = torch.randn(3, 2, 5, 10, device=device), torch.randn(3, 2, 5, 10, device=device)
    axes = [0, 0, 0, 0, 0, 1, 1, 1, 2, 2] if order == "blocked" else [0, 1, 2, 0, 1, 2, 0, 1, 0, 0]
    merged = [torch.stack([t[axis, ..., i] for i, axis in enumerate(axes)], -1) for t in (cos, sin)]
    want = liger_fn.rope(q, k, *merged, layout=layout, rotary_dim=20)
    options: dict[str, Any] = {"layout": layout, "sections": sections, "section_order": order}
    assert_same_bits(liger_fn.rope(q, k, cos, sin, rotary_dim=20, **options), want, "tables of one number a pair")
    cos, sin = (torch.cat((t, t), -1) if layout == "half" else t.repeat_interleave(2, -1) for t in (cos, sin))
    assert_same_bits(liger_fn.rope(q, k, cos, sin, **options), want, "tables of one number a channel")


def test_k_is_none(backend: str, device: torch.device) -> None:
    """The result is q's alone, and so are fwd's and reference's; bwd takes one cotangent."""
    s = Sample(cases.ROPE, cases.ROPE.typical, torch.float32, device)
    q, k, cos, sin = s.inputs.values()
    want, grads = s.ours()
    y = liger_fn.rope(q, None, cos, sin)
    assert isinstance(y, Tensor)
    assert torch.equal(y, want[0])
    assert torch.equal(liger_fn.rope.reference(q, None, cos, sin), s.call(s.op.reference)[0])
    y, residuals = liger_fn.rope.fwd(q, None, cos, sin)
    assert torch.equal(y, want[0])
    dq, dk = liger_fn.rope.bwd(residuals, s.cots[0])
    assert torch.equal(dq, grads[0])
    assert dk is None
    with pytest.raises(TypeError, match=r"^rope\.bwd: dy must be 1 tensor.*k was None.*got tuple"):
        liger_fn.rope.bwd(residuals, s.cots)
    no_keys = liger_fn.rope(q, k[:, :0], cos, sin)  # type: ignore[index]
    assert torch.equal(no_keys[0], want[0])
    assert no_keys[1].shape == (2, 0, 5, 10)


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_a_cotangent_of_other_sizes_is_refused(backend: str, unsqueeze_dim: int, device: torch.device) -> None:
    """Kernels would read beyond it; the heads alone may differ."""
    q, table = torch.randn(2, 3, 5, 8, device=device).transpose(1, unsqueeze_dim), torch.randn(5, 4, device=device)
    for k in (q, None):
        _, residuals = liger_fn.rope.fwd(q, k, table, table, unsqueeze_dim=unsqueeze_dim)
        for sizes in ((1, 3, 5, 8), (2, 3, 4, 8), (2, 3, 5, 6), (2, 3, 8)):
            dy = torch.randn(sizes, device=device).transpose(1, unsqueeze_dim if len(sizes) == 4 else 1)
            with pytest.raises(ValueError, match=r"^rope\.bwd: dy must have the shape"):
                liger_fn.rope.bwd(residuals, dy if k is None else (q, dy))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_no_view_is_copied(layout: str, unsqueeze_dim: int) -> None:
    """The kernel is handed the caller's own tensors, whatever their strides, in forward and in backward."""
    if not _launch.HAS_TRITON:
        pytest.skip("needs Triton")
    q, k = (restride(torch.randn(2, 4, 4, 8), layout).to("meta") for _ in range(2))
    table = restride(torch.randn(2, 4, 8), layout).to("meta")
    q, k, table = (torch.empty_strided(t.shape, t.stride(), device="meta") for t in (q, k, table))
    kernels: Any = "interpreter" if _launch.INTERPRETED else "triton"
    with liger_fn.use_backend(kernels), _launch.record() as launches:
        _, residuals = liger_fn.rope.fwd(q, k, table, table, unsqueeze_dim=unsqueeze_dim)
        liger_fn.rope.bwd(residuals, (q, k))
    assert len(launches) == 2
    for launch in launches:
        assert [a is b for a, b in zip(launch.args[:2], (q, k), strict=True)] == [True, True]
        assert launch.args[4] is table
        assert launch.args[5] is table


def test_layout_is_kept_by_token(backend: str, device: torch.device) -> None:
    q, k = torch.randn(2, 5, 3, 8, device=device), torch.randn(2, 2, 5, 8, device=device).transpose(1, 2)
    table = torch.randn(5, 8, device=device)
    for width in (8,) if backend == "reference" else (8, 4):
        values = liger_fn.rope(q, k, table[:, :width], table[:, :width], unsqueeze_dim=2)
        assert [v.stride() for v in values] == [q.stride(), k.stride()]
    turned = liger_fn.rope(q.transpose(1, 2), k.transpose(1, 2), table, table)
    assert_same_bits(liger_fn.rope(q, k, table, table, unsqueeze_dim=2), [y.transpose(1, 2) for y in turned], "by token")


@pytest.mark.parametrize("model", ["llama", "gpt_neox", "cohere", "glm4", "ernie4_5", "gptj"])
def test_is_the_models_own_function(backend: str, model: str, device: torch.device) -> None:
    """What the docstring says of each model's tables, against the function in transformers itself."""
    pytest.importorskip("transformers")
    theirs = importlib.import_module(f"transformers.models.{model}.modeling_{model}").apply_rotary_pos_emb
    q, k = torch.randn(2, 3, 5, 16, device=device), torch.randn(2, 1, 5, 16, device=device)
    n = 4 if model in ("gpt_neox", "glm4") else 8
    angle = torch.randn(2, 5, n, device=device)
    twice = angle.repeat_interleave(2, -1) if model == "cohere" else torch.cat((angle, angle), -1)
    cos, sin = twice.cos(), twice.sin()
    if model in ("llama", "gpt_neox"):
        ours, want = liger_fn.rope(q, k, cos, sin), theirs(q, k, cos, sin)
    elif model == "cohere":
        ours, want = liger_fn.rope(q, k, cos, sin, layout="interleaved"), theirs(q, k, cos, sin)
    elif model == "gptj":
        q, cos, sin = q.transpose(1, 2), angle.cos(), angle.sin()
        ours = liger_fn.rope(q, None, cos, sin, layout="interleaved", rotary_dim=2 * n, unsqueeze_dim=2)
        want = theirs(q, sin, cos)
    else:
        ours = liger_fn.rope(q, k, cos[..., :n], sin[..., :n], layout="interleaved", rotary_dim=2 * n)
        want = theirs(q, k, cos, sin)
    torch.testing.assert_close(ours, want)


# --- rope_complex -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conjugate", [False, True])
def test_complex_is_the_product(backend: str, conjugate: bool, device: torch.device) -> None:
    """Value and gradients are those of the complex product, also by a conjugate, whose numbers lie in memory unconjugated."""
    q, k = torch.randn(2, 5, 3, 8, device=device), torch.randn(2, 5, 1, 8, device=device)
    freqs = torch.polar(torch.ones(2, 5, 4, device=device), torch.randn(2, 5, 4, device=device))
    freqs = freqs.conj() if conjugate else freqs
    leaves = [t.requires_grad_() for t in (q, k)]
    want = [torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * freqs[:, :, None]).flatten(-2) for x in leaves]
    got = rope_complex(q, k, freqs)
    torch.testing.assert_close(got, tuple(want))
    cots = [torch.randn_like(y) for y in want]
    torch.testing.assert_close(torch.autograd.grad(got, leaves, cots), torch.autograd.grad(want, leaves, cots))
    torch.testing.assert_close(rope_complex(q, None, freqs), want[0])
    by_head = rope_complex(q.transpose(1, 2), k.transpose(1, 2), freqs[:1], unsqueeze_dim=1)
    torch.testing.assert_close(by_head[0].transpose(1, 2)[0], want[0][0])


def test_complex_refuses_what_is_not() -> None:
    q = torch.randn(2, 5, 3, 8)
    for bad, says in ((torch.ones(5, 4), r"torch.float32 \[5, 4\]"), (torch.ones(4) * 1j, r"complex64 \[4\]"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"^rope_complex: freqs_cis must be a complex tensor .*{says}.*call rope"):
            rope_complex(q, q, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^rope: rotary_dim .* at most 8.*got 10"):
        rope_complex(q, q, torch.ones(5, 5) * 1j)
    with pytest.raises(ValueError, match=r"^rope: no gradient is computed for cos"):
        rope_complex(q, q, (torch.ones(5, 4) * 1j).requires_grad_())
