"""Which calls of torch functions are weight layers: products of an activation with a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import Args, Call, Kwargs
from .known import KnownTensors, Operand

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
FORMING: frozenset[Call] = RESHAPED | MASKED | frozenset(PRODUCTS)


@dataclass(slots=True, eq=False)
class WeightCall:
    """The operands of a weight layer: activations, and the weights or the parameters that they are forms of."""

    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    opaque: bool
    """Whether it ends in no product that an observer sees."""
    units_at: int | None
    """The dimension of its result that is its units, 1 or -1; those before it are the input's. None: not known."""


def bind(func: Call, args: Args, kwargs: Kwargs, tensors: KnownTensors) -> WeightCall | None:
    """The operands of one of the `WEIGHT_CALLS`, if it multiplies an activation by a weight."""
    if func in LAYERS:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        parameters = (weight,) if type(weight) is nn.Parameter else tensors.of(weight).weights or (weight,)
        return WeightCall((args[0],), parameters, False, -1 if func is LINEAR else 1)
    factors = tensors.operands(args[PRODUCTS.get(func, 0) :], kwargs)
    weights = [parameter for _, known in factors for parameter in known.weights]
    inputs = [x for x, known in factors if not known.weights][: OPAQUE.get(func, 2)]
    if not weights or not inputs:
        return None
    opaque = func in OPAQUE
    ends_in_units = not opaque and func is not torch.einsum and bool(factors[-1][1].weights)
    return WeightCall(tuple(inputs), tuple(weights), opaque, -1 if ends_in_units else None)


def form(func: Call, args: Args, operands: list[Operand], result: Tensor) -> tuple[Tensor, ...]:
    """The parameters that the result of one of the `FORMING` calls is another form of; none of an activation."""
    parameters = [parameter for _, known in operands for parameter in known.weights]
    if not parameters:
        return ()
    if func in RESHAPED:
        # A table that is looked up is none.
        is_form = not any(isinstance(x, Tensor) for x in args[1:])
    elif func in MASKED:
        is_form = any(known.weights and x.shape == result.shape for x, known in operands[: len(args)])
    else:
        is_form = all(known.weights for _, known in operands)
    return tuple(parameters) if is_form else ()
