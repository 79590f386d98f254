"""What a fused optimizer's deferred gradients have to share with gradients that are there at once."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dfa_kernels as dfa


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 8, generator=generator), torch.randint(4, (6,), generator=generator)


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def test_an_error_that_is_overwritten_before_the_step_is_noticed():
    model = dfa.DFA(network())
    optimizer = dfa.optim.SGD(model, 0.1)
    error = torch.randn(6, 4)
    model(batch()[0]).backward(error)
    error.zero_()
    with pytest.raises(RuntimeError, match="in-place operation before the step"):
        optimizer.step()


@pytest.mark.parametrize("how", ["grad", "backward"])
def test_a_gradient_of_the_input_alone_is_no_gradient_of_the_parameters(how):
    model = dfa.DFA(network())
    optimizer = dfa.optim.SGD(model, 0.1)
    before, x = weights(model), batch()[0].requires_grad_()
    output = model(x).square().sum()
    if how == "grad":
        (found,) = torch.autograd.grad(output, x)
    else:
        output.backward(inputs=[x])
        found = x.grad
    optimizer.step()
    assert found.abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_a_second_backward_pass_needs_retain_graph():
    model = dfa.DFA(network())
    dfa_optimizer = dfa.optim.SGD(model, 0.1)
    output = model(batch()[0]).sum()
    output.backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()
    assert len(dfa_optimizer._ledger) == 1


@pytest.mark.parametrize("convolution", [False, True])
def test_a_kept_loss_keeps_no_activations(convolution):
    net = network()
    if convolution:
        net = nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 2, 1), nn.ReLU(), nn.Flatten(), *net)
    model = dfa.DFA(net)
    optimizer = dfa.optim.SGD(model, 0.1)
    total, inputs = torch.zeros(()), []
    for _ in range(3):
        x = batch()[0]
        inputs.append(weakref.ref(x))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), batch()[1])
        loss.backward()
        optimizer.step()
        total = total + loss
        del x, loss
    gc.collect()
    assert [reference() for reference in inputs] == [None] * 3


def test_hooks_of_a_parameter_get_its_gradient():
    """A layer whose parameter has a hook gets its gradient at once, and the same update."""
    x, y = batch()
    plain, hooked = dfa.DFA(network()), dfa.DFA(network())
    seen: list[torch.Tensor] = []
    hooked.net[0].weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    hooked.net[2].bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    F.cross_entropy(plain(x), y).backward()
    expected = [p.grad for p in plain.parameters()]
    expected[0] = expected[0].clamp(-1e-3, 1e-3)
    before = weights(hooked)
    optimizer = dfa.optim.SGD(hooked, 1.0)
    F.cross_entropy(hooked(x), y).backward()
    optimizer.step()
    torch.testing.assert_close(seen, [expected[3]])
    for now, then, gradient in zip(weights(hooked), before, expected, strict=True):
        torch.testing.assert_close(then - now, gradient, rtol=1e-4, atol=1e-7)


class Swish(nn.Module):
    """Its first layer is fused by way of the sigmoid, and also part of a graph that autograd finishes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        return self.b(a * torch.sigmoid(a))


@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_a_layer_that_autograd_finishes_too_gets_both_gradients(rule):
    x, y = batch()
    ours, torchs = dfa.DFA(Swish()), dfa.DFA(Swish())
    optimizers = [
        getattr(dfa.optim, rule)(ours, lr=0.1),
        getattr(torch.optim, rule)(torchs.parameters(), lr=0.1),
    ]
    for _ in range(3):
        for model, optimizer in zip((ours, torchs), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(weights(ours), weights(torchs), rtol=1e-5, atol=1e-6)


def test_a_step_leaves_no_gradient_of_any_kind():
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    model = dfa.DFA(net)
    optimizer = dfa.optim.SGD(model, 0.1)
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    after = weights(model)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), after, strict=True))


def test_replaced_parameters_are_named():
    model = dfa.DFA(network())
    optimizer = dfa.optim.SGD(model, 0.1)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    with pytest.raises(RuntimeError, match=r"\(16, 8\).*make a new optimizer"):
        optimizer.step()


def test_a_sparse_gradient_is_refused():
    net = nn.Sequential(nn.EmbeddingBag(9, 8, sparse=True), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    model = dfa.DFA(net)
    optimizer = dfa.optim.AdamW(model)
    F.cross_entropy(model(torch.tensor([[1, 2], [3, 4]])), torch.tensor([0, 1])).backward()
    with pytest.raises(RuntimeError, match=r"\(9, 8\) has a sparse gradient"):
        optimizer.step()


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_optimizer_is_not_copied_without_its_model(copying):
    optimizer = dfa.optim.SGD(dfa.DFA(network()), 0.1)
    with pytest.raises(TypeError, match="belongs to its model"):
        copying(optimizer)


def test_a_step_inside_autocast_computes_in_full_precision():
    x, y = batch()
    models = [dfa.DFA(network()) for _ in range(2)]
    optimizers = [dfa.optim.SGD(model, 0.1) for model in models]
    for model in models:
        F.cross_entropy(model(x), y).backward()
    optimizers[0].step()
    with torch.autocast("cpu", torch.bfloat16):
        optimizers[1].step()
    assert all(torch.equal(a, b) for a, b in zip(weights(models[0]), weights(models[1]), strict=True))
