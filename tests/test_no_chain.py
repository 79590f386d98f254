"""No product with a weight in the backward pass: counted by the operators that reach the dispatcher."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import loss_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dfa_kernels as dfa

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "dot", "linear", "matmul", "einsum"}
SIZES = [3072, 800, 800, 800, 10]


class Operators(TorchDispatchMode):
    """Writes down every operator that runs, with the shapes of its tensors and its other arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.operands = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls.append((name, [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]))
        if name in PRODUCTS:
            self.operands.append([a.data_ptr() for a in args if isinstance(a, torch.Tensor)])
        return func(*args, **(kwargs or {}))

    def products(self):
        return [call for call in self.calls if call[0] in PRODUCTS]

    def products_with(self, parameters):
        """How many products have one of these parameters as an operand, transposed or not."""
        known = {p.data_ptr() for p in parameters if p.dim() == 2}
        return sum(bool(known & set(pointers)) for pointers in self.operands)

    def masks(self):
        """Which of (input, weight, bias) each convolution's backward pass computes."""
        return [args[-1] for name, args in self.calls if name == "convolution_backward"]


def mlp(sizes, activation=nn.Tanh, norm=None):
    net = nn.Sequential()
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        net.append(nn.Linear(fan_in, fan_out))
        if i < len(sizes) - 2:
            net.extend(([norm(fan_out)] if norm else []) + [activation()])
    return net


def counted(model, x, target, optimizer=None):
    """The operators of one step, after one that has found the taps and made the feedback."""
    operators = Operators()
    for mode in (None, operators):
        if mode is None:
            step(model, x, target, optimizer)
            continue
        with mode:
            step(model, x, target, optimizer)
    return operators


def step(model, x, target, optimizer):
    model.zero_grad()
    F.cross_entropy(model(x), target).backward()
    if optimizer is not None:
        optimizer.step()


def test_the_counter_sees_the_products_of_backpropagation():
    """Four forward, three δ and four weight gradients."""
    x, target = torch.randn(4, 12), torch.randint(3, (4,))
    net = mlp([12, 9, 8, 7, 3])
    operators = counted(net, x, target)
    assert len(operators.products()) == 11
    assert operators.products_with(net.parameters()) == 7


@pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU])
def test_nine_products(activation, taps):
    """Four forward, one projection for the widest layer, four weight gradients."""
    model = dfa.DFA(mlp(SIZES, activation), taps=taps)
    operators = counted(model, torch.randn(16, 3072), torch.randint(10, (16,)))
    assert len(operators.products()) == 9
    shapes = [args for _, args in operators.products()[4:]]
    assert operators.products_with(model.parameters()) == 4
    assert shapes[0][-2:] == [(16, 10), (10, 800)]
    assert sorted(shapes[1:]) == sorted([[(out, 16), (16, i)] for i, out in itertools.pairwise(SIZES)])


@pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}])
def test_nine_products_with_the_update(options, taps):
    model = dfa.DFA(mlp(SIZES), taps=taps)
    optimizer = dfa.optim.SGD(model, 0.1, **options)
    operators = counted(model, torch.randn(16, 3072), torch.randint(10, (16,)), optimizer)
    assert len(operators.products()) == 9


def test_nine_products_with_adamw():
    model = dfa.DFA(mlp(SIZES))
    optimizer = dfa.optim.AdamW(model)
    operators = counted(model, torch.randn(16, 3072), torch.randint(10, (16,)), optimizer)
    assert len(operators.products()) == 9


def test_the_update_makes_no_gradient_of_the_size_of_a_weight():
    """SGD adds the product into a large weight: no other operator may read or write anything as large."""
    model = dfa.DFA(mlp(SIZES))
    optimizer = dfa.optim.SGD(model, 0.1)
    operators = counted(model, torch.randn(16, 3072), torch.randint(10, (16,)), optimizer)
    large = [name for name, args in operators.calls if any(isinstance(a, tuple) and a == (800, 3072) for a in args)]
    assert large == ["t", "addmm_"]


def test_products_do_not_grow_with_the_first_pass():
    """The pass that finds the taps of a Sequential runs it only once."""
    x, target = torch.randn(4, 12), torch.randint(3, (4,))
    model = dfa.DFA(mlp([12, 9, 8, 3]))
    model.feedback.stored(9, 3, "cpu")
    with Operators() as operators:
        step(model, x, target, None)
    assert len(operators.products()) == 7


@pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_products_of_a_network_with_norms(norm, taps):
    """Segments that autograd finishes: four forward, one projection, four weight gradients as well."""
    model = dfa.DFA(mlp([30, 20, 19, 18, 3], nn.ReLU, norm), taps=taps)
    operators = counted(model, torch.randn(16, 30), torch.randint(3, (16,)))
    # The fused output layer and the other segments need one projection between them, for all taps.
    assert len(operators.products()) == 9
    assert operators.products_with(model.parameters()) == 4


@pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
def test_frozen_layers_cost_nothing(taps):
    net = mlp([30, 20, 19, 3])
    net[2].requires_grad_(False)
    operators = counted(dfa.DFA(net, taps=taps), torch.randn(16, 30), torch.randint(3, (16,)))
    # Three forward, one projection, two weight gradients.
    assert len(operators.products()) == 6
    assert operators.products_with(net.parameters()) == 3


def cnn(norm):
    norms = [nn.BatchNorm2d(6), nn.BatchNorm2d(8)] if norm else []
    layers = [nn.Conv2d(3, 6, 3), *norms[:1], nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), *norms[1:], nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 2 * 2, 10), nn.ReLU(), nn.Linear(10, 4))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
def test_convolutions_pass_nothing_on(taps, norm):
    model = dfa.DFA(cnn(norm), taps=taps)
    operators = counted(model, torch.randn(5, 3, 10, 10), torch.randint(4, (5,)))
    assert len(operators.masks()) == 2
    assert all(mask[0] is False and mask[1] is True for mask in operators.masks())
    # Two forward, one projection for all segments and one more for the grouped launch, two weight gradients.
    assert len(operators.products()) <= 6
    assert operators.products_with(model.parameters()) == 2


def test_frozen_convolution_has_no_weight_gradient():
    net = cnn(norm=False)
    net[3].weight.requires_grad_(False)
    operators = counted(dfa.DFA(net), torch.randn(5, 3, 10, 10), torch.randint(4, (5,)))
    assert sorted(operators.masks()) == [[False, False, True], [False, True, True]]


def test_no_gradient_with_respect_to_a_tap():
    """Whatever a tap feeds is a leaf that asks for no gradient."""
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Probe(), nn.BatchNorm1d(5), nn.Linear(5, 4), nn.ReLU(), Probe())
    net.append(nn.Linear(4, 3))
    loss_of(dfa.DFA(net)(torch.randn(7, 6)), torch.randn(7, 3), "quadratic").backward()
    after_taps = seen[-2:]
    assert [t.requires_grad for t in after_taps] == [False, False]
    assert [t.grad_fn for t in after_taps] == [None, None]
