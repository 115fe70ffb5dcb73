r"""The experts of a mixture over a process group, of which each rank has its own experts and its own tokens: expert parallel.

    y_t = Σ_r y_tr        y_tr = Σ_j w_tj o_tj over the choices of token t that are experts of rank r        o: as in `moe_experts`
    dx_t = Σ_r dx_tr      dw_tj from the rank of that choice      gradients of the experts: of the tokens of all ranks, whole on their rank

Tokens go to the ranks of their experts, which run `moe_experts` on what they get; y_tr comes back, in x's dtype, and is summed in fp32 in
the order of the ranks. Backward sends dy the same way, and dx_tr and dw come back. How rows travel stands in `_expert_parallel`. A rank
alone is `moe_experts`, bit for bit. Residuals: those of `moe_experts` for the tokens that this rank got, and where its own went.
Source: Lepikhin et al. 2020, arXiv:2006.16668.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _check
from ._backend import Backend, in_own_dtypes
from ._expert_parallel import EXCHANGES, Way, dispatch, whole
from ._moe_rows import Grads
from ._vjp import Args, Needs, Op, custom_vjp
from ._vocab_parallel import Shard, shard_of
from .moe_experts import Activation, Packed, Save, arguments, moe_experts
from .moe_unpermute import moe_unpermute

Exchange = Literal["all_to_all", "all_gather"]


class Residuals(NamedTuple):
    """What the backward of `expert_parallel_moe_experts` needs: that of `moe_experts`, the tokens got, and the way they came."""

    x: Tensor | None
    gate_up: Tensor
    down: Tensor
    topk_weight: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    topk_index: Tensor
    rows: Tensor | None  # from here to by_size: as in `moe_experts`, of the tokens got
    order: Tensor
    token: Tensor
    place: Tensor
    offsets: Tensor
    by_size: Tensor
    got_x: Tensor | None
    got_index: Tensor | None
    got_weight: Tensor | None
    sent: Tensor | None  # where the rows of this rank's tokens are among those it sent
    counts: Tensor | None  # how many went to each rank, and came from each
    activation: str
    packed: str
    limit: float
    alpha: float
    save: str
    exchange: str
    group: str
    first_expert: int
    num_experts: int

    @property
    def shard(self) -> Shard:
        return Shard(*self[-3:])

    @property
    def alone(self) -> Any:
        """The residuals of `moe_experts`, run on what was got, or on x by a rank alone."""
        x, weight, index = (self.got_x, self.got_weight, self.got_index) if self.group else (self.x, self.topk_weight, self.topk_index)
        return moe_experts.residuals(x, *self[1:3], weight, *self[4:6], index, *self[7:13], *self[18:23])


# --- definition: the experts of all ranks, whose gradients come home ----------------------------------------------------------------------


def _reference(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_weight: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    topk_index: Tensor, activation: str, packed: str, limit: float, alpha: float, save: str, exchange: str, group: str, first_expert: int,
    num_experts: int,
) -> Any:  # fmt: skip
    shard = Shard(group, first_expert, num_experts)
    gate_up, down, gate_up_bias, down_bias = (whole(t, shard) for t in (gate_up, down, gate_up_bias, down_bias))  # type: ignore[assignment]
    return moe_experts._reference(
        x, gate_up, down, topk_weight, gate_up_bias, down_bias, topk_index, activation, packed, limit, alpha, save
    )


# --- forward and backward -----------------------------------------------------------------------------------------------------------------


def _by_token(t: Tensor) -> Tensor:
    """`[..., n]` as `[T, n]`."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _outputs(*args: Any, needs: Needs) -> Args:
    (x, gate_up, down, topk_weight, _, _, topk_index), options, exchange, shard = args[:7], args[7:12], args[12], Shard(*args[13:])
    if not shard.group:
        return *moe_experts.outputs(*args[:12], needs=needs), None, None, None, None, None
    if exchange == "all_to_all" and isinstance(x, FakeTensor):
        raise NotImplementedError(
            'expert_parallel_moe_experts: exchange="all_to_all" asks the device how many rows each rank gets, which no traced graph can; '
            'pass exchange="all_gather", or trace around it with torch.compiler.disable'
        )
    ranks, tokens, k = shard.classes // gate_up.shape[0], math.prod(x.shape[:-1]), topk_index.shape[-1]
    every, sent = exchange == "all_gather", min(k, shard.classes // gate_up.shape[0])  # all_to_all: no more than that, and not traced
    rows, index = x.new_empty(ranks * tokens, x.shape[-1]), topk_index.new_empty(ranks * tokens, k, dtype=torch.int32)
    weight = topk_weight.new_empty(ranks * tokens, k)
    computed = moe_experts.outputs(rows, gate_up, down, weight, None, None, index, *options, needs=needs)[1:]
    counts = None if every else torch.empty(2, ranks, dtype=torch.int64)
    return _check.dense(x), *computed, rows, index, weight, index.new_empty(tokens, ranks if every else sent), counts


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> Grads:
    like: Any = res._replace(x=dy if res.x is None else res.x, group="")
    gradients: Grads = moe_experts.gradients(like.alone, dy, needs)
    return gradients


def _fwd(*args: Any, needs: Needs, backend: Backend) -> tuple[Tensor, Residuals]:
    (x, gate_up, down, topk_weight, *biases, topk_index), options, exchange, shard = args[:7], args[7:12], args[12], Shard(*args[13:])
    experts = moe_experts.pairs[backend]
    if not shard.group:
        y, own = experts.fwd(*args[:12], needs=needs)
        return y, Residuals._make((*own[:13], *(None,) * 5, *own[13:], exchange, *shard))
    way, got = dispatch(
        "expert_parallel_moe_experts", _by_token(x), _by_token(topk_index), _by_token(topk_weight), gate_up.shape[0], exchange, shard,
        needs, backend,
    )  # fmt: skip
    y, own = experts.fwd(got.x, gate_up, down, got.topk_weight, *biases, got.topk_index, *options, needs=needs)
    kept = *own[7:13], got.x, got.topk_index, got.topk_weight, way.place, way.counts, *own[13:]
    return way.home(y).view(x.shape), Residuals._make((None, *args[1:7], *kept, exchange, *shard))


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool, backend: Backend) -> Grads:
    experts = moe_experts.pairs[backend]
    if not res.group:
        return experts.bwd(res.alone, dy, needs=needs, donate=donate)
    assert res.sent is not None  # forward went that way
    way = Way(res.shard, res.sent, res.counts if res.exchange == "all_to_all" else None, moe_unpermute.pairs[backend])
    dx, dgate_up, ddown, dw, *dbiases = experts.bwd(res.alone, way.out(_by_token(dy)), needs=needs, donate=donate)
    dx, dw = (t if t is None else way.home(t) for t in (dx, dw))
    return (
        dx if dx is None else dx.view(dy.shape), dgate_up, ddown, dw if dw is None else dw.view(res.topk_weight.shape), *dbiases
    )  # fmt: skip


class _Exchanged(Op[..., Any]):
    """The op, which stays outside of compiled code where the host has to read how many rows go where."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and kwargs.get("exchange") != "all_gather" and dist.is_available() and dist.is_initialized():
            group = kwargs.get("group")
            if (group.size() if isinstance(group, dist.ProcessGroup) else dist.get_world_size()) > 1:
                return self._apart(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    @torch.compiler.disable(reason='expert_parallel_moe_experts: no graph holds exchange="all_to_all"; pass exchange="all_gather"')
    def _apart(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


# --- public function ----------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(in_own_dtypes(partial(_fwd, backend="triton")), in_own_dtypes(partial(_bwd, backend="triton"))),
    plain=(partial(_fwd, backend="reference"), partial(_bwd, backend="reference")),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: ((*res.topk_index.shape[:-1], res.gate_up.shape[2]),),
    diff=6,
    kind=_Exchanged,
)
def expert_parallel_moe_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_index: Tensor, topk_weight: Tensor, *, group: Any = None,
    exchange: Exchange = "all_to_all", activation: Activation = "silu", gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None,
    packed: Packed = "concat", limit: float | None = None, alpha: float = 1.702, save: Save = "gate_up",
) -> Args:  # fmt: skip
    r"""`moe_experts` where each rank of a process group has its own experts, all of as many, and its own tokens, any number.

    Each rank calls it with its tokens and its experts, and asks for the same gradients, in forward and in backward: ranks wait for one
    another, and one that does not come is waited for. A rank without tokens calls it with none. The loss may be any function of the y of
    all ranks; gradients are those of the sum over the ranks of what each calls backward on.

    Args:
        x: `[..., H]`, this rank's tokens; otherwise as in `moe_experts`.
        gate_up: `[E / W, 2I, H]`, the experts r E / W to (r + 1) E / W − 1 on rank r of the W of the group; otherwise as in `moe_experts`,
            and so are down `[E / W, H, I]`, gate_up_bias and down_bias.
        topk_index: `[..., k]`, which counts the experts of all ranks, 0 to E − 1; others are no expert.
        topk_weight: `[..., k]`, as in `moe_experts`.
        group: a `torch.distributed.ProcessGroup`; None for all ranks, or for a process alone, which has all experts.
        exchange: "all_to_all" sends a token once to each rank where it has a choice. The host reads how many rows go where: it waits for
            the device once in forward, and not in backward. torch.compile leaves the call to eager execution, and with fullgraph=True
            refuses it; a CUDA graph cannot hold it. "all_gather" sends every token to every rank, where all ranks have as many: more
            bytes, but the host waits for nothing.
        activation, packed, limit, alpha: as in `moe_experts`.
        save: as in `moe_experts`, of the R rows that this rank got: "gate_up" keeps `[R k, 2I]`, however few of their choices are experts
            here. In any case the rows themselves are kept, `[R, H]`.

    Under autocast as `moe_experts`, before anything is sent.

    Returns:
        y, of x's shape and dtype, of this rank's tokens. What each rank makes of a token is rounded to x's dtype, in which it travels, then
        summed in fp32 in the order of the ranks and rounded again; dx likewise. The same inputs on all ranks give the same bits.
        Gradients: all but topk_index; those of the experts are complete, over the tokens of all ranks, and need no further sum.

    Raises:
        TypeError: as `moe_experts`; `group` is no process group that this rank is in.
        ValueError: as `moe_experts`; an unknown exchange; on every rank, if ranks differ in E / W, H, k, a dtype, exchange, the gradients
            that are wanted, or with "all_gather" in the number of tokens. With "all_gather" a GPU is not asked: another E / W there makes
            y NaN, and what else differs is for the process group to find (TORCH_DISTRIBUTED_DEBUG=DETAIL) or to wait for.

    What concerns one rank alone, such as a shape that does not fit, is an error on that rank; the others wait for it as long as the
    group's timeout says.

    Examples:
        >>> gate_up, down = torch.ones(3, 2, 2), torch.ones(3, 2, 1)
        >>> chosen, weight = torch.tensor([[0, 2]]), torch.tensor([[0.75, 0.25]])
        >>> liger_fn.expert_parallel_moe_experts(torch.tensor([[1.0, 2.0]]), gate_up, down, chosen, weight)
        tensor([[8.5732, 8.5732]])

    Source: Lepikhin et al. 2020, arXiv:2006.16668.
    """
    op = "expert_parallel_moe_experts"
    _check.choice(op, "exchange", exchange, EXCHANGES)
    args = arguments(op, x, gate_up, down, topk_index, topk_weight, gate_up_bias, down_bias, activation, packed, limit, alpha, save)
    return *args, exchange, *shard_of(op, group, gate_up, None, None)
