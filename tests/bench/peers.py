"""The same function from each library: this one, plain PyTorch eager and compiled, PyTorch's own kernel, and liger-kernel if installed.

Each provider takes the arguments of `tests.bench.table` in their order and its options by name, and returns what liger_fn returns.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import liger_fn

Fn = Callable[..., Any]
Providers = dict[str, Fn]

OURS, DONATE, EAGER, COMPILE, NATIVE, LIGER = (
    "liger_fn", "liger_fn donate", "eager", "torch.compile", "native", "liger-kernel"
)  # fmt: skip
# Of the heads alone: ways to sum the weight's gradient, to keep nothing until backward, and to do with 64 MiB of logits.
WEIGHT, FP32, EXACT, RECOMPUTE, WEIGHT_64, EXACT_64, LIGER_FP32, CCE = (
    "liger_fn weight", "liger_fn fp32", "liger_fn exact", "liger_fn recompute", "liger_fn weight 64 MiB", "liger_fn exact 64 MiB",
    "liger-kernel fp32", "cut-cross-entropy",
)  # fmt: skip
GROUPED, HAND = "transformers grouped_mm", "torch._grouped_mm"  # of the experts alone
MINE = (OURS, DONATE, WEIGHT, FP32, EXACT, RECOMPUTE, WEIGHT_64, EXACT_64)
PROVIDERS = (*MINE, EAGER, COMPILE, NATIVE, GROUPED, HAND, LIGER, LIGER_FP32, CCE)
EPS, LAYER_EPS = 1e-6, 1e-5  # what the functions take by themselves
DONATING = ("swiglu", "geglu", "cross_entropy")  # measured with donate=True too

# What a figure must be read with.
NOTES = {
    (DONATE, "swiglu"): "its backward writes over its inputs",
    (DONATE, "geglu"): "its backward writes over its inputs",
    (DONATE, "cross_entropy"): "its forward writes over the logits, which saves one of the three passes that the floor counts",
    (LIGER, "rope"): "with a copy of q and k, which its in-place write makes necessary",
    (LIGER, "cross_entropy"): "with a copy of the logits, which its in-place write makes necessary",
    (LIGER, "swiglu"): "its backward writes over its inputs",
    (LIGER, "geglu"): "its backward writes over its inputs",
    (EAGER, "moe_experts"): "transformers' loop over the experts",
    (HAND, "moe_experts"): "with sorting, gathering and scattering by PyTorch",
    (LIGER, "moe_experts"): "it tunes itself at its first call, which may take minutes and is in no figure",
}
OVERWRITES = {(provider, op) for (provider, op), note in NOTES.items() if "writes over" in note}  # these need new inputs for each call


def _llama_norm(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + LAYER_EPS) * w + b).to(x.dtype)


def _group_norm(x: Tensor, w: Tensor, b: Tensor, num_groups: int) -> Tensor:
    h = x.float().unflatten(1, (num_groups, -1)).flatten(2)
    h = h - h.mean(-1, keepdim=True)
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + LAYER_EPS)).view(x.shape)
    by_channel = (-1,) + (1,) * (x.dim() - 2)
    return (h * w.view(by_channel) + b.view(by_channel)).to(x.dtype)


def _packed_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def _add_then(norm: Callable[[Tensor, Tensor], Tensor]) -> Fn:
    def add_norm(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norm(total, w), total

    return add_norm


def _native_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, w.shape, w, EPS)


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)

    def half(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)

    return q * c + half(q) * s, k * c + half(k) * s


def _plain(name: str) -> tuple[Fn, Fn | None]:
    """(eager code as Hugging Face writes it, PyTorch's native function where there is one)."""
    torchs_head = getattr(F, "linear_cross_entropy", None)  # since torch 2.13
    table: dict[str, tuple[Fn, Fn | None]] = {
        "rms_norm": (_llama_norm, _native_norm),
        "add_rms_norm": (_add_then(_llama_norm), _add_then(_native_norm)),
        "layer_norm": (_layer_norm, lambda x, w, b: F.layer_norm(x, w.shape, w, b, LAYER_EPS)),
        "group_norm": (_group_norm, lambda x, w, b, num_groups: F.group_norm(x, num_groups, w, b, LAYER_EPS)),
        "softmax": (lambda x: torch.softmax(x.float(), -1).to(x.dtype), lambda x: torch.softmax(x, -1)),
        "swiglu": (lambda gate, up: F.silu(gate) * up, None),
        "geglu": (lambda gate, up: F.gelu(gate, approximate="tanh") * up, None),
        "swiglu_packed": (_packed_swiglu, None),
        "relu_squared": (lambda x: F.relu(x).square(), None),
        "swiglu_mlp": (_mlp, None),
        "rope": (_rope, None),
        "cross_entropy": (lambda logits, target: F.cross_entropy(logits.float(), target), None),
        "linear_cross_entropy": (lambda x, w, target: F.cross_entropy((x @ w.T).float(), target), torchs_head),
    }
    return table[name]


def _liger_kernel(name: str) -> Fn | None:
    try:
        from liger_kernel import ops
    except ImportError:
        return None

    table: Providers = {
        "rms_norm": lambda x, w: ops.LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False),
        "add_rms_norm": lambda x, r, w: ops.LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False),
        "layer_norm": lambda x, w, b: ops.LigerLayerNormFunction.apply(x, w, b, LAYER_EPS),
        "group_norm": lambda x, w, b, num_groups: ops.LigerGroupNormFunction.apply(x, w, b, x.shape[1], num_groups, LAYER_EPS),
        "softmax": lambda x: ops.LigerSoftmaxFunction.apply(x),
        "swiglu": lambda gate, up: ops.LigerSiLUMulFunction.apply(gate, up),
        "geglu": lambda gate, up: ops.LigerGELUMulFunction.apply(gate, up),
        "swiglu_packed": lambda gate_up: ops.LigerFusedGateUpSiLUMulFunction.apply(gate_up),
        "relu_squared": lambda x: ops.LigerReLUSquaredFunction.apply(x),
        "swiglu_mlp": lambda x, a, b, c: F.linear(ops.LigerSiLUMulFunction.apply(F.linear(x, a), F.linear(x, b)), c),
        "rope": lambda q, k, cos, sin: ops.LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin),
        "cross_entropy": lambda logits, target: ops.LigerCrossEntropyFunction.apply(logits.clone(), target, None)[0],
        "linear_cross_entropy": lambda x, w, target: ops.LigerFusedLinearCrossEntropyFunction.apply(x, w, target)[0],
    }
    return table[name]


def _ours(name: str) -> Fn:
    """The function itself; with its tensors in front, where it takes something else between them."""
    op = getattr(liger_fn, name)
    return {"group_norm": lambda x, w, b, num_groups: op(x, num_groups, w, b)}.get(name, op)


def uncompiled(name: str, device: torch.device) -> Providers:
    """Every implementation of `name` there is on `device` but the compiled one, ours first. liger-kernel's are kernels: they need a GPU."""
    eager, native = _plain(name)
    theirs = _liger_kernel(name) if device.type == "cuda" else None
    found = {OURS: _ours(name), EAGER: eager, NATIVE: native, LIGER: theirs}
    return {k: f for k, f in found.items() if f is not None}


def donating(name: str) -> Providers:
    """Ours, told that nobody else needs the inputs; empty where that changes nothing."""
    return {DONATE: partial(_ours(name), donate=True)} if name in DONATING else {}


def providers(name: str, device: torch.device) -> Providers:
    """The same, and donating; and eager code compiled, each shape for itself, on a GPU only: a CPU's compiler outlasts all the rest."""
    found = uncompiled(name, device) | donating(name)
    if device.type == "cuda":
        torch._dynamo.reset()
        found[COMPILE] = torch.compile(found[EAGER], dynamic=False)
    return {k: found[k] for k in PROVIDERS if k in found}


def for_sweep(name: str, device: torch.device) -> Providers:
    """Those whose figures are drawn against size: ours, the compiler's, PyTorch's own (eager code where it has none), liger-kernel's."""
    found = providers(name, device)
    return {k: found[k] for k in (OURS, NATIVE if NATIVE in found else EAGER, COMPILE, LIGER) if k in found}


# --- heads ------------------------------------------------------------------------------------------------------------------------------

SUMS = {WEIGHT: "weight", FP32: "fp32", EXACT: "exact"}
_BUDGET = {"memory_budget": 64 * 2**20}
HEAD_OPTIONS: dict[str, dict[str, Any]] = {
    OURS: {},
    **{name: {"accumulate": how} for name, how in SUMS.items()},
    RECOMPUTE: {"save": "recompute"},
    WEIGHT_64: {"accumulate": "weight"} | _BUDGET,
    EXACT_64: {"accumulate": "exact"} | _BUDGET,
}


def _head(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((x @ w.T).float(), target)


def _head_rows(x: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's lse, and its target's log-probability."""
    logits = (x @ w.T).float()
    lse = logits.logsumexp(-1)
    return lse, logits.gather(1, target[:, None]).squeeze(1) - lse


@cache
def _compiled(fn: Fn) -> Fn:
    """The same one each time, so that no shape is compiled twice."""
    return torch.compile(fn, dynamic=False)


def _cut_cross_entropy() -> Fn | None:
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        return None
    return linear_cross_entropy


def _liger_head(accum_dtype: torch.dtype | None = None, reduction: str = "mean") -> Fn:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

    # in between: bias, class weights, ignore_index, z-loss, label smoothing; soft cap, whether to return the z-loss
    return lambda x, w, target: Function.apply(x, w, target, None, None, -100, 0.0, 0.0, reduction, None, False, accum_dtype)[0]


def heads(device: torch.device) -> Providers:
    """Every implementation of a head's loss there is on `device`, by (x, weight, target)."""
    found = uncompiled("linear_cross_entropy", device)
    found |= {name: partial(found[OURS], **options) for name, options in HEAD_OPTIONS.items()}
    if device.type == "cuda":
        found[COMPILE] = _compiled(_head)
        if LIGER in found:
            found[LIGER_FP32] = _liger_head(torch.float32)
        if (cut := _cut_cross_entropy()) is not None:
            found[CCE] = cut
    return {k: found[k] for k in PROVIDERS if k in found}


def head_rows(device: torch.device) -> Providers:
    """What says (lse, log-probability of the target) of each row; None for what a library does not tell."""

    def ours(options: dict[str, Any]) -> Fn:
        def rows(x: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            aux = liger_fn.linear_cross_entropy(x, w, target, return_aux=True, **options)[1]
            return aux.lse, aux.log_prob

        return rows

    def of_losses(fn: Fn) -> Fn:
        return lambda x, w, target: (None, -fn(x, w, target))

    found: Providers = {name: ours(HEAD_OPTIONS[name]) for name in (OURS, *SUMS)} | {EAGER: _head_rows}
    every = heads(device)
    if COMPILE in every:
        found[COMPILE] = _compiled(_head_rows)
    for name, dtype in ((LIGER, None), (LIGER_FP32, torch.float32)):
        if name in every:
            found[name] = of_losses(_liger_head(dtype, "none"))
    if CCE in every:
        found[CCE] = of_losses(partial(every[CCE], reduction="none"))
    return found


# --- experts ----------------------------------------------------------------------------------------------------------------------------


def _grouped(x: Tensor, gate_up: Tensor, down: Tensor, topk_index: Tensor, topk_weight: Tensor) -> Tensor:
    """Rows sorted by expert, two grouped products, and back."""
    (tokens, k), experts = topk_index.shape, len(gate_up)
    chosen = topk_index.reshape(-1)
    order = chosen.argsort()
    counted = chosen.int() if chosen.is_cuda else chosen.float()  # each device counts another kind
    offsets = torch.histc(counted, experts, 0, experts - 1).cumsum(0, dtype=torch.int32)
    gate, up = torch._grouped_mm(x.index_select(0, order // k), gate_up.transpose(1, 2), offs=offsets).chunk(2, -1)
    rows = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=offsets)
    rows = rows * topk_weight.reshape(-1, 1).index_select(0, order).to(rows.dtype)
    return rows.index_select(0, order.argsort()).view(tokens, k, -1).sum(1)


@cache
def _module_of_experts(how: str, experts: int, hidden: int, inner: int) -> Any:
    """transformers' module, without weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(num_experts=experts, hidden_size=hidden, moe_intermediate_size=inner, hidden_act="silu")
    config._experts_implementation = how
    with torch.device("meta"):
        return Qwen3MoeExperts(config)


def _transformers_experts(how: str) -> Fn:
    def experts(x: Tensor, gate_up: Tensor, down: Tensor, topk_index: Tensor, topk_weight: Tensor) -> Any:
        module = _module_of_experts(how, len(down), *down.shape[1:])
        weights = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(module, weights, (x, topk_index, topk_weight))

    return experts


def liger_experts(x: Tensor, gate_up: Tensor, down: Tensor, topk_index: Tensor, topk_weight: Tensor) -> Any:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction as Function

    return Function.apply(x, gate_up, down, topk_index, topk_weight)


def experts(device: torch.device) -> Providers:
    """Every implementation of a mixture's experts there is on `device`, by the arguments of `liger_fn.moe_experts`."""
    ours, installed = liger_fn.moe_experts, importlib.util.find_spec
    found: Providers = {OURS: ours, RECOMPUTE: partial(ours, save="recompute")}
    if installed("transformers"):
        found |= {EAGER: _transformers_experts("eager"), GROUPED: _transformers_experts("grouped_mm")}
    if hasattr(torch, "_grouped_mm"):
        found[HAND] = _grouped
    if installed("liger_kernel") and device.type == "cuda":
        found[LIGER] = liger_experts
    return {k: found[k] for k in PROVIDERS if k in found}
