"""Optimizer rules, each written once: for a gradient that exists, and for one that is only a product δᵀ x.

`rule_(parameter, state, hyper, gradient)` updates in place. Where the rule is linear in the gradient,
`product_rule_` lets the matrix product add straight into its destination, so that no gradient is ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ._torch_internals import add_each_, fused_adamw_, fused_sgd_

# CPU kernels for a product of few rows add term by term into the destination and round each time, which for an output
# layer of 10 rows costs a factor of 20 in accuracy. A gradient this small is stored at no cost.
SMALL = 2**16

# exp of it is 0 in double precision too, and no step count times it is NaN.
LOG_OF_ZERO = -1e4

T = TypeVar("T")
State = Sequence[Tensor]
Hyper = Sequence[float]
Row = Sequence[Tensor | float]


@dataclass(frozen=True)
class UpdateRule:
    """How one optimizer changes a parameter."""

    apply_: Callable[[Tensor, State, Hyper, Tensor], None]
    """(parameter, state, hyper, gradient): the update from a gradient."""
    apply_each_: Callable[[Sequence[Tensor], State, Hyper, Sequence[Tensor]], None]
    """(parameters, state, hyper of each, gradients): of several with state at once, by torch's own fused rule."""
    apply_product_: Callable[[Tensor, State, Hyper, Tensor, Tensor], None]
    """(parameter, state, hyper, delta [n, out], x [n, in]): the update from the gradient deltaᵀ x."""
    state: tuple[str, ...]
    """The tensors that every parameter has beside it, by the names that torch's optimizer uses."""
    tile_numbers: Callable[..., tuple[float, ...]]
    """(*hyper) → what the kernels' epilogue takes. Differences from 1 are taken here, in double precision."""
    row: Callable[..., tuple[float, ...]]
    """(*hyper without AdamW's step) → a row of `DeviceNumbers`, but for that step, its last number. lr is the first."""
    apply_row_: Callable[[Tensor, State, Row, Tensor], None]
    """(parameter, state, row, gradient): the update from a gradient, whose numbers no host needs to know."""
    counts: bool = False
    """Whether a parameter's updates are counted."""
    with_state: str = ""
    """The row for parameters that have state, if it is another."""


def sgd_(parameter: Tensor, state: State, hyper: Hyper, gradient: Tensor) -> None:
    lr, momentum, weight_decay, nesterov = hyper
    if gradient.dtype != parameter.dtype:
        gradient = gradient.to(parameter.dtype)
    if momentum and _can_be_fused([parameter, gradient, *state]):
        sgd_each_([parameter], state, hyper, [gradient])
        return
    if weight_decay:
        gradient = gradient.add(parameter, alpha=weight_decay)
    if not momentum:
        parameter.add_(gradient, alpha=-lr)
        return
    (velocity,) = state
    velocity.mul_(momentum).add_(gradient)
    parameter.add_(gradient.add(velocity, alpha=momentum) if nesterov else velocity, alpha=-lr)


def sgd_each_(parameters: Sequence[Tensor], state: State, hyper: Hyper, gradients: Sequence[Tensor]) -> None:
    """As `adamw_each_`, with momentum."""
    lr, momentum, weight_decay, nesterov = hyper
    numbers = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=bool(nesterov))
    fused_sgd_(parameters, gradients, state, **numbers)


def sgd_product_(parameter: Tensor, state: State, hyper: Hyper, delta: Tensor, x: Tensor) -> None:
    lr, momentum, weight_decay, nesterov = hyper
    if delta.dtype != parameter.dtype or nesterov or parameter.numel() <= SMALL:
        sgd_(parameter, state, hyper, delta.t() @ x)
    elif not momentum:
        parameter.addmm_(delta.t(), x, beta=1 - lr * weight_decay, alpha=-lr)
    else:
        (velocity,) = state
        velocity.addmm_(delta.t(), x, beta=momentum)
        if weight_decay:
            velocity.add_(parameter, alpha=weight_decay)
        parameter.add_(velocity, alpha=-lr)


def adamw_(parameter: Tensor, state: State, hyper: Hyper, gradient: Tensor) -> None:
    lr, beta1, beta2, eps, weight_decay, step = hyper
    mean, square = state
    gradient = gradient.to(parameter.dtype)
    if _can_be_fused([parameter, gradient, mean, square]):
        adamw_each_([parameter], state, hyper, [gradient])
        return
    parameter.mul_(1 - lr * weight_decay)
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (square.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    parameter.addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))


def adamw_each_(parameters: Sequence[Tensor], state: State, hyper: Hyper, gradients: Sequence[Tensor]) -> None:
    """Of all of them by the same numbers, in one call that reads and writes each once."""
    lr, beta1, beta2, eps, weight_decay, step = hyper
    numbers = dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    fused_adamw_(parameters, gradients, state[0::2], state[1::2], step, **numbers)


def adamw_product_(parameter: Tensor, state: State, hyper: Hyper, delta: Tensor, x: Tensor) -> None:
    adamw_(parameter, state, hyper, delta.t() @ x)


def sgd_row_(parameter: Tensor, state: State, row: Row, gradient: Tensor) -> None:
    lr, weight_decay, momentum, nesterov = row
    step = gradient.to(parameter.dtype) + parameter * weight_decay
    for velocity in state:
        moved = velocity * momentum + step
        # A group without momentum leaves its buffer alone.
        velocity.copy_(torch.where(torch.as_tensor(momentum) != 0, moved, velocity))
        step = torch.where(torch.as_tensor(nesterov) != 0, step + moved * momentum, moved)
    parameter.sub_(step * lr)


def adamw_row_(parameter: Tensor, state: State, row: Row, gradient: Tensor) -> None:
    lr, share1, beta2, share2, eps, weight_decay, log_beta1, log_beta2, step = row
    mean, square = state
    gradient = gradient.to(parameter.dtype)
    correction1, correction2 = (-torch.expm1(torch.as_tensor(step * log)) for log in (log_beta1, log_beta2))
    parameter.mul_(1 - lr * weight_decay)
    mean.add_((gradient - mean) * share1)
    square.mul_(beta2).add_(gradient * gradient * share2)
    denominator = square.sqrt() / correction2.sqrt() + eps
    parameter.sub_(mean / denominator * (lr / correction1))


def _sgd_row(lr: float, momentum: float, weight_decay: float, nesterov: float) -> tuple[float, ...]:
    return lr, weight_decay, momentum, nesterov


def _adamw_row(lr: float, beta1: float, beta2: float, eps: float, decay: float) -> tuple[float, ...]:
    """In float32 neither 1 - beta nor 1 - beta**step would be exact: the latter is made of the logarithm by expm1."""
    log1, log2 = (math.log(beta) if beta else LOG_OF_ZERO for beta in (beta1, beta2))
    return lr, 1 - beta1, beta2, 1 - beta2, eps, decay, log1, log2


def _sgd_numbers(lr: float, momentum: float, weight_decay: float, nesterov: float) -> tuple[float, ...]:
    return lr, weight_decay


def _momentum_numbers(lr: float, momentum: float, weight_decay: float, nesterov: float) -> tuple[float, ...]:
    return lr, weight_decay, momentum, nesterov


def _adamw_numbers(lr: float, beta1: float, beta2: float, eps: float, decay: float, step: float) -> tuple[float, ...]:
    rate = lr / (1 - beta1**step)
    return 1 - lr * decay, 1 - beta1, beta2, 1 - beta2, rate, math.sqrt(1 - beta2**step), eps


RULES: dict[str, UpdateRule] = {
    "sgd": UpdateRule(sgd_, sgd_each_, sgd_product_, (), _sgd_numbers, _sgd_row, sgd_row_, with_state="momentum"),
    "momentum": UpdateRule(sgd_, sgd_each_, sgd_product_, ("momentum_buffer",), _momentum_numbers, _sgd_row, sgd_row_),
    "adamw": UpdateRule(
        adamw_,
        adamw_each_,
        adamw_product_,
        ("exp_avg", "exp_avg_sq"),
        _adamw_numbers,
        _adamw_row,
        adamw_row_,
        counts=True,
    ),
}


def are_small(parameters: Sequence[Tensor]) -> bool:
    """Whether the gradients of all of them together are stored at no cost."""
    return sum(map(Tensor.numel, parameters)) <= SMALL


def update_each_(
    rule: str, parameters: Sequence[Tensor], state: State, hyper: Hyper, gradients: Sequence[Tensor]
) -> None:
    """Updates every parameter from its gradient; state and hyper hold an equal share for each.

    Between small products the calls themselves are what takes time: where one will do, it is one.
    """
    n = len(parameters)
    own = hyper[: len(hyper) // n]
    if list(hyper) == [*own] * n:
        if rule == "sgd" and not any(own[1:]):
            add_each_(parameters, gradients, -own[0])
            return
        # Without momentum a buffer is left alone.
        if state and own[1] and _can_be_fused([*parameters, *gradients, *state]):
            RULES[rule].apply_each_(parameters, state, own, gradients)
            return
    for p, own_state, own, gradient in zip(parameters, shares(state, n), shares(hyper, n), gradients, strict=True):
        RULES[rule].apply_(p, own_state, own, gradient)


def _can_be_fused(tensors: Sequence[Tensor]) -> bool:
    """Whether torch's own fused rules may update these.

    On a CPU they do not look at strides, and SGD's is wrong in bfloat16; on a GPU they need numbers there.
    """
    dtype = tensors[0].dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        return False
    return all([type(x) in _PLAIN and x.is_cpu and x.dtype is dtype and x.is_contiguous() for x in tensors])


_PLAIN = (Tensor, nn.Parameter)


def shares(values: Sequence[T], n: int) -> list[Sequence[T]]:
    """The values in n equal parts."""
    each = len(values) // n if n else 0
    return [values[i * each : (i + 1) * each] for i in range(n)]
