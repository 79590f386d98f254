"""`dfa.alignment` against two plain copies of the network and cosines written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from oracle import feedback_from_matrix
from torch import nn

import dfa_kernels as dfa

SEED = 6


def mlp(drop=0.0, norm=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))
    if norm:
        net.insert(1, nn.BatchNorm1d(9))
    if drop:
        net.insert(len(net) - 1, nn.Dropout(drop))
    return net


def cnn():
    torch.manual_seed(0)
    convolution = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*convolution, nn.Linear(36, 6), nn.Tanh(), nn.Linear(6, 3))


NETS = {
    "mlp": (mlp, ["1", "3"], "nonlinearity", (5,)),
    "mlp at inputs": (mlp, ["2", "4"], "layer_input", (5,)),
    "dropout": (lambda: mlp(drop=0.4), ["1", "3"], "nonlinearity", (5,)),
    "dropout at inputs": (lambda: mlp(drop=0.4), ["2", "5"], "layer_input", (5,)),
    "batch norm": (lambda: mlp(norm=True), ["2", "4"], "nonlinearity", (5,)),
    "convolutions": (cnn, ["2", "6"], "nonlinearity", (2, 8, 8)),
    "convolutions at inputs": (cnn, ["5", "7"], "layer_input", (2, 8, 8)),
}


def data(shape, n=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *shape, generator=generator), torch.randint(3, (n,), generator=generator)


def cosines(net, places, at_input, x, y, U):
    """Cosines of e B_iᵀ with ∂L/∂h_i, in float64, from the hooks of a plain network."""
    tensors = []

    def note(z):
        z.retain_grad()
        tensors.append(z)

    for name in places:
        module = net.get_submodule(name)
        if at_input:
            module.register_forward_pre_hook(lambda module, args: note(args[0]))
        else:
            module.register_forward_hook(lambda module, args, output: note(output))
    output = net(x)
    output.retain_grad()
    F.cross_entropy(output, y).backward()
    e = output.grad.double()
    return [_rowwise_cosine(e, z.grad.double().flatten(1), U) for z in tensors]


def _rowwise_cosine(e, true, U):
    projected = e @ feedback_from_matrix(U, true.shape[1]).T
    # A row that dropout or dead units leave without a gradient has no angle, and counts as zero.
    return ((projected * true).sum(1) / (projected.norm(dim=1) * true.norm(dim=1))).nan_to_num(0.0)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("make, places, taps, shape", NETS.values(), ids=NETS)
def test_equals_an_independent_computation(make, places, taps, shape, mode):
    x, y = data(shape)
    plain = make().train(mode == "train")
    model = dfa.DFA(copy.deepcopy(plain), dfa.Feedback(seed=SEED), taps=taps)
    U = dfa.Feedback(seed=SEED, normalize=False).matrix(400, 3)
    torch.manual_seed(3)
    exact = cosines(copy.deepcopy(plain).double(), places, taps == "layer_input", x.double(), y, U)
    if any(isinstance(m, nn.Dropout) for m in plain.modules()) and mode == "train":
        exact = None  # float64 draws other masks
    torch.manual_seed(3)
    same = cosines(copy.deepcopy(plain), places, taps == "layer_input", x, y, U)
    torch.manual_seed(3)
    found = dfa.alignment(model, x, y, F.cross_entropy)
    model(x)
    assert list(found) == [tap.name for tap in model.taps]
    for i, value in enumerate(found.values()):
        expected = same[i] if exact is None else exact[i]
        error = (value.cosine.double() - expected).abs().max()
        # A cosine is at most one, so its last bits are those of one.
        assert error <= 2 * (same[i] - expected).abs().max() + 16 * torch.finfo(torch.float32).eps
        assert value.cosine.shape == (12,)
        assert value.mean == pytest.approx(value.cosine.double().mean().item(), abs=1e-12)
        assert value.std == pytest.approx(value.cosine.double().std(correction=0).item(), abs=1e-12)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_leaves_everything_as_it_was(mode, before):
    x, y = data((2, 8, 8))
    net = cnn()
    net.insert(5, nn.Dropout(0.3))
    model = dfa.DFA(net)
    if before:
        F.cross_entropy(model(x), y).backward()
    model.train(mode == "train")
    held = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    tensors = [t.clone() for t in (*model.parameters(), *model.buffers())]
    random = torch.get_rng_state()
    dfa.alignment(model, x, y, F.cross_entropy)
    assert torch.equal(torch.get_rng_state(), random)
    for a, b in zip((*model.parameters(), *model.buffers()), tensors, strict=True):
        assert torch.equal(a, b)
    for p, grad in zip(model.parameters(), held, strict=True):
        assert (p.grad is None and grad is None) or torch.equal(p.grad, grad)
    assert model.training == (mode == "train")


def test_under_no_grad():
    x, y = data((5,))
    model = dfa.DFA(mlp())
    expected = dfa.alignment(model, x, y, F.cross_entropy)
    with torch.no_grad():
        found = dfa.alignment(model, x, y, F.cross_entropy)
    for a, b in zip(found.values(), expected.values(), strict=True):
        assert torch.equal(a.cosine, b.cosine)


def test_under_backprop_the_numbers_are_the_same():
    x, y = data((5,))
    model = dfa.DFA(mlp())
    expected = dfa.alignment(model, x, y, F.cross_entropy)
    with model.backprop():
        found = dfa.alignment(model, x, y, F.cross_entropy)
    for a, b in zip(found.values(), expected.values(), strict=True):
        assert torch.equal(a.cosine, b.cosine)


def test_transposed_last_weight_aligns_the_last_hidden_layer():
    """With B = W_Nᵀ the projected error of the last hidden layer is its true gradient."""
    x, y = data((5,))
    net = mlp()
    U = torch.randn(9, 3)
    U[:7] = net[4].weight.detach().T
    model = dfa.DFA(net, dfa.Feedback.from_matrix(U, normalize=False, gain=1.0))
    found = dfa.alignment(model, x, y, F.cross_entropy)
    assert (found["2"].cosine - 1).abs().max() <= 4 * torch.finfo(torch.float32).eps
    assert found["2"].mean == pytest.approx(1, abs=1e-6)
    assert (found["0"].cosine - 1).abs().max() > 0.01


def test_negated_feedback_is_opposed():
    x, y = data((5,))
    net = mlp()
    U = torch.randn(9, 3)
    U[:7] = -net[4].weight.detach().T
    found = dfa.alignment(dfa.DFA(net, dfa.Feedback.from_matrix(U)), x, y, F.cross_entropy)
    assert (found["2"].cosine + 1).abs().max() <= 4 * torch.finfo(torch.float32).eps


def test_rows_without_a_gradient_have_cosine_zero():
    x, y = data((5,))

    def loss_of_some(output, y):
        return F.cross_entropy(output[:9], y[:9])

    found = dfa.alignment(dfa.DFA(mlp()), x, y, loss_of_some)
    for value in found.values():
        assert torch.equal(value.cosine[9:].double(), torch.zeros(3, dtype=torch.float64))
        assert (value.cosine[:9] != 0).all()
        assert not math.isnan(value.mean)


def test_a_tap_that_the_output_does_not_depend_on():
    """Its true gradient is zero in every row."""

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(6, 3)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            torch.tanh(self.b(h))
            return self.c(h)

    found = dfa.alignment(dfa.DFA(Unused()), *data((5,)), F.cross_entropy)
    assert torch.equal(found["b"].cosine.double(), torch.zeros(12, dtype=torch.float64))
    assert (found["a"].cosine != 0).all()


def test_frozen_layers_before_a_tap():
    """Freezing changes what learns, not the angle."""
    x, y = data((5,))
    net = mlp()
    expected = dfa.alignment(dfa.DFA(copy.deepcopy(net)), x, y, F.cross_entropy)
    net[2].requires_grad_(False)
    found = dfa.alignment(dfa.DFA(net), x, y, F.cross_entropy)
    for name, value in found.items():
        assert torch.equal(value.cosine, expected[name].cosine)


def test_tiny_gradients_have_the_same_cosine():
    """Norms of 1e-30 have squares below the smallest float32."""
    x, y = data((5,))
    model = dfa.DFA(mlp().double())
    expected = dfa.alignment(model, x.double(), y, F.cross_entropy)
    found = dfa.alignment(model, x.double(), y, lambda out, y: F.cross_entropy(out, y) * 1e-30)
    for a, b in zip(found.values(), expected.values(), strict=True):
        assert (a.cosine - b.cosine).abs().max() <= 1e-6


def test_device_moves_the_batch():
    x, y = data((5,))
    model = dfa.DFA(mlp())
    found = dfa.alignment(model, x, y, F.cross_entropy, device="cpu")
    expected = dfa.alignment(model, x, y, F.cross_entropy)
    assert torch.equal(found["0"].cosine, expected["0"].cosine)


@pytest.mark.parametrize("model", [nn.Linear(5, 3), None])
def test_not_a_wrapped_network(model):
    with pytest.raises(TypeError, match=rf"model.*{type(model).__name__}.*DFA"):
        dfa.alignment(model, *data((5,)), F.cross_entropy)
