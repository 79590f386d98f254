"""Calls with more layers than one launch takes, in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from .calls import DeviceNumbers, LayerCall


def split(call: LayerCall, most: int) -> Iterator[LayerCall]:
    """The call in parts of at most so many layers, in their order; the last one has the output layer."""
    for first in range(0, len(call.inputs), most):
        here = slice(first, first + most)
        yield call._replace(
            inputs=call.inputs[here],
            saved=call.saved[here],
            dropout_mask=call.dropout_mask[here],
            activations=call.activations[here],
            parameters=call.parameters[2 * first : 2 * here.stop],
            weight_grads=call.weight_grads[here],
            bias_grads=call.bias_grads[here],
        )


def split_update(
    call: LayerCall,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    hyper: Sequence[float] | DeviceNumbers,
    most: int,
) -> Iterator[tuple[LayerCall, Sequence[Tensor], Sequence[Tensor], Sequence[float] | DeviceNumbers]]:
    """Each part of the call, with its parameters, their state and their numbers."""
    first, each = 0, len(state) // len(weights)
    for part in split(call, most):
        end = first + sum(part.weight_grads) + sum(part.bias_grads)
        if isinstance(hyper, DeviceNumbers):
            own: Sequence[float] | DeviceNumbers = hyper._replace(rows=hyper.rows[first:end])
        else:
            numbers = len(hyper) // len(weights)
            own = hyper[first * numbers : end * numbers]
        yield part, weights[first:end], state[first * each : end * each], own
        first = end
