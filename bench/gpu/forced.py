"""Running a kernel with a config of one's choice, whatever the plan would take."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from dfa_kernels.backends.triton import launch_plan, producer
from dfa_kernels.backends.triton.configs import DeltasConfig, GemmConfig, ProjectionConfig, StripConfig, TwoPhaseConfig
from dfa_kernels.backends.triton.launch_plan import LaunchPlan
from dfa_kernels.backends.triton.plan_gemm import choose_configs, choose_deltas, plan_grouped_gemm, plan_products
from dfa_kernels.backends.triton.plan_small import plan_strip, usable_strips
from dfa_kernels.backends.triton.plan_taps import plan_projection
from dfa_kernels.backends.triton.plan_wide import plan_two_phase, usable_two_phase
from dfa_kernels.backends.triton.problem import GroupedProblem, TapsProblem, Target
from dfa_kernels.backends.triton.route import Planner, planned_by

PRODUCER = "grouped_gemm_producer"
"""`grouped_gemm` with a warp that loads; ValueError where `producer.reason_without` has one."""
PRODUCTS = "products"
"""`deltas` alone, then the library's products."""
Config = StripConfig | TwoPhaseConfig | GemmConfig | ProjectionConfig


def with_config(config: Config) -> AbstractContextManager[None]:
    """Within it every launch of the config's kernel uses the config; grouped launches run no other kernel."""
    if isinstance(config, ProjectionConfig) and not isinstance(config, DeltasConfig):
        return planned_by(lambda problem, target: plan_projection(problem, config), TapsProblem)
    return planned_by(planner_for(config))


def planner_for(config: StripConfig | TwoPhaseConfig | GemmConfig | DeltasConfig) -> Planner:
    def plan(problem: GroupedProblem, target: Target) -> LaunchPlan:
        if isinstance(config, GemmConfig | DeltasConfig):
            gemm, deltas = choose_configs(problem, target)
            chosen = (config, deltas) if isinstance(config, GemmConfig) else (gemm, config)
            return plan_grouped_gemm(problem, *chosen, target)
        if isinstance(config, StripConfig):
            return plan_strip(problem, config, target)
        return plan_two_phase(problem, config, target)

    return plan


def kernel_planner(kernel: str) -> Planner:
    """The kernel of that name, with the first of its committed configs that fills the GPU."""

    def plan(problem: GroupedProblem, target: Target) -> LaunchPlan:
        if kernel == PRODUCTS:
            return plan_products(problem, choose_deltas(problem, target), target)
        if kernel.startswith("grouped_gemm"):
            gemm, deltas = choose_configs(problem, target)
            plain = plan_grouped_gemm(problem, gemm, deltas, target)
            if kernel != PRODUCER:
                return plain
            if reason := producer.reason_without(plain, target, producer.NO_GLUON):
                raise ValueError(f"kernel: {PRODUCER} cannot run: {reason}; 'grouped_gemm' can")
            return plan_grouped_gemm(problem, producer.CONFIG, deltas, target)
        usable: Any = usable_strips if kernel == "strip" else usable_two_phase
        configs: Sequence[Any] = usable(problem, target)
        plans = [planner_for(config)(problem, target) for config in configs]
        return next((p for p in plans if gradient_tiles(p) >= target.multiprocessors), plans[-1])

    return plan


def gradient_tiles(plan: LaunchPlan) -> int:
    """Tiles of weight gradients, of which `first_that_fills` wants one for each multiprocessor."""
    assert not isinstance(plan.config, ProjectionConfig)
    return launch_plan.gradient_tiles(plan.problem, plan.config)
