"""Ways to compute the same: backpropagation, DFA in plain torch, DFA by hand, and this project.

A variant makes its regions from a problem and a learning rate: "step" (forward, loss, backward, SGD), "backward" (from
a given error to gradients) and "backward+update" (from a given error to changed weights), those that it has.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfa_kernels as dfa
from bench.cpu.training_steps import dfa_naive, linear_layers
from bench.gpu.cases import Problem
from bench.gpu.graphs import Work, captured, nothing

STEP, BACKWARD, UPDATE = "step", "backward", "backward+update"
REGIONS = (STEP, BACKWARD, UPDATE)


@dataclass
class Region:
    """What is timed, and what has to happen before it each time."""

    run: Work
    net: nn.Module
    """Its weights change, or its gradients are what comes out."""
    results: Callable[[], list[Tensor]]
    prepare: Work = nothing
    graphed: bool = False


Regions = dict[str, Region]
Variant = Callable[[Problem, float], Regions]


def weights_of(net: nn.Module) -> Callable[[], list[Tensor]]:
    return lambda: [p.detach() for p in net.parameters()]


def gradients_of(net: nn.Module) -> Callable[[], list[Tensor]]:
    return lambda: [p.grad for p in net.parameters() if p.grad is not None]


class Trained:
    """A model, its optimizer if it has one, and a batch: the pieces of a training step as users write it."""

    def __init__(self, problem: Problem, model: nn.Module, net: nn.Module, optimizer: torch.optim.Optimizer | None):
        self.problem, self.model, self.net, self.optimizer = problem, model, net, optimizer
        self.output: list[Tensor] = []

    def clear(self) -> None:
        if self.optimizer is None:
            self.net.zero_grad()
        else:
            self.optimizer.zero_grad()

    def step(self) -> None:
        self.clear()
        F.cross_entropy(self.model(self.problem.x), self.problem.y).backward()
        self.update_only()

    def forward(self) -> None:
        self.clear()
        self.output[:] = [self.model(self.problem.x)]

    def backward(self) -> None:
        self.output[0].backward(self.problem.error, retain_graph=True)

    def update_only(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()

    def update(self) -> None:
        self.backward()
        self.update_only()

    def restore(self) -> None:
        self.problem.restore(self.net)

    def region(self, name: str, graphed: bool) -> Region:
        run: Work = {STEP: self.step, BACKWARD: self.backward, UPDATE: self.update}[name]
        prepare: Work = nothing if name == STEP else self.forward
        results = gradients_of(self.net) if name == BACKWARD else weights_of(self.net)
        if not graphed:
            return Region(run, self.net, results, prepare)
        return Region(captured(run, prepare, self.restore), self.net, results, graphed=True)


def _trained(make: Callable[[Problem, nn.Sequential, float, bool], Trained], graphed: bool) -> Variant:
    """All regions of a kind of model; each has a network of its own, and "backward" no optimizer."""

    def variant(problem: Problem, lr: float) -> Regions:
        return {
            name: make(problem, copy.deepcopy(problem.net), lr, name != BACKWARD).region(name, graphed)
            for name in REGIONS
        }

    return variant


def _graphed_step(make: Callable[[Problem, nn.Sequential, float], tuple[nn.Module, torch.optim.Optimizer]]) -> Variant:
    """A step as users have it captured, with the batch's way into the graph."""

    def variant(problem: Problem, lr: float) -> Regions:
        net = copy.deepcopy(problem.net)
        model, optimizer = make(problem, net, lr)
        step = dfa.GraphedStep(model, optimizer, F.cross_entropy, problem.x, problem.y)
        return {STEP: Region(lambda: step(problem.x, problem.y), net, weights_of(net), graphed=True)}

    return variant


def _bp_to_graph(problem: Problem, net: nn.Sequential, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    return net, _torch_sgd(net, lr)


def _ours_to_graph(problem: Problem, net: nn.Sequential, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = dfa.DFA(net, problem.feedback(), backend=problem.backend)
    return model, dfa.optim.SGD(model, lr=lr, capturable=True)


def _torch_sgd(net: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=lr, fused=True)


def _bp(problem: Problem, net: nn.Sequential, lr: float, learns: bool) -> Trained:
    return Trained(problem, net, net, _torch_sgd(net, lr) if learns else None)


def _ours(problem: Problem, net: nn.Sequential, lr: float, learns: bool) -> Trained:
    model = dfa.DFA(net, problem.feedback(), backend=problem.backend)
    return Trained(problem, model, net, dfa.optim.SGD(model, lr=lr) if learns else None)


def _ours_torch_sgd(problem: Problem, net: nn.Sequential, lr: float, learns: bool) -> Trained:
    model = dfa.DFA(net, problem.feedback(), backend=problem.backend)
    return Trained(problem, model, net, _torch_sgd(net, lr) if learns else None)


def _dfa_in_torch(problem: Problem, net: nn.Sequential, lr: float, learns: bool) -> Trained:
    model = dfa.DFA(net, problem.feedback(), backend="torch")
    return Trained(problem, model, net, _torch_sgd(net, lr) if learns else None)


def bp_compiled(problem: Problem, lr: float) -> Regions:
    """Forward, loss and backward under torch.compile. Compiled once for all learning rates."""
    if "compiled" not in problem.kept:
        net = copy.deepcopy(problem.net)
        problem.kept["compiled"] = net, torch.compile(lambda x, y: F.cross_entropy(net(x), y))
    net, loss = problem.kept["compiled"]
    optimizer = _torch_sgd(net, lr)

    def step() -> None:
        optimizer.zero_grad()
        loss(problem.x, problem.y).backward()
        optimizer.step()

    return {STEP: Region(step, net, weights_of(net))}


def naive_dfa(problem: Problem, lr: float) -> Regions:
    """A matrix per layer, in the network's dtype, and hooks that replace what autograd's chain has computed."""
    net = copy.deepcopy(problem.net)
    step = dfa_naive(net, problem.x, problem.y, lr, problem.U.to(problem.case.torch_dtype))
    return {STEP: Region(step, net, weights_of(net))}


class ByHand:
    """δ of all layers from one product e Uᵀ, then one product of the library for each layer, into a fixed place."""

    def __init__(self, problem: Problem, lr: float) -> None:
        self.problem, self.lr = problem, lr
        self.net = copy.deepcopy(problem.net)
        self.layers = linear_layers(self.net)
        case, dtype = problem.case, problem.case.torch_dtype
        scale = 1 / math.sqrt(case.hidden * case.classes)
        self.B = (problem.U * scale).to(dtype).t().contiguous()
        self.onehot = F.one_hot(problem.y, case.classes).float()
        for p in self.net.parameters():
            p.grad = torch.empty_like(p)
        self.outputs: list[Tensor] = []

    @torch.no_grad()
    def forward(self) -> None:
        self.outputs = [self.problem.x]
        for i, layer in enumerate(self.layers):
            a = torch.addmm(layer.bias, self.outputs[-1], layer.weight.t())
            self.outputs.append(a.tanh_() if i < len(self.layers) - 1 else a)

    @torch.no_grad()
    def step(self) -> None:
        self.forward()
        error = torch.softmax(self.outputs[-1], 1, dtype=torch.float32).sub_(self.onehot).div_(len(self.onehot))
        self._update(error.to(self.problem.error.dtype))

    @torch.no_grad()
    def backward(self) -> None:
        for layer, delta, x in self.products(self.problem.error):
            assert layer.weight.grad is not None and layer.bias.grad is not None
            torch.mm(delta.t(), x, out=layer.weight.grad)
            torch.sum(delta, 0, out=layer.bias.grad)

    @torch.no_grad()
    def update(self) -> None:
        self._update(self.problem.error)

    def _update(self, error: Tensor) -> None:
        for layer, delta, x in self.products(error):
            layer.weight.addmm_(delta.t(), x, alpha=-self.lr)
            layer.bias.add_(delta.sum(0), alpha=-self.lr)

    def products(self, error: Tensor) -> list[tuple[nn.Linear, Tensor, Tensor]]:
        """(layer, δ [batch, out], x [batch, in]) of every layer."""
        P = error @ self.B
        deltas = [torch.ops.aten.tanh_backward(P, h) for h in self.outputs[1:-1]]
        return list(zip(self.layers, [*deltas, error], self.outputs[:-1], strict=True))

    def restore(self) -> None:
        self.problem.restore(self.net)


def by_hand_graphed(problem: Problem, lr: float) -> Regions:
    """δ + the library's product per layer, under a CUDA graph: what the grouped launch has to beat."""
    found: Regions = {}
    for name in REGIONS:
        hand = ByHand(problem, lr)
        run: Work = {STEP: hand.step, BACKWARD: hand.backward, UPDATE: hand.update}[name]
        results = gradients_of(hand.net) if name == BACKWARD else weights_of(hand.net)
        prepare = nothing if name == STEP else hand.forward
        found[name] = Region(captured(run, prepare, hand.restore), hand.net, results, graphed=True)
    return found


def by_hand(problem: Problem, lr: float) -> Regions:
    """The same without a graph; where there are none, it shows that it computes the right thing."""
    hand = ByHand(problem, lr)
    return {STEP: Region(hand.step, hand.net, weights_of(hand.net))}


BP, BP_GRAPHED, BP_COMPILED = "BP", "BP, graphed", "BP, torch.compile"
OURS, OURS_GRAPHED, OURS_TORCH_SGD = "dfa.DFA", "dfa.DFA, graphed", "dfa.DFA + torch SGD"
NAIVE, IN_TORCH, BY_HAND = "naive DFA", "unified DFA in torch", "δ + cuBLAS by hand"
BY_HAND_GRAPHED = "δ + cuBLAS by hand, graphed"
BP_GRAPHED_STEP, OURS_GRAPHED_STEP = "BP, GraphedStep", "dfa.DFA, GraphedStep"

EVERYWHERE: dict[str, Variant] = {
    BP: _trained(_bp, graphed=False),
    NAIVE: naive_dfa,
    IN_TORCH: _trained(_dfa_in_torch, graphed=False),
    BY_HAND: by_hand,
    OURS_TORCH_SGD: _trained(_ours_torch_sgd, graphed=False),
    OURS: _trained(_ours, graphed=False),
}
ON_GPU: dict[str, Variant] = {
    BP_GRAPHED: _trained(_bp, graphed=True),
    BY_HAND_GRAPHED: by_hand_graphed,
    OURS_GRAPHED: _trained(_ours, graphed=True),
    BP_GRAPHED_STEP: _graphed_step(_bp_to_graph),
    OURS_GRAPHED_STEP: _graphed_step(_ours_to_graph),
    BP_COMPILED: bp_compiled,
}
"""The compiled one last: it takes longest to make."""


SMALLEST_LEFT_OUT = 1e9
"""Operations of all weight gradients from which on compiled backpropagation is not worth the minute that it takes to
make: its products take what they take."""


def variants_for(problem: Problem) -> dict[str, Variant]:
    """Those that are compared on this problem."""
    if not problem.on_gpu:
        return EVERYWHERE
    leaves_out = problem.case.weight_flops > SMALLEST_LEFT_OUT
    return EVERYWHERE | {name: make for name, make in ON_GPU.items() if not (leaves_out and name == BP_COMPILED)}


def rule_of(variant: str) -> str:
    return "BP" if variant.startswith("BP") else "DFA"
