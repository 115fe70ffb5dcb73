r"""The experts of a mixture as one function of the tokens and of what each token chose.

    (a, u) = x_t gate_upᵉᵀ + b       h = act(a, u)       o = h downᵉᵀ + d       y_t = Σ_j w_tj o_tj       e the j-th choice of token t
    dw_tj = ⟨dy_t downᵉ, h⟩ + ⟨dy_t, d⟩        (da, du) = w (dy_t downᵉ) ∂h        dx_t = Σ_j (da, du) gate_upᵉ
    ddownᵉ = Σ dy_tᵀ (w h)        dgate_upᵉ = Σ (da, du)ᵀ x_t        db = Σ (da, du)        dd = Σ w dy_t

The activations and the definition stand in `_moe_rows.py`; how choices become rows sorted by expert in `_moe_routing.py`; the kernels in
`_moe_products.py` and `_moe_gradients.py`, their launches in `_moe_launch.py`. No output of an expert is kept: dw comes from h, which
backward makes again from (a, u), and w multiplies h and what is made of dy, so that no weighted copy of dy is written.

Residuals: the arguments, the routing, and (a, u) of each choice, unless `save` says that backward makes them again.
Source: Shazeer et al. 2017, arXiv:1701.06538.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import _check
from ._backend import autocasts
from ._check import dense
from ._glu_rows import number
from ._launch import as_rows
from ._moe_launch import backward, forward
from ._moe_routing import Routing, countable, empty_routing, plain_route, route
from ._moe_rows import Grads, How, plain_backward, plain_inner, plain_outer, reference
from ._vjp import Args, Needs, custom_vjp

Activation = Literal["silu", "gelu_tanh", "gelu", "relu2", "clamped_swiglu"]
Packed = Literal["concat", "interleaved"]
Save = Literal["gate_up", "recompute"]


class Residuals(NamedTuple):
    """What the backward of `moe_experts` needs."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    topk_weight: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    topk_index: Tensor
    rows: Tensor | None  # (a, u) of each place, packed as gate_up is
    order: Tensor
    token: Tensor
    place: Tensor
    offsets: Tensor
    by_size: Tensor
    activation: str
    packed: str
    limit: float
    alpha: float
    save: str

    @property
    def how(self) -> How:
        return How(self.activation, self.packed, self.limit, self.alpha)

    @property
    def routing(self) -> Routing:
        return Routing(self.order, self.token, self.place, self.offsets, self.by_size)


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_weight: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    topk_index: Tensor, activation: str, packed: str, limit: float, alpha: float, save: str,
) -> Tensor:  # fmt: skip
    how = How(activation, packed, limit, alpha)
    return reference(x, gate_up, down, topk_weight, gate_up_bias, down_bias, topk_index, how)


def _by_token(t: Tensor) -> Tensor:
    """`[..., n]` as `[T, n]`."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _plain_fwd(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_weight: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    topk_index: Tensor, activation: str, packed: str, limit: float, alpha: float, save: str, needs: Needs,
) -> tuple[Tensor, Residuals]:  # fmt: skip
    tensors, options = (x, gate_up, down, topk_weight, gate_up_bias, down_bias, topk_index), (activation, packed, limit, alpha)
    routing = plain_route(_by_token(topk_index), gate_up.shape[0])
    rows = plain_inner(_by_token(x), gate_up, gate_up_bias, routing)
    y = plain_outer(rows, down, _by_token(topk_weight), down_bias, routing, How(*options)).view(x.shape)
    return y, Residuals(*tensors, rows if _keeps(save, needs) else None, *routing, *options, save)


def _plain_bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> Grads:
    x, w, routing = _by_token(res.x), _by_token(res.topk_weight), res.routing
    rows = plain_inner(x, res.gate_up, res.gate_up_bias, routing) if res.rows is None or res.save == "recompute" else res.rows
    dx, dgate_up, ddown, dw, *dbiases = plain_backward(
        _by_token(dy), x, res.gate_up, res.down, w, res.gate_up_bias, res.down_bias, rows, routing, res.how, needs
    )
    return _like(dx, res.x), dgate_up, ddown, _like(dw, res.topk_weight), *dbiases


def _like(t: Tensor | None, of: Tensor) -> Tensor | None:
    return t if t is None else t.view(of.shape)


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


def _keeps(save: str, needs: Needs) -> bool:
    """Is (a, u) kept? What is wanted alone for down_bias does without."""
    return save == "gate_up" and any(needs[:5])


def _outputs(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_weight: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    topk_index: Tensor, activation: str, packed: str, limit: float, alpha: float, save: str, needs: Needs,
) -> Args:  # fmt: skip
    slots = math.prod(topk_index.shape)
    rows = x.new_empty(slots, gate_up.shape[1]) if _keeps(save, needs) else None
    return dense(x), rows, *empty_routing(slots, gate_up.shape[0], x.device)


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> Grads:
    """Those of the weights in the layout of the weights."""
    wanted: list[Tensor | None] = [t if n else None for t, n in zip(res[:6], needs, strict=True)]
    return tuple(t if t is None else torch.empty_like(t) if i in (1, 2) else dense(t) for i, t in enumerate(wanted))


def _fwd(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_weight: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    topk_index: Tensor, activation: str, packed: str, limit: float, alpha: float, save: str, needs: Needs,
) -> tuple[Tensor, Residuals]:  # fmt: skip
    tensors, options = (x, gate_up, down, topk_weight, gate_up_bias, down_bias, topk_index), (activation, packed, limit, alpha, save)
    y, rows, *places = _outputs(*tensors, *options, needs=needs)
    routing = Routing(*places)
    route(_by_token(topk_index), routing)
    forward(as_rows(x), gate_up, down, topk_weight, gate_up_bias, down_bias, rows, y, routing, How(*options[:4]))
    return y, Residuals(*tensors, rows, *routing, *options)


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> Grads:
    grads, rows = _gradients(res, dy, needs), None if res.save == "recompute" else res.rows
    backward(as_rows(dy), as_rows(res.x), *res[1:6], _by_token(res.topk_index), rows, res.routing, res.how, grads)
    return grads


# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(_fwd, _bwd),
    plain=(_plain_fwd, _plain_bwd),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: (res.x.shape,),
    diff=6,
)
def moe_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_index: Tensor, topk_weight: Tensor, *, activation: Activation = "silu",
    gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None, packed: Packed = "concat", limit: float | None = None,
    alpha: float = 1.702, save: Save = "gate_up",
) -> Args:  # fmt: skip
    r"""The experts of a mixture: `y_t = Σ_j w_tj (act(x_t gate_upᵉᵀ) downᵉᵀ)`, where e is the j-th expert that token t chose.

    Args:
        x: `[..., H]`, any strides; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        gate_up: `[E, 2I, H]`, of x's dtype, by any strides: a weight that is stored as `[E, H, 2I]` goes in as `.transpose(1, 2)`, costs no
            copy, and its gradient has the same layout. `[E, I, H]` for an activation without a gate.
        down: `[E, H, I]`, of x's dtype, likewise.
        topk_index: `[..., k]`, the experts that each token chose, of an integer dtype. A number outside of 0 to E − 1 chooses no expert: it
            adds 0 and has a gradient of 0 (expert parallelism marks experts so that live elsewhere). The host never looks at it.
        topk_weight: `[..., k]`, the weight of each choice, of any float dtype; its gradient has that dtype.
        activation: from gate a and up u. "silu": `a σ(a) u`. "gelu_tanh", "gelu": `gelu(a) u`. "clamped_swiglu" (gpt-oss, MiniMax M3):
            `a σ(alpha a) (u + 1)`. "relu2" (Nemotron-H): `max(a, 0)²`, without up.
        gate_up_bias: `[E, 2I]` (`[E, I]` without a gate), of x's dtype, packed as gate_up. down_bias: `[E, H]`, of x's dtype.
        packed: "concat" if the I rows of gate are followed by those of up, "interleaved" if they come by turns (gpt-oss).
        limit: above 0; clamps a to at most that, and u to ± that, before the activation (gpt-oss, DeepSeek V4).
        alpha: above 0; of "clamped_swiglu" alone.
        save: "gate_up" keeps `x gate_upᵀ` for backward, `[T k, 2I]`; "recompute" makes it again there, to the same bits.

    Under autocast x, the weights and the biases take part in the dtype that a matrix product would take; topk_weight keeps its own.

    Returns:
        y, of x's shape and dtype. (a, u), h and o are rounded as the results of products are; y is summed in fp32 over the choices in their
        order, and rounded once. In backward dy downᵉ is rounded so too (of float16 it stays wide). What a token gets does not depend on
        which tokens are with it: its sums have one order. (How a product is cut depends on T k / E; where that picks another entry of the
        table, results differ by the rounding of fp32 sums.) A GPU that copies blocks by itself (Hopper) holds `[T k, H]` of x or dy while
        it computes, where I is at least 1024. The same inputs give the same bits, and the host waits for nothing. Gradients: all but
        topk_index; what asks for none costs nothing.

    Raises:
        TypeError: a tensor is not of a float dtype, dtypes differ, topk_index is not of an integer dtype, limit or alpha is not a number.
        ValueError: a shape does not fit, E, H, I or k is 0, devices differ, an unknown option, limit or alpha not above 0, limit or
            "interleaved" without a gate, alpha with another activation, T k has no int32.

    Examples:
        >>> gate_up, down = torch.ones(3, 2, 2), torch.ones(3, 2, 1)
        >>> chosen, weight = torch.tensor([[0, 2]]), torch.tensor([[0.75, 0.25]])
        >>> liger_fn.moe_experts(torch.tensor([[1.0, 2.0]]), gate_up, down, chosen, weight)
        tensor([[8.5732, 8.5732]])

    Source: Shazeer et al. 2017, arXiv:1701.06538; Gale et al. 2022, arXiv:2211.15841.
    """
    return arguments(
        "moe_experts", x, gate_up, down, topk_index, topk_weight, gate_up_bias, down_bias, activation, packed, limit, alpha, save
    )


def arguments(
    op: str, x: Tensor, gate_up: Tensor, down: Tensor, topk_index: Tensor, topk_weight: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, activation: str, packed: str, limit: float | None, alpha: float, save: str,
) -> Args:  # fmt: skip
    """What the op takes, or the error of what does not fit."""
    _check.floats(op, "x", x)
    _check.choice(op, "activation", activation, get_args(Activation))
    _check.choice(op, "packed", packed, get_args(Packed))
    _check.choice(op, "save", save, get_args(Save))
    options = activation, packed, *_numbers(op, activation, packed, limit, alpha), save
    _check_weights(op, x, gate_up, down, gate_up_bias, down_bias, 1 if activation == "relu2" else 2)
    index, weight = _choices(op, x, topk_index, topk_weight)
    _check.same_device(
        op, x, gate_up=gate_up, down=down, topk_index=index, topk_weight=weight, gate_up_bias=gate_up_bias, down_bias=down_bias
    )
    products: Any = x, gate_up, down, gate_up_bias, down_bias
    if autocasts(x.device.type):
        products = (t if t is None else _check.autocast(t) for t in products)
    x, gate_up, down, *biases = products
    _check.same_dtype(op, x, gate_up=gate_up, down=down, gate_up_bias=biases[0], down_bias=biases[1])
    return x, gate_up, down, weight, *(b if b is None else b.contiguous() for b in biases), index, *options


def _numbers(op: str, activation: str, packed: str, limit: float | None, alpha: float) -> tuple[float, float]:
    """limit, infinity for None, and alpha."""
    limit, alpha = math.inf if limit is None else number(op, "limit", limit), number(op, "alpha", alpha)
    for name, value in (("limit", limit), ("alpha", alpha)):
        if not value > 0:
            raise ValueError(f"{op}: {name} must be above 0, got {value}; {'None is no limit' if name == 'limit' else 'gpt-oss has 1.702'}")
    if activation == "relu2" and (packed != "concat" or not math.isinf(limit)):
        raise ValueError(f"{op}: activation 'relu2' has no gate to pack or limit, got packed={packed!r}, limit={limit}; leave both out")
    if activation != "clamped_swiglu" and alpha != 1.702:
        raise ValueError(f"{op}: alpha is for activation 'clamped_swiglu', got {alpha} with {activation!r}; leave it out")
    return limit, alpha


def _check_weights(
    op: str, x: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None, halves: int
) -> None:  # fmt: skip
    """The shapes of the weights and biases fit x, and each other."""
    _check.floating(op, gate_up=gate_up, down=down)
    _check.optional(op, gate_up_bias=gate_up_bias, down_bias=down_bias)
    h, name = x.shape[-1], "2I" if halves == 2 else "I"
    if gate_up.dim() != 3 or gate_up.shape[2] != h or gate_up.shape[1] % halves:
        raise ValueError(
            f"{op}: gate_up must be [E, {name}, {h}] (E experts, {name} rows, last axis of x), got {list(gate_up.shape)}; "
            "a weight of [E, H, ...] goes in as .transpose(1, 2)"
        )
    experts, inner = gate_up.shape[0], gate_up.shape[1] // halves
    for what, size in (("the experts' axis of gate_up", experts), ("the last axis of x", h), ("the second axis of gate_up", inner)):
        _check.at_least_one(op, what, size)
    _check.shape(op, "down", down, (experts, h, inner), "E, H, I; a weight of [E, I, H] goes in as .transpose(1, 2)")
    if gate_up_bias is not None:
        _check.shape(op, "gate_up_bias", gate_up_bias, (experts, gate_up.shape[1]), f"E, {name}")
    if down_bias is not None:
        _check.shape(op, "down_bias", down_bias, (experts, h), "E, H")


def _choices(op: str, x: Tensor, topk_index: Tensor, topk_weight: Tensor) -> tuple[Tensor, Tensor]:
    """topk_index and topk_weight, which fit x, as kernels take them."""
    _check.floats(op, "topk_weight", topk_weight)
    _check.integers(op, "topk_index", topk_index)
    k = topk_weight.shape[-1]
    _check.at_least_one(op, "the last axis of topk_weight", k)
    for name, t in (("topk_weight", topk_weight), ("topk_index", topk_index)):
        _check.shape(op, name, t, (*x.shape[:-1], k), "the axes of x but the last, and k choices")
    countable(op, topk_index)
    return (topk_index if topk_index.dtype in (torch.int64, torch.int32) else topk_index.long()).contiguous(), topk_weight.contiguous()
