"""What the operators have to give, in plain torch in any precision, apart from the package's own arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from bench.cpu.projection import written_out
from bench.gpu.precision import TruncatedProducts, tf32
from bench.gpu.reference import complaint, deviation_of
from dfa_kernels.feedback.fastfood import block_rows
from dfa_kernels.updates import RULES


class Batch(NamedTuple):
    """What a pass leaves: the error [b, E], every layer's input, every hidden layer's output by tanh."""

    error: Tensor
    inputs: list[Tensor]
    saved: list[Tensor]

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch(self.error.to(dtype), [x.to(dtype) for x in self.inputs], [h.to(dtype) for h in self.saved])


Formula = Callable[[torch.dtype], list[Tensor]]
"""The results, computed in a dtype."""

OPTIMIZERS: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr),
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr),
}
STEPS_BEFORE = 999
"""That AdamW has made."""


@lru_cache(maxsize=5)
def feedback_matrix(kind: str, units: int, error_size: int, device: torch.device) -> Tensor:
    """U with seed 0, before any scale: [units, error_size] in float64."""
    d = block_rows(error_size)
    blocks = [written_out(kind, block, d, error_size) for block in range(-(-units // d))]
    return torch.cat(blocks)[:units].to(device, torch.float64)


def projected(error: Tensor, U: Tensor, units: int) -> Tensor:
    """e Bᵀ: [batch, units], in the error's precision."""
    B = U[:units] / math.sqrt(units * U.shape[1])
    return error @ B.to(error.dtype).t()


def deltas(batch: Batch, U: Tensor) -> list[Tensor]:
    """δ of every hidden layer."""
    return [torch.ops.aten.tanh_backward(projected(batch.error, U, h.shape[1]), h) for h in batch.saved]


def gradients(batch: Batch, U: Tensor) -> list[Tensor]:
    """Of every layer's weight and bias."""
    found = []
    for delta, x in zip([*deltas(batch, U), batch.error], batch.inputs, strict=True):
        found += [delta.t() @ x, delta.sum(0)]
    return found


def updated(
    rule: str, weights: Sequence[Tensor], state: Sequence[Tensor], gradients: Sequence[Tensor], lr: float
) -> list[Tensor]:
    """Weights and then state after a step of torch's optimizer, in the gradients' precision."""
    names, each = RULES[rule].state, len(RULES[rule].state)
    new = [weight.to(g.dtype, copy=True) for weight, g in zip(weights, gradients, strict=True)]
    optimizer, kept = OPTIMIZERS[rule](new, lr), []
    for i, (parameter, gradient) in enumerate(zip(new, gradients, strict=True)):
        parameter.grad = gradient
        own = [tensor.to(gradient.dtype, copy=True) for tensor in state[i * each : (i + 1) * each]]
        optimizer.state[parameter] = dict(zip(names, own, strict=True))
        if rule == "adamw":
            optimizer.state[parameter]["step"] = torch.tensor(float(STEPS_BEFORE))
        kept += own
    optimizer.step()
    return new + kept


def butterfly(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of the last dimension, a power of two, by sums and differences of pairs."""
    n, shape = 1, x.shape
    while n < shape[-1]:
        a, b = x.reshape(-1, 2, n).unbind(1)
        x, n = torch.stack([a + b, a - b], 1), 2 * n
    return x.reshape(shape)


@dataclass(frozen=True)
class Expected:
    """A call's right results, and how far plain torch in the precision that is timed is from each of them."""

    exact: list[Tensor]
    baselines: list[float]

    def check(self, found: Sequence[Tensor]) -> tuple[float, float]:
        """How far the worst result is off, and what it may be: twice the baseline. AssertionError if that is not so."""
        assert len(found) == len(self.exact), f"{len(found)} of {len(self.exact)} results are there"
        each = []
        for i, (tensor, exact, baseline) in enumerate(zip(found, self.exact, self.baselines, strict=True)):
            tiny = 4 * torch.finfo(tensor.dtype).eps * _largest(exact)
            error, allowed = _distance(tensor, exact), 2 * baseline + tiny
            if not error <= allowed:
                wrong = deviation_of(f"result {i} {list(tensor.shape)}", tensor, exact, allowed)
                raise AssertionError(complaint(wrong.row()))
            each.append((error, allowed))
        return max(each, key=lambda pair: pair[0] / pair[1])


def expected(formula: Formula, dtype: torch.dtype, may_be_tf32: bool = False) -> Expected:
    """may_be_tf32: factors of float32 products may be rounded to tf32, or cut to it, as tensor cores do."""
    exact = formula(torch.float64)
    with tf32(may_be_tf32):
        ways = [formula(dtype)]
    if may_be_tf32:
        with tf32(False), TruncatedProducts():
            ways.append(formula(dtype))
    baselines = [max(_distance(way[i], tensor) for way in ways) for i, tensor in enumerate(exact)]
    return Expected(exact, baselines)


def _distance(a: Tensor, exact: Tensor) -> float:
    """The largest difference; NaN if there is one."""
    return _largest(a.double() - exact)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()
