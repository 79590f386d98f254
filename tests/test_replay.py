"""Passes that repeat the calls of the last one give what an observed pass gives, bit for bit, whatever they call."""

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dfa_kernels as dfa
from dfa_kernels.backward import last_passes
from dfa_kernels.forward import script
from dfa_kernels.forward.replay import Replay
from dfa_kernels.forward.segments import SegmentedPass

PASSES = 7
Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Layers that `run` calls; `k` counts the passes, those of a survey not among them."""

    def __init__(self, run: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)
        self.p = nn.Parameter(torch.tensor([0.5]))
        self.register_buffer("given", torch.randn(5, 8))
        self.register_buffer("mask", (torch.rand(8) < 0.7).float())
        self.run, self.k = run, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def plain(net: Net, x: Tensor) -> Tensor:
    return net.out(torch.tanh(net.c(torch.tanh(net.b(torch.tanh(net.a(x)))))))


def residual(net: Net, x: Tensor) -> Tensor:
    h = F.relu(net.a(x.view(x.shape[0], -1)))
    h = h + F.relu(net.b(h))
    return net.out(h * 0.5 + torch.sigmoid(net.c(h)))


def gelu(net: Net, x: Tensor) -> Tensor:
    """Whose derivative needs its input."""
    return net.out(F.gelu(net.c(F.gelu(net.b(F.gelu(net.a(x))), approximate="tanh"))))


def returned(net: Net, x: Tensor) -> Tensor:
    """With calls that return their argument."""
    h = torch.tanh(net.a(x.contiguous().float()))
    return net.out(torch.tanh(net.b(h.contiguous().to(torch.float32))).flatten(1))


def random(net: Net, x: Tensor) -> Tensor:
    h = F.dropout(F.relu(net.a(x)), 0.3, training=True)
    h = h * (torch.rand(8) < 0.5)
    return net.out(F.relu(net.b(h)) * net.mask + torch.cat([h, h], dim=1)[:, :8])


def twice(net: Net, x: Tensor) -> Tensor:
    """A layer and an input that come twice."""
    h = torch.tanh(net.b(torch.tanh(net.a(x))))
    return net.out(torch.tanh(net.b(h + torch.tanh(net.a(x)))))


def steps(model: dfa.DFA, fused: bool, during: Callable[[int, Net], AbstractContextManager[Any]]) -> list[Any]:
    """Losses, and the parameters after some steps of training."""
    optimizer: Any = dfa.optim.SGD(model, lr=0.1) if fused else torch.optim.SGD(model.parameters(), lr=0.1)
    generator, found, net = torch.Generator().manual_seed(1), [], model.net
    assert isinstance(net, Net)
    torch.manual_seed(2)
    for k in range(PASSES):
        net.k = k
        x, y = torch.randn(5, 6, generator=generator), torch.randint(3, (5,), generator=generator)
        optimizer.zero_grad()
        try:
            with during(k, net):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            found += [loss.detach(), *[None if p.grad is None else p.grad.clone() for p in net.parameters()]]
            optimizer.step()
        except (RuntimeError, ValueError) as error:
            found.append(str(error))
    return [*found, *[p.detach().clone() for p in net.parameters()]]


def always(k: int, net: Net) -> AbstractContextManager[Any]:
    return nullcontext()


def without_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        last_passes.LastPasses, "watch", lambda _, policy, weight_layers: SegmentedPass(policy, weight_layers)
    )


def both(
    monkeypatch: pytest.MonkeyPatch,
    run: Forward,
    fused: bool = False,
    during: Callable[[int, Net], AbstractContextManager[Any]] = always,
) -> tuple[int, dfa.DFA]:
    """How many passes of the training were replays to their end, after it was compared with one without any."""
    ended, has_followed = [], Replay.has_followed
    monkeypatch.setattr(Replay, "has_followed", lambda *args: ended.append(has_followed(*args)) or ended[-1])
    model = dfa.DFA(Net(run))
    found = steps(model, fused, during)
    with monkeypatch.context() as patched:
        without_replays(patched)
        expected = steps(dfa.DFA(Net(run)), fused, during)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
    return sum(ended), model


@pytest.mark.parametrize("fused", [False, True], ids=["torch.optim", "fused"])
@pytest.mark.parametrize("run", [plain, residual, gelu, returned, random, twice])
def test_equals_observed_passes(run: Forward, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    replays, _ = both(monkeypatch, run, fused)
    # The first two are worked out and the third is written down, unless it has lists of tensors.
    assert replays == (0 if run is random else PASSES - 3)


def changed(usual: Callable[..., Tensor], other: Callable[..., Tensor]) -> Forward:
    """A network whose end is another one in the last passes but one."""

    def run(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(net.a(x))
        g = torch.tanh(net.b(h))
        return (other if net.k in (4, 5) else usual)(net, x, h, g)

    return run


class Scaled(torch.autograd.Function):
    """x · p, which no observer sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        with torch._C.DisableTorchFunction():
            return x * p

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        return None, (gradient * x).sum().reshape(1)


def within(context: Callable[[], AbstractContextManager[Any]], make: Callable[[], Tensor]) -> Tensor:
    with context():
        return make()


def overwritten(h: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        h.mul_(2)
    return h


def usual(net: Net, x: Tensor, h: Tensor, g: Tensor) -> Tensor:
    return net.out(torch.tanh(net.c(g)) + h)


def last_of_two(net: Net, x: Tensor, h: Tensor, g: Tensor) -> Tensor:
    part, _ = h.narrow(1, 0, 3), net.out(h)
    return net.out(g) if net.k != 5 else part


def first_of_two(net: Net, x: Tensor, h: Tensor, g: Tensor) -> Tensor:
    h.narrow(1, 0, 3)
    found = net.out(h)
    net.out(g)
    return found


def copied(x: Tensor, transposed: bool) -> Tensor:
    with torch._C.DisableTorchFunction():
        return x.t().clone(memory_format=torch.contiguous_format).t() if transposed else x.clone()


def layer_twice(net: Net, x: Tensor, h: Tensor, g: Tensor) -> Tensor:
    """A layer of whose two products only the second is taught."""
    net.c(net.given)
    return net.out(torch.tanh(net.c(g * 0.5)))


def looked_at(net: Net, x: Tensor, h: Tensor, other: Tensor | None = None) -> Tensor:
    z = net.c(h)
    r = torch.tanh(z)
    (z * (r if other is None else other)).detach()
    return net.out(r)


def beside(net: Net, x: Tensor, g: Tensor) -> Tensor:
    z = net.c(g)
    torch.relu((x * net.p).contiguous()).detach()
    return net.out(torch.tanh(z))


End = Callable[[Net, Tensor, Tensor, Tensor], Tensor]
CHANGES: dict[str, tuple[End, End]] = {
    "another function": (usual, lambda n, x, h, g: n.out(torch.sigmoid(n.c(g)) + h)),
    "no tap": (usual, lambda n, x, h, g: n.out(n.c(g) + h)),
    "another tensor": (usual, lambda n, x, h, g: n.out(torch.tanh(n.c(h)) + h)),
    "the other order": (usual, lambda n, x, h, g: n.out(h + torch.tanh(n.c(g)))),
    "another layer": (usual, lambda n, x, h, g: n.out(torch.tanh(n.b(g)) + h)),
    "a call more": (usual, lambda n, x, h, g: n.out(torch.tanh(n.c(g)) + h.abs())),
    "a call more at the end": (usual, lambda n, x, h, g: n.out(torch.tanh(n.c(g)) + h) * 2),
    "a call less": (usual, lambda n, x, h, g: n.out(torch.tanh(n.c(g)))),
    "in place": (usual, lambda n, x, h, g: n.out(torch.tanh(n.c(g)).add_(h))),
    "an activation in place": (usual, lambda n, x, h, g: n.out(torch.tanh_(n.c(g)) + h)),
    "without a graph": (usual, lambda n, x, h, g: n.out(torch.tanh(n.c(g)) + h.detach())),
    "a list": (usual, lambda n, x, h, g: n.out(torch.stack([torch.tanh(n.c(g)), h]).sum(0))),
    "dropout": (usual, lambda n, x, h, g: n.out(torch.tanh(F.dropout(n.c(g), 0.5)) + h)),
    "a mask": (usual, lambda n, x, h, g: n.out(torch.tanh(n.c(g)) + n.mask)),
    "a path around a tap that is made": (
        lambda n, x, h, g: n.out(torch.tanh(n.b(torch.tanh(n.c(g))))),
        lambda n, x, h, g: n.out(n.b((z := n.c(g)) * torch.tanh(z))),
    ),
    "a number": (
        lambda n, x, h, g: n.out(torch.tanh(n.c(g)) + h.mul(3)), lambda n, x, h, g: n.out(torch.tanh(n.c(g)) + h.mul(2))
    ),
    "a tensor for a number": (
        lambda n, x, h, g: n.out(torch.tanh(n.c(g)) + h.mul(3)),
        lambda n, x, h, g: n.out(torch.tanh(n.c(g)) + h.mul(n.mask)),
    ),
    "an argument more": (
        lambda n, x, h, g: n.out(F.softplus(n.c(g))), lambda n, x, h, g: n.out(F.softplus(n.c(g), 2.0))
    ),
    "another keyword": (
        lambda n, x, h, g: n.out(F.softplus(n.c(g), beta=0.5)),
        lambda n, x, h, g: n.out(F.softplus(n.c(g), threshold=0.5)),
    ),
    "a graph that nobody saw": (
        lambda n, x, h, g: n.out(torch.tanh(n.c(n.given))),
        lambda n, x, h, g: n.out(torch.tanh(n.c(Scaled.apply(n.given, n.p)))),
    ),
    "a layer without a graph": (
        usual, lambda n, x, h, g: n.out(torch.tanh(within(torch.no_grad, lambda: n.c(g))) + h)
    ),
    "a checkpoint": (
        lambda n, x, h, g: n.out(torch.tanh(n.c(torch.tanh(n.b(g))))),
        lambda n, x, h, g: n.out(
            checkpoint(lambda g: torch.tanh(n.c(torch.tanh(n.b(g)))), g, use_reentrant=False)
        ),
    ),
    "an overwritten tensor": (usual, lambda n, x, h, g: n.out(torch.tanh(n.c(g)) + overwritten(h))),
    "an overwritten product": (usual, lambda n, x, h, g: n.out(torch.tanh(overwritten(n.c(g))) + h)),
    "an overwritten output": (usual, lambda n, x, h, g: overwritten(n.out(torch.tanh(n.c(g)) + h))),
    "an overwritten input": (
        lambda n, x, h, g: n.out(F.gelu(n.c(F.gelu(n.b(g))))),
        lambda n, x, h, g: n.out(F.gelu(n.c(overwritten(F.gelu(n.b(g)))))),
    ),
    "a checkpoint from tap to tap": (
        lambda n, x, h, g: n.out(torch.tanh(n.c(g))),
        lambda n, x, h, g: n.out(checkpoint(lambda g: torch.tanh(n.c(g)), g, use_reentrant=False)),
    ),
    "a call in inference mode": (
        lambda n, x, h, g: n.out(g), lambda n, x, h, g: (within(torch.inference_mode, g.mean), n.out(g))[1]
    ),
    "the same call in inference mode": (
        lambda n, x, h, g: n.out(torch.tanh(n.c(g)) + h * 2),
        lambda n, x, h, g: n.out(torch.tanh(n.c(g)) + within(torch.inference_mode, lambda: h * 2)),
    ),
    "a product beside": (usual, layer_twice),
    "an activation by keyword": (usual, lambda n, x, h, g: n.out(torch.tanh(input=n.c(g)) + h)),
    "a layer by keyword": (
        usual, lambda n, x, h, g: n.out(torch.tanh(F.linear(g, bias=None, weight=n.c.weight)) + h)
    ),
    "an activation for a buffer": (
        lambda n, x, h, g: looked_at(n, x, g, n.given), lambda n, x, h, g: looked_at(n, x, g)
    ),
    "a copy that was none": (
        lambda n, x, h, g: beside(n, copied(x, False), g), lambda n, x, h, g: beside(n, copied(x, True), g)
    ),
    "another output": (last_of_two, first_of_two),
    "an earlier end": (last_of_two, last_of_two),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight layer", "ignore:.*taught")
@pytest.mark.parametrize("change", CHANGES)
def test_leaves_the_script_at_the_call_that_differs(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replays, _ = both(monkeypatch, changed(*CHANGES[change]))
    assert replays >= 1


@pytest.mark.filterwarnings("ignore:.*weight layer", "ignore:.*taught")
@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_repeated_is_observed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same networks, with the unusual end the usual one."""
    both(monkeypatch, changed(*reversed(CHANGES[change])))


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("first", [0, 4])
def test_nested_tensors_are_observed(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no shapes."""

    def run(net: Net, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction() if first else nullcontext():
            given = net.given[None]
            if net.k >= first:
                given = torch._nested_tensor_from_mask(given, torch.ones(1, 5, dtype=torch.bool))
        torch.tanh(given)
        return plain(net, x)

    both(monkeypatch, run)


def test_getters_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    replays, _ = both(monkeypatch, lambda net, x: net.out(torch.tanh(net.b(torch.tanh(net.a(x)).T.T))))
    assert replays == PASSES - 3


def test_dropout_of_what_is_not_taught_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def beside(net: Net) -> Tensor:
        return F.dropout(net.b(net.given), 0.5).detach()

    both(
        monkeypatch,
        changed(
            lambda n, x, h, g: n.out(torch.tanh(n.c(g)) + beside(n)),
            lambda n, x, h, g: n.out(torch.tanh(n.c(g)) + beside(n) + torch.rand(8)),
        ),
    )


@pytest.mark.parametrize("first", [0, 4])
def test_takes_inputs_made_in_inference_mode(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no versions."""

    def run(net: Net, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            x = within(torch.inference_mode, x.clone) if net.k >= first else x
        return plain(net, x * 2)

    both(monkeypatch, run)


def always_autocast(k: int, net: Net) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def test_leaves_in_inference_mode_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer's input, cast for its gradient, would be a tensor that nothing can save."""
    usual_end, other_end = CHANGES["a call in inference mode"]
    both(monkeypatch, changed(usual_end, other_end), during=always_autocast)


def frozen(k: int, net: Net) -> AbstractContextManager[Any]:
    for p in net.b.parameters():
        p.requires_grad_(k < 4)
    return nullcontext()


def half_frozen(k: int, net: Net) -> AbstractContextManager[Any]:
    net.b.bias.requires_grad_(k < 4)
    return nullcontext()


def broadcast(k: int, net: Net) -> AbstractContextManager[Any]:
    if k == 4:
        net.b.bias.data = torch.ones(1)
    return nullcontext()


def autocast(k: int, net: Net) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if k in (4, 5) else nullcontext()


def awaited(k: int, net: Net) -> AbstractContextManager[Any]:
    if k == 4:
        net.b.weight.register_hook(lambda gradient: gradient * 2)
    return nullcontext()


@pytest.mark.parametrize("fused", [False, True], ids=["torch.optim", "fused"])
@pytest.mark.parametrize("during", [frozen, half_frozen, broadcast, awaited, autocast, always_autocast])
def test_notices_what_changes_between_passes(
    during: Callable[[int, Net], AbstractContextManager[Any]], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays, _ = both(monkeypatch, residual, fused, during)
    assert replays >= 1


def test_a_smaller_batch_is_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, replays = dfa.DFA(Net(residual)), []
    has_followed = Replay.has_followed
    monkeypatch.setattr(Replay, "has_followed", lambda *args: replays.append(has_followed(*args)) or replays[-1])
    for rows in (5, 5, 5, 5, 3, 5, 5, 5, 5):
        model(torch.randn(rows, 6)).sum().backward()
    assert replays == [True, False, True]


def test_loaded_feedback_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = dfa.DFA(Net(residual)), dfa.DFA(Net(residual), dfa.Feedback(seed=7))
    x, y = torch.randn(5, 6), torch.randint(3, (5,))
    for _ in range(5):
        F.cross_entropy(model(x), y).backward()
    model.load_state_dict(other.state_dict())
    model.zero_grad()
    for each in (model, other):
        F.cross_entropy(each(x), y).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p is model.net.p or torch.equal(p.grad, q.grad)


def test_a_side_loss_reaches_the_layers_before_its_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []

    def run(net: Net, x: Tensor) -> Tensor:
        kept[:] = [torch.tanh(net.a(x))]
        return net.out(torch.tanh(net.b(kept[0])))

    def gradients(model: dfa.DFA) -> list[Tensor | None]:
        torch.manual_seed(3)
        for _ in range(5):
            model.zero_grad()
            output = model(torch.randn(5, 6))
            (output.sum() + dfa.side_loss(kept[0], lambda h: h.square().sum())).backward()
        return [p.grad for p in model.parameters()]

    found = gradients(dfa.DFA(Net(run)))
    without_replays(monkeypatch)
    for a, b in zip(found, gradients(dfa.DFA(Net(run))), strict=True):
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def test_keeps_no_tensor_of_a_pass() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def run(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(net.a(x))
        seen.append(weakref.ref(h))
        return net.out(torch.tanh(net.b(h)))

    model = dfa.DFA(Net(run))
    gc.disable()
    try:
        for _ in range(5):
            model(torch.randn(5, 6)).sum().backward()
        assert all(ref() is None for ref in seen)
    finally:
        gc.enable()


def test_large_passes_have_no_script_and_keep_nothing_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the results of `looks_back`, each of 160 bytes, three.
    monkeypatch.setattr(script, "LARGEST", 500)
    replays, _ = both(monkeypatch, residual)
    assert replays == 0
    model = dfa.DFA(Net(looks_back))
    assert not any(alive_at_the_end(model, 5) for _ in range(5))


def test_a_larger_batch_is_not_kept() -> None:
    model = dfa.DFA(Net(looks_back))
    assert [alive_at_the_end(model, rows) for rows in (1, 1, 1, 1, 50)] == [False, False, True, True, False]


def test_a_pass_that_leaves_keeps_no_results_any_more() -> None:
    model, alive = dfa.DFA(Net(looks_back)), []
    for model.net.k in range(5):
        alive.append(alive_at_the_end(model, 5))
    assert alive == [False, False, True, True, False]


def looks_back(net: Net, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x))
    ref = weakref.ref(h * 2)
    g = torch.tanh(net.b(h * 3 if net.k == 4 else h))
    net.was_alive = ref() is not None
    return net.out(g)


def alive_at_the_end(model: dfa.DFA, rows: int) -> bool:
    """Whether a tensor that the network lets go of in a pass over so many rows is kept to the end."""
    model(torch.randn(rows, 6)).sum().backward()
    return bool(model.net.was_alive)


def test_other_rows_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> list[Tensor]:
        model, found = dfa.DFA(Net(plain)), []
        torch.manual_seed(4)
        for k in range(6):
            model.batch_dims = 1 if k >= 4 else None
            model.zero_grad()
            model(torch.randn(5, 4, 6)).square().sum().backward()
            found += [p.grad.clone() for name, p in model.named_parameters() if not name.endswith("p")]
        return found

    found = gradients()
    without_replays(monkeypatch)
    for a, b in zip(found, gradients(), strict=True):
        assert torch.equal(a, b)


def test_an_input_on_another_device_is_refused_as_by_an_observer() -> None:
    model = dfa.DFA(Net(plain))
    for _ in range(5):
        model(torch.randn(5, 6)).sum().backward()
    with pytest.raises(ValueError, match="a weight layer on cpu got an input on meta"):
        model(torch.randn(5, 6, device="meta"))


def test_a_script_may_be_dropped_within_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        if net.k == 5:
            model.load_state_dict(other.state_dict())
        return plain(net, x)

    model, other, gradients = dfa.DFA(Net(run)), dfa.DFA(Net(plain), dfa.Feedback(seed=7)), []
    x = torch.randn(5, 6)
    for k in range(7):
        model.net.k = k
        model(x).sum().backward()
        gradients.append(model.net.a.weight.grad)
        model.zero_grad()
    other(x).sum().backward()
    assert torch.equal(gradients[5], gradients[0])
    assert torch.equal(gradients[6], other.net.a.weight.grad)


def test_another_thread_may_write_a_script_meanwhile() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        activation = net.activation
        if net.k == 5:
            net.k, net.activation = 6, torch.relu
            thread = Thread(target=lambda: [model(x).sum().backward() for _ in range(4)])
            thread.start(), thread.join()
        return net.out(activation(net.b(activation(net.a(x)))))

    model, gradients = dfa.DFA(Net(run)), []
    model.net.activation, x = torch.tanh, torch.randn(5, 6)
    for k in range(6):
        model.net.k = k
        output = model(x)
        model.zero_grad()
        output.sum().backward()
        gradients.append(model.net.a.weight.grad)
    assert torch.equal(gradients[-1], gradients[0])


def test_a_network_that_always_changes_gets_no_more_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    make = script.Recording.script
    monkeypatch.setattr(script.Recording, "script", lambda *args: written.append(make(*args)) or written[-1])
    model = dfa.DFA(Net(lambda net, x: net.out(torch.tanh(net.b(torch.tanh(net.a(x)) * float(net.k))))))
    for k in range(20):
        model.net.k = k
        model(torch.randn(5, 6)).sum().backward()
    assert len(written) == last_passes.MOST_LEFT


def test_copies_and_pickles() -> None:
    model = dfa.DFA(Net(plain))
    for _ in range(5):
        model(torch.randn(5, 6)).sum().backward()
    other = copy.deepcopy(model)
    x = torch.randn(5, 6)
    assert torch.equal(other(x), model(x))
    model.zero_grad(), other.zero_grad()
    for each in (model, other):
        each(x).sum().backward()
    assert other.net.a.weight.grad is not None and other.net.a.weight.grad is not model.net.a.weight.grad
    assert torch.equal(other.net.a.weight.grad, model.net.a.weight.grad)
