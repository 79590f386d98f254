"""What a forward pass leaves for its backward pass: segments, what is a row and what a unit, the stored feedback."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .. import backends
from ..feedback import Feedback
from ..feedback.spec import FeedbackSpec
from .segments import FusedLayer, Segment


@dataclass(slots=True)
class Pass:
    """A forward pass, interpreted once: the node, the taps and the plan are made from it."""

    output: Tensor
    rows: tuple[int, ...]
    """The output's leading dimensions that a tap shares with it."""
    error_size: int
    segments: list[Segment]
    last: FusedLayer | None
    """The output layer, if it is fused."""
    stored: list[Tensor]
    """What the feedback keeps for the widest tap."""
    feedback: FeedbackSpec
    backend: str


def recorded(
    output: Tensor, segments: list[Segment], last: FusedLayer | None, feedback: Feedback, backend: str
) -> Pass:
    """The pass that gave this output [..., E]; its segments learn what of their taps are units."""
    rows, error_size = error_shape(output)
    for segment in segments:
        segment.units = _tap_units(segment, rows)
    _check_units(segments, last, rows)
    sizes = [math.prod(segment.units) for segment in segments]
    stored = feedback.stored(max(sizes), error_size, output.device) if sizes else []
    backend = backends.resolve(backend, output.device)
    return Pass(output, rows, error_size, segments, last, stored, feedback.spec, backend)


def error_shape(output: Tensor) -> tuple[tuple[int, ...], int]:
    """(leading dimensions that are rows, number of error components) of an output [..., E] or [b]."""
    if output.dim() == 0:
        raise ValueError("net: the output must be [b, E] or [b], got a scalar; compute the loss outside the network")
    if not output.is_floating_point():
        raise TypeError(f"net: the output must be real and floating, got {output.dtype}")
    if output.dim() > 3:
        raise ValueError(
            f"net: the output must be [b, E], [b] or [b, T, E], got shape {list(output.shape)}; flatten it to [b, E]"
        )
    if output.dim() == 1:
        return tuple(output.shape), 1
    return tuple(output.shape[:-1]), output.shape[-1]


def _tap_units(segment: Segment, rows: tuple[int, ...]) -> tuple[int, ...]:
    """The tap's shape without the rows that it shares with the error."""
    shape = tuple(segment.tap.shape)
    if shape[: len(rows)] != rows:
        raise ValueError(
            f"taps: a tap of shape {list(shape)} must begin with the output's rows {list(rows)}; flatten the output "
            "to [b, E], or choose other taps"
        )
    return shape[len(rows) :]


def _check_units(segments: list[Segment], last: FusedLayer | None, rows: tuple[int, ...]) -> None:
    """Refuses shapes in which rows and units cannot be told apart."""
    layers = [last, *[segment.layer for segment in segments]]
    for layer in layers:
        if layer is not None and layer.x.dim() < 2:
            raise ValueError(
                f"x: a weight layer got an input of shape {list(layer.x.shape)}, without a batch dimension"
            )
        if layer is not None and layer.convolution is not None and len(rows) > 1:
            raise ValueError(
                f"net: the output's leading dimensions {list(rows)} would be rows of a convolution, whose channels are "
                "units; flatten the output to [b, E]"
            )
