"""Alignment: how close the projected error is to the gradient that backpropagation would deliver."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .compilers import whole
from .feedback import Feedback
from .forward.record import error_shape
from .forward.restore import restored
from .forward.segments import Segment
from .forward.taps import ForwardPass, TapPolicy, tap_names
from .wrapper import DFA


@dataclass(frozen=True)
class Alignment:
    """Cosine between e B_iᵀ and ∂L/∂h_i at one tap, per row of the batch; mean and standard deviation over the rows."""

    cosine: Tensor = field(repr=False)
    mean: float
    std: float


class _ObservedPass(ForwardPass):
    """A pass that leaves the autograd graph whole and remembers the tensor at every tap."""

    def __init__(self, policy: TapPolicy, weight_layers: int) -> None:
        super().__init__(policy, weight_layers)
        self.segments: list[Segment] = []

    def at_tap(self, origin: Tensor | str, z: Tensor) -> tuple[Tensor, Tensor]:
        if z.requires_grad and not any(z is segment.tap for segment in self.segments):
            self.segments.append(Segment(origin, z, z, None, self.point, self.newest))
        return z, z

    def give_up_taps(self, points: list[int]) -> None:
        self.segments = [segment for segment in self.segments if segment.point not in points]


def alignment(
    model: DFA,
    x: Tensor,
    y: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    *,
    device: torch.device | str | None = None,
) -> dict[str, Alignment]:
    """Alignment at every tap of ``model`` (the paper's cosine similarity of the angle to backpropagation).

    One forward and one backward pass in the mode (train or eval) that the model is in, on its own weights; random
    number state, buffers and ``.grad`` are left as they were. Both vectors are taken after the non-linearity.

    Args:
        x, y: one batch; moved to ``device``, by default that of the model's first parameter.
        loss_fn: ``loss_fn(output, y)``, a scalar.

    Returns:
        Tap name → `Alignment` with ``cosine`` [rows]. A row where either vector is zero has cosine 0.
    """
    if not isinstance(model, DFA):
        raise TypeError(f"model: got {type(model).__name__}, expected a dfa_kernels.DFA")
    where = device if device is not None else next(model.parameters()).device
    x, y = x.to(where), y.to(where)
    observed = _ObservedPass(model._policy, whole(model._surveyed, (x,), {}).weight_layers)
    # Batch norm's backward pass reads the buffers of its forward pass, so they are restored after both.
    with restored(model.net), torch.enable_grad():
        with observed:
            output = whole(model._run, x)
        segments = observed.segments
        points = [output, *[segment.tap for segment in segments]]
        error, *true = torch.autograd.grad(loss_fn(output, y), points, materialize_grads=True)
    rows, error_size = error_shape(output, model.batch_dims)
    error = error.reshape(math.prod(rows), error_size)
    names = tap_names(model.net, [segment.origin for segment in segments], model._called(observed.calls))
    found = {}
    for name, segment, gradient in zip(names, segments, true, strict=True):
        places = model._row_dims.of(segment, rows)
        by_rows = gradient.movedim(places, tuple(range(len(rows)))).reshape(math.prod(rows), -1)
        found[name] = _align(model.feedback, error, by_rows)
    return found


def _align(feedback: Feedback, error: Tensor, true: Tensor) -> Alignment:
    """Rows of e B_iᵀ [R, l_i] against those of the true gradient [R, l_i]."""
    projected = feedback.project(error, true.shape[1])
    cosine = F.cosine_similarity(projected.double(), true.double(), dim=1, eps=0).nan_to_num(0.0)
    return Alignment(cosine, cosine.mean().item(), cosine.std(correction=0).item())
