"""The plan of a launch that makes δ of every tap."""

from __future__ import annotations

from functools import lru_cache

from .configs import ProjectionConfig, configs_for
from .kernels.project_taps import project_taps_kernel
from .launch_plan import LaunchPlan, derivatives_of, fitted, index_dtype, that_fills
from .problem import TapsProblem, Target, alignment

MOST_PICKED = 64
"""Units of a tile whose δ come from picked components."""


@lru_cache(maxsize=512)
def plan_taps(problem: TapsProblem, target: Target) -> LaunchPlan:
    """The launch for this problem, with the tiles that fill the GPU."""
    configs = _configs(problem, target)
    tiles = [_projection_tiles(problem, fitted(config, problem.projected)) for config in configs]
    return plan_projection(problem, configs[that_fills(tiles, target)])


def _configs(problem: TapsProblem, target: Target) -> list[ProjectionConfig]:
    if problem.projected.tile != "nonzeros":
        return list(configs_for(target.capability, problem.projected.arithmetic).project_taps)
    # Components that are picked and summed gain nothing from tiles that are large for tensor cores: an H200 took 9.3 ms
    # with those for tf32, 5.4 ms with these.
    configs = configs_for(target.capability, "ieee").project_taps
    return [config for config in configs if config.block_u <= MOST_PICKED] or [configs[-1]]


def plan_projection(problem: TapsProblem, config: ProjectionConfig) -> LaunchPlan:
    """δ of every tap."""
    config = fitted(config, problem.projected)
    projected = problem.projected
    longest = projected.rows * max(problem.sizes)
    derivatives, which = derivatives_of(problem.activations)
    arguments = projected.arguments(max(problem.sizes)) | dict(
        sizes=problem.sizes,
        channels=problem.channels,
        scales=projected.scales(problem.sizes),
        p=problem.parameters[0::2],
        q=problem.parameters[1::2],
        DERIVATIVES=derivatives,
        WHICH=which,
        SAVED=problem.saved,
        DROPOUT=problem.dropout_mask,
        CHANNELS_LAST=problem.channels_last,
        ALIGN=alignment(problem.sizes),
        INDEX=index_dtype(longest, max(problem.sizes) * projected.error_size, projected.error_reach),
        BLOCK_U=config.block_u,
        BLOCK_R=config.block_r,
        BLOCK_E=config.block_e,
    )
    taps = len(problem.sizes)
    why = f"a tile of the projection serves all {taps} taps" if taps > 1 else "a tile of the projection at a time"
    return LaunchPlan(
        problem,
        project_taps_kernel,
        config,
        _projection_tiles(problem, config),
        arguments,
        why,
    )


def _projection_tiles(problem: TapsProblem, config: ProjectionConfig) -> int:
    return -(-max(problem.sizes) // config.block_u) * -(-problem.projected.rows // config.block_r)
