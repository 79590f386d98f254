"""Host time of a training step: networks so narrow that arithmetic takes none of it, one thread of a CPU.

    python -m bench.cpu.host_path

What is left is Python and the calls of operators: what a GPU waits for in a small network without a CUDA graph.
Variants take turns of several steps: between single ones each would find the processor's caches full of another's
code, which no training loop does.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfa_kernels as dfa
from bench.cpu.interleaved import Step, interleaved, medians

LR = 0.1
WIDTHS = (8, 8, 8, 8, 4)
STEPS_A_TURN = 10


class Residual(nn.Module):
    """x + tanh(x W + b): no plain sequence, so its pass is observed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x))


def plain() -> nn.Sequential:
    modules: list[nn.Module] = []
    for before, after in pairwise(WIDTHS):
        modules += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*modules[:-1])


def residual() -> nn.Sequential:
    return nn.Sequential(*[Residual(WIDTHS[0]) for _ in WIDTHS[2:]], nn.Linear(*WIDTHS[-2:]))


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def turn_of(step: Step) -> Step:
    def turn() -> None:
        for _ in range(STEPS_A_TURN):
            step()

    return turn


def variants(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, tuple[nn.Module, Step]]:
    """The network that each of them trains, and its step."""
    bp, torch_sgd, fused = deepcopy(net), dfa.DFA(deepcopy(net)), dfa.DFA(deepcopy(net))
    return {
        "BP + torch SGD": (bp, step_of(bp, torch.optim.SGD(bp.parameters(), lr=LR), x, y)),
        "DFA + torch SGD": (torch_sgd.net, step_of(torch_sgd, torch.optim.SGD(torch_sgd.parameters(), lr=LR), x, y)),
        "DFA + dfa.optim.SGD": (fused.net, step_of(fused, dfa.optim.SGD(fused, lr=LR), x, y)),
    }


def updated_by_hand(net: nn.Sequential, x: Tensor, y: Tensor) -> list[Tensor]:
    """The parameters after one step, in float64, by the definition: δh = e Bᵀ for hidden layers, e for the last."""
    net, h = deepcopy(net).double(), x.double()
    *hidden, last = [module for module in net.modules() if isinstance(module, nn.Linear)]
    inputs = []
    for layer in hidden:
        inputs.append(h)
        h = torch.tanh(layer(h)) + (h if isinstance(net[0], Residual) else 0)
    logits = last(h)
    (error,) = torch.autograd.grad(F.cross_entropy(logits, y), logits)
    for layer, x in zip(hidden, inputs, strict=True):
        b = dfa.Feedback().matrix(layer.out_features, error.shape[1]).double()
        torch.tanh(layer(x.detach())).backward(error @ b.T)
    last(h.detach()).backward(error)
    return [p.detach() - LR * p.grad for p in net.parameters() if p.grad is not None]


def check(net: nn.Sequential, x: Tensor, y: Tensor) -> None:
    """AssertionError unless one step of each DFA variant is the definition's, to float32's precision."""
    expected = updated_by_hand(net, x, y)
    for name, (trained, step) in variants(net, x, y).items():
        if name.startswith("DFA"):
            step()
            for p, by_hand in zip(trained.parameters(), expected, strict=True):
                torch.testing.assert_close(p.detach().double(), by_hand, rtol=1e-5, atol=1e-6, msg=name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=500)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(4, WIDTHS[0]), torch.randint(WIDTHS[-1], (4,))
    for title, net in {"plain": plain(), "residual": residual()}.items():
        check(net, x, y)
        turns = {name: turn_of(step) for name, (_, step) in variants(net, x, y).items()}
        times = medians(interleaved(turns, rounds, 20))
        for name, seconds in times.items():
            microseconds = seconds / STEPS_A_TURN * 1e6
            print(f"{title:10}{name:22}{microseconds:8.0f} µs  {seconds / times['BP + torch SGD']:5.2f}×")


if __name__ == "__main__":
    main()
