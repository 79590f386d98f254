"""Every gradient of a wrapped network against the float64 oracle."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    Layer,
    assert_close_to_oracle,
    conv_gradient,
    cut_gradients,
    error_of,
    feedback_from_matrix,
    loss_of,
    mlp_forward,
    mlp_gradients,
    slope,
)
from torch import nn

import dfa_kernels as dfa
from dfa_kernels.activations import ACTIVATIONS

SEED = 3
# One for all tests, which so make each U once.
FEEDBACK = dfa.Feedback(seed=SEED)
WIDEST = 1024

# (name in the table, p, q, module): the parameters as the oracle counts them.
CASES = [
    ("identity", 0.0, 0.0, nn.Identity),
    ("tanh", 0.0, 0.0, nn.Tanh),
    ("relu", 0.0, 0.0, nn.ReLU),
    ("leaky_relu", 0.01, 0.0, nn.LeakyReLU),
    ("leaky_relu", -0.5, 0.0, partial(nn.LeakyReLU, -0.5)),
    ("leaky_relu", 0.0, 0.0, partial(nn.LeakyReLU, 0.0)),
    ("sigmoid", 0.0, 0.0, nn.Sigmoid),
    ("gelu", 0.0, 0.0, nn.GELU),
    ("gelu", 1.0, 0.0, partial(nn.GELU, approximate="tanh")),
    ("silu", 0.0, 0.0, nn.SiLU),
    ("elu", 1.0, 0.0, nn.ELU),
    ("elu", 0.3, 0.0, partial(nn.ELU, 0.3)),
    ("elu", -0.7, 0.0, partial(nn.ELU, -0.7)),
    ("softplus", 1.0, 20.0, nn.Softplus),
    ("softplus", 3.0, 2.0, partial(nn.Softplus, 3.0, 2.0)),
    ("hardtanh", -1.0, 1.0, nn.Hardtanh),
    ("hardtanh", -0.3, 2.0, partial(nn.Hardtanh, -0.3, 2.0)),
    ("abs", 0.0, 0.0, lambda: Call(torch.abs)),
]
# Without an activation the "nonlinearity" policy has no tap.
NONLINEAR = [case for case in CASES if case[0] != "identity"]
PLACED = [("nonlinearity", case) for case in NONLINEAR] + [("layer_input", case) for case in CASES]
PLACED_IDS = [f"{taps}-{name}-{p:g}-{q:g}" for taps, (name, p, q, _) in PLACED]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
WIDTHS = [1, 2, 3, 5, 7, 11, 13, 17, 23, 31, 37, 40]


class Call(nn.Module):
    """A module of one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@functools.lru_cache(maxsize=64)
def unified(rows, error_size):
    """The U of `SEED`, which the package never stores with a layer's scale."""
    return dfa.Feedback(seed=SEED, normalize=False).matrix(rows, error_size)


def make_target(loss, rows, error_size):
    if loss == "cross_entropy":
        return torch.randint(error_size, (rows,))
    return torch.randn(rows, error_size)


def wrap(net, **options):
    return dfa.DFA(net, FEEDBACK, **options)


def check_mlp(linears, cases, x, target, loss, taps, masks=None):
    """DFA's gradients of Linear, activation, Linear … against the formulas, with dropout masks if given."""
    modules = []
    for linear, case, mask in itertools.zip_longest(linears, cases, masks or []):
        modules += (
            [linear] + ([case[3]()] if case else []) + ([Call(partial(torch.mul, mask))] if mask is not None else [])
        )
    model = wrap(nn.Sequential(*modules), taps=taps)
    loss_of(model(x), target, loss).backward()
    check_layers(linears, cases, x, target, loss, masks, mask_before_tap=taps == "layer_input")


def check_layers(linears, cases, x, target, loss, masks=None, mask_before_tap=False):
    """The ``.grad`` of the linears of an MLP against the formulas."""
    layers = []
    for linear, case, mask in itertools.zip_longest(linears, cases, masks or []):
        name, p, q = case[:3] if case else ("identity", 0.0, 0.0)
        layers.append(Layer(linear.weight.detach(), _detached(linear.bias), name, p, q, mask))
    ref_layers = [layer.to(torch.float64) for layer in layers]
    *_, ref_output = mlp_forward(ref_layers, x.double())
    *_, output = mlp_forward(layers, x)
    output.requires_grad_()
    (e,) = torch.autograd.grad(loss_of(output, target, loss), output)
    ref_e = error_of(ref_output, target, loss)
    U = unified(WIDEST, e.shape[1])
    B = [feedback_from_matrix(U, layer.weight.shape[0]) for layer in layers[:-1]]
    ref = mlp_gradients(ref_layers, x.double(), ref_e, B, mask_before_tap=mask_before_tap)
    same = mlp_gradients(layers, x, e, B, mask_before_tap=mask_before_tap)
    for i, linear in enumerate(linears):
        assert linear.weight.grad.dtype == linear.weight.dtype
        assert_close_to_oracle(linear.weight.grad, ref[i].weight, same[i].weight, ref[i].weight_scale, f"W{i}")
        if linear.bias is not None:
            assert_close_to_oracle(linear.bias.grad, ref[i].bias, same[i].bias, ref[i].bias_scale, f"b{i}")


def _detached(t):
    return None if t is None else t.detach()


def check_cut(net, cuts, x, target=None, *, at_input=False, clone=copy.deepcopy, **options):
    """DFA's gradients of any network against autograd in its segments, cut at the modules named."""
    copies = [clone(net).double(), clone(net)]
    if target is None:
        with torch.no_grad():
            target = torch.randn_like(clone(net)(x))
    inputs = [x.detach().double(), x.detach()]
    U = unified(WIDEST, target.shape[-1])
    ref, same = (
        cut_gradients(n, cuts, z, lambda out: loss_of(out, target, "quadratic"), U, at_input=at_input)
        for n, z in zip(copies, inputs, strict=True)
    )
    model = wrap(net, **options)
    loss_of(model(x), target, "quadratic").backward()
    for (name, p), r, scale, s in zip(net.named_parameters(), *ref, same[0], strict=True):
        if r is None:
            assert p.grad is None, name
        else:
            assert p.grad is not None, name
            assert_close_to_oracle(p.grad, r, s, scale, name)
    return model


def grads(module):
    return [p.grad for p in module.parameters()]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_every_activation_of_the_table_has_a_case():
    assert {case[0] for case in CASES} == set(ACTIVATIONS)


@st.composite
def networks(draw):
    depth = draw(st.integers(2, 6))
    sizes = draw(st.lists(st.sampled_from(WIDTHS), min_size=depth, max_size=depth))
    taps = draw(st.sampled_from(["nonlinearity", "layer_input"]))
    usable = CASES if taps == "layer_input" else NONLINEAR
    return {
        "sizes": [*sizes, draw(st.integers(1, 30))],
        "cases": draw(st.lists(st.sampled_from(usable), min_size=depth - 1, max_size=depth - 1)),
        "biases": draw(st.lists(st.booleans(), min_size=depth, max_size=depth)),
        "batch": draw(st.sampled_from([0, 1, 2, 7, 70])),
        "loss": draw(st.sampled_from(["cross_entropy", "quadratic"])),
        "taps": taps,
        "seed": draw(st.integers(0, 10**6)),
    }


def build(network, dtype):
    torch.manual_seed(network["seed"])
    pairs = itertools.pairwise(network["sizes"])
    linears = [nn.Linear(i, o, b, dtype=dtype) for (i, o), b in zip(pairs, network["biases"], strict=True)]
    x = torch.randn(network["batch"], network["sizes"][0], dtype=dtype)
    return linears, x, make_target(network["loss"], network["batch"], network["sizes"][-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(network=networks())
def test_mlp_gradients_equal_the_formulas(dtype, network):
    linears, x, target = build(network, dtype)
    check_mlp(linears, network["cases"], x, target, network["loss"], network["taps"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps, case", PLACED, ids=PLACED_IDS)
def test_each_activation(taps, case, dtype):
    torch.manual_seed(1)
    linears = [nn.Linear(9, 13, dtype=dtype), nn.Linear(13, 11, dtype=dtype), nn.Linear(11, 6, dtype=dtype)]
    # Wide enough to reach both sides of every bound and threshold.
    x = 3 * torch.randn(23, 9, dtype=dtype)
    check_mlp(linears, [case, case], x, make_target("cross_entropy", 23, 6), "cross_entropy", taps)


@pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
def test_masks_around_a_tap(taps):
    torch.manual_seed(2)
    linears = [nn.Linear(5, 8), nn.Linear(8, 7), nn.Linear(7, 3)]
    masks = [torch.randint(2, (10, 8)) * 2.0, torch.randint(2, (10, 7)) * 2.0]
    check_mlp(linears, [CASES[1], CASES[2]], torch.randn(10, 5), torch.randn(10, 3), "quadratic", taps, masks)


@pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_with_the_masks_that_the_plain_network_draws(taps, inplace):
    torch.manual_seed(4)
    linears = [nn.Linear(5, 30), nn.Linear(30, 20), nn.Linear(20, 3)]
    drops = [nn.Dropout(0.3, inplace), nn.Dropout(0.5, inplace)]
    # |x| keeps its input for f', so that dropout may overwrite what it returns.
    net = nn.Sequential(linears[0], Call(torch.abs), drops[0], linears[1], Call(torch.abs), drops[1], linears[2])
    x, target = torch.randn(12, 5), torch.randn(12, 3)
    torch.manual_seed(11)
    masks = [F.dropout(torch.ones(12, 30), 0.3), F.dropout(torch.ones(12, 20), 0.5)]
    torch.manual_seed(11)
    loss_of(wrap(net, taps=taps)(x), target, "quadratic").backward()
    cases = [("abs", 0.0, 0.0)] * 2
    check_layers(linears, cases, x, target, "quadratic", masks, mask_before_tap=taps == "layer_input")


def test_dropout_between_layer_and_activation():
    torch.manual_seed(5)
    first, last = nn.Linear(5, 30), nn.Linear(30, 3)
    x, target = torch.randn(12, 5), torch.randn(12, 3)
    torch.manual_seed(11)
    mask = F.dropout(torch.ones(12, 30), 0.4)
    torch.manual_seed(11)
    loss_of(wrap(nn.Sequential(first, nn.Dropout(0.4), nn.Tanh(), last))(x), target, "quadratic").backward()

    def expected(dtype):
        layer = Layer(first.weight, first.bias).to(dtype)
        a = F.linear(x.to(dtype), layer.weight, layer.bias) * mask
        output = F.linear(torch.tanh(a), last.weight.detach().to(dtype), last.bias.detach().to(dtype))
        e = error_of(output, target, "quadratic")
        delta = (e @ feedback_from_matrix(unified(WIDEST, 3), 30).to(dtype).T) * slope("tanh", a) * mask
        return delta.T @ x.to(dtype), delta.sum(0)

    (ref_W, ref_b), (W, b) = expected(torch.float64), expected(torch.float32)
    assert_close_to_oracle(first.weight.grad, ref_W, W, 0.0)
    assert_close_to_oracle(first.bias.grad, ref_b, b, 0.0)


def sequence_reference(linears, x, e, dtype, positions_are_units):
    """δa and gradients of Linear, tanh, Linear on x [b, T, d], by the formula."""
    first = Layer(linears[0].weight, linears[0].bias).to(dtype)
    a = F.linear(x.to(dtype), first.weight, first.bias)
    units = a.shape[1] * a.shape[2] if positions_are_units else a.shape[2]
    B = feedback_from_matrix(unified(WIDEST, e.shape[-1]), units).to(dtype)
    delta = (e @ B.T).reshape(a.shape) * slope("tanh", a)
    return delta.flatten(0, 1).T @ x.to(dtype).flatten(0, 1), delta.sum((0, 1)), torch.tanh(a)


@pytest.mark.parametrize("batch", [0, 1, 6])
def test_positions_that_the_output_has_too_are_rows(batch):
    torch.manual_seed(6)
    linears = [nn.Linear(5, 7), nn.Linear(7, 4)]
    x, direction = torch.randn(batch, 3, 5), torch.randn(batch, 3, 4)
    model = wrap(nn.Sequential(linears[0], nn.Tanh(), linears[1]))
    (model(x) * direction).sum().backward()
    assert [(t.shape, t.size) for t in model.taps] == [((7,), 7)]
    ref_W, ref_b, h = sequence_reference(linears, x, direction.double(), torch.float64, False)
    W, b, _ = sequence_reference(linears, x, direction, torch.float32, False)
    assert_close_to_oracle(linears[0].weight.grad, ref_W, W, 0.0)
    assert_close_to_oracle(linears[0].bias.grad, ref_b, b, 0.0)
    last = direction.double().flatten(0, 1).T @ h.flatten(0, 1)
    last32 = direction.flatten(0, 1).T @ h.float().flatten(0, 1)
    assert_close_to_oracle(linears[1].weight.grad, last, last32, 0.0)


@pytest.mark.parametrize("batch", [0, 1, 6])
def test_positions_that_the_output_has_not_are_units(batch):
    torch.manual_seed(7)
    linears = [nn.Linear(5, 7), nn.Linear(21, 4)]
    x, direction = torch.randn(batch, 3, 5), torch.randn(batch, 4)
    model = wrap(nn.Sequential(linears[0], nn.Tanh(), nn.Flatten(), linears[1]))
    (model(x) * direction).sum().backward()
    assert [(t.shape, t.size) for t in model.taps] == [((3, 7), 21)]
    ref_W, ref_b, h = sequence_reference(linears, x, direction.double(), torch.float64, True)
    W, b, _ = sequence_reference(linears, x, direction, torch.float32, True)
    assert_close_to_oracle(linears[0].weight.grad, ref_W, W, 0.0)
    assert_close_to_oracle(linears[0].bias.grad, ref_b, b, 0.0)
    last, last32 = direction.double().T @ h.flatten(1), direction.T @ h.float().flatten(1)
    assert_close_to_oracle(linears[1].weight.grad, last, last32, 0.0)


def test_output_of_one_number_a_row():
    torch.manual_seed(8)
    linears = [nn.Linear(5, 7), nn.Linear(7, 1)]
    x, target = torch.randn(9, 5), torch.randn(9, 1)
    model = wrap(nn.Sequential(linears[0], nn.Tanh(), linears[1], nn.Flatten(0)))
    output = model(x)
    assert output.shape == (9,)
    loss_of(output[:, None], target, "quadratic").backward()
    check_layers(linears, [CASES[1]], x, target, "quadratic")


def strided(x):
    """The same values, not contiguous."""
    wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1] + 1)
    wide[..., ::2] = math.nan
    wide[..., 1::2] = x
    return wide[..., 1::2]


def transposed(x):
    return x.T.contiguous().T


@pytest.mark.parametrize("layout", [strided, transposed])
@pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
def test_non_contiguous_inputs(layout, taps):
    torch.manual_seed(9)
    linears = [nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)]
    x = layout(torch.randn(8, 5))
    assert not x.is_contiguous()
    check_mlp(linears, [CASES[1], CASES[2]], x, torch.randn(8, 3), "quadratic", taps)


def test_expanded_error():
    """The gradient of a sum is one number with strides of zero."""
    torch.manual_seed(10)
    linears = [nn.Linear(5, 7), nn.Linear(7, 3)]
    x = torch.randn(8, 5)
    net = nn.Sequential(linears[0], nn.Tanh(), linears[1])
    output = wrap(net)(x)
    output.sum().backward()
    # With this target the quadratic loss has (output − target) / 8 = 1 as its error, up to rounding.
    check_layers(linears, [CASES[1]], x, output.detach() - 8, "quadratic")


CONVOLUTIONS = {
    "plain": {},
    "stride": {"stride": (2, 1)},
    "padding": {"padding": (1, 2)},
    "dilation": {"dilation": 2, "padding": 1},
    "groups": {"groups": 2},
    "all": {"stride": 2, "padding": 2, "dilation": (1, 2), "groups": 2},
}


def conv_reference(conv, x, output_of, options, dtype):
    weight, bias = conv.weight.detach().to(dtype), _detached(conv.bias)
    a = F.conv2d(x.to(dtype), weight, None if bias is None else bias.to(dtype), **options)
    e = output_of(torch.tanh(a), dtype)
    B = feedback_from_matrix(unified(WIDEST, e.shape[1]), a[0].numel()).to(dtype)
    delta = (e @ B.T).reshape(a.shape) * slope("tanh", a)
    return conv_gradient(x.to(dtype), weight, delta, **options)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution_gradients_equal_the_formula(options, bias, layout):
    torch.manual_seed(12)
    conv = nn.Conv2d(4, 6, 3, bias=bias, **options)
    x = torch.randn(5, 4, 9, 8)
    size = conv(x)[0].numel()
    last, target = nn.Linear(size, 4), torch.randn(5, 4)
    net = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), last).to(memory_format=layout)
    loss_of(wrap(net)(x.to(memory_format=layout)), target, "quadratic").backward()

    def error_after(h, dtype):
        output = F.linear(h.flatten(1), last.weight.detach().to(dtype), last.bias.detach().to(dtype))
        return error_of(output, target, "quadratic")

    ref = conv_reference(conv, x, error_after, options, torch.float64)
    same = conv_reference(conv, x, error_after, options, torch.float32)
    assert_close_to_oracle(conv.weight.grad, ref.weight, same.weight, ref.weight_scale)
    if bias:
        assert_close_to_oracle(conv.bias.grad, ref.bias, same.bias, ref.bias_scale)


def small_cnn():
    torch.manual_seed(13)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 10),
        nn.ReLU(),
        nn.Linear(10, 4),
    )


def batch_norm_cnn():
    torch.manual_seed(14)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 3, padding="same", bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 10, bias=False),
        nn.BatchNorm1d(10),
        nn.Tanh(),
        nn.Linear(10, 4),
    )


NETS = {
    "cnn-nonlinearity": (small_cnn, ["1", "4", "7"], "nonlinearity"),
    "cnn-layer_input": (small_cnn, ["3", "6", "8"], "layer_input"),
    "bn-nonlinearity": (batch_norm_cnn, ["2", "6", "10"], "nonlinearity"),
    "bn-layer_input": (batch_norm_cnn, ["4", "8", "11"], "layer_input"),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make, cuts, taps", NETS.values(), ids=NETS)
def test_convolutional_networks(make, cuts, taps, dtype, mode, layout):
    net = make().to(dtype).to(memory_format=layout).train(mode == "train")
    x = torch.randn(7, 3, 8, 8, dtype=dtype).to(memory_format=layout)
    check_cut(net, cuts, x, at_input=taps == "layer_input", taps=taps)


def test_one_dimensional_and_transposed_convolutions():
    torch.manual_seed(15)
    net = nn.Sequential(
        nn.Conv1d(2, 5, 3, padding=1),
        nn.ELU(),
        nn.ConvTranspose1d(5, 4, 2, stride=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(4 * 12, 3),
    )
    check_cut(net, ["1", "3"], torch.randn(5, 2, 6))
    net = nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.ReLU(), nn.Conv3d(1, 2, 2), nn.Tanh())
    net = nn.Sequential(net[0], net[1], nn.Unflatten(1, (1, 3)), net[2], net[3], nn.Flatten(), nn.Linear(100, 3))
    check_cut(net, ["1", "4"], torch.randn(5, 2, 4, 4))


def test_transformer_layer():
    torch.manual_seed(16)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=nn.GELU(), batch_first=True, norm_first=True)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), layer, Call(lambda h: h.mean(1)), nn.Linear(8, 3))
    check_cut(net, ["1", "2.norm2", "2.activation"], torch.randn(6, 4, 5))


class Functional(nn.Module):
    """A forward pass of functions, one of each spelling that torch has."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))

    def forward(self, x):
        a, b, c, d, e, last = self.layers
        h = F.relu(a(x))
        h = torch.tanh(b(h))
        h = c(h).sigmoid()
        h = abs(d(h))
        h = F.leaky_relu(F.linear(input=h, weight=e.weight, bias=e.bias), negative_slope=-0.5)
        return last(h)


def test_functional_activations():
    torch.manual_seed(17)
    net, x, target = Functional(), torch.randn(9, 6), torch.randn(9, 6)
    loss_of(wrap(net)(x), target, "quadratic").backward()
    cases = [("relu",), ("tanh",), ("sigmoid",), ("abs",), ("leaky_relu", -0.5)]
    check_layers(list(net.layers), [(*c, 0.0, 0.0)[:3] for c in cases], x, target, "quadratic")


INPLACE = {
    "relu": (partial(nn.ReLU, inplace=True), ("relu", 0.0, 0.0)),
    "leaky": (partial(nn.LeakyReLU, -0.5, inplace=True), ("leaky_relu", -0.5, 0.0)),
    "elu": (partial(nn.ELU, -0.7, inplace=True), ("elu", -0.7, 0.0)),
    "silu": (partial(nn.SiLU, inplace=True), ("silu", 0.0, 0.0)),
    "hardtanh": (partial(nn.Hardtanh, -0.5, 0.5, True), ("hardtanh", -0.5, 0.5)),
    "abs_": (lambda: Call(torch.abs_), ("abs", 0.0, 0.0)),
    "Tensor.abs_": (lambda: Call(lambda a: a.abs_()), ("abs", 0.0, 0.0)),
    "tanh_": (lambda: Call(torch.tanh_), ("tanh", 0.0, 0.0)),
    "sigmoid_": (lambda: Call(lambda a: a.sigmoid_()), ("sigmoid", 0.0, 0.0)),
    "leaky_relu_": (lambda: Call(partial(F.leaky_relu_, negative_slope=-0.5)), ("leaky_relu", -0.5, 0.0)),
}


@pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
@pytest.mark.parametrize("make, case", INPLACE.values(), ids=INPLACE)
def test_in_place_activations(make, case, taps):
    torch.manual_seed(18)
    linears = [nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)]
    check_mlp(linears, [(*case, make)] * 2, torch.randn(8, 5), torch.randn(8, 3), "quadratic", taps)


class Statements(nn.Module):
    """In-place activations as statements: nothing uses what they return."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        a, b, last = self.layers
        h = a(x)
        h.relu_()
        h = b(h)
        F.elu(h, inplace=True)
        return last(h)


@pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
def test_in_place_activations_whose_result_is_not_used(taps):
    """Right, or a clear error; never the sum of projected and propagated error."""
    torch.manual_seed(19)
    net, x, target = Statements(), torch.randn(9, 6), torch.randn(9, 6)
    try:
        loss_of(wrap(net, taps=taps)(x), target, "quadratic").backward()
    except (RuntimeError, ValueError) as error:
        assert "in-place" in str(error) or "in place" in str(error)
        return
    cases = [("relu", 0.0, 0.0), ("elu", 1.0, 0.0)]
    check_layers(list(net.layers), cases, x, target, "quadratic")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.act1, self.act2 = nn.ReLU(), nn.Tanh()

    def forward(self, x):
        h = self.act1(self.first(x))
        return self.third(h + self.act2(self.second(h)))


def test_residual_connections():
    torch.manual_seed(20)
    check_cut(Residual(), ["act1", "act2"], torch.randn(8, 6))


def test_residual_connection_around_a_tap_at_the_layer_input():
    """Within the segment that the second tap ends, the skip leads to the first layer as well."""
    torch.manual_seed(20)
    check_cut(Residual(), ["second", "third"], torch.randn(8, 6), taps="layer_input", at_input=True)


def test_pre_activation_used_twice():
    class Twice(Residual):
        def forward(self, x):
            a = self.first(x)
            return self.third(self.act2(self.second(self.act1(a))) + a)

    torch.manual_seed(21)
    check_cut(Twice(), ["act1", "act2"], torch.randn(8, 6))


class Scaled(nn.Module):
    """A user's module with parameters of its own."""

    def __init__(self, size):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(size)), nn.Parameter(torch.randn(size))

    def forward(self, x):
        return x * self.gain + self.shift


@pytest.mark.parametrize("taps, cuts", [("nonlinearity", ["2", "5"]), ("layer_input", ["4", "7"])])
def test_user_modules_with_parameters(taps, cuts):
    torch.manual_seed(22)
    net = nn.Sequential(
        nn.Linear(5, 7),
        Scaled(7),
        nn.ReLU(),
        Scaled(7),
        nn.Linear(7, 6),
        nn.Tanh(),
        Scaled(6),
        nn.Linear(6, 3),
        Scaled(3),
    )
    check_cut(net, cuts, torch.randn(8, 5), taps=taps, at_input=taps == "layer_input")


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.SELU, nn.Mish, nn.Hardswish, nn.PReLU, nn.Softsign, nn.GLU])
def test_activations_that_autograd_finishes(activation):
    torch.manual_seed(23)
    half = 2 if activation is nn.GLU else 1
    net = nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8 // half, 6), activation(), nn.Linear(6 // half, 3))
    check_cut(net, ["1", "3"], torch.randn(9, 5))


def test_two_activations_in_a_row():
    """The second belongs to the next segment, or to the same one where the tap is at the layer's input."""
    torch.manual_seed(24)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    check_cut(copy.deepcopy(net), ["1", "4"], torch.randn(9, 5))
    check_cut(net, ["3", "5"], torch.randn(9, 5), taps="layer_input", at_input=True)


@pytest.mark.parametrize("taps, cuts", [("nonlinearity", ["1", "3"]), ("layer_input", ["2", "4"])])
def test_activation_after_the_last_layer_belongs_to_the_output(taps, cuts):
    torch.manual_seed(24)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3), nn.Softplus())
    check_cut(net, cuts, torch.randn(9, 5), taps=taps, at_input=taps == "layer_input")


def test_parameter_free_network_end():
    """Nothing but the last product is fused where something follows it."""
    torch.manual_seed(24)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), Call(lambda h: 2 * h))
    check_cut(net, ["1"], torch.randn(9, 5))


@pytest.mark.parametrize("taps, at_input", [("nonlinearity", False), ("layer_input", True)])
def test_shared_layer_gets_the_sum(taps, at_input):
    torch.manual_seed(25)
    shared = nn.Linear(6, 6)
    acts = [nn.ReLU(), nn.Tanh(), nn.ReLU()]
    net = nn.Sequential(nn.Linear(5, 6), acts[0], shared, acts[1], shared, acts[2], nn.Linear(6, 3))
    cuts = ["2", "6"] if at_input else ["1", "3", "5"]
    check_cut(net, cuts, torch.randn(8, 5), taps=taps, at_input=at_input)


def test_shared_activation_module():
    torch.manual_seed(25)
    act = nn.Tanh()
    net = nn.Sequential(nn.Linear(5, 6), act, nn.Linear(6, 7), act, nn.Linear(7, 3))
    check_cut(net, ["1"], torch.randn(8, 5))


def test_shared_layer_that_is_also_the_last():
    torch.manual_seed(25)
    shared = nn.Linear(6, 6)
    check_cut(nn.Sequential(shared, nn.Tanh(), shared), ["1"], torch.randn(8, 6))


def test_bias_shared_by_two_layers():
    torch.manual_seed(25)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    net[2].bias = net[0].bias
    check_cut(net, ["1", "3"], torch.randn(8, 6))


FROZEN = {
    "weight": ["2.weight"],
    "bias": ["2.bias"],
    "layer": ["2.weight", "2.bias"],
    "first layer": ["0.weight", "0.bias"],
    "first two layers": ["0.weight", "0.bias", "2.weight", "2.bias"],
    "last layer": ["4.weight", "4.bias"],
    "last weight": ["4.weight"],
}


@pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
@pytest.mark.parametrize("names", FROZEN.values(), ids=FROZEN)
def test_frozen_parameters(names, taps):
    torch.manual_seed(26)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    for name in names:
        net.get_parameter(name).requires_grad_(False)
    cuts = ["2", "4"] if taps == "layer_input" else ["1", "3"]
    check_cut(net, cuts, torch.randn(8, 5), taps=taps, at_input=taps == "layer_input")


@pytest.mark.parametrize("names", [["0.weight"], ["0.bias"], ["0.weight", "0.bias"], ["3.weight"], ["3.bias"]])
def test_frozen_convolution(names):
    net = small_cnn()
    for name in names:
        net.get_parameter(name).requires_grad_(False)
    check_cut(net, ["1", "4", "7"], torch.randn(7, 3, 8, 8))


def test_unfreezing_after_the_first_pass():
    torch.manual_seed(26)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    net[0].requires_grad_(False)
    x, target = torch.randn(8, 5), torch.randn(8, 3)
    model = wrap(net)
    loss_of(model(x), target, "quadratic").backward()
    net[0].requires_grad_(True)
    model.zero_grad()
    loss_of(model(x), target, "quadratic").backward()
    check_layers([net[0], net[2], net[4]], [CASES[2], CASES[1]], x, target, "quadratic")


class Doubled(nn.Module):
    def forward(self, W):
        return 2 * W


def normed_network(norm):
    torch.manual_seed(27)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    for i in (2, 4):
        norm(net[i])
    return net


NORMS = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "weight_norm by hook": nn.utils.weight_norm,
    "parametrization": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Doubled()),
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_layers_whose_weight_is_computed(norm):
    # A network with such a hook cannot be copied, so every copy is built anew.
    net = normed_network(norm)
    check_cut(net, ["1", "3"], torch.randn(8, 5), clone=lambda net: normed_network(norm))


@pytest.mark.parametrize("place", ["0", "1", "2", "3", "4"])
def test_forward_hooks_that_change_the_output(place):
    torch.manual_seed(28)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    x, target = torch.randn(8, 5), torch.randn(8, 3)
    # What a hook does to a module's output is what a module after it would do, whose place the tap precedes.
    spelled = nn.Sequential()
    for name, module in copy.deepcopy(net).named_children():
        spelled.append(module)
        if name == place:
            spelled.append(Call(lambda h: h * 1.5 + 0.1))
    net.get_submodule(place).register_forward_hook(lambda module, args, out: out * 1.5 + 0.1)
    for model in (wrap(net), wrap(spelled)):
        loss_of(model(x), target, "quadratic").backward()
    assert_same(grads(net), grads(spelled))
    shifted = int(place) < 1
    check_cut(spelled_copy(spelled), ["2" if shifted else "1", "4" if int(place) < 3 else "3"], x, target)


def spelled_copy(net):
    fresh = copy.deepcopy(net)
    fresh.zero_grad()
    return fresh


def test_backward_hooks_on_parameters_see_the_gradient():
    torch.manual_seed(28)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    seen = []
    net[0].weight.register_hook(lambda g: seen.append(g.clone()))
    net[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    loss_of(wrap(net)(torch.randn(8, 5)), torch.randn(8, 3), "quadratic").backward()
    assert len(seen) == 2
    assert_same(seen, [net[0].weight.grad] * 2)


@pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
def test_input_that_requires_a_gradient(taps):
    """It gets the projected error of the first tap through the first layer; all else stays as it is."""
    torch.manual_seed(29)
    linears = [nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)]
    net = nn.Sequential(linears[0], nn.Tanh(), linears[1], nn.ReLU(), linears[2])
    x, target = torch.randn(8, 5, requires_grad=True), torch.randn(8, 3)
    loss_of(wrap(net, taps=taps)(x), target, "quadratic").backward()
    check_layers(linears, [CASES[1], CASES[2]], x.detach(), target, "quadratic")

    def expected(dtype):
        layers = [
            Layer(m.weight, m.bias, name).to(dtype)
            for m, name in zip(linears, ["tanh", "relu", "identity"], strict=True)
        ]
        _, pre, output = mlp_forward(layers, x.detach().to(dtype))
        B = feedback_from_matrix(unified(WIDEST, 3), 7).to(dtype)
        return (error_of(output, target, "quadratic") @ B.T) * slope("tanh", pre[0]) @ layers[0].weight

    assert_close_to_oracle(x.grad, expected(torch.float64), expected(torch.float32), 0.0)


@pytest.mark.parametrize("make", [small_cnn, batch_norm_cnn])
def test_bitwise_repeatability(make):
    x, target = torch.randn(7, 3, 8, 8), torch.randn(7, 4)
    results = []
    for _ in range(3):
        model = wrap(make())
        loss_of(model(x), target, "quadratic").backward()
        results.append(grads(model))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.GELU])
def test_nan_and_inf_in_the_error_reach_every_layer(bad, activation):
    torch.manual_seed(30)
    net = nn.Sequential(nn.Linear(5, 7), activation(), nn.Linear(7, 6), activation(), nn.Linear(6, 3))
    output = wrap(net)(torch.randn(8, 5))
    e = torch.randn(8, 3)
    e[2, 1] = bad
    output.backward(e)
    for name, p in net.named_parameters():
        assert not p.grad.isfinite().all(), name


def test_nan_in_one_row_of_a_convolution_reaches_it():
    net = small_cnn()
    e = torch.randn(7, 4)
    e[3, 0] = math.nan
    wrap(net)(torch.randn(7, 3, 8, 8)).backward(e)
    for name, p in net.named_parameters():
        assert p.grad.isnan().any(), name


class Overwrites(nn.Module):
    """Overwrites the activation that its own derivative needs."""

    def __init__(self, layer=nn.Linear):
        super().__init__()
        self.first, self.last = layer(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h.mul_(2)
        return self.last(h)


def test_activation_overwritten_during_the_forward_pass():
    with pytest.raises(RuntimeError, match="in-place operation"):
        wrap(Overwrites())(torch.randn(4, 5)).sum().backward()


def test_layer_input_overwritten_during_the_forward_pass():
    class OverwritesInput(Overwrites):
        def forward(self, x):
            x = x + 0
            h = torch.tanh(self.first(x))
            x.zero_()
            return self.last(h)

    with pytest.raises(RuntimeError, match="in-place operation"):
        wrap(OverwritesInput())(torch.randn(4, 5)).sum().backward()


def test_input_overwritten_before_the_backward_pass():
    x = torch.randn(4, 5)
    loss = wrap(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))(x).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_overwriting_what_no_gradient_needs_is_allowed():
    """f' of |a| comes from a; the next layer sees the tensor as it is after the change."""

    class Allowed(Overwrites):
        def forward(self, x):
            h = torch.abs(self.first(x))
            h.mul_(2)
            return self.last(h)

    torch.manual_seed(31)
    net, x, target = Allowed(), torch.randn(8, 5), torch.randn(8, 3)
    loss_of(wrap(net)(x), target, "quadratic").backward()
    masks = [torch.full((8, 6), 2.0)]
    check_layers([net.first, net.last], [("abs", 0.0, 0.0)], x, target, "quadratic", masks)


def test_mixed_parameter_dtypes():
    """A float64 layer within a float32 network."""
    torch.manual_seed(32)
    net = nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), Call(torch.Tensor.double), nn.Linear(7, 6).double(), nn.ReLU(),
        Call(torch.Tensor.float), nn.Linear(6, 3),
    )  # fmt: skip
    x, target = torch.randn(8, 5), torch.randn(8, 3)
    loss_of(wrap(net)(x), target, "quadratic").backward()
    assert [p.grad.dtype for p in net.parameters()] == [p.dtype for p in net.parameters()]
    assert_mixed_close(net, x, target)


def assert_mixed_close(net, x, target):
    linears = [net[0], net[3], net[6]]
    layers = [
        Layer(m.weight, m.bias, n).to(torch.float64) for m, n in zip(linears, ["tanh", "relu", "identity"], strict=True)
    ]
    *_, output = mlp_forward(layers, x.double())
    B = [feedback_from_matrix(unified(WIDEST, 3), size) for size in (7, 6)]
    ref = mlp_gradients(layers, x.double(), error_of(output, target, "quadratic"), B)
    plain = [layer.to(torch.float32) for layer in layers]
    *_, output = mlp_forward(plain, x)
    same = mlp_gradients(plain, x, error_of(output, target, "quadratic"), B)
    for linear, r, s in zip(linears, ref, same, strict=True):
        # The errors of the float32 layers are in the float64 layer's gradient too.
        assert_close_to_oracle(linear.weight.grad.float(), r.weight, s.weight, r.weight_scale)


def test_every_kind_of_feedback_gives_its_own_matrix():
    """The gradient uses exactly the matrix that `feedback_matrix` returns."""
    for kind, storage in itertools.product(
        ["gaussian", "rademacher", "uniform", "sparse", "fastfood"], ["dense", "procedural"]
    ):
        torch.manual_seed(33)
        net = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 6))
        model = dfa.DFA(net, dfa.Feedback(kind, storage, seed=5))
        x, e = torch.randn(8, 5), torch.randn(8, 6)
        model(x).backward(e)
        layer = Layer(net[0].weight, None, "tanh")
        last = Layer(net[2].weight, net[2].bias)
        B = model.feedback_matrix("0")
        assert B.abs().sum() > 0
        ref = mlp_gradients([layer.to(torch.float64), last.to(torch.float64)], x.double(), e.double(), [B])[0]
        same = mlp_gradients([layer.to(torch.float32), last.to(torch.float32)], x, e, [B])[0]
        assert_close_to_oracle(net[0].weight.grad, ref.weight, same.weight, ref.weight_scale, f"{kind} {storage}")


def test_scaled_matrix_of_each_tap_is_the_formula():
    model = wrap(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 3)))
    model(torch.randn(2, 5))
    for tap in model.taps:
        expected = feedback_from_matrix(unified(WIDEST, 3), tap.size)
        assert_close_to_oracle(model.feedback_matrix(tap.name), expected, expected.float(), 0.0)
