"""The networks of the experiments: fully connected and convolutional, for images of any size from 8 x 8 up.

The order in a layer is weights, dropout, activation, batch norm (then pooling, in the convolutional network).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

CHANNELS = (32, 64, 64)
CNN_UNITS = 128


class Abs(nn.Module):
    """|x|."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "abs": Abs,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "hardtanh": nn.Hardtanh,
}
ACTIVATION_NAMES = f"{', '.join(ACTIVATIONS)} or leaky:SLOPE with a finite SLOPE"


def activation_maker(name: str) -> Callable[[], nn.Module]:
    """What makes the activation called `name`; in "leaky:SLOPE" the slope has any sign. Else ValueError."""
    kind, _, slope = name.partition(":")
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    try:
        value = float(slope) if kind == "leaky" else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"got {name!r}, expected {ACTIVATION_NAMES}")
    return partial(nn.LeakyReLU, value)


@dataclass(frozen=True)
class Style:
    """What every layer of a network has in common. The dropout rates are those of the paper's three kinds."""

    activation: str = "tanh"
    input_dropout: float = 0.0
    linear_dropout: float = 0.0
    conv_dropout: float = 0.0
    batch_norm: bool = False

    def finish(self, number: str, dropout: nn.Module, norm: nn.Module) -> list[tuple[str, nn.Module]]:
        """What follows the weights of a hidden layer, by name."""
        parts = dropped(f"dropout{number}", dropout)
        parts.append((f"activation{number}", activation_maker(self.activation)()))
        return parts + ([(f"norm{number}", norm)] if self.batch_norm else [])


def mlp(shape: Sequence[int], widths: Sequence[int], classes: int, style: Style) -> nn.Sequential:
    """Fully connected: images of `shape` are flattened, hidden layers fc1, fc2, … have `widths` units."""
    first = dropped("input_dropout", nn.Dropout(style.input_dropout))
    sizes = [math.prod(shape), *widths]
    return named([("flatten", nn.Flatten()), *first, *linear_layers(sizes, classes, style)])


def cnn(shape: Sequence[int], classes: int, style: Style) -> nn.Sequential:
    """Three convolutions, each with activation and max pooling, then a hidden layer of 128 units.

    5 x 5 kernels and overlapping pooling 3/2 as in the paper, or 3 x 3 and 2/2 for images they would use up.
    """
    side = min(shape[1:])
    large = side >= 15
    parts = dropped("input_dropout", nn.Dropout2d(style.input_dropout))
    for i, (inputs, outputs) in enumerate(pairwise([shape[0], *CHANNELS]), start=1):
        parts += conv_layer(f"{i}", inputs, outputs, large, style)
    pixels = math.prod(pooled(size, large) for size in shape[1:])
    sizes = [CHANNELS[-1] * pixels, CNN_UNITS]
    return named([*parts, ("flatten", nn.Flatten()), *linear_layers(sizes, classes, style)])


def conv_layer(number: str, inputs: int, outputs: int, large: bool, style: Style) -> list[tuple[str, nn.Module]]:
    kernel = 5 if large else 3
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    rest = style.finish(f"_conv{number}", nn.Dropout2d(style.conv_dropout), nn.BatchNorm2d(outputs))
    return [(f"conv{number}", convolution), *rest, (f"pool{number}", nn.MaxPool2d(3 if large else 2, 2))]


def linear_layers(sizes: Sequence[int], classes: int, style: Style) -> list[tuple[str, nn.Module]]:
    """Hidden layers fc1, fc2, … from sizes[0] features to sizes[-1] units, and the output layer "out"."""
    parts: list[tuple[str, nn.Module]] = []
    for i, (inputs, units) in enumerate(pairwise(sizes), start=1):
        rest = style.finish(f"_fc{i}", nn.Dropout(style.linear_dropout), nn.BatchNorm1d(units))
        parts += [(f"fc{i}", nn.Linear(inputs, units)), *rest]
    return [*parts, ("out", nn.Linear(sizes[-1], classes))]


def pooled(size: int, large: bool) -> int:
    """What three poolings leave of `size` pixels."""
    for _ in CHANNELS:
        size = (size - 3) // 2 + 1 if large else size // 2
    return size


def dropped(name: str, dropout: nn.Module) -> list[tuple[str, nn.Module]]:
    """The dropout layer, or nothing where its rate is 0."""
    return [(name, dropout)] if getattr(dropout, "p", 0.0) else []


def named(parts: Sequence[tuple[str, nn.Module]]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))
