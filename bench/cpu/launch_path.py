"""Host time of a grouped call up to the compiled kernel, for which a stand-in does nothing; one thread of a CPU.

    python -m bench.cpu.launch_path

That is what `layer_grads` and `layer_update_` of the Triton backend take on a GPU, but for Triton's own launcher.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import dfa_kernels as dfa
from dfa_kernels.backends.calls import LayerCall
from dfa_kernels.backends.triton import launch, operators, route
from dfa_kernels.backends.triton.launch_plan import LaunchPlan
from dfa_kernels.backends.triton.route import forget_routes, route_for

WIDTH, CLASSES, BATCH = 64, 10, 128
DEPTHS = (4, 12)
CALLS = 100

Work = Callable[[], Any]


def layers(depth: int) -> tuple[LayerCall, list[Tensor]]:
    """The call of a network of equal layers, and its parameters."""
    hidden, error, feedback = depth - 1, torch.randn(BATCH, CLASSES), dfa.Feedback()
    x, saved = ([torch.randn(BATCH, WIDTH) for _ in range(n)] for n in (depth, hidden))
    wanted = [True] * depth
    call = LayerCall(
        error, feedback.stored(WIDTH, CLASSES, "cpu"), feedback.spec, x, saved, [None] * hidden, ["tanh"] * hidden,
        [0.0] * (2 * hidden), wanted, wanted,
    )  # fmt: skip
    widths = [WIDTH] * hidden + [CLASSES]
    return call, [torch.randn(shape) for out in widths for shape in ((out, WIDTH), (out,))]


@contextmanager
def standing_in(run: Callable[..., None]) -> Iterator[None]:
    """Within it plans are made whose kernel is compiled already: to ``run``."""
    make = LaunchPlan.__post_init__

    def made(plan: LaunchPlan) -> None:
        make(plan)
        plan.compiled = {None: run}  # type: ignore[dict-item]

    forget_routes()
    with (
        patch.object(LaunchPlan, "__post_init__", made),
        patch.object(launch, "INTERPRETED", False),
        patch.object(route, "check_device", lambda device: None),
        patch.object(torch.cuda, "current_device", lambda: None),
    ):
        yield
    forget_routes()


def works(depth: int) -> dict[str, Work]:
    call, weights = layers(depth)
    state = [torch.zeros_like(w) for w in weights for _ in range(2)]
    sgd, adamw = [0.1, 0.0, 0.0, 0.0] * len(weights), [1e-3, 0.9, 0.999, 1e-8, 0.01, 1.0] * len(weights)
    return {
        "layer_grads": lambda: operators.layer_grads(call, torch.float32),
        "layer_update_ sgd": lambda: operators.layer_update_(call, weights, [], "sgd", sgd),
        "layer_update_ adamw": lambda: operators.layer_update_(call, weights, state, "adamw", adamw),
    }


def check() -> None:
    """AssertionError unless the kernel gets the addresses of what it reads, and those of what the caller gets."""
    launched: list[Any] = []
    call, _ = layers(3)
    with standing_in(lambda *arguments: launched.extend(arguments)):
        grads = operators.layer_grads(call, torch.float32)
    given = [tuple(t.data_ptr() for t in group) for group in (call.inputs, call.saved, grads[0::2], grads[1::2])]
    assert all(group in launched for group in given)
    assert call.error.data_ptr() == launched[0]
    assert len({grad.data_ptr() for grad in grads}) == len(grads)
    assert all(grad.is_contiguous() and grad.data_ptr() % 16 == 0 for grad in grads)


def microseconds(work: Work, rounds: int) -> float:
    """The least of many, which what else runs on the machine disturbs least."""
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(CALLS):
            work()
        found.append((time.perf_counter() - started) / CALLS)
    return min(found) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    check()
    with standing_in(lambda *arguments: None):
        found = {depth: {name: microseconds(work, rounds) for name, work in works(depth).items()} for depth in DEPTHS}
        call, _ = layers(DEPTHS[0])
        memory = route_for(call, "store", torch.float32).memory
        allocated = microseconds(lambda: memory.allocate(call.error.device, torch.float32), rounds)
    few, many = DEPTHS
    for name, each in found[few].items():
        slope = (found[many][name] - each) / (many - few)
        print(f"{name:20} {few} layers {each:6.1f} µs, each further layer {slope:5.2f} µs")
    print(f"of layer_grads' the allocator takes {allocated:.1f} µs with {few} layers")


if __name__ == "__main__":
    main()
