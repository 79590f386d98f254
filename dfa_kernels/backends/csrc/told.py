"""What a library is told of a call of `layer_grads` or `layer_update_`, but for the addresses and the schedule."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...updates import RULES as UPDATE_RULES
from .arguments import ACTIVATIONS, DTYPES, RULES
from .looks import Looks
from .projected import projected


class Gradients(NamedTuple):
    """Those that are wanted, in the order of the operators."""

    shapes: tuple[tuple[int, ...], ...]
    weights: tuple[int, ...]
    biases: tuple[int, ...]
    """Which of them belongs to each layer; -1 where a layer wants none."""


NO_GRADIENTS = Gradients((), (), ())


class Told(NamedTuple):
    """The arguments' numbers, of all layers and of each."""

    numbers: dict[str, Any]
    layers: list[dict[str, Any]]
    dtype: torch.dtype
    """Of the activations."""
    widest: int
    """Units of the widest tap: rows of U that are needed."""


def sizes_of(looks: Looks) -> list[tuple[int, int, int, int]]:
    """Rows of the error, positions, inputs and outputs of every layer."""
    rows, widths_out = looks.error.shape[0], [shape[1] for shape in looks.saved]
    widths_out += [looks.error.shape[1]] * (len(looks.inputs) - len(looks.saved))
    return [
        (rows, n // rows if rows else 1, width, out) for (n, width), out in zip(looks.inputs, widths_out, strict=True)
    ]


def units_of(looks: Looks) -> list[int]:
    """Of every hidden layer's tap."""
    return [t * out for _, t, _, out in sizes_of(looks)[: len(looks.saved)]]


def gradients_of(looks: Looks) -> Gradients:
    """The gradients that the call wants."""
    shapes: list[tuple[int, ...]] = []
    weights, biases = [], []
    for (_, _, width, out), wants_weight, wants_bias in zip(
        sizes_of(looks), looks.weight_grads, looks.bias_grads, strict=True
    ):
        weights.append(len(shapes) if wants_weight else -1)
        shapes += [(out, width)] * wants_weight
        biases.append(len(shapes) if wants_bias else -1)
        shapes += [(out,)] * wants_bias
    return Gradients(tuple(shapes), tuple(weights), tuple(biases))


def told(looks: Looks, gradients: Gradients, source: str) -> Told:
    """What a library is told, with U from this source."""
    assert looks.dtype is not None
    (dtype,) = looks.dtypes
    units = units_of(looks)
    numbers, scales = projected(looks.error, units, source)
    numbers |= dict(
        hidden=len(units), dtype=DTYPES[dtype], parameter_dtype=DTYPES[looks.dtype], rule=RULES[looks.rule],
    )  # fmt: skip
    layers: list[dict[str, Any]] = [
        dict(width_in=width, width_out=out, positions=t, channels=1, weight_set=_set(looks, w), bias_set=_set(looks, b))
        for (_, t, width, out), w, b in zip(sizes_of(looks), gradients.weights, gradients.biases, strict=True)
    ]
    for i, (name, scale) in enumerate(zip(looks.activations, scales, strict=True)):
        p, q = looks.parameters[2 * i : 2 * i + 2]
        layers[i] |= dict(activation=ACTIVATIONS[name], scale=scale, p=p, q=q)
    return Told(numbers, layers, dtype, max(units, default=0))


def _set(looks: Looks, parameter: int) -> int:
    return looks.sets[parameter] if looks.sets and parameter >= 0 else 0


def tensors_of(looks: Looks, gradients: Gradients) -> list[tuple[str, int]]:
    """The tensors of the call but for the shared ones, in the operators' order: (what, layer)."""
    names = [("x", i) for i in range(len(looks.inputs))] + [("saved", i) for i in range(len(looks.saved))]
    names += [("mask", i) for i, there in enumerate(looks.masks) if there]
    owners = {slot: ("weight", i) for i, slot in enumerate(gradients.weights)}
    owners |= {slot: ("bias", i) for i, slot in enumerate(gradients.biases)}
    of_parameters = [owners[slot] for slot in range(len(gradients.shapes))]
    states = len(UPDATE_RULES[looks.rule].state) if looks.rule in UPDATE_RULES else 0
    of_state = [(f"{kind}_state{which}", i) for kind, i in of_parameters for which in range(states)]
    return names + of_parameters + of_state
