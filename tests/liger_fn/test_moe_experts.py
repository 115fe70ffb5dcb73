"""moe_experts: the contract, and its oddities."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import liger_fn
from liger_fn import _moe_launch
from liger_fn._moe_launch import CUTS, FULL, Cut, Tile
from tests import cases
from tests.cases.moe_experts import GPT_OSS, experts
from tests.contract import Contract, wrong
from tests.numerics import assert_same_bits
from tests.sample import Sample, gradients


class TestMoeExperts(Contract):
    table = cases.MOE_EXPERTS
    wrong_calls = (
        wrong("int-x", TypeError, "x must be float32", "torch.int64", ".to(", x=torch.Tensor.long),
        wrong("0-d", ValueError, "x must have at least 1 axes", "[]", x=lambda x: x.sum()),
        wrong("transposed", ValueError, "gate_up must be [E, 2I, 10]", "[2, 10, 26]", ".transpose(1, 2)", gate_up=lambda w: w.mT),
        wrong("odd", ValueError, "gate_up must be [E, 2I, 10]", "[2, 25, 10]", gate_up=lambda w: w[:, 1:]),
        wrong("2-d", ValueError, "gate_up must be [E, 2I, 10]", "[26, 10]", gate_up=lambda w: w[0]),
        wrong("no-experts", ValueError, "the experts' axis of gate_up must have at least 1", "0", gate_up=lambda w: w[:0]),
        wrong("down", ValueError, "down must have shape [2, 10, 13]", "[2, 13, 10]", ".transpose(1, 2)", down=lambda w: w.mT),
        wrong("gate-up-bias", ValueError, "gate_up_bias must have shape [2, 26]", "[2, 25]", gate_up_bias=lambda b: b[:, 1:]),
        wrong("down-bias", ValueError, "down_bias must have shape [2, 10]", "[1, 10]", down_bias=lambda b: b[1:]),
        wrong("dtype", TypeError, "down must be torch.float32", "torch.bfloat16", ".to(", down=torch.Tensor.bfloat16),
        wrong("bias-dtype", TypeError, "down_bias must be torch.float32", "torch.float16", down_bias=torch.Tensor.half),
        wrong("device", ValueError, "down must be on", "meta", ".to(", down=lambda w: w.to("meta")),
        wrong("index-list", TypeError, "topk_index must be a torch.Tensor", "list", topk_index=[0]),
        wrong(
            "index-dtype", TypeError, "topk_index must be of an integer dtype", "torch.float32", ".long()", topk_index=torch.Tensor.float
        ),
        wrong("index-bool", TypeError, "topk_index must be of an integer dtype", "torch.bool", topk_index=torch.Tensor.bool),
        wrong(
            "too-many",
            ValueError,
            "fewer than 2^31 - 2^16 elements",
            "[2, 1, 2147483648]",
            "split",
            topk_index=lambda i: i[..., :1].expand(2, 1, 2**31),
            topk_weight=lambda w: w[..., :1].expand(2, 1, 2**31),
        ),
        wrong("index-shape", ValueError, "topk_index must have shape [2, 1, 2]", "[2, 1, 1]", topk_index=lambda i: i[..., 1:]),
        wrong("weight-shape", ValueError, "topk_weight must have shape [2, 1, 2]", "[1, 1, 2]", topk_weight=lambda w: w[1:]),
        wrong("no-choice", ValueError, "the last axis of topk_weight must have at least 1", topk_weight=lambda w: w[..., :0]),
        wrong("weight-dtype", TypeError, "topk_weight must be float32", "torch.int64", topk_weight=torch.Tensor.long),
        wrong("activation", ValueError, "activation must be one of", "'relu'", activation="relu"),
        wrong("packed", ValueError, "packed must be one of", "'rows'", packed="rows"),
        wrong("save", ValueError, "save must be one of", "None", save=None),
        wrong("limit", ValueError, "limit must be above 0, got 0.0", "None", limit=0.0),
        wrong("limit-nan", ValueError, "limit must be above 0, got nan", limit=float("nan")),
        wrong("limit-tensor", TypeError, "limit must be a Python number", limit=torch.ones(())),
        wrong("alpha", ValueError, "alpha must be above 0, got -1.0", alpha=-1.0),
        wrong("alpha-of-silu", ValueError, "alpha is for activation 'clamped_swiglu'", "1.5", "leave it out", activation="silu", alpha=1.5),
        wrong("no-gate", ValueError, "'relu2' has no gate", "interleaved", "leave both out", activation="relu2"),
    )


# --- Hugging Face's modules -------------------------------------------------------------------------------------------------------------

T, E, K, H, I = 8, 4, 2, 12, 10
SIZES = {"hidden_act": "silu", "hidden_size": H, "num_local_experts": E, "num_experts": E, "intermediate_size": I}
NEMOTRON = {"n_routed_experts": E, "moe_latent_size": None, "mlp_hidden_act": "relu2"}
MODULES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # class: its family, its configuration, what it is here
    "MixtralExperts": ("mixtral", SIZES, {}),
    "Qwen3MoeExperts": ("qwen3_moe", {**SIZES, "moe_intermediate_size": I}, {}),
    "DeepseekV4Experts": ("deepseek_v4", {**SIZES, "swiglu_limit": 0.6}, {"limit": 0.6}),
    "NemotronHExperts": ("nemotron_h", {**SIZES, **NEMOTRON, "moe_intermediate_size": I}, {"activation": "relu2"}),
    "GptOssExperts": ("gpt_oss", {**SIZES, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}, {**GPT_OSS, "limit": 0.6}),
    "Llama4TextExperts": ("llama4", SIZES, {}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODULES)
def test_is_the_module(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """The value and all gradients, which lie as the module stores its parameters."""
    family, config, options = MODULES[name]
    modeling: Any = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    module = getattr(modeling, name)(SimpleNamespace(**config, _experts_implementation="eager")).to(device, dtype)
    module.limit = options.get("limit")  # whatever the configuration says: older releases have a number of their own
    p: dict[str, Tensor] = {k: torch.nn.init.normal_(v, std=0.4) for k, v in module.named_parameters()}
    weights = [p.get("gate_up_proj", p.get("up_proj")), p["down_proj"]]
    if name in ("GptOssExperts", "Llama4TextExperts"):  # stored as [E, in, out]
        weights = [w.mT for w in weights if w is not None]
    x = torch.randn(T, H, device=device, dtype=dtype, requires_grad=True)
    topk_weight = torch.rand(T, K, device=device, dtype=dtype, requires_grad=True)
    topk_index = torch.rand(T, E, device=device).topk(K)[1]
    leaves = [x, *p.values(), topk_weight]
    if name == "Llama4TextExperts":  # takes rows that are sorted by expert, as many of each, already weighted
        topk_index, topk_weight = torch.arange(T, device=device).view(T, 1) // (T // E), torch.ones_like(topk_weight[:, :1])
        want, leaves = module(x), leaves[:-1]
    else:
        want = module(x, topk_index, topk_weight)
    biases = {"gate_up_bias": p.get("gate_up_proj_bias"), "down_bias": p.get("down_proj_bias")}
    y = liger_fn.moe_experts(x, *weights, topk_index, topk_weight, **options, **biases)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    ours, theirs = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy)
    torch.testing.assert_close(ours, theirs)
    assert [g.stride() for g in ours] == [t.stride() for t in leaves]


# --- what the docstring says ------------------------------------------------------------------------------------------------------------


def sample(make: Any, device: torch.device, dtype: torch.dtype = torch.float32, **options: Any) -> Sample:
    return Sample(cases.MOE_EXPERTS, cases.Case("", make, options), dtype, device)


def test_absent_is_left_out(backend: str, device: torch.device) -> None:
    """The second of two choices is no expert: the same bits as one choice, and a weight's gradient of 0."""
    s = sample(experts(6, e=3, k=1, h=24, i=20, bias=True), device)
    values, grads = s.ours()
    for nothing in (-1, 3):
        both: dict[str, Any] = dict(s.inputs)
        both["topk_index"] = torch.cat((both["topk_index"], torch.full_like(both["topk_index"], nothing)), -1)
        both["topk_weight"] = torch.cat((both["topk_weight"], torch.full_like(both["topk_weight"], torch.nan)), -1)
        got, (dx, dgate_up, ddown, dw, *dbiases) = gradients(
            lambda *t, b=both: s.call(s.op, **{**b, **dict(zip(s.wrt, t, strict=True))}), [both[k] for k in s.wrt], s.cots
        )
        assert_same_bits(got, values, "value")
        assert_same_bits([dx, dgate_up, ddown, dw[:, :1], *dbiases], grads, "gradient")
        assert not dw[:, 1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_depend_on_others(dtype: torch.dtype, device: torch.device) -> None:
    """By the kernels; plain PyTorch's products choose an order by the number of rows."""
    if liger_fn.backend(torch.empty(0, device=device)) == "reference":
        pytest.skip("needs Triton, or its interpreter")
    s = sample(experts(9, e=3, k=2, h=40, i=24), device, dtype)
    values, (dx, _, _, dw) = s.ours()
    for part in (slice(0, 1), slice(2, 7)):
        some = {k: t[part] if k in s.table.rows and t is not None else t for k, t in s.inputs.items()}
        y, residuals = s.op.fwd(**some)
        got = s.op.bwd(residuals, s.cots[0][part])
        assert_same_bits([y, got[0], got[3]], [values[0][part], dx[part], dw[part]], "a part of the tokens")


RELU2 = {"activation": "relu2"}
SMALL = Tile(32, 32, 32, 2, 4, blocks=True)  # so that a few rows and columns are several tiles
EVERY_CUT = [
    pytest.param(cut, wide, options, id=f"{name}-{options.get('activation', 'silu')}")
    for name, cut, wide, ways in (
        ("many", CUTS[64], 10**9, ({}, GPT_OSS)),
        ("small", Cut(*6 * [SMALL]), 10**9, ({}, GPT_OSS)),
        ("copied", Cut(*6 * [SMALL]), 0, ({}, GPT_OSS, RELU2)),
        ("few", CUTS[0], 10**9, (RELU2,)),
        ("full", FULL, 10**9, (GPT_OSS, RELU2)),
    )
    for options in ways
]


@pytest.mark.parametrize(("cut", "wide", "options"), EVERY_CUT)
def test_every_cut(cut: Cut, wide: int, options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By each entry of the table, and with copies of the tokens: several tiles, the last of each kind not whole."""
    monkeypatch.setattr(_moe_launch, "cut", lambda *args: cut)
    monkeypatch.setattr(_moe_launch, "WIDE", wide)
    rows, halves = 150 if cut.up.bm > 64 else 40, 1 if options is RELU2 else 2
    make = experts(rows, e=2, k=1, h=40, i=136 if cut.down.bn > 64 else 72, halves=halves, bias=True, every=9)
    dtype, draws = (torch.float32, 6) if cut is FULL else (torch.float16, 1)
    TestMoeExperts().judge([Sample(cases.MOE_EXPERTS, cases.Case("", make, options), dtype, device, seed) for seed in range(draws)])


def test_made_again_to_the_same_bits(device: torch.device) -> None:
    make = experts(9, e=2, k=2, h=24, i=20, bias=True)
    kept, again = (sample(make, device, torch.bfloat16, **GPT_OSS, save=save).ours() for save in ("gate_up", "recompute"))
    for part, got, want in zip(("value", "gradient"), again, kept, strict=True):
        assert_same_bits(got, want, part)


def test_the_cut_follows_the_rows_of_an_expert() -> None:
    for c in (*CUTS.values(), FULL):
        assert len({tile.bm for tile in c[:4]}) == 1, "one map of tiles serves all products over rows"
    assert _moe_launch.cut(64 * 8, 8, torch.bfloat16) is CUTS[64]
    assert _moe_launch.cut(64 * 8 - 1, 8, torch.bfloat16) is CUTS[0]
    assert _moe_launch.cut(10**6, 8, torch.float32) is FULL


def test_fp16_weights_what_is_beyond_its_range(backend: str, device: torch.device) -> None:
    """dy downᵉ is 76800 here, w times that 4800."""
    one = torch.ones(1, 1, 128, dtype=torch.float16, device=device)
    s = {"gate_up": one.expand(1, 8, 128) / 128, "down": one.mT.expand(1, 128, 4)}
    weight, x = torch.full((1, 1), 1 / 16, device=device), one[0].clone().requires_grad_()
    y = liger_fn.moe_experts(x, s["gate_up"], s["down"], torch.zeros(1, 1, dtype=torch.int64, device=device), weight)
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 600.0))
    slope = 4 * 4800 * (torch.sigmoid(torch.tensor(1.0)) * (2 - torch.sigmoid(torch.tensor(1.0))) + torch.sigmoid(torch.tensor(1.0))) / 128
    torch.testing.assert_close(dx.float().cpu(), slope.expand(1, 128), rtol=2e-3, atol=0)


def test_what_is_kept(backend: str, device: torch.device) -> None:
    """(a, u) of each choice, unless it is made again; the routing; and nothing that backward does not need."""
    for save, want in (("gate_up", [[10, 40]]), ("recompute", [])):
        s = sample(experts(5, e=3, k=2, h=24, i=20, bias=True), device, save=save)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t) or t, lambda t: t):  # type: ignore[misc]
            s.call(s.op, x=s.tensors[0].detach().requires_grad_())
        own = [t for t in saved if all(t.data_ptr() != i.data_ptr() for i in s.inputs.values() if i is not None)]
        assert [list(t.shape) for t in own if t.is_floating_point()] == want
        assert sorted(t.numel() for t in own if not t.is_floating_point()) == [3, 4, 10, 10, 10]
    assert s.op.fwd(**s.inputs, save="recompute")[1].rows is None


def test_twice_the_same_bits(backend: str, device: torch.device) -> None:
    s = sample(experts(9, e=3, k=2, h=40, i=24, bias=True), device, torch.bfloat16)
    for part, got, want in zip(("value", "gradient"), s.ours(), s.ours(), strict=True):
        assert_same_bits(got, want, part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_topk_weight(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Its own dtype, to the bit."""
    s = sample(experts(4, e=2, k=2, h=24, i=8, bias=True, weight=torch.float32), device, dtype)
    half: dict[str, Any] = {
        k: t if t is None or not t.is_floating_point() or k == "topk_weight" else t.bfloat16() for k, t in s.inputs.items()
    }
    weight = half["topk_weight"].requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        y = s.op(**{**s.inputs, "topk_weight": weight})
    want = s.op(**half)
    assert y.dtype is torch.bfloat16
    assert weight.dtype is torch.float32
    grads = [torch.autograd.grad(out.float().sum(), weight)[0] for out in (y, want)]
    assert_same_bits([y.detach(), grads[0]], [want.detach(), grads[1]], "in autocast")


def test_integers_of_any_kind(backend: str, device: torch.device) -> None:
    s = sample(experts(6, e=3, k=2, h=24, i=8), device)
    want = s.op(**s.inputs)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        index = s.inputs["topk_index"]
        assert index is not None
        assert_same_bits([s.op(**{**s.inputs, "topk_index": index.to(dtype)})], [want], str(dtype))
