"""What a step of a convolutional net needs at its peak: no more than by backpropagation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import profile

import dfa_kernels as dfa
from bench.cpu.large_networks import vgg16

SIDE, BATCH, CLASSES = 128, 4, 20


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that is allocated at once of what this allocates on the CPU."""
    with profile(profile_memory=True) as profiled:
        run()
    changes, waiting = [], list(profiled.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        now += change
        peak = max(peak, now)
    return peak


def test_a_step_of_vgg_needs_little_more_than_its_forward_pass() -> None:
    """Beside what the forward pass keeps, e Uᵀ and δ of the last convolution, the smallest."""
    torch.manual_seed(0)
    net = vgg16(CLASSES, SIDE, 8)
    x, y = torch.randn(BATCH, 3, SIDE, SIDE), torch.arange(BATCH) % CLASSES

    def step(model: Callable[[Tensor], Tensor]) -> None:
        net.zero_grad()
        F.cross_entropy(model(x), y).backward()

    model = dfa.DFA(net)
    step(model)
    net.zero_grad()
    found = peak_bytes(lambda: step(model))
    net.zero_grad()
    exact = peak_bytes(lambda: step(net))
    forward = peak_bytes(lambda: model(x))
    projection = BATCH * max(tap.size for tap in model.taps) * 4
    assert found < exact
    assert found < 1.1 * (forward + projection)
