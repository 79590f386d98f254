"""Running a kernel with a config of one's choice, whatever the plan would take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from dfa_kernels.backends.triton import route, taps
from dfa_kernels.backends.triton.configs import OnePhaseConfig, ProjectionConfig, TwoPhaseConfig, configs_for
from dfa_kernels.backends.triton.plan import (
    LaunchPlan,
    plan_one_phase,
    plan_projection,
    plan_two_phase,
    usable_two_phase,
)
from dfa_kernels.backends.triton.problem import GroupedProblem, Target

Config = OnePhaseConfig | TwoPhaseConfig | ProjectionConfig
Planner = Callable[[GroupedProblem, Target], LaunchPlan]


@contextmanager
def grouped_by(planner: Planner) -> Iterator[None]:
    """Within it `layer_grads` and `layer_update_` run what this planner says."""
    with mock.patch.object(route, "plan_grouped", planner):
        route.route_of.cache_clear()
        try:
            yield
        finally:
            route.route_of.cache_clear()


@contextmanager
def with_config(config: Config) -> Iterator[None]:
    """Within it every launch of the config's kernel uses the config; grouped launches run no other kernel."""
    if isinstance(config, ProjectionConfig):
        with _taps_with(config):
            yield
    else:
        with grouped_by(planner_for(config)):
            yield


def planner_for(config: OnePhaseConfig | TwoPhaseConfig) -> Planner:
    def plan(problem: GroupedProblem, target: Target) -> LaunchPlan:
        if isinstance(config, OnePhaseConfig):
            return plan_one_phase(problem, config)
        return plan_two_phase(problem, config, target)

    return plan


def kernel_planner(kernel: str) -> Planner:
    """The kernel of that name, with the first of its committed configs that fills the GPU."""

    def plan(problem: GroupedProblem, target: Target) -> LaunchPlan:
        configs: Sequence[Any] = configs_for(target.capability, problem.projected.arithmetic).one_phase
        if kernel == "two_phase":
            configs = usable_two_phase(problem, target)
        plans = [planner_for(config)(problem, target) for config in configs]
        return next((p for p in plans if gradient_tiles(p) >= target.multiprocessors), plans[-1])

    return plan


def gradient_tiles(plan: LaunchPlan) -> int:
    """Tiles of weight gradients, of which `first_that_fills` wants one for each multiprocessor."""
    if plan.name == "two_phase":
        copies, projections, total = plan.numbers[-3:]
        return int(total - copies - projections)
    return plan.programs


@contextmanager
def _taps_with(config: ProjectionConfig) -> Iterator[None]:
    with mock.patch.object(taps, "plan_taps", lambda problem, target: plan_projection(problem, config)):
        yield
