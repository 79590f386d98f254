"""Which dimensions of a tap are the rows of the error, and which are units: never told by equal sizes alone."""

from __future__ import annotations

from .segments import Segment
from .survey import Varied


class RowDims:
    """Tells a network's rows, from what a survey of it has shown and from earlier passes."""

    def __init__(self, varied: tuple[Varied | None, ...] = ()) -> None:
        self._varied = varied
        self._known: dict[tuple[int, int, int], tuple[int, ...]] = {}

    def of(self, segment: Segment, rows: tuple[int, ...]) -> tuple[int, ...]:
        """The tap's dimensions that are the output's rows, whose sizes are given, in the output's order.

        Raises:
            ValueError: the tap lacks one of them, or it cannot be told.
        """
        shape = segment.tap.shape
        about = segment.point, len(shape), len(rows)
        known = self._known.get(about)
        if known is None:
            known = _row_dims(segment, rows, self._varied)
            if None not in self._varied[: len(rows)] and len(self._varied) >= len(rows):
                self._known[about] = known
        for k, (i, size) in enumerate(zip(known, rows, strict=True)):
            if shape[i] != size:
                raise ValueError(_refusal(segment, k, rows, []))
        return known


def _row_dims(segment: Segment, rows: tuple[int, ...], varied: tuple[Varied | None, ...]) -> tuple[int, ...]:
    found: list[int] = []
    for k, size in enumerate(rows):
        seen = varied[k] if k < len(varied) else None
        fitting = _that_varied(segment, size, seen) if seen is not None else _by_place(segment, k, rows)
        if len(fitting) != 1:
            raise ValueError(_refusal(segment, k, rows, fitting))
        found += fitting
    return tuple(found)


def _that_varied(segment: Segment, size: int, seen: Varied) -> list[int]:
    """The dimensions that changed as the output's did."""
    shape, other = segment.tap.shape, seen.shapes.get(segment.point, ())
    if len(other) != len(shape):
        return []
    return [i for i, n in enumerate(shape) if n == size and other[i] == seen.size]


def _by_place(segment: Segment, k: int, rows: tuple[int, ...]) -> list[int]:
    """The k-th dimension, where no pass of another size tells: others may be of that size, unless they are units."""
    shape = tuple(segment.tap.shape)
    units_at = None if segment.newest is None else segment.newest.units_at
    # Before the units; of all dimensions the first can be trusted to be the batch, but no other can be anything.
    end = len(shape) if units_at is None and k == 0 else (units_at or 0) % max(len(shape), 1)
    if k >= end or shape[k] != rows[k]:
        return []
    return [k, *(i for i in range(k + 1, end) if shape[i] == rows[k])]


def _refusal(segment: Segment, k: int, rows: tuple[int, ...], fitting: list[int]) -> str:
    shape = list(segment.tap.shape)
    if fitting:
        return (
            f"taps: dimensions {fitting} of a tap of shape {shape} may be the output's dimension {k}, of size "
            f"{rows[k]}, and the network does not run on a batch of another size, which would tell; run its first pass "
            "on a batch whose size is that of no other dimension, and without torch.compile"
        )
    said = f"taps: a tap of shape {shape} has no dimension that is dimension {k} of the output, whose rows are "
    said += f"{list(rows)}"
    if len(shape) == 1:
        return f"{said}; the network got one sample, it seems: give it a batch, x[None]"
    if k > 0:
        return f"{said}; batch_dims={k} takes the output's first {k} as rows and the others as the error"
    return (
        f"{said}; return the output with the batch as its first dimension and no other merged into it ([b, T, E], not "
        "[b · T, E]), or choose other taps"
    )
