"""What a forward pass leaves for its backward pass: segments, what is a row and what a unit, the stored feedback."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from .. import backends
from ..feedback import Feedback
from ..feedback.spec import FeedbackSpec
from .layer_outputs import Layer
from .rows import RowDims
from .segments import FusedLayer, Segment
from .survey import row_count
from .weight_layers import WeightCall


@dataclass(slots=True)
class Watched:
    """What somebody saw who watched the pass; nothing of a network whose modules tell all."""

    calls: list[WeightCall] = field(default_factory=list)
    """All its weight layers."""
    chained: list[Layer] = field(default_factory=list)
    """Those that only a chain through others connects with the tap that teaches them."""


@dataclass(slots=True)
class Pass:
    """A forward pass, interpreted once: the node, the taps and the plan are made from it."""

    output: Tensor
    rows: tuple[int, ...]
    """The output's leading dimensions that are rows."""
    error_size: int
    segments: list[Segment]
    last: FusedLayer | None
    """The output layer, if it is fused."""
    stored: list[Tensor]
    """What the feedback keeps for the widest tap."""
    feedback: FeedbackSpec
    backend: str
    watched: Watched


def recorded(
    output: Tensor,
    segments: list[Segment],
    last: FusedLayer | None,
    feedback: Feedback,
    backend: str,
    batch_dims: int | None,
    row_dims: RowDims | None,
    watched: Watched,
) -> Pass:
    """The pass that gave this output; its segments learn what of their taps are rows.

    row_dims: tells them; None if they are the leading ones of every tap.
    """
    rows, error_size = error_shape(output, batch_dims)
    leading = tuple(range(len(rows)))
    for segment in segments:
        if segment.tap.is_complex():
            raise TypeError(
                f"net: a tap would be at a complex tensor of shape {tuple(segment.tap.shape)}, which no error is "
                "projected to; put dfa_kernels.Tap() modules where the network is real (torch.view_as_real)"
            )
        _split(segment, rows, leading, leading if row_dims is None else row_dims.of(segment, rows))
        _check_input(segment.layer)
    _check_input(last)
    if last is not None and len(rows) != output.dim() - 1:
        # Its rows are not the error's.
        last = None
    sizes = [math.prod(segment.units) for segment in segments]
    stored = feedback.stored(max(sizes), error_size, output.device) if sizes else []
    backend = backends.resolve(backend, output.device)
    return Pass(output, rows, error_size, segments, last, stored, feedback.spec, backend, watched)


def error_shape(output: Tensor, batch_dims: int | None) -> tuple[tuple[int, ...], int]:
    """(sizes of the leading dimensions that are rows, number of error components) of an output."""
    shape = tuple(output.shape)
    if not shape:
        raise ValueError("net: the output must be [b, E] or [b], got a scalar; compute the loss outside the network")
    if not output.is_floating_point():
        raise TypeError(f"net: the output must be real and floating, got {output.dtype}")
    if batch_dims is not None and batch_dims > len(shape):
        raise ValueError(f"batch_dims: got {batch_dims} for an output of shape {list(shape)}")
    rows = shape[: row_count(len(shape), batch_dims)]
    return rows, math.prod(shape[len(rows) :])


def _split(segment: Segment, rows: tuple[int, ...], leading: tuple[int, ...], places: tuple[int, ...]) -> None:
    """Into rows and units. A fused layer's rows lead; a convolution's are its batch."""
    shape = tuple(segment.tap.shape)
    segment.rows, segment.units = places, shape[len(rows) :]
    if places == leading:
        if segment.layer is None or segment.layer.convolution is None or len(rows) == 1:
            return
    else:
        segment.units = tuple([size for i, size in enumerate(shape) if i not in places])
    segment.layer = None


def _check_input(layer: FusedLayer | None) -> None:
    if layer is not None and layer.x.dim() < 2:
        raise ValueError(f"x: a weight layer got an input of shape {list(layer.x.shape)}, without a batch dimension")
