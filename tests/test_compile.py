"""A compiler compiles a pass whole or leaves it alone; what records or transforms passes is told the way out."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dfa_kernels as dfa


class Block(nn.Module):
    """As in ResNets, with what they usually do in place."""

    def __init__(self, channels, out, stride, inplace):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(channels, out, 1, stride, bias=False)
        self.inplace = inplace

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)), self.inplace)
        return F.relu(self.norm2(self.conv2(h)) + self.short(x), self.inplace)


def resnet(inplace=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace),
        Block(4, 6, 2, inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), Attention(8), nn.LayerNorm(8), nn.Linear(8, 5))


class Broken(nn.Module):
    """A network that no compiler can compile in one piece."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.relu(self.first(x))
        torch._dynamo.graph_break()
        return self.last(torch.tanh(self.middle(h)))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))


def images(n=4, height=8, width=8):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(n))


def tokens(n=4, length=6):
    return torch.randint(11, (n, length), generator=torch.Generator().manual_seed(n))


def rows(n=4):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(n))


def gradients(call, x):
    module = getattr(call, "_orig_mod", call)
    module.zero_grad()
    output = call(x).flatten(0, -2)
    F.cross_entropy(output, torch.arange(len(output)) % output.shape[1]).backward()
    return [p.grad.clone() for p in module.parameters()]


def assert_equal_gradients(found, expected):
    """Up to the order of summation. What batch norm keeps at zero is as inexact as the largest gradient."""
    largest = max(gradient.abs().max() for gradient in expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 16 * torch.finfo(b.dtype).eps * largest


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


SEVERAL_IMAGES = [images(4, 8, 8), images(3, 12, 10), images(5, 16, 16)]
SEVERAL_TEXTS = [tokens(4, 6), tokens(3, 9), tokens(2, 5)]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("make, batches", [(resnet, SEVERAL_IMAGES), (transformer, SEVERAL_TEXTS)])
def test_several_sizes_and_several_models(make, batches, dynamic):
    """Compiled whole, in-place activations and residual sums too, the first model and the next."""
    for _ in range(2):
        compiled, eager = torch.compile(dfa.DFA(make()), dynamic=dynamic, fullgraph=True, backend="aot_eager"), make()
        for x in batches:
            assert_equal_gradients(gradients(compiled, x), gradients(dfa.DFA(eager), x))


def test_inductor_of_an_in_place_residual_network():
    compiled, eager = torch.compile(dfa.DFA(resnet())), dfa.DFA(resnet())
    assert_equal_gradients(gradients(compiled, images()), gradients(eager, images()))


@pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_network_that_cannot_be_compiled_in_one_piece(dynamic, taps):
    compiled = torch.compile(dfa.DFA(Broken(), taps=taps), dynamic=dynamic, backend="aot_eager")
    eager = dfa.DFA(Broken(), taps=taps)
    for x in (rows(4), rows(3), rows(2)):
        assert_equal_gradients(gradients(compiled, x), gradients(eager, x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("make, x", [(mlp, rows()), (Broken, rows()), (resnet, images())])
def test_compiled_inside(make, x, backend):
    """Once a part of a pass of its own: its saved tensors had other versions, or its gradients were lost."""
    with pytest.warns(UserWarning, match=r"net: .* compiled.*torch\.compile\(dfa_kernels\.DFA\(net\)\)"):
        model = dfa.DFA(torch.compile(make(), backend=backend))
    eager = dfa.DFA(make())
    for _ in range(2):
        assert_equal_gradients(gradients(model, x), gradients(eager, x))
    assert [tap.shape for tap in model.taps] == [tap.shape for tap in eager.taps]


def test_a_part_compiled_inside():
    net = mlp()
    net[2].compile(backend="aot_eager")
    with pytest.warns(UserWarning, match=r"net: \['0\.2'\] are compiled"):
        model = dfa.DFA(nn.Sequential(net, nn.Identity()))
    assert_equal_gradients(gradients(model, rows()), gradients(dfa.DFA(mlp()), rows()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_alignment_of_what_is_compiled_inside(backend):
    with pytest.warns(UserWarning, match="compiled"):
        model = dfa.DFA(torch.compile(resnet(), backend=backend))
    y = torch.arange(4) % 3
    found = dfa.alignment(model, images(), y, F.cross_entropy)
    expected = dfa.alignment(dfa.DFA(resnet()), images(), y, F.cross_entropy)
    for a, b in zip(found.values(), expected.values(), strict=True):
        assert torch.equal(a.cosine, b.cosine)


def test_another_network_is_compiled_after_one_that_was_not():
    """That a pass was left alone is no reason to leave others alone."""
    gradients(torch.compile(dfa.DFA(Broken()), backend="aot_eager"), rows())
    compiled = torch.compile(dfa.DFA(mlp()), fullgraph=True, backend="aot_eager")
    assert_equal_gradients(gradients(compiled, rows()), gradients(dfa.DFA(mlp()), rows()))


def test_trace_names_the_way_out():
    model, x = dfa.DFA(mlp()), rows()
    with pytest.raises(RuntimeError, match=r"run one, before torch\.jit\.trace too"):
        torch.jit.trace(model, x)
    model(x)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot.*model\.net.*torch\.no_grad\(\)"):
        torch.jit.trace(model, x)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
    for way_out in (traced, torch.jit.trace(model.net, x)):
        assert torch.equal(way_out(rows(3)), mlp()(rows(3)))


def loss_of(model, parameters, x):
    return torch.func.functional_call(model, parameters, (x,)).square().sum()


@pytest.mark.parametrize("each_row", [False, True])
@pytest.mark.parametrize("make", [mlp, Broken])
def test_func_names_the_way_out(make, each_row):
    model, net = dfa.DFA(make()), make()
    parameters, x = dict(model.named_parameters()), rows()[:, None] if each_row else rows()

    def transformed(module, parameters):
        def gradient(p, x):
            return torch.func.grad(lambda p: loss_of(module, p, x))(p)

        return (torch.func.vmap(gradient, (None, 0)) if each_row else gradient)(parameters, x)

    with pytest.raises(RuntimeError, match=r"torch\.func.*cannot.*model\.backprop\(\).*model\.net"):
        transformed(model, parameters)
    with model.backprop():
        found = transformed(model, parameters)
    for a, b in zip(found.values(), transformed(net, dict(net.named_parameters())).values(), strict=True):
        assert torch.equal(a, b)


def test_vmap_without_gradients():
    model, x = dfa.DFA(mlp()), rows()
    with pytest.raises(RuntimeError, match=r"torch\.func.*cannot"):
        torch.func.vmap(model)(x[:, None])
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(model)(x[:, None])[:, 0], mlp()(x))


class Activated(nn.Module):
    """``activation`` is called for its result or, if ``in_place``, for what it does to its argument."""

    def __init__(self, activation, in_place=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 4)
        self.activation, self.in_place = activation, in_place

    def forward(self, x):
        h = self.a(x)
        activated = self.activation(h)
        return self.c(torch.tanh(self.b(h if self.in_place else activated)))


def _threshold_(h):
    return F.threshold_(h, 0.1, 0.2)


IN_PLACE = [F.relu_, torch.tanh_, F.elu_, F.selu_, _threshold_]


@pytest.mark.parametrize(
    "activation, in_place",
    [(f, False) for f in (F.tanh, F.sigmoid, *IN_PLACE)] + [(f, True) for f in IN_PLACE],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_activations_that_compilers_do_not_show_by_themselves(activation, in_place):
    """F.relu_ was no activation there, and its layer learned by a chain, silently."""
    compiled, eager, x = Activated(activation, in_place), Activated(activation, in_place), torch.randn(5, 6)
    found = gradients(torch.compile(dfa.DFA(compiled), backend="aot_eager", fullgraph=True), x)
    assert_equal_gradients(found, gradients(dfa.DFA(eager), x))


@pytest.mark.parametrize(
    "passes, message", [(0, r"run one pass without torch\.compile"), (1, r"1 of its 2.*torch\.abs")]
)
def test_an_activation_that_some_compilers_hide(passes, message):
    """Python's abs is none of torch's functions, which torch 2.13 takes at its word."""
    model, x = dfa.DFA(Activated(abs)), torch.randn(5, 6)
    for _ in range(passes):
        model(x)
    try:
        found = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    except RuntimeError as error:
        assert re.search(message, str(error))
    else:
        assert_equal_gradients(found, gradients(dfa.DFA(Activated(abs)), x))
