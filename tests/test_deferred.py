"""What a fused optimizer's deferred gradients have to share with gradients that are there at once."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

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
    assert len(dfa_optimizer._ledger.calls) == 1


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


def learning(dtype: torch.dtype = torch.float32) -> tuple[dfa.DFA, torch.optim.Optimizer]:
    model = dfa.DFA(network().to(dtype))
    return model, dfa.optim.SGD(model, 0.1)


def teach(model: nn.Module, scale: float = 1.0) -> None:
    x, y = batch()
    F.cross_entropy(model(scale * x.to(next(model.parameters()).dtype)), y).backward()


def gradients(*scales: float, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Those that the passes leave where no optimizer defers them."""
    model = dfa.DFA(network().to(dtype))
    for scale in scales:
        teach(model, scale)
    return [p.grad for p in model.parameters()]


def clip_value(parameters: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_value_(parameters, 0.01)


def clip_norm(parameters: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(parameters, 0.1)


def clip_norm_foreach(parameters: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(parameters, 0.1, foreach=True)


def clip_total_norm(parameters: list[nn.Parameter]) -> None:
    total = nn.utils.get_total_norm([p.grad for p in parameters])
    nn.utils.clip_grads_with_norm_(parameters, 0.1, total)


def multiply(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.grad.mul_(2).add_(1e-3)


def replace(parameters: list[nn.Parameter]) -> None:
    parameters[1].grad = parameters[1].grad * 3


def drop_one(parameters: list[nn.Parameter]) -> None:
    parameters[2].grad = None


def swap(parameters: list[nn.Parameter]) -> None:
    parameters[1].grad, parameters[3].grad = parameters[3].grad, parameters[1].grad


def move(parameters: list[nn.Parameter]) -> None:
    parameters[1].grad, parameters[3].grad = parameters[3].grad, None


def unscale_foreach(parameters: list[nn.Parameter]) -> None:
    torch._foreach_mul_([p.grad for p in parameters], 0.5)


CHANGES = [clip_value, clip_norm, clip_norm_foreach, clip_total_norm, multiply, replace, drop_one, unscale_foreach,
           swap, move]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_gradients_are_those_of_the_step(change: Callable[[list[nn.Parameter]], None], dtype: torch.dtype):
    (ours, optimizer), torchs = learning(dtype), dfa.DFA(network().to(dtype))
    other = torch.optim.SGD(torchs.parameters(), 0.1)
    start = weights(ours)
    for _ in range(2):
        for model, stepping in ((ours, optimizer), (torchs, other)):
            stepping.zero_grad()
            teach(model)
            change(list(model.parameters()))
            stepping.step()
    torch.testing.assert_close(weights(ours), weights(torchs))
    assert all(p.grad is None for p in ours.parameters())
    assert not torch.equal(weights(ours)[0], start[0])


def saved(tensor: torch.Tensor) -> torch.Tensor:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    buffer.seek(0)
    return torch.load(buffer)


LOOKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "clone": torch.clone,
    "norm": lambda g: g * (g.norm() / g.norm()),
    "numpy": lambda g: torch.from_numpy(g.numpy().copy()),
    "list": lambda g: torch.tensor(g.tolist()),
    "data": lambda g: g.data,
    "deepcopy": copy.deepcopy,
    "pickle": lambda g: pickle.loads(pickle.dumps(g)),
    "save": saved,
    "out": lambda g: torch.add(g, 0, out=torch.empty(g.shape)),
    "autograd": lambda g: torch.autograd.functional.jvp(lambda x: x * g, torch.ones(g.shape), torch.ones(g.shape))[1],
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_look_sees_the_gradient(look: Callable[[torch.Tensor], torch.Tensor]):
    for i, expected in enumerate(gradients(1.0)):
        model, optimizer = learning()
        teach(model)
        seen = look(list(model.parameters())[i].grad)
        assert type(seen) is torch.Tensor
        torch.testing.assert_close(seen, expected)
        del optimizer


def test_a_printed_gradient_shows_numbers():
    model, optimizer = learning()
    teach(model)
    assert repr(model.net[4].bias.grad) == repr(gradients(1.0)[-1])
    del optimizer


@pytest.mark.parametrize("looks", ["after", "between", "both"])
def test_a_look_at_the_sum_of_two_passes(looks: str):
    model, optimizer = learning()
    before = weights(model)
    teach(model)
    if looks != "after":
        torch.testing.assert_close([p.grad.clone() for p in model.parameters()], gradients(1.0))
    teach(model, 2.0)
    if looks != "between":
        torch.testing.assert_close([p.grad.clone() for p in model.parameters()], gradients(1.0, 2.0))
    optimizer.step()
    for now, then, gradient in zip(weights(model), before, gradients(1.0, 2.0), strict=True):
        torch.testing.assert_close(now, then - 0.1 * gradient)


def test_gradients_that_were_dropped_by_hand_are_not_owed():
    """By the wrapped network's zero_grad, which knows of no optimizer."""
    model, optimizer = learning()
    before = weights(model)
    teach(model)
    model.net[2:].zero_grad()
    teach(model, 2.0)
    optimizer.step()
    expected = gradients(1.0, 2.0)[:2] + gradients(2.0)[2:]
    for now, then, gradient in zip(weights(model), before, expected, strict=True):
        torch.testing.assert_close(now, then - 0.1 * gradient)


@pytest.mark.parametrize("zero", ["optimizer", "model", "network"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroed_gradients(zero: str, set_to_none: bool):
    """The network does not know that its gradients are deferred: torch's zero_ makes zeros of them."""
    model, optimizer = learning()
    teach(model)
    {"optimizer": optimizer, "model": model, "network": model.net}[zero].zero_grad(set_to_none=set_to_none)
    for p in model.parameters():
        assert p.grad is None if set_to_none or zero != "network" else torch.equal(p.grad, torch.zeros_like(p))


def test_a_look_at_what_was_overwritten_raises():
    model, optimizer = learning()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    x.zero_()
    with pytest.raises(RuntimeError, match="in-place operation before the step"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(RuntimeError, match="in-place operation before the step"):
        optimizer.step()


def test_another_optimizer_beside_it_steps_too():
    (ours, kept), torchs = learning(), dfa.DFA(network())
    for model in (ours, torchs):
        teach(model)
        torch.optim.AdamW(model.parameters()).step()
    torch.testing.assert_close(weights(ours), weights(torchs))
    del kept


def test_a_gradient_that_is_gone_says_so():
    model, optimizer = learning()
    teach(model)
    kept = model.net[0].weight.grad
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"\.grad.*before anybody looked.*clone\(\)"):
        kept.norm()
    teach(model)
    assert model.net[0].weight.grad is not kept
    with pytest.raises(RuntimeError, match="before anybody looked"):
        kept.norm()
    model.net[0].weight.grad = kept
    with pytest.raises(RuntimeError, match="before anybody looked"):
        optimizer.step()


def test_a_gradient_that_was_seen_stays_what_it_was():
    model, optimizer = learning()
    teach(model)
    kept = model.net[0].weight.grad
    kept.norm()
    optimizer.step()
    teach(model, 2.0)
    torch.testing.assert_close(kept.clone(), gradients(1.0)[0])


def test_what_nobody_kept_serves_again():
    """Making one takes longer than all else about it."""
    model, optimizer = learning()
    teach(model)
    first = [id(p.grad) for p in model.parameters()]
    optimizer.step()
    teach(model)
    assert [id(p.grad) for p in model.parameters()] == first


def test_a_pass_that_outlives_its_optimizer_writes_gradients():
    model, optimizer = learning()
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    del optimizer
    loss.backward()
    assert type(model.net[0].weight.grad) is torch.Tensor
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients(1.0))


def test_optimizer_and_model_that_hold_each_other_are_freed():
    model, optimizer = learning()
    teach(model)
    model.optimizer, parts = optimizer, [weakref.ref(p) for p in model.parameters()]
    del model, optimizer
    gc.collect()
    gc.collect()
    assert [part() for part in parts] == [None] * 6


def test_gradients_follow_their_parameters_to_another_dtype():
    model, optimizer = learning()
    teach(model)
    model.double()
    torch.testing.assert_close([p.grad for p in model.parameters()], [g.double() for g in gradients(1.0)])
    del optimizer


def test_a_partly_deferred_gradient_is_seen_whole():
    """The rest of it comes from autograd, in the same pass."""
    x, y = batch()
    ours, plain = dfa.DFA(Swish()), dfa.DFA(Swish())
    optimizer = dfa.optim.SGD(ours, 0.1)
    for model in (ours, plain):
        F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close([p.grad.clone() for p in ours.parameters()], [p.grad for p in plain.parameters()])
    del optimizer


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_gradient_penalty_is_refused(fused: bool, layer_norm: bool):
    net = network()
    if layer_norm:
        net.insert(1, nn.LayerNorm(16))
    model = dfa.DFA(net)
    optimizer = dfa.optim.SGD(model, 0.1) if fused else None
    x, message = batch()[0], r"(?s)create_graph: got True.*backprop\(\)"
    with pytest.raises(RuntimeError, match=message):
        model(x).square().sum().backward(create_graph=True)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    del optimizer


def test_a_gradient_penalty_by_backpropagation():
    model, plain, x = dfa.DFA(network()), network(), batch()[0].requires_grad_()
    with model.backprop():
        output = model(x)
    for values, net in ((output, model), (plain(x), plain)):
        (slope,) = torch.autograd.grad(values.square().sum(), x, create_graph=True)
        slope.square().sum().backward(inputs=list(net.parameters()))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_backward_pass_for_some_of_the_parameters_is_refused():
    """It filled all of them, or none, by whether the first was among them."""
    model = dfa.DFA(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    optimizer = dfa.optim.SGD(model, lr=0.1)
    first, *others = model.parameters()
    x = torch.randn(2, 4)
    for some in ([first], others):
        with pytest.raises(RuntimeError, match="expected all or none"):
            model(x).sum().backward(inputs=some)
    with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad"):
        torch.autograd.grad(model(x).sum(), [first])
    assert all(p.grad is None for p in model.parameters())
    model(x).sum().backward(inputs=[first, *others])
    optimizer.step()


def test_a_hook_that_comes_after_the_forward_pass_gets_its_gradient():
    model, optimizer = learning()
    x, y = batch()
    loss, seen = F.cross_entropy(model(x), y), []
    first, *_ = model.parameters()
    first.register_hook(seen.append)
    loss.backward()
    optimizer.step()
    assert [gradient.shape for gradient in seen] == [first.shape]
    assert seen[0].abs().sum() > 0


@pytest.mark.parametrize("passes", [1, 2])
def test_a_gradient_that_was_assigned_stays_what_it_is(passes):
    """What was deferred is not added to it; a backward pass after it is, as torch does."""
    model, optimizer = learning()
    teach(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if passes == 2:
        teach(model)
    before = weights(model)
    other, others = learning()
    if passes == 2:
        teach(other)
        others.step()
    optimizer.step()
    expected = before if passes == 1 else weights(other)
    for found, wanted in zip(weights(model), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("width", [16, 400])
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("observed", [False, True])
def test_an_input_in_a_parameters_memory_is_read_before_it_changes(width: int, first: int, observed: bool):
    """From the first pass on, or in one that is like those before it."""
    ends = []
    for fused in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
        weight = net[0].weight
        model = dfa.DFA(nn.Sequential(nn.Identity(), *net) if observed else net)
        optimizer = dfa.optim.SGD(model, 5.0) if fused else torch.optim.SGD(model.parameters(), 5.0)
        for step in range(5):
            optimizer.zero_grad()
            x = weight.detach() if step >= first else weight.detach().clone()
            model(x).square().mean().backward()
            optimizer.step()
        ends.append(weights(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "sparse", "fastfood"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "SGD by a norm"])
def test_default_device_and_dtype_are_for_others(kind: str, optimizer: str):
    """What is made on the way is where, and as, the network is. No other test has a batch of this size."""
    x, y = (each[:5] for each in batch())
    ends = []
    for dtype, device in ((torch.bfloat16, "meta"), (torch.float64, "meta"), (torch.float32, "cpu")):
        model = dfa.DFA(network(), dfa.Feedback(kind, "procedural"))
        name, *norm = optimizer.split(" by a ")
        made = getattr(dfa.optim, name)(model, lr=0.01, **({"max_norm": 0.1} if norm else {}))
        for _ in range(4):
            loss = F.cross_entropy(model(x), y)
            torch.set_default_dtype(dtype)
            try:
                with torch.device(device):
                    loss.backward()
                    made.step()
            finally:
                torch.set_default_dtype(torch.float32)
        ends.append(weights(model))
    for found in ends[:-1]:
        torch.testing.assert_close(found, ends[-1])


def test_gradients_outlive_their_optimizer():
    """As in torch, an optimizer made anew goes on from them."""
    (model, optimizer), (other, others) = learning(), learning()
    teach(model)
    teach(other)
    del optimizer
    gc.collect()
    torch.optim.SGD(model.parameters(), lr=others.param_groups[0]["lr"]).step()
    others.step()
    for found, wanted in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_parameter_that_has_become_smaller_is_no_place_for_an_update():
    """Kernels would write behind its end."""
    model, optimizer = learning()
    teach(model)
    p = next(model.parameters())
    p.data = p.data[:1].clone()
    with pytest.raises(RuntimeError, match=r"step: a parameter is of shape .* expected .* as in the backward pass"):
        optimizer.step()


def test_a_bias_of_one_number_for_all_outputs_is_torchs_to_update():
    """Kernels would write a number for each output, behind its end."""
    memory = torch.zeros(16)
    net = network()
    layer = net[0]
    layer.bias = nn.Parameter(memory[:1])
    model = dfa.DFA(net)
    optimizer = dfa.optim.SGD(model, lr=0.5)
    teach(model)
    assert layer.bias not in set(optimizer._ledger.calls[0].parameters)
    optimizer.step()
    assert memory[0] != 0
    assert not memory[1:].any()
