"""What every variant has to compute, in plain torch in any precision; in float64 it is the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.cases import Problem
from bench.gpu.precision import TruncatedProducts, tf32

Gradients = list[Tensor]
"""Of every weight and bias, in the order of the network's parameters."""

VISIBLE = 0.25
"""The check's learning rate moves every tensor by this share of its largest entry, so that no rounding hides it."""
TILE = 128
"""Rows and columns of what is counted as one tile, and numbers of a bias."""


@torch.no_grad()
def gradients(rule: str, weights: Sequence[Tensor], x: Tensor, target: Tensor, U: Tensor) -> Gradients:
    """By "BP" or "DFA", for classes [batch] as target, or for a given error [batch, classes]."""
    layers = list(zip(weights[0::2], weights[1::2], strict=True))
    outputs = [x]
    for i, (weight, bias) in enumerate(layers):
        a = torch.addmm(bias, outputs[-1], weight.t())
        outputs.append(a.tanh_() if i < len(layers) - 1 else a)
    error = target if target.is_floating_point() else _error(outputs[-1], target)
    found: Gradients = []
    delta = error
    for i in reversed(range(len(layers))):
        if i < len(layers) - 1:
            chained = delta @ layers[i + 1][0] if rule == "BP" else _projected(error, U, len(layers[i][1]))
            delta = torch.ops.aten.tanh_backward(chained, outputs[i + 1])
        found += [delta.sum(0), delta.t() @ outputs[i]]
    return found[::-1]


def _error(output: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        output = output.detach().requires_grad_()
        (error,) = torch.autograd.grad(F.cross_entropy(output, y), output)
    return error


def _projected(error: Tensor, U: Tensor, size: int) -> Tensor:
    return error @ (U[:size].to(error.dtype) / math.sqrt(size * U.shape[1])).t()


@dataclass(frozen=True)
class Deviation:
    """Of one tensor, the one that fares worst. A number that is not finite is wrong, whatever is allowed."""

    tensor: str
    error: float
    allowed: float
    wrong_tiles: int
    """Tiles with a number that is off by more than what is allowed, of ``tiles``."""
    tiles: int
    repeats: bool | None = None
    """Whether a second run made the same bits; None if there was none."""

    @property
    def correct(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.allowed

    @property
    def badness(self) -> float:
        """How many times what is allowed."""
        ratio = self.error / self.allowed
        return math.inf if math.isnan(ratio) else ratio

    def row(self) -> dict[str, Any]:
        """For the results. Where it is wrong is said only if it is."""
        row: dict[str, Any] = {
            "correct": self.correct,
            "error": self.error,
            "allowed": self.allowed,
            "repeats": self.repeats,
        }
        if not self.correct:
            row |= {"tensor": self.tensor, "wrong_tiles": self.wrong_tiles, "tiles": self.tiles}
        return row


def name_of(i: int, tensor: Tensor) -> str:
    """Of the i-th parameter, or its gradient: a weight and a bias of every layer, counted from 0."""
    return f"{('weight', 'bias')[i % 2]} {i // 2} {list(tensor.shape)}"


def deviation_of(name: str, found: Tensor, exact: Tensor, allowed: float) -> Deviation:
    """exact: in float64."""
    off = (found.double() - exact).abs()
    beyond = (off.isfinite() & (off <= allowed)).logical_not_().float().reshape(-1, off.shape[-1])
    tiles = F.max_pool2d(beyond[None], TILE, ceil_mode=True)
    return Deviation(name, off.max().item(), allowed, int(tiles.sum()), tiles.numel())


def complaint(row: Mapping[str, Any]) -> str:
    """What a row of a wrong result says. Results of older versions do not say where it is wrong."""
    where = f"wrong: {row['tensor']}, " if "tensor" in row else "wrong result: "
    # Numbers that JSON does not have come back from it as strings.
    words = [f"{where}off by {float(row['error']):.1e}", f"allowed {float(row['allowed']):.1e}"]
    if "tiles" in row:
        words.append(f"in {row['wrong_tiles']} of {row['tiles']} tiles")
    if row.get("repeats") is not None:
        words.append("the same each time" if row["repeats"] else "differently each time")
    return ", ".join(words)


class MissingResultsError(Exception):
    """There are fewer tensors than the network has parameters."""


@dataclass
class Reference:
    """Right values for one rule and one target, and how far plain torch in the same precision is from them."""

    exact: Gradients
    plain: list[Gradients]
    weights: list[Tensor]
    learning_rate: float

    def check(self, compute: Callable[[], Sequence[Tensor]], updated: bool) -> Deviation:
        """Of gradients, or of weights after one step, computed twice; the worse of the two where they differ.

        Raises MissingResultsError.
        """
        # A second run may change the first one's tensors.
        first = [tensor.clone() for tensor in compute()]
        second = list(compute())
        repeats = len(first) == len(second) and all(map(_same_bits, first, second))
        runs = [first] if repeats else [first, second]
        worst = max((self.deviation(found, updated) for found in runs), key=lambda deviation: deviation.badness)
        return replace(worst, repeats=repeats)

    def deviation(self, found: Sequence[Tensor], updated: bool) -> Deviation:
        """Of gradients, or of weights after one step. Raises MissingResultsError."""
        if len(found) != len(self.exact):
            raise MissingResultsError(f"{len(found)} of {len(self.exact)} results are there")
        each = [self._deviation(i, tensor, updated) for i, tensor in enumerate(found)]
        return max(each, key=lambda deviation: deviation.badness)

    def _deviation(self, i: int, found: Tensor, updated: bool) -> Deviation:
        exact, plain = self.exact[i], [gradients[i] for gradients in self.plain]
        if updated:
            before, rate = self.weights[i], self.learning_rate
            exact = before.double() - rate * exact
            plain = [(before.double() - rate * p.double()).to(before.dtype) for p in plain]
        tiny = 4 * torch.finfo(found.dtype).eps * _largest(exact) + 1e-300
        baseline = max(_largest(p.double() - exact) for p in plain)
        return deviation_of(name_of(i, found), found, exact, 2 * baseline + tiny)


def make_reference(problem: Problem, rule: str, given_error: bool) -> Reference:
    """For the error that `problem` gives, or for its classes from a forward pass."""
    weights = [p.detach() for p in problem.net.parameters()]
    target = problem.error if given_error else problem.y
    exact = _in_precision(problem, rule, weights, target, torch.float64)
    with tf32(problem.case.tf32):
        plain = [_in_precision(problem, rule, weights, target, problem.case.torch_dtype)]
    if problem.case.tf32:
        with tf32(False), TruncatedProducts():
            plain.append(_in_precision(problem, rule, weights, target, problem.case.torch_dtype))
    shares = [_largest(w) / _largest(g) for w, g in zip(weights, exact, strict=True)]
    return Reference(exact, plain, weights, VISIBLE * max(shares))


def _in_precision(problem: Problem, rule: str, weights: list[Tensor], target: Tensor, dtype: torch.dtype) -> Gradients:
    target = target.to(dtype) if target.is_floating_point() else target
    return gradients(rule, [w.to(dtype) for w in weights], problem.x.to(dtype), target, problem.U)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # As bytes, since a NaN equals nothing, and minus zero equals zero.
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
