"""Tile shapes of the kernels, a committed table per GPU architecture (`configs.json`, rewritten by `bench.gpu.tune`).

Nothing is tuned while a network trains: a launch takes the first row of its list whose tiles fill the GPU, or the last.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

REGISTERS = 65536
"""Of a multiprocessor, on every GPU in the table."""
MOST_REGISTERS = 255
"""Of a thread."""

ARITHMETICS = ("half", "tf32", "ieee")
"""float16 and bfloat16; float32 through tensor cores; float32 in full."""


class HasRegisters:
    """What `programs` programs on each multiprocessor, `num_warps` warps each, leave a thread."""

    num_warps: int
    programs: int

    @property
    def registers(self) -> int | None:
        """Said to the compiler, which else picks an occupancy by itself and spills a little to reach it."""
        return min(MOST_REGISTERS, REGISTERS // (self.programs * self.num_warps * 32) // 8 * 8)


@dataclass(frozen=True)
class StripConfig(HasRegisters):
    """Tiles [block_m outputs, block_n inputs] of weight gradients; δ of at most `rows` rows, in parts of block_r."""

    block_m: int
    block_n: int
    block_r: int
    rows: int
    num_warps: int
    num_stages: int
    programs: int = 1


@dataclass(frozen=True)
class ProjectionConfig(HasRegisters):
    """Tiles [block_u units, block_r rows] of the projection, block_e components of the error at a time."""

    block_u: int
    block_r: int
    block_e: int
    num_warps: int
    num_stages: int
    programs: int = 1


@dataclass(frozen=True)
class TwoPhaseConfig(HasRegisters):
    """Both kinds of tiles, and how many programs run on each multiprocessor.

    needs_tma: without it, addresses and masks of the tiles would not fit into the registers beside the gradient.
    """

    block_u: int
    block_r: int
    block_e: int
    block_m: int
    block_n: int
    block_k: int
    group_m: int
    programs: int
    num_warps: int
    num_stages: int
    needs_tma: bool = False


@dataclass(frozen=True)
class DeltasConfig(ProjectionConfig):
    """The same of `deltas`, where U stays in the registers or e Uᵀ is given."""


@dataclass(frozen=True)
class GemmConfig(HasRegisters):
    """Tiles [block_m outputs, block_n inputs] of weight gradients, block_k rows at a time, of persistent programs.

    needs_tma: as for TwoPhaseConfig.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    programs: int
    num_warps: int
    num_stages: int
    needs_tma: bool = False


@dataclass(frozen=True)
class ProducerConfig(GemmConfig):
    """The same with a warp beside num_warps that loads ahead, as many tiles as there are stages."""

    @property
    def registers(self) -> None:
        """Triton divides them among warps that load and warps that multiply."""
        return None


@dataclass(frozen=True)
class Configs:
    """The table of one architecture and arithmetic; each list from large tiles to small."""

    strip: tuple[StripConfig, ...]
    two_phase: tuple[TwoPhaseConfig, ...]
    project_taps: tuple[ProjectionConfig, ...]
    deltas: tuple[DeltasConfig, ...]
    grouped_gemm: tuple[GemmConfig, ...]


KINDS: dict[str, type[Any]] = {
    "strip": StripConfig,
    "two_phase": TwoPhaseConfig,
    "project_taps": ProjectionConfig,
    "deltas": DeltasConfig,
    "grouped_gemm": GemmConfig,
}


@cache
def table() -> dict[int, dict[str, Configs]]:
    """Configs by compute capability (90 for sm_90) and arithmetic."""
    text = resources.files(__package__).joinpath("configs.json").read_text()
    return {
        int(arch.removeprefix("sm_")): {arithmetic: _configs(rows) for arithmetic, rows in by_arithmetic.items()}
        for arch, by_arithmetic in json.loads(text).items()
    }


def _configs(rows: dict[str, list[dict[str, int]]]) -> Configs:
    return Configs(**{kernel: tuple(KINDS[kernel](**row) for row in rows[kernel]) for kernel in KINDS})


def configs_for(capability: int, arithmetic: str) -> Configs:
    """Those of the newest architecture in the table that is not newer than the GPU."""
    known = [arch for arch in table() if arch <= capability]
    return table()[max(known, default=min(table()))][arithmetic]


def first_that_fills(tiles: Sequence[int], multiprocessors: int) -> int:
    """Index of the first count of tiles that gives every multiprocessor one, else the last."""
    return next((i for i, count in enumerate(tiles) if count >= multiprocessors), len(tiles) - 1)
