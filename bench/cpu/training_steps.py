"""Ways to take one training step of a tanh network with softmax cross-entropy and SGD, all with the same result.

A variant is built from a network, a batch and a learning rate, and is then called once a step. The BP variants agree
with each other, the DFA variants too; `compare.py` checks that before it times them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfa_kernels as dfa
from dfa_kernels.updates import SMALL

Step = Callable[[], object]
Variant = Callable[[nn.Sequential, Tensor, Tensor, float, Tensor], Step]


def linear_layers(net: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in net if isinstance(layer, nn.Linear)]


def bp(net: nn.Sequential, x: Tensor, y: Tensor, lr: float, feedback: Tensor) -> Step:
    """Backpropagation with torch.optim.SGD."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def bp_update_in_hooks(net: nn.Sequential, x: Tensor, y: Tensor, lr: float, feedback: Tensor) -> Step:
    """Backpropagation that updates a parameter as soon as its gradient is there, and frees the gradient."""
    for parameter in net.parameters():
        optimizer = torch.optim.SGD([parameter], lr=lr)

        def update(parameter: Tensor, optimizer: torch.optim.SGD = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(update)

    def step() -> None:
        F.cross_entropy(net(x), y).backward()

    return step


def bp_update_in_product(net: nn.Sequential, x: Tensor, y: Tensor, lr: float, feedback: Tensor) -> Step:
    """Backpropagation written out by hand, the update inside the weight gradient's product: the fastest known to us."""
    layers = linear_layers(net)

    @torch.no_grad()
    def step() -> None:
        outputs = _forward(layers, x)
        delta = _error(outputs[-1], y)
        for i in reversed(range(len(layers))):
            chained = torch.ops.aten.tanh_backward(delta @ layers[i].weight, outputs[i]) if i else delta
            _update(layers[i], delta, outputs[i], lr)
            delta = chained

    return step


def bp_compiled(net: nn.Sequential, x: Tensor, y: Tensor, lr: float, feedback: Tensor) -> Step:
    """Backpropagation under torch.compile, with torch.optim.SGD."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    compiled = torch.compile(lambda x, y: F.cross_entropy(net(x), y))

    def step() -> None:
        optimizer.zero_grad()
        compiled(x, y).backward()
        optimizer.step()

    return step


def dfa_naive(net: nn.Sequential, x: Tensor, y: Tensor, lr: float, feedback: Tensor) -> Step:
    """The usual public code: a matrix per layer, and hooks that replace what autograd's chain has computed."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    matrices = [_scaled(feedback, layer.out_features).clone() for layer in linear_layers(net)[:-1]]
    error: list[Tensor] = []

    def keep(gradient: Tensor) -> None:
        error.append(gradient)

    def step() -> None:
        optimizer.zero_grad()
        h, taps = x, iter(matrices)
        for layer in net:
            h = layer(h)
            if isinstance(layer, nn.Tanh):
                matrix = next(taps)
                h.register_hook(lambda gradient, matrix=matrix: error[0] @ matrix.t())
        h.register_hook(keep)
        F.cross_entropy(h, y).backward()
        error.clear()
        optimizer.step()

    return step


def dfa_by_hand(net: nn.Sequential, x: Tensor, y: Tensor, lr: float, feedback: Tensor) -> Step:
    """DFA written out by hand, the update inside the weight gradient's product: the bar for the wrapper."""
    layers = linear_layers(net)

    @torch.no_grad()
    def step() -> None:
        outputs = _forward(layers, x)
        error = _error(outputs[-1], y)
        shared = error @ feedback.t()
        for i, layer in enumerate(layers[:-1]):
            scale = 1 / math.sqrt(layer.out_features * feedback.shape[1])
            delta = torch.ops.aten.tanh_backward(shared[:, : layer.out_features], outputs[i + 1])
            _update(layer, delta, outputs[i], lr, scale)
        _update(layers[-1], error, outputs[-2], lr)

    return step


def dfa_torch_optimizer(net: nn.Sequential, x: Tensor, y: Tensor, lr: float, feedback: Tensor) -> Step:
    """`dfa.DFA` with torch.optim.SGD."""
    model = dfa.DFA(net, dfa.Feedback.from_matrix(feedback))
    return _wrapped(model, torch.optim.SGD(model.parameters(), lr=lr), x, y)


def dfa_fused(net: nn.Sequential, x: Tensor, y: Tensor, lr: float, feedback: Tensor) -> Step:
    """`dfa.DFA` with `dfa.optim.SGD`."""
    model = dfa.DFA(net, dfa.Feedback.from_matrix(feedback))
    return _wrapped(model, dfa.optim.SGD(model, lr=lr), x, y)


def _wrapped(model: dfa.DFA, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _forward(layers: list[nn.Linear], x: Tensor) -> list[Tensor]:
    """x, every hidden output, the logits."""
    outputs = [x]
    for i, layer in enumerate(layers):
        a = torch.addmm(layer.bias, outputs[-1], layer.weight.t())
        outputs.append(a.tanh_() if i < len(layers) - 1 else a)
    return outputs


def _error(logits: Tensor, y: Tensor) -> Tensor:
    """∂(mean cross-entropy)/∂logits."""
    error = torch.softmax(logits, 1)
    error[torch.arange(len(y)), y] -= 1
    return error.div_(len(y))


def _update(layer: nn.Linear, delta: Tensor, x: Tensor, lr: float, scale: float = 1.0) -> None:
    if layer.weight.numel() <= SMALL:
        layer.weight.add_(delta.t() @ x, alpha=-lr * scale)
    else:
        layer.weight.addmm_(delta.t(), x, alpha=-lr * scale)
    layer.bias.add_(delta.sum(0), alpha=-lr * scale)


def _scaled(feedback: Tensor, size: int) -> Tensor:
    return feedback[:size] / math.sqrt(size * feedback.shape[1])


BP_VARIANTS: dict[str, Variant] = {
    "BP": bp,
    "BP, update in hooks": bp_update_in_hooks,
    "BP, update in product": bp_update_in_product,
}
DFA_VARIANTS: dict[str, Variant] = {
    "naive DFA": dfa_naive,
    "DFA by hand": dfa_by_hand,
    "dfa.DFA + torch SGD": dfa_torch_optimizer,
    "dfa.DFA + dfa.optim.SGD": dfa_fused,
}
