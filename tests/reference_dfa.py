"""Direct Feedback Alignment of a network that is cut by hand, written apart from the package that it checks.

The network says itself where its taps are: it calls ``tap(h, name, rows)`` there. Each place keeps h with its graph,
the network goes on without one, and autograd finishes every piece on its own: the pieces that end at taps from e Bᵀ,
what is behind them from e.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Place:
    """A tap: h with the graph of its segment, the leaf that the network goes on with, h's dimensions that are rows."""

    name: str
    h: Tensor
    leaf: Tensor
    rows: tuple[int, ...]

    @property
    def units(self) -> tuple[int, ...]:
        return tuple(n for i, n in enumerate(self.h.shape) if i not in self.rows)


class Cuts:
    """The callback that cuts. ``traced``: into leaves that the pieces behind them can be differentiated by."""

    def __init__(self, batch_dims: int, traced: bool = False) -> None:
        self.places: list[Place] = []
        self.batch_dims = batch_dims
        self.traced = traced

    def __call__(self, h: Tensor, name: str, rows: tuple[int, ...] = (0,)) -> Tensor:
        self.places.append(Place(name, h, h.detach().requires_grad_(self.traced), rows[: self.batch_dims]))
        return self.places[-1].leaf


def reference_gradients(
    net: nn.Module,
    inputs: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    matrix: Callable[[int, int], Tensor],
    batch_dims: int,
    output: Callable[[Any], Tensor] = lambda y: y,
    side: Callable[[nn.Module], Tensor] | None = None,
) -> tuple[list[Tensor | None], list[Place]]:
    """Gradients of ``net.parameters()`` and the taps.

    ``matrix(units, E)`` is B [units, E]. ``batch_dims``: how many leading dimensions of the output are rows.
    ``side(net)``: a term of the loss from what the pass left in ``net``; its gradient ends where the network is cut.
    """
    cuts = Cuts(batch_dims)
    y = output(net(*inputs, tap=cuts))
    e = error_of(y, loss)
    ends = [(y, e)]
    for place in cuts.places:
        if place.h.requires_grad:
            ends.append((place.h, delta(e, place, matrix, batch_dims)))
    if side is not None:
        term = side(net)
        ends.append((term, torch.ones_like(term)))
    return summed_gradients(net, ends), cuts.places


def error_of(y: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = y.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def delta(e: Tensor, place: Place, matrix: Callable[[int, int], Tensor], batch_dims: int) -> Tensor:
    """e Bᵀ in the tap's shape: row r of e goes to the elements of h whose row dimensions are at r."""
    error = e.reshape(*e.shape[:batch_dims], -1)
    B = matrix(math.prod(place.units), error.shape[-1]).to(e.dtype)
    projected = (error @ B.T).reshape(*e.shape[:batch_dims], *place.units)
    return projected.movedim(tuple(range(batch_dims)), place.rows)


def summed_gradients(net: nn.Module, ends: list[tuple[Tensor, Tensor]]) -> list[Tensor | None]:
    """Σ over the ends of the gradient that each of them sends to the parameters; None where none comes."""
    learning = [p for p in net.parameters() if p.requires_grad]
    sums: dict[Tensor, Tensor] = {}
    for end, gradient in ends:
        found = torch.autograd.grad(end, learning, gradient, allow_unused=True, retain_graph=True)
        for p, g in zip(learning, found, strict=True):
            if g is not None:
                sums[p] = sums[p] + g if p in sums else g
    return [sums.get(p) for p in net.parameters()]


def chained_gradients(
    net: nn.Module,
    inputs: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    output: Callable[[Any], Tensor] = lambda y: y,
) -> list[Tensor | None]:
    """The same pieces, each from its tap's true gradient: backpropagation, if the places cut the network rightly."""
    cuts = Cuts(0, traced=True)
    y = output(net(*inputs, tap=cuts))
    ends = [(y, error_of(y, loss))]
    for place in reversed(cuts.places):
        pulls = [torch.autograd.grad(end, place.leaf, g, allow_unused=True, retain_graph=True)[0] for end, g in ends]
        ends.append((place.h, sum((pull for pull in pulls if pull is not None), torch.zeros_like(place.h))))
    return summed_gradients(net, ends)
