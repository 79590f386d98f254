"""The short way through a plain Sequential gives what the observed pass gives, bit for bit, and knows its limits."""

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dfa_kernels as dfa
from dfa_kernels.autocast import CASTS_LACK_GRAPHS
from dfa_kernels.forward.sequence import plain_sequence

ACTIVATIONS = [
    nn.Tanh(), nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.1), nn.LeakyReLU(-0.5), nn.Sigmoid(), nn.GELU(),
    nn.GELU("tanh"), nn.SiLU(), nn.ELU(0.7), nn.ELU(-0.7), nn.Softplus(2.0, 3.0), nn.Hardtanh(-0.3, 0.4), nn.ReLU6(),
]  # fmt: skip


class Opaque(nn.Module):
    """The same network, but not a Sequential itself, so it is observed."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def network(activation: nn.Module, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Linear(8, 12), nn.Dropout(dropout), copy.deepcopy(activation), nn.Dropout(dropout))
    return nn.Sequential(
        nn.Flatten(), nn.Dropout(dropout), hidden, nn.Linear(12, 9), copy.deepcopy(activation), nn.Linear(9, 3)
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 2, 4, generator=generator), torch.randint(3, (7,), generator=generator)


def output_and_gradients(net: nn.Module, taps: str) -> list[torch.Tensor]:
    x, y = batch()
    torch.manual_seed(2)
    output = dfa.DFA(net, taps=taps)(x)
    F.cross_entropy(output, y).backward()
    return [output.detach(), *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_equals_the_observed_pass(activation, dropout, taps):
    net = network(activation, dropout)
    assert plain_sequence(net, batch()[0], None, True) is not None
    found = output_and_gradients(copy.deepcopy(net), taps)
    expected = output_and_gradients(Opaque(copy.deepcopy(net)), taps)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        found = output_and_gradients(network(nn.Tanh()), "nonlinearity")
        expected = output_and_gradients(Opaque(network(nn.Tanh())), "nonlinearity")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", [nn.Sequential, Opaque])
def test_autocast_keeps_no_weight_without_its_graph(kind):
    """A pass here makes no graph for some products; one of the same network after it gets its own."""
    model = dfa.DFA(kind(network(nn.Tanh())))
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        with model.backprop():
            F.cross_entropy(model(x), y).backward()
    found = [p.grad for p in model.parameters()]
    net = network(nn.Tanh())
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(net(x), y).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, net.parameters(), strict=True))


class Casts(TorchDispatchMode):
    """Counts the casts of one tensor."""

    def __init__(self, tensor):
        super().__init__()
        self.tensor, self.count = tensor, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and args[0] is self.tensor
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(CASTS_LACK_GRAPHS, reason="this torch keeps casts that a pass with a graph must not get")
def test_autocast_keeps_the_casts_of_its_caller():
    model, weight = dfa.DFA(network(nn.Tanh())), nn.Parameter(torch.ones(3, 6))
    with torch.autocast("cpu", torch.bfloat16), Casts(weight) as casts:
        for _ in range(2):
            F.linear(torch.ones(2, 6), weight)
            model(batch()[0])
    assert casts.count == 1


def test_dropout_does_nothing_in_eval_mode():
    net = network(nn.Tanh(), 0.5).eval()
    found = output_and_gradients(copy.deepcopy(net), "layer_input")
    expected = output_and_gradients(copy.deepcopy(net).train().apply(_without_dropout), "layer_input")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _without_dropout(module: nn.Module) -> None:
    if isinstance(module, nn.Dropout):
        module.p = 0.0


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def hooked(place: str) -> nn.Sequential:
    net = network(nn.Tanh())
    getattr(net[3], place)(lambda *args: None)
    return net


def frozen() -> nn.Sequential:
    net = network(nn.Tanh())
    net[3].weight.requires_grad_(False)
    return net


def plain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), *layers)


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(hooked("register_forward_hook"), id="forward hook"),
        pytest.param(hooked("register_forward_pre_hook"), id="forward pre-hook"),
        pytest.param(hooked("register_full_backward_hook"), id="backward hook"),
        pytest.param(frozen(), id="frozen weight"),
        pytest.param(plain(Scaled(8, 3)), id="subclass of Linear"),
        pytest.param(plain(nn.Linear(8, 3), nn.Tanh()), id="activation at the end"),
        pytest.param(plain(nn.Tanh(), nn.Linear(8, 3)), id="two activations"),
        pytest.param(plain(nn.Linear(8, 8), nn.Linear(8, 3)), id="no activation between"),
        pytest.param(plain(nn.BatchNorm1d(8), nn.Linear(8, 3)), id="batch norm"),
        pytest.param(plain(nn.Linear(8, 3).double()), id="another dtype"),
        pytest.param(Opaque(plain(nn.Linear(8, 3))), id="no Sequential"),
        pytest.param(nn.Sequential(nn.Linear(8, 3)), id="no hidden layer"),
    ],
)
def test_leaves_other_networks_to_the_observed_pass(net):
    assert plain_sequence(net, torch.zeros(2, 8), None, True) is None


def test_leaves_other_calls_to_the_observed_pass():
    net, x = plain(nn.Linear(8, 3)), torch.zeros(2, 8)
    assert plain_sequence(net, x, None, True) is not None
    assert plain_sequence(net, x.clone().requires_grad_(), None, True) is None
    assert plain_sequence(net, x.to("meta"), None, True) is None
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert plain_sequence(net, x, None, True) is None
    finally:
        handle.remove()


def test_the_network_may_change_between_passes():
    net = plain(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model = dfa.DFA(net)
    model(torch.ones(2, 8))
    net[1] = nn.ReLU()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), net(x))


@pytest.mark.parametrize("place", [0, 1])
def test_a_replaced_forward_is_run(place):
    """Adapters and quantisers put a forward of their own on a module."""
    net, x = plain(nn.Linear(8, 3)), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    original = net[place].forward
    net[place].forward = lambda x: 2 * original(x)
    assert torch.equal(dfa.DFA(net)(x), net(x))


@pytest.mark.parametrize("passes", [0, 2])
def test_a_replaced_class_forward_is_run(passes, monkeypatch):
    net, x = plain(nn.Linear(8, 3)), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    model = dfa.DFA(net)
    for _ in range(passes):
        model(x)
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: torch.tanh(2 * x))
    assert torch.equal(model(x), net(x))


class Watched(nn.Sequential):
    """No plain sequence, though all its segments are linear layers: its passes are observed."""


def small(dropout: float = 0.5, kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    torch.manual_seed(3)
    return kind(
        nn.Sequential(nn.Linear(8, 9), nn.LeakyReLU(0.1)),
        nn.Dropout(dropout),
        nn.Linear(9, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )


def set_forward(model):
    model.net[2].forward = lambda x: 2 * F.linear(x, model.net[2].weight)


def narrow(model):
    model.net[2].weight.data = model.net[2].weight.data[:5].clone()
    model.net[2].bias.data = model.net[2].bias.data[:5].clone()
    model.net[4].weight.data = model.net[4].weight.data[:, :5].clone()


def replace_parameter(model):
    model.net[4].weight = nn.Parameter(torch.ones(3, 6))


def replace_module(model):
    torch.manual_seed(4)
    model.net[0][0] = nn.Linear(8, 9)


def append(model):
    torch.manual_seed(4)
    model.net.extend([nn.Tanh(), nn.Linear(3, 3)])


class Doubled(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def change_class(model):
    model.net.__class__ = Doubled


def parametrize(model):
    torch.nn.utils.parametrize.register_parametrization(model.net[2], "bias", nn.ReLU())


CHANGES = {
    "nothing": lambda model: None,
    "eval": lambda model: model.eval(),
    "dropout": lambda model: setattr(model.net[1], "p", 0.9),
    "slope": lambda model: setattr(model.net[0][1], "negative_slope", 0.7),
    "frozen": lambda model: model.net[2].weight.requires_grad_(False),
    "frozen bias": lambda model: model.net[2].bias.requires_grad_(False),
    "no bias": lambda model: model.net[2].register_parameter("bias", None),
    "hook": lambda model: model.net[2].register_forward_hook(lambda module, args, output: 2 * output),
    "gradient's hook": lambda model: model.net[2].weight.register_hook(lambda gradient: 3 * gradient),
    "forward": set_forward,
    "narrow": narrow,
    "parameter": replace_parameter,
    "module": replace_module,
    "network": lambda model: setattr(model, "net", network(nn.ReLU(), 0.2)),
    "one layer more": append,
    "parametrized": parametrize,
    "class": change_class,
    "double": lambda model: model.double(),
    "feedback": lambda model: setattr(model, "feedback", dfa.Feedback("rademacher", seed=5)),
}


@pytest.mark.parametrize("kind", [nn.Sequential, Watched])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_known_from_the_last_one_sees_what_has_changed_since(change, fused, kind):
    """Each change once before the first pass, once behind some; then the step of both is the same."""
    if kind is Watched and change in ("network", "one layer more"):
        pytest.skip("an observed network must keep its number of weight layers")

    def step_after(passes: int) -> tuple[list[torch.Tensor], list[dfa.TapInfo]]:
        model, x = dfa.DFA(small(kind=kind)), batch()[0].flatten(1)
        for _ in range(passes):
            model(x).square().sum().backward()
            model.zero_grad()
        CHANGES[change](model)
        optimizer = (dfa.optim.SGD if fused else torch.optim.SGD)(model if fused else model.parameters(), lr=0.1)
        x = x.to(next(model.parameters()).dtype)
        x = x.view(7, 2, 4) if change == "network" else x
        torch.manual_seed(2)
        model(x).square().sum().backward()
        optimizer.step()
        return [p.detach() for p in model.parameters()], model.taps

    (found, taps), (expected, taps_expected) = step_after(2), step_after(0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert taps == taps_expected


@pytest.mark.parametrize("kind", [nn.Sequential, Watched])
def test_another_batch_is_another_pass(kind):
    """In size, dtype, device and gradient; one under autocast too."""
    model, fresh, x = dfa.DFA(small(0.0, kind)), dfa.DFA(small(0.0, kind)), batch()[0].flatten(1)

    def gradients(model: dfa.DFA, x: torch.Tensor, autocast: bool) -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(x)
        output.float().square().sum().backward()
        return [p.grad for p in model.parameters()]

    for batch_of, autocast in ((x, False), (x[:3], False), (x, True), (x.clone().requires_grad_(), False), (x, False)):
        found, expected = gradients(model, batch_of, autocast), gradients(copy.deepcopy(fresh), batch_of, autocast)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Rewired(nn.Module):
    """Ways through the same layers, whose tensors have the same shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.way = "straight"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third, last = self.layers
        if self.way == "swapped":
            first, second = second, first
        h = torch.tanh(first(x))
        h = torch.sigmoid(second(h)) if self.way == "another activation" else torch.tanh(second(h))
        if self.way == "residual":
            h = x + h
        h = torch.tanh(third(x if self.way == "from the input" else h))
        if self.way == "dropout":
            h = F.dropout(h, 0.5)
        output = last(h)
        return torch.tanh(output) if self.way == "open end" else output


WAYS = ("straight", "swapped", "another activation", "residual", "from the input", "dropout", "open end")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_another_way_through_the_same_layers_is_another_pass(way, fused):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

    def step(earlier: Sequence[str]) -> tuple[list[torch.Tensor], list[dfa.TapInfo], str]:
        model = dfa.DFA(Rewired())
        optimizer = (dfa.optim.SGD if fused else torch.optim.SGD)(model if fused else model.parameters(), lr=0.1)
        for model.net.way in earlier:
            model(x)
        model.net.way = way
        torch.manual_seed(2)
        model(x).square().sum().backward()
        optimizer.step()
        return [p.detach() for p in model.parameters()], model.taps, str(model.plan())

    found, *told = step(["straight", *WAYS, "straight"])
    assert all(torch.equal(a, b) for a, b in zip(found, step([])[0], strict=True))
    # Of passes through the same shapes the first one tells.
    assert told == list(step(["straight"])[1:])
