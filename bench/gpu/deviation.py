"""How far a result is from the right one, where, and whether it repeats: a wrong kernel told from an inexact one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

TILE = 128
"""Rows and columns of what is counted as one tile, and numbers of a bias."""


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
