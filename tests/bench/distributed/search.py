"""The longest sequence that fits: which length to try next, from what the lengths before it took.

Each length is a whole step, and at hundreds of thousands of tokens attention makes that minutes, so that few may be tried. A step's memory
is the highest of its phases (forward and loss; the backward of the last layer; what comes after), and each of those grows as a straight
line: two short lengths say where the room ends, the third is just below, and the fourth is to find none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

NEARLY = 0.98  # of the room: what lies in pieces between allocations is no use to a step
Point = tuple[int, tuple[float, ...]]  # a length, and the peak of each phase of its step


@dataclass(frozen=True)
class Search:
    """What is known so far. Lengths are multiples of `grain`."""

    first: int
    grain: int
    fits: tuple[Point, ...] = ()  # the shortest first
    fails: int | None = None  # the shortest length that found no room
    room: float = 0.0  # that a step's peak may take, as long as none has failed: unknown

    @property
    def longest(self) -> int | None:
        return self.fits[-1][0] if self.fits else None

    def with_fit(self, length: int, peaks: tuple[float, ...], room: float) -> Search:
        """With a length that fitted."""
        return replace(self, fits=tuple(sorted({**dict(self.fits), length: peaks}.items())), room=room)

    def without(self, length: int) -> Search:
        """With a length that did not."""
        return replace(self, fails=min(length, self.fails or length))

    def next(self) -> int | None:
        """The length to try; None once one is known that fits, and another that does not and is at most an eighth longer (or a grain)."""
        low, high = self.longest, self.fails
        if low is None:
            return self.first if high is None else self._whole(high / 2) or None
        aim = max(self._aim(), low + self._eighth(low))  # a shorter stride would say nothing
        if high is None:
            return aim
        if high - low <= self._eighth(low):
            return None
        if aim >= high:  # the lines had promised more
            aim = self._whole(high * 8 / 9 if len(self.fits) > 1 else (low + high) / 2)
        return min(max(aim, low + self.grain), high - self.grain)

    def _eighth(self, length: int) -> int:
        return max(self.grain, self._whole(length / 8))

    def _whole(self, length: float) -> int:
        return int(length // self.grain) * self.grain

    def _aim(self) -> int:
        """Where the first of the lines through the last two points reaches the room; without a line that rises, twice the longest."""
        if len(self.fits) < 2:
            return 2 * self.fits[-1][0]
        (a, before), (b, after) = self.fits[-2:]
        slopes = [(y - x) / (b - a) for x, y in zip(before, after, strict=True)]
        reach = [b + (NEARLY * self.room - y) / slope for y, slope in zip(after, slopes, strict=True) if slope > 0]
        return self._whole(min(reach)) if reach else 2 * b
