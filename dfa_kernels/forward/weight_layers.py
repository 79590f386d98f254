"""Which calls of torch functions are weight layers: products of an activation with a parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tensor_map import TensorMap

Call = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
T: Any = Tensor

LINEAR = F.linear
CONVOLUTIONS: frozenset[Call] = frozenset({F.conv1d, F.conv2d, F.conv3d})
TRANSPOSED: frozenset[Call] = frozenset({F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d})
# Their second argument is the weight, whatever it was made from.
LAYERS: frozenset[Call] = frozenset({LINEAR}) | CONVOLUTIONS | TRANSPOSED

# Products of any two tensors, with the number of arguments before the factors.
PRODUCTS: dict[Call, int] = {
    **dict.fromkeys((torch.matmul, T.matmul, T.__matmul__, torch.mm, T.mm, torch.bmm, T.bmm), 0),
    **dict.fromkeys((torch.addmm, T.addmm, torch.baddbmm, T.baddbmm), 1),
    **dict.fromkeys((torch.einsum, torch.tensordot, F.bilinear), 0),
}
# Modules of several products with activations between them, which no observer sees; with the number of activations
# that they take as their first arguments.
OPAQUE: dict[Call, int] = {
    F.multi_head_attention_forward: 3,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), 1),
    **dict.fromkeys((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), 1),
}
WEIGHT_CALLS: frozenset[Call] = LAYERS | frozenset(PRODUCTS) | frozenset(OPAQUE)
MODULES = (
    nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d, nn.RNNBase, nn.RNNCellBase,
)  # fmt: skip

# What makes of a parameter another form of the same weight.
RESHAPED: frozenset[Call] = frozenset(
    {
        T.t, T.T.__get__, T.mT.__get__, T.transpose, T.permute, T.view, T.reshape, T.expand, T.unsqueeze, T.squeeze,
        T.flatten, T.__getitem__, T.contiguous, T.to, T.type_as, T.float, T.double, T.half, T.bfloat16, torch.t,
        torch.transpose, torch.permute, torch.reshape, torch.unsqueeze, torch.squeeze, torch.flatten,
    }
)  # fmt: skip
MASKED: frozenset[Call] = frozenset({T.mul, T.__mul__, T.__rmul__, torch.mul, T.div, T.__truediv__, torch.div})


@dataclass(frozen=True, slots=True)
class WeightCall:
    """The operands of a weight layer: activations, and the weights or the parameters that they are forms of."""

    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    opaque: bool
    """Whether it ends in no product that an observer sees."""
    units_at: int | None
    """The dimension of its result that is its units, 1 or -1; those before it are the input's. None: not known."""


class Weights:
    """Tells weights from activations in one forward pass: parameters, and what is made of parameters alone."""

    def __init__(self) -> None:
        self._made: TensorMap[tuple[Tensor, ...]] = TensorMap()

    def of(self, x: Any) -> tuple[Tensor, ...]:
        """The parameters that x is a form of; none if it is an activation."""
        return (x,) if isinstance(x, nn.Parameter) else self._made.get(x) or ()

    def bind(self, func: Call, args: Args, kwargs: Kwargs) -> WeightCall | None:
        """The operands, if the call multiplies an activation by a weight."""
        if func in LAYERS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            return WeightCall((args[0],), self.of(weight) or (weight,), False, -1 if func is LINEAR else 1)
        factors = list(tensors_in(args[PRODUCTS.get(func, 0) :], kwargs))
        weights = [parameter for x in factors for parameter in self.of(x)]
        inputs = [x for x in factors if not self.of(x)][: OPAQUE.get(func, 2)]
        if not weights or not inputs:
            return None
        opaque = func in OPAQUE
        ends_in_units = not opaque and func is not torch.einsum and bool(self.of(factors[-1]))
        return WeightCall(tuple(inputs), tuple(weights), opaque, -1 if ends_in_units else None)

    def follow(self, func: Call, args: Args, kwargs: Kwargs, result: Any) -> None:
        """Remembers a result that is a weight, too."""
        if not isinstance(result, Tensor):
            return
        if func in RESHAPED:
            # A table that is looked up is none.
            is_weight = not any(isinstance(x, Tensor) for x in args[1:])
        elif func in MASKED:
            is_weight = any(self.of(x) and x.shape == result.shape for x in args)
        else:
            is_weight = func in PRODUCTS and all(self.of(x) for x in tensors_in(args, kwargs))
        if is_weight:
            parameters = [parameter for x in tensors_in(args, kwargs) for parameter in self.of(x)]
            if parameters:
                self._made.set(result, tuple(parameters))


def tensors_in(args: Args, kwargs: Kwargs) -> Iterator[Tensor]:
    """The tensors among a call's arguments, those in lists included."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (x for x in value if isinstance(x, Tensor))


def replaced(args: Args, kwargs: Kwargs, change: Callable[[Tensor], Tensor]) -> tuple[Args, Kwargs]:
    """The arguments of a call with every tensor changed, those in lists included."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if type(value) in (list, tuple):
            return type(value)([one(x) for x in value])
        return value

    return tuple([one(value) for value in args]), {name: one(value) for name, value in kwargs.items()}


def input_first(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """The arguments of ``f(input, …)``, the input among the positional ones."""
    if args:
        return args, kwargs
    rest = dict(kwargs)
    return (rest.pop("input"),), rest
