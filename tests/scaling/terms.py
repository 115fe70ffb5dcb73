"""From the measured pieces to the terms of a step: straight lines between what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .kept import EMBEDDING, HEAD, LAYERS, OPTIMIZER, Piece, Pieces
from .measure import LONG, MOST, SEQ
from .shapes import BY_NAME, STOCK, Shape

BYTES = 2  # of a number in bf16


@dataclass(frozen=True)
class Curve:
    """A quantity by the number of tokens: straight between two points, and beyond them as between the last or the first two."""

    points: tuple[tuple[int, float], ...]

    def at(self, tokens: float) -> float:
        if len(self.points) == 1:
            ((only, value),) = self.points
            return value * tokens / only
        after = next((i for i, (x, _) in enumerate(self.points[1:], 1) if tokens <= x), len(self.points) - 1)
        (x0, y0), (x1, y1) = self.points[after - 1 : after + 1]
        return max(0.0, y0 + (y1 - y0) * (tokens - x0) / (x1 - x0))

    @property
    def measured_to(self) -> int:
        return self.points[-1][0]


@dataclass(frozen=True)
class LayerTerms:
    """Of one layer on one rank, with or without checkpointing. Times are of sequences of SEQ tokens."""

    forward_ms: Curve
    backward_ms: Curve  # with checkpointing, recomputation is in it
    forward_longer: float  # milliseconds more for each token, and token that its sequence has beyond SEQ
    backward_longer: float
    kept: float  # bytes a token from forward to backward
    peak: Curve  # bytes that its backward needs beyond what forward left, its gradients among them

    def ms(self, tokens: int, seq: int) -> tuple[float, float]:
        """Of forward and of backward."""
        over = tokens * (seq - SEQ)
        return self.forward_ms.at(tokens) + over * self.forward_longer, self.backward_ms.at(tokens) + over * self.backward_longer


@dataclass(frozen=True)
class Terms:
    """All that a rank's step is made of: of a shape, a degree of tensor parallelism and a provider."""

    shape: Shape
    tp: int
    provider: str
    plain: LayerTerms
    checkpointed: LayerTerms
    head_ms: Curve  # logits and loss, forward and backward
    head_peak: Curve  # bytes, the weight's gradient among them
    embedding_ms: Curve
    optimizer_ms: dict[str, float]  # of one parameter, by its dtype

    def layer(self, checkpointing: bool) -> LayerTerms:
        return self.checkpointed if checkpointing else self.plain


Key = tuple[str, int, str]
Rows = dict[tuple[int, int, int, bool], Piece]  # by layers, batch, seq, checkpointing


def derive(pieces: Pieces) -> dict[Key, Terms]:
    """The terms of each (shape, tp, provider) of which enough was measured."""
    rows = [r for r in pieces.rows if r.measured]
    keys = dict.fromkeys((r.shape, r.tp, r.provider) for r in rows if r.what == LAYERS)
    found = {key: _of(key, rows) for key in keys}
    return {key: terms for key, terms in found.items() if terms is not None}


def _of(key: Key, rows: list[Piece]) -> Terms | None:
    of_key = [r for r in rows if (r.shape, r.tp, r.provider) == key]
    layers = {(r.layers, r.batch, r.seq, r.checkpointing): r for r in of_key if r.what == LAYERS}
    longer = _longer(layers)
    each = [None if longer is None else _layer(layers, checkpointing, longer) for checkpointing in (False, True)]
    head_ms = _curve((r for r in of_key if r.what == HEAD), _both_ms)
    shape, tp, provider = BY_NAME[key[0]], key[1], key[2]
    # The stock head was measured whole, since every rank gathers the logits; of its gradient a rank has a part.
    others = BYTES * (shape.head() - shape.head(tp)) if provider == STOCK else 0
    head_peak = _curve((r for r in of_key if r.what == HEAD), lambda r: max(0.0, _whole_peak(r) - others))
    look_up = _curve((r for r in rows if r.what == EMBEDDING and r.shape == key[0]), _both_ms)
    adam = {r.dtype: (r.backward_ms or 0.0) / r.parameters for r in rows if r.what == OPTIMIZER}
    plain, checkpointed = each
    if plain is None or checkpointed is None or head_ms is None or head_peak is None or look_up is None or not adam:
        return None
    return Terms(shape, tp, provider, plain, checkpointed, head_ms, head_peak, look_up, adam)


def _both_ms(row: Piece) -> float:
    return (row.forward_ms or 0.0) + (row.backward_ms or 0.0)


def _whole_peak(row: Piece) -> float:
    return max(row.forward_peak or 0, (row.kept or 0) + (row.backward_peak or 0))


def _curve(rows: Iterable[Piece], value: Callable[[Piece], float]) -> Curve | None:
    points = sorted((r.tokens, value(r)) for r in rows)
    return Curve(tuple(points)) if points else None


def _each(rows: Rows, batch: int, seq: int, checkpointing: bool, value: Callable[[Piece], float]) -> float | None:
    """What one layer adds: half of what MOST layers have over one."""
    one, most = rows.get((1, batch, seq, checkpointing)), rows.get((MOST, batch, seq, checkpointing))
    return None if one is None or most is None else (value(most) - value(one)) / (MOST - 1)


def _forward(row: Piece) -> float:
    return row.forward_ms or 0.0


def _backward(row: Piece) -> float:
    return row.backward_ms or 0.0


def _longer(rows: Rows) -> tuple[float, float] | None:
    """Milliseconds of forward and of backward without recomputation, more for each token and token beyond SEQ; from checkpointed rows."""
    most = max((batch for _, batch, seq, _ in rows if seq == SEQ), default=0)
    found = []
    for value in (_forward, _backward):
        short, long = _each(rows, most, SEQ, True, value), _each(rows, 1, LONG, True, value)
        if short is None or long is None:
            return None
        found.append((long / LONG - short / (most * SEQ)) / (LONG - SEQ))
    return found[0], found[1] - found[0]


def _layer(rows: Rows, checkpointing: bool, longer: tuple[float, float]) -> LayerTerms | None:
    batches = sorted({batch for _, batch, seq, c in rows if seq == SEQ and c == checkpointing})
    found: dict[str, list[tuple[int, float]]] = {}
    for batch in batches:
        at = batch, SEQ, checkpointing
        values = [_each(rows, *at, value) for value in (_forward, _backward, lambda r: float(r.kept or 0))]
        one = rows.get((1, *at))
        if one is not None and all(v is not None for v in values):
            for name, v in zip(("forward", "backward", "kept", "peak"), (*values, one.backward_peak or 0), strict=True):
                found.setdefault(name, []).append((batch * SEQ, float(v or 0)))
    if not found:
        return None
    tokens, kept = found["kept"][-1]
    forward, backward = longer
    again = forward if checkpointing else 0.0
    curves = {name: Curve(tuple(points)) for name, points in found.items()}
    return LayerTerms(curves["forward"], curves["backward"], forward, backward + again, kept / tokens, curves["peak"])
