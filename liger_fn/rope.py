r"""Rotary position embedding: turn pairs of channels by an angle that grows with the position.

With a and b the first and second channels of all pairs, and (c₁, c₂), (s₁, s₂) what cos and sin hold for them:

    y = (a c₁ − b s₁,  b c₂ + a s₂)          dq = (da c₁ + db s₂,  db c₂ − da s₁)        where dy = (da, db)

Layout "half" pairs channel i with i + n, where n pairs are turned; "interleaved" pairs 2i with 2i + 1. Channels beyond 2n pass through.
q and k turn by the same angles, in one launch. Residuals: cos and sin. Source: Su et al. 2021, arXiv:2104.09864; sections of channels for
time, height and width: Wang et al. 2024, arXiv:2409.12191.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _check
from ._check import wide
from ._launch import Plan, next_power_of_2, warps
from ._rope_kernels import _rope_kernel
from ._vjp import Args, Needs, Op, custom_vjp

Layout = Literal["half", "interleaved"]
SectionOrder = Literal["blocked", "interleaved"]
PER_WARP = 256  # pairs that a warp turns (H100)


class Residuals(NamedTuple):
    """What the backward of `rope` needs."""

    cos: Tensor
    sin: Tensor
    layout: str
    heads_axis: int
    dim: int
    rotary_dim: int
    order: str  # of sections; "" where there are none
    first: int  # blocked: the pair where height starts; interleaved: where it ends
    second: int  # the same of width
    alone: bool  # k is None


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    layout: str, heads_axis: int, dim: int, rotary_dim: int, order: str, first: int, second: int, alone: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    c, s = _tables(Residuals(cos, sin, layout, heads_axis, dim, rotary_dim, order, first, second, alone))

    def turn(x: Tensor) -> Tensor:
        part = x[..., :rotary_dim]
        y = (part * c + _quarter(part, layout) * s).to(x.dtype)
        return y if rotary_dim == dim else torch.cat((y, x[..., rotary_dim:]), -1)

    return turn(q), turn(k)


def _quarter(x: Tensor, layout: str) -> Tensor:
    """Every pair (a, b) turned by a quarter: (−b, a)."""
    if layout == "half":
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


def _tables(res: Residuals) -> tuple[Tensor, Tensor]:
    """cos and sin with a number for each channel, and an axis for the heads."""
    half, width = res.rotary_dim // 2, res.cos.shape[-1]

    def whole(table: Tensor) -> Tensor:
        if res.order:
            channel = torch.arange(width, device=table.device)
            pair = channel % half if res.layout == "half" else channel // (width // half)
            if res.order == "blocked":
                height, across = (pair >= res.first) & (pair < res.second), pair >= res.second
            else:
                height, across = (pair % 3 == 1) & (pair < res.first), (pair % 3 == 2) & (pair < res.second)
            table = torch.where(across, table[2], torch.where(height, table[1], table[0]))
        if width == half:
            table = torch.cat((table, table), -1) if res.layout == "half" else table.repeat_interleave(2, -1)
        return table.unsqueeze(res.heads_axis)

    return whole(res.cos), whole(res.sin)


def _plain_fwd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *how: Any, needs: Needs) -> tuple[tuple[Tensor, Tensor], Residuals]:
    return _reference(q, k, cos, sin, *how), Residuals(cos, sin, *how)


def _plain_bwd(res: Residuals, dy: tuple[Tensor, Tensor], needs: Needs, donate: bool) -> tuple[Tensor | None, ...]:
    c, s = map(wide, _tables(res))

    def turn_back(d: Tensor) -> Tensor:
        part = wide(d[..., : res.rotary_dim])
        dx = (part * c - _quarter(part * s, res.layout)).to(d.dtype)
        return dx if res.rotary_dim == res.dim else torch.cat((dx, d[..., res.rotary_dim :]), -1)

    return tuple(turn_back(d) if n else None for d, n in zip(dy, needs, strict=True))


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


def _alike(x: Tensor) -> Tensor:
    """An empty tensor in the memory layout of `x`, so that a transposed view costs no copy; the last axis is dense, as kernels write."""
    out = torch.empty_like(x)
    return out if out.stride()[-1] == 1 else x.new_empty(x.shape)


def _outputs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *how: Any, needs: Needs) -> tuple[Tensor, Tensor]:
    return _alike(q), _alike(k)


def _gradients(res: Residuals, dy: tuple[Tensor, Tensor], needs: Needs) -> tuple[Tensor | None, ...]:
    return tuple(_alike(d) if n else None for d, n in zip(dy, needs, strict=True))


@lru_cache(1024)
def _plan(
    shapes: tuple[Any, Any], strides: tuple[tuple[int, ...], ...], tables: tuple[tuple[int, ...], ...], width: int, how: Any, backward: bool
) -> Plan:
    """How a call is cut, from the shapes of q and k, and the strides of q, k, their results, cos and sin."""
    layout, h, dim, turned, order, first, second, _ = how
    some = shapes[0] or shapes[1]
    length, half, rest = some[3 - h], turned // 2, dim - turned
    each = [s for t, channels in zip(strides, (4, 4, 3, 3), strict=True) for s in (t[0], t[h], t[3 - h], t[3])[:channels]]
    heads = [n[h] if n else 0 for n in shapes]
    tiles = [next_power_of_2(max(n, 1)) for n in heads]
    columns, passed = next_power_of_2(half), next_power_of_2(rest) if rest else 0
    (*_, a, b, c), (*_, d, e, f) = tables
    sections = (tables[0][0], tables[1][0]) if order else (0, 0)
    return Plan(
        _rope_kernel, (some[0] * length,), *each, a, b, c, d, e, f, *sections, length, *heads, half, rest, first, second,
        BACKWARD=backward, PAIRS=layout == "interleaved", DENSE=strides[0][3] == strides[1][3] == c == f == 1, WHOLE=width == turned,
        SECTIONS=order != "", THREES=order == "interleaved", QH=tiles[0], KH=tiles[1], D=columns, REST=passed,
        num_warps=warps(max(tiles) * max(columns, passed // 2), PER_WARP),
    )  # fmt: skip


_ABSENT = (0, 0, 0, 1)  # strides


def _rotate(q: Tensor | None, k: Tensor | None, yq: Tensor | None, yk: Tensor | None, res: Residuals, backward: bool) -> None:
    """Launch over every token; a tensor that is None, or has no heads, is left out."""
    cos, sin = res[:2]
    if k is not None and k.shape[res.heads_axis] == 0:
        k = yk = None
    if q is None and k is None:
        return
    every = q, k, yq, yk
    strides = tuple([_ABSENT if t is None else t.stride() for t in every])
    shapes = None if q is None else q.shape, None if k is None else k.shape
    _plan(shapes, strides, (cos.stride(), sin.stride()), cos.shape[-1], res[2:], backward)(cos.device, *every, cos, sin)


def _fwd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *how: Any, needs: Needs) -> tuple[tuple[Tensor, Tensor], Residuals]:
    res = Residuals(cos, sin, *how)
    yq, yk = _outputs(q, k, cos, sin, *how, needs=needs)
    _rotate(q, k, yq, yk, res, backward=False)
    return (yq, yk), res


def _bwd(res: Residuals, dy: tuple[Tensor, Tensor], needs: Needs, donate: bool) -> tuple[Tensor | None, ...]:
    dq, dk = _gradients(res, dy, needs)
    _rotate(dy[0] if needs[0] else None, dy[1] if needs[1] else None, dq, dk, res, backward=True)
    return dq, dk


# --- public function --------------------------------------------------------------------------------------------------------------------


class _Rope(Op[..., Any]):
    """The op, whose result for k=None is one tensor. An operator has a fixed number of outputs: inside, that k is one without heads."""

    def __call__(self, q: Tensor, k: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        y = super().__call__(q, k, *args, **kwargs)
        return y[0] if k is None else y

    def fwd(self, *args: Any, **kwargs: Any) -> tuple[Any, Residuals]:
        """As of every op; y is one tensor for k=None."""
        y, residuals = super().fwd(*args, **kwargs)
        return y[0] if residuals.alone else y, residuals

    def bwd(self, residuals: Any, dy: Any, *, needs: Needs | None = None, donate: bool = False) -> tuple[Tensor | None, ...]:
        """As of every op; dy is one tensor for k=None, and the second gradient None."""
        if not isinstance(residuals, Residuals) or not residuals.alone:
            return super().bwd(residuals, dy, needs=needs, donate=donate)
        if not isinstance(dy, Tensor):
            raise TypeError(f"rope.bwd: dy must be 1 tensor, shaped as what rope.fwd returned first (k was None), got {type(dy).__name__}")
        both = dy, _no_heads(dy, residuals.heads_axis)
        return super().bwd(residuals, both, needs=needs, donate=donate)[0], None

    def reference(self, q: Tensor, k: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """The definition, in plain PyTorch: any device, any dtype, differentiable any number of times."""
        y = super().reference(q, k, *args, **kwargs)
        return y[0] if k is None else y


def _no_heads(x: Tensor, heads_axis: int) -> Tensor:
    return x.new_empty([0 if i == heads_axis else n for i, n in enumerate(x.shape)])


def _cotangents(res: Residuals) -> tuple[Any, Any]:
    batch, length = res.cos.shape[-3:-1]
    shape = (batch, None, length, res.dim) if res.heads_axis == 1 else (batch, length, None, res.dim)
    return shape, shape


@custom_vjp(
    residuals=Residuals,
    kernels=(_fwd, _bwd),
    plain=(_plain_fwd, _plain_bwd),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=_cotangents,
    diff=2,
    n_out=2,
    kind=_Rope,
)
def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: Layout = "half",
    rotary_dim: int | None = None,
    sections: Sequence[int] | None = None,
    section_order: SectionOrder = "blocked",
    unsqueeze_dim: int = 1,
) -> Args:
    r"""Rotary position embedding of queries and keys: pairs of channels turn by the angles whose cos and sin are given.

    Args:
        q: `[B, heads, T, D]`, any strides (no view costs a copy); float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        k: `[B, k_heads, T, D]`, of q's dtype; k_heads may differ from q's (grouped queries). None: q alone.
        cos, sin: `[B, T, W]`, or `[1, T, W]` or `[T, W]` for all of the batch; any float dtype. W is rotary_dim, a number for each channel,
            or (where rotary_dim is given) half of it, a number for each pair.
        layout: which channels are a pair, of n = rotary_dim/2 pairs. "half": i and i + n (Llama, Qwen, GPT-NeoX, Phi, StableLM); tables
            are `cat((angle, angle), -1)`. "interleaved": 2i and 2i + 1; tables are `angle.repeat_interleave(2, -1)`, as Cohere's are.
            GLM, GLM-4 and ERNIE 4.5 rotate interleaved, but make their tables as Llama does and use the first half of each: pass
            `cos[..., :n], sin[..., :n]` and `rotary_dim=2*n`. GPT-J's tables are n wide: pass `rotary_dim=2*n`.
        rotary_dim: how many channels, the first of each head, are turned; even. The others pass through. None: the width of cos.
        sections: how many pairs take their angle from time, height and width (M-RoPE). cos and sin are then `[3, B or 1, T, W]` or
            `[3, T, W]`, and the three numbers add up to rotary_dim/2. None where a model has merged its tables itself, as the rotary
            modules of transformers 5.23 do (Qwen2-VL, Qwen3-VL, GLM-4V).
        section_order: "blocked": first all pairs of time, then of height, then of width (Qwen2-VL). "interleaved": of each three pairs in
            turn, one is of time, one of height, one of width, until height or width has its number; the rest is of time (Qwen3-VL).
        unsqueeze_dim: where cos and sin lack the axis of heads. 2: q and k are `[B, T, heads, D]`.

    Returns:
        `(q', k')`, or q' alone where k is None: q and k turned, in their own shapes, dtypes and (where their last axis is dense) memory
        layouts; the kernels compute in fp32, round once. Gradients: q and k.

    Raises:
        TypeError: a tensor is not of a float dtype, or q and k differ in dtype.
        ValueError: a shape does not fit, rotary_dim is odd or over D, sections do not add up, an unknown option, devices differ, or cos or
            sin asks for a gradient.

    Examples:
        >>> q = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)  # one pair of channels
        >>> liger_fn.rope(q, q, torch.zeros(1, 1, 2), torch.ones(1, 1, 2))[0].flatten()  # a quarter turn
        tensor([-4.,  3.])

    Source: Su et al. 2021, arXiv:2104.09864; sections: Wang et al. 2024, arXiv:2409.12191.
    """
    _check.floating("rope", q=q, cos=cos, sin=sin)
    _check.optional("rope", k=k)
    _check.rank("rope", "cos", cos, 2)
    _check.choice("rope", "layout", layout, ("half", "interleaved"))
    _check.choice("rope", "section_order", section_order, ("blocked", "interleaved"))
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"rope: unsqueeze_dim must be 1 (q is [B, heads, T, D]) or 2 (q is [B, T, heads, D]), got {unsqueeze_dim!r}")
    axes = "[batch, heads, length, channels]" if unsqueeze_dim == 1 else "[batch, length, heads, channels]"
    if q.dim() != 4:
        raise ValueError(f"rope: q must be {axes} with unsqueeze_dim={unsqueeze_dim}, got {list(q.shape)}")
    batch, length, dim = q.shape[0], q.shape[3 - unsqueeze_dim], q.shape[3]
    if k is not None and (k.dim() != 4 or (k.shape[0], k.shape[3 - unsqueeze_dim], k.shape[3]) != (batch, length, dim)):
        want = f"[{batch}, k_heads, {length}, {dim}]" if unsqueeze_dim == 1 else f"[{batch}, {length}, k_heads, {dim}]"
        raise ValueError(f"rope: k must be {want} (as q, but for the heads), got {list(k.shape)}")
    turned = cos.shape[-1] if rotary_dim is None else _check.integer("rope", "rotary_dim", rotary_dim)
    if not 0 < turned <= dim or turned % 2:
        raise ValueError(
            f"rope: rotary_dim (by default the width of cos) must be even, at least 2 and at most {dim}, the channels of q, got {turned}; "
            "where cos and sin hold one number for each pair, pass twice their width"
        )
    order, first, second = _sections(sections, section_order, turned // 2)
    cos = _checked("cos", cos, order, batch, length, (turned,) if rotary_dim is None else (turned, turned // 2))
    sin = _checked("sin", sin, order, batch, length, (cos.shape[-1],))
    _check.same_dtype("rope", q, k=k)
    _check.same_device("rope", q, k=k, cos=cos, sin=sin)
    _check.no_grad_for("rope", cos=cos, sin=sin)
    keys = _no_heads(q, unsqueeze_dim) if k is None else k
    return q, keys, cos, sin, layout, unsqueeze_dim, dim, turned, order, first, second, k is None


def _sections(sections: Any, order: str, pairs: int) -> tuple[str, int, int]:
    if sections is None:
        return "", 0, 0
    if (
        not isinstance(sections, list | tuple)
        or len(sections) != 3
        or sum(_check.integer("rope", "each of sections", n, 0) for n in sections) != pairs
    ):
        raise ValueError(f"rope: sections must be 3 numbers of pairs that add up to rotary_dim/2 = {pairs}, got {sections}")
    time, height, across = sections
    return (order, time, time + height) if order == "blocked" else (order, 3 * height, 3 * across)


def _checked(name: str, table: Tensor, order: str, batch: int, length: int, widths: tuple[int, ...]) -> Tensor:
    """A table as `[B, T, W]`, or `[3, B, T, W]` with sections; what the batch shares is expanded."""
    if not order and table.shape == (batch, length, widths[0]):
        return table
    lead = [3] if order else []
    t = table.unsqueeze(-3) if table.dim() == len(lead) + 2 else table
    *sections, shared, positions, width = t.shape if t.dim() > 2 else (0, 0, 0)
    if sections != lead or shared not in (1, batch) or positions != length or width not in widths:
        want = [*map(str, lead), f"{batch} or 1", str(length), " or ".join(map(str, widths))]
        raise ValueError(f"rope: {name} must be [{', '.join(want)}] (batch, length and channels to turn), got {list(table.shape)}")
    return t if shared == batch else t.expand(*lead, batch, -1, -1)


def rope_complex(q: Tensor, k: Tensor | None, freqs_cis: Tensor, *, unsqueeze_dim: int = 2) -> Any:
    r"""`rope` of interleaved pairs, each taken as a complex number and multiplied by one: `y = (a + ib)(c + is)` (Llama 4).

    Args:
        q: `[B, T, heads, D]`, or `[B, heads, T, D]` with `unsqueeze_dim=1`; any strides.
        k: the same but for the heads, or None.
        freqs_cis: complex, `[B, T, n]`, or `[1, T, n]` or `[T, n]` for all of the batch; the first 2n channels of each head are turned.
        unsqueeze_dim: where freqs_cis lacks the axis of heads.

    Returns:
        `(q', k')`, or q' alone where k is None, as `rope` gives them. Gradients: q and k.

    Raises:
        TypeError: freqs_cis is not complex; and all that `rope` raises.

    Examples:
        >>> q = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
        >>> liger_fn.rope_complex(q, None, torch.tensor([[1j]])).flatten()  # a quarter turn
        tensor([-4.,  3.])

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    if not isinstance(freqs_cis, Tensor) or not freqs_cis.is_complex() or freqs_cis.dim() < 2:
        got = f"{freqs_cis.dtype} {list(freqs_cis.shape)}" if isinstance(freqs_cis, Tensor) else type(freqs_cis).__name__
        raise TypeError(f"rope_complex: freqs_cis must be a complex tensor [B or 1, T, n], got {got}; for cos and sin call rope")
    n, f = freqs_cis.shape[-1], freqs_cis.resolve_conj()
    return rope(q, k, f.real, f.imag, layout="interleaved", rotary_dim=2 * n, unsqueeze_dim=unsqueeze_dim)
