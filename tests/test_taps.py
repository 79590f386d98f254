"""Where the taps of less regular networks are."""

import random
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dfa_kernels as dfa


class Net(nn.Module):
    def __init__(self, forward, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.function = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, *self.layers)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 8, generator=generator), torch.randint(4, (6,), generator=generator)


def trained_by(model: dfa.DFA) -> list[torch.Tensor]:
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    return [p.grad for p in model.parameters()]


def test_layers_that_both_run_before_their_activations():
    """Each of two branches has its own tap: after the activation of what that layer made."""

    def forward(x, a, b, c):
        u, v = a(x), b(x)
        return c(torch.cat([torch.tanh(u), torch.relu(v)], 1))

    torch.manual_seed(0)
    model = dfa.DFA(Net(forward, nn.Linear(8, 5), nn.Linear(8, 7), nn.Linear(12, 4)))
    gradients = trained_by(model)
    assert [(tap.name, tap.size) for tap in model.taps] == [("layers.0", 5), ("layers.1", 7)]
    x, y = batch()
    a, b, _ = model.net.layers
    output = model(x).detach().requires_grad_()
    (error,) = torch.autograd.grad(F.cross_entropy(output, y), output)
    u, v = a(x).detach(), b(x).detach()
    delta_a = (error @ model.feedback_matrix("layers.0").T) * (1 - u.tanh() ** 2)
    delta_b = (error @ model.feedback_matrix("layers.1").T) * (v > 0)
    torch.testing.assert_close(gradients[0], delta_a.T @ x, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradients[2], delta_b.T @ x, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("change", ["keyword", "foreach"])
def test_a_pre_activation_changed_in_place_leaves_the_layer_to_autograd(change):
    def forward(x, a, b):
        z = a(x)
        if change == "keyword":
            torch.clamp_(input=z, min=-0.2, max=0.2)
        else:
            torch._foreach_mul_([z], 2.0)
        return b(torch.tanh(z))

    def forward_out_of_place(x, a, b):
        z = a(x)
        return b(torch.tanh(z.clamp(-0.2, 0.2) if change == "keyword" else 2.0 * z))

    layers = nn.Linear(8, 16), nn.Linear(16, 4)
    found = trained_by(dfa.DFA(Net(forward, *layers)))
    found = [gradient.clone() for gradient in found]
    for layer in layers:
        layer.zero_grad()
    expected = trained_by(dfa.DFA(Net(forward_out_of_place, *layers)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_an_in_place_activation_of_a_view():
    torch.manual_seed(0)
    layers = nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(6, 4)
    x = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(1))

    def gradients(activation: nn.Module) -> list[torch.Tensor]:
        net = nn.Sequential(layers[0], layers[1], activation, layers[2])
        net.zero_grad()
        dfa.DFA(net)(x).square().sum().backward()
        return [p.grad.clone() for p in net.parameters()]

    torch.testing.assert_close(gradients(nn.ReLU(inplace=True)), gradients(nn.ReLU()), rtol=0, atol=0)


def test_looking_at_a_shape_does_not_unfuse_a_layer():
    def forward(x, a, b):
        z = a(x)
        assert z.shape[1] == 16 and z.dim() == 2
        return b(torch.tanh(z))

    model = dfa.DFA(Net(forward, nn.Linear(8, 16), nn.Linear(16, 4)))
    optimizer = dfa.optim.SGD(model, 0.1)
    trained_by(model)
    assert len(optimizer._ledger.calls[0].parameters) == 4


def test_taps_that_only_exist_without_gradients_are_refused():
    block = nn.Sequential(nn.Linear(8, 16), nn.Tanh())

    def forward(x, block, last):
        return last(checkpoint(block, x, use_reentrant=True))

    model = dfa.DFA(Net(forward, block, nn.Linear(16, 4)))
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(batch()[0].requires_grad_())


def test_taps_follow_a_change_of_the_network():
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    model = dfa.DFA(net)
    trained_by(model)
    net[2] = nn.Sequential(nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 5))
    trained_by(model)
    assert [(tap.name, tap.size) for tap in model.taps] == [("0", 16), ("2.0", 9)]
    assert model.feedback_matrix("0").shape == (16, 5)


def test_lazy_buffers_do_not_disturb_the_counting_pass():
    def forward(x, a, norm, b):
        return b(torch.relu(norm(a(x))))

    model = dfa.DFA(Net(forward, nn.Linear(8, 16), nn.LazyBatchNorm1d(), nn.Linear(16, 4)))
    assert all(gradient.abs().sum() > 0 for gradient in trained_by(model)[::2])


def test_complex_outputs_are_refused():
    net = nn.Sequential(nn.Linear(8, 16, dtype=torch.cfloat), nn.Tanh(), nn.Linear(16, 4, dtype=torch.cfloat))
    with pytest.raises(TypeError, match=r"real and floating.*complex64"):
        dfa.DFA(net)(batch()[0].to(torch.cfloat))


def test_an_input_without_a_batch_is_refused():
    net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="batch"):
        dfa.DFA(net)(torch.randn(8))


class Stateful(nn.Module):
    """Keeps its last hidden state, in every way that a module can keep something."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(6)
        self.state = None
        self.passes = 0
        self.mean = torch.zeros(6)
        self.register_buffer("maximum", None)
        self.states: list[torch.Tensor] = []
        self.by_name: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(0.5)
        before = x.new_zeros(len(x), 6) if self.state is None else self.state
        state = torch.tanh(self.norm(self.first(x)) + self.second(before))
        self.state = state.detach()
        self.passes += 1
        self.mean.mul_(0.9).add_(self.state.mean(0))
        self.maximum = self.state.amax(0) if self.maximum is None else torch.maximum(self.maximum, self.state.amax(0))
        self.states.append(self.state)
        self.by_name[f"state {len(self.by_name)}"] = self.state
        return self.last(state + self.mean + self.maximum) * self.passes * len(self.by_name) + random.random()


def test_looking_for_taps_leaves_what_a_network_remembers_alone():
    torch.manual_seed(0)
    model, plain = dfa.DFA(Stateful(), taps="layer_input"), Stateful()
    plain.load_state_dict(model.net.state_dict())
    outputs = []
    for network in (model, plain):
        random.seed(1)
        x, _ = batch()
        outputs.append([network(x).detach() for _ in range(2)])
        assert len(getattr(network, "net", network).states) == 2
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


class Gated(nn.Module):
    """Its gates are activations of parameters, which follow no layer."""

    def __init__(self, gate_first: bool) -> None:
        super().__init__()
        self.first, self.last, self.gate = nn.Linear(8, 6), nn.Linear(6, 4), nn.Parameter(torch.rand(6))
        self.gate_first = gate_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate_first:
            gate = torch.sigmoid(self.gate)
            return self.last(torch.relu(self.first(x) * gate))
        a = self.first(x)
        return self.last(torch.relu(a * torch.sigmoid(self.gate)))


def test_an_activation_of_a_parameter_follows_no_layer():
    torch.manual_seed(0)
    models = [dfa.DFA(Gated(gate_first)) for gate_first in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    expected, found = map(trained_by, models)
    torch.testing.assert_close(found, expected)
    assert [tap.name for tap in models[1].taps] == ["first"]


def test_a_tap_whose_tensor_has_gone_elsewhere_stays():
    """The mean has what the tap cut; were the tap moved, nothing would teach that path."""

    def forward(x, a, b):
        z = a(x)
        h = torch.relu(z)
        return b(h.mean(1, keepdim=True) + h + z)

    torch.manual_seed(0)
    model = dfa.DFA(Net(forward, nn.Linear(8, 5), nn.Linear(5, 4)))
    trained_by(model)
    assert [(tap.name, tap.bypassed) for tap in model.taps] == [("layers.0", True)]


def test_what_was_made_without_a_graph_stays_so_when_a_tap_moves():
    def forward(x, a, b):
        z = a(x)
        s = torch.sigmoid(z)
        with torch.no_grad():
            gate = s * 2
        return b(z * gate)

    torch.manual_seed(0)
    model = dfa.DFA(Net(forward, nn.Linear(8, 5), nn.Linear(5, 4)))
    gradients = trained_by(model)
    x, y = batch()
    a, _ = model.net.layers
    z = a(x).detach()
    output = model(x).detach().requires_grad_()
    (error,) = torch.autograd.grad(F.cross_entropy(output, y), output)
    delta = (error @ model.feedback_matrix("layers.0").T) * z.sigmoid() * 2
    torch.testing.assert_close(gradients[0], delta.T @ x, rtol=1e-5, atol=1e-7)


def test_rows_of_two_inputs_of_one_size_are_not_confused():
    """As many prototypes as queries: the prototypes have no row of the output."""

    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 5)

        def forward(self, queries: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
            q, p = (self.last(torch.relu(self.first(x))) for x in (queries, prototypes))
            return q @ p.T

    model = dfa.DFA(Prototypes())
    for n in (3, 4):
        with pytest.raises(ValueError, match="taps"):
            model(torch.rand(4, 8), torch.rand(n, 8))


@pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
def test_a_checkpoint_across_a_tap_is_refused(taps):
    """Computed again without cuts it gave wrong gradients where shapes happened to fit."""

    def forward(x, a, b, c):
        return c(checkpoint(lambda x: F.mish(b(F.mish(a(x)))), x, use_reentrant=False))

    layers = [nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)]
    with pytest.raises(RuntimeError, match="checkpoint"):
        dfa.DFA(Net(forward, *layers), taps=taps)(torch.randn(8, 8))


def test_checkpoints_between_taps():
    def forward(x, a, b, c, kind):
        for layer in (a, b):
            x = kind(lambda x, layer=layer: F.mish(layer(x)), x)
        return c(x)

    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)]
    gradients = []
    for kind in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        model = dfa.DFA(Net(lambda x, *layers, kind=kind: forward(x, *layers, kind), *layers))
        model.zero_grad()
        gradients.append(trained_by(model))
    torch.testing.assert_close(*gradients)


def test_calls_of_other_threads_are_no_part_of_a_first_pass():
    """Such a call, begun before the pass and ended within it, took a module from what the pass thinks is running."""
    begun, go_on, errors = threading.Event(), threading.Event(), []

    class Waiting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            begun.set()
            assert go_on.wait(60)
            return x

    def elsewhere() -> None:
        try:
            waiting = Waiting()
            waiting.register_forward_hook(lambda *_: None)
            waiting(torch.zeros(1))
        except Exception as error:
            errors.append(error)

    other = threading.Thread(target=elsewhere)

    def forward(x, a, b):
        h = torch.tanh(a(x))
        go_on.set()
        other.join()
        return b(h)

    other.start()
    assert begun.wait(60)
    model = dfa.DFA(Net(forward, nn.Linear(8, 16), nn.Linear(16, 4)))
    model(torch.randn(3, 8))
    assert not errors
    assert [tap.name for tap in model.taps] == ["layers.0"]
