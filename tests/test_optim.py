"""The fused optimizers against torch.optim on the same gradients."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import assert_close_to_oracle
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.torch_version import TorchVersion

import dfa_kernels as dfa
from dfa_kernels import numbers_on_device, updates
from dfa_kernels.backward.lazy_gradient import LazyGradient

FUSED = {"sgd": dfa.optim.SGD, "adamw": dfa.optim.AdamW}
PLAIN = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}

RULES = {
    "plain": ("sgd", {"lr": 0.1}),
    "decay": ("sgd", {"lr": 0.1, "weight_decay": 0.05}),
    "momentum": ("sgd", {"lr": 0.1, "momentum": 0.9}),
    "momentum decay": ("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    "nesterov": ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "nesterov decay": ("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "nesterov": True}),
    "adamw": ("adamw", {"lr": 0.01}),
    "adamw betas": ("adamw", {"lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.2}),
    "adamw no decay": ("adamw", {"lr": 0.01, "weight_decay": 0}),
}
every_rule = pytest.mark.parametrize("rule, options", RULES.values(), ids=RULES)
TWO = {name: RULES[name] for name in ("momentum decay", "adamw")}
two_rules = pytest.mark.parametrize("rule, options", TWO.values(), ids=TWO)


@pytest.fixture(params=["small", "large"])
def product_path(request, monkeypatch):
    """Small weights are updated from a gradient; that threshold at zero, all go the way of the large ones."""
    if request.param == "large":
        monkeypatch.setattr(updates, "SMALL", 0)


both_paths = pytest.mark.usefixtures("product_path")


def mlp(bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7, bias), nn.ReLU(), nn.Linear(7, 6, bias), nn.Tanh(), nn.Linear(6, 3, bias))


def frozen_mlp():
    net = mlp()
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    net[4].requires_grad_(False)
    return net


def mixed_mlp():
    """Fused layers between layers that autograd finishes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Dropout(0.3),
        nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3),
    )  # fmt: skip


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 6), nn.Sigmoid(), nn.Linear(6, 3),
    )  # fmt: skip


def transposed_mlp():
    """Its weights lie in memory column by column."""
    net = mlp()
    for layer in (net[0], net[2]):
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    return net


NETS = {
    "mlp": (mlp, 5),
    "transposed": (transposed_mlp, 5),
    "no bias": (lambda: mlp(bias=False), 5),
    "frozen": (frozen_mlp, 5),
    "mixed": (mixed_mlp, 5),
    "cnn": (cnn, 64),
}


def data(seed=0, n=8, width=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator), torch.randint(3, (n,), generator=generator)


def fused(rule, options):
    return lambda model: FUSED[rule](model, **options)


def plain(rule, options):
    return lambda model: PLAIN[rule](model.parameters(), **options)


def backward(model, seed=0, width=5):
    x, y = data(seed, width=width)
    loss = F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)
    loss.backward()
    return loss


def usual_step(model, optimizer, i, width):
    optimizer.zero_grad()
    backward(model, i, width)
    optimizer.step()


def train(net, make_optimizer, *, width=5, steps=6, step=usual_step, dtype=torch.float32, prepare=None):
    """The network after some steps; the random numbers of dropout are the same for everyone."""
    model = dfa.DFA(net.to(dtype))
    optimizer = make_optimizer(model)
    if prepare is not None:
        prepare(model, optimizer)
    torch.manual_seed(1)
    for i in range(steps):
        step(model, optimizer, i, width)
    return model


def check(make, rule, options, **how):
    """The fused optimizer is as near to a float64 run as torch's."""
    ref = train(make(), plain(rule, options), dtype=torch.float64, **how)
    same = train(make(), plain(rule, options), **how)
    out = train(make(), fused(rule, options), **how)
    assert_close(out, ref, same)
    before = dict(make().named_parameters())
    for name, p in out.net.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def assert_close(out, ref, same):
    tensors = [(*m.net.parameters(), *m.net.buffers()) for m in (out, ref, same)]
    for a, r, s in zip(*tensors, strict=True):
        if a.is_floating_point():
            # Updates are steps of order one times lr, whatever is left of the parameter.
            assert_close_to_oracle(a.detach(), r.detach(), s.detach(), 1.0)
        else:
            assert torch.equal(a, r)


@both_paths
@every_rule
@pytest.mark.parametrize("make, width", NETS.values(), ids=NETS)
def test_equals_torch_optim(make, width, rule, options):
    check(make, rule, options, width=width)


@both_paths
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@two_rules
def test_other_dtypes(rule, options, dtype):
    ref = train(mlp().to(dtype), plain(rule, options), dtype=torch.float64)
    same = train(mlp(), plain(rule, options), dtype=dtype)
    out = train(mlp(), fused(rule, options), dtype=dtype)
    assert_close(out, ref, same)


@both_paths
@two_rules
def test_autocast(rule, options):
    def step(model, optimizer, i, width):
        optimizer.zero_grad()
        x, y = data(i)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        F.cross_entropy(output.float(), y).backward()
        optimizer.step()

    out, same = train(mlp(), fused(rule, options), step=step), train(mlp(), plain(rule, options), step=step)
    assert_close(out, same, same)


@both_paths
@two_rules
@pytest.mark.parametrize("make, width", NETS.values(), ids=NETS)
def test_two_backward_passes_before_a_step(make, width, rule, options):
    def step(model, optimizer, i, width):
        optimizer.zero_grad()
        backward(model, i, width)
        backward(model, i + 100, width)
        optimizer.step()

    check(make, rule, options, width=width, step=step)


@both_paths
@two_rules
def test_retained_graph_counts_twice(rule, options):
    def step(model, optimizer, i, width):
        optimizer.zero_grad()
        x, y = data(i)
        loss = F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()

    check(mlp, rule, options, step=step)


@both_paths
@every_rule
def test_shared_layer(rule, options):
    """One parameter, two gradients, one update."""

    def make():
        torch.manual_seed(0)
        shared = nn.Linear(6, 6)
        return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), shared, nn.Tanh(), shared, nn.ReLU(), nn.Linear(6, 3))

    check(make, rule, options)


@two_rules
def test_parameter_shared_with_a_segment_of_autograd(rule, options):
    """Right, or an error that names it."""

    def make():
        torch.manual_seed(0)
        shared = nn.Linear(6, 6)
        return nn.Sequential(
            nn.Linear(5, 6), nn.ReLU(), shared, nn.Tanh(), shared, nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)
        )

    try:
        check(make, rule, options)
    except RuntimeError as error:
        assert "2.weight" in str(error)


@both_paths
@two_rules
def test_parameter_groups(rule, options):
    """Another rate for the last layer, and no decay for biases."""

    def prepare(model, optimizer):
        (group,) = optimizer.param_groups
        last = [p for n, p in model.named_parameters() if n.startswith("net.4")]
        biases = [p for n, p in model.named_parameters() if n.endswith("bias") and not n.startswith("net.4")]
        taken = {id(p) for p in last + biases}
        group["params"] = [p for p in group["params"] if id(p) not in taken]
        optimizer.add_param_group({"params": last, "lr": 0.03})
        optimizer.add_param_group({"params": biases, "weight_decay": 0.0})

    check(mlp, rule, options, prepare=prepare)
    together, apart = train(mlp(), fused(rule, options)), train(mlp(), fused(rule, options), prepare=prepare)
    assert not torch.equal(together.net[4].weight, apart.net[4].weight)
    assert not torch.equal(together.net[0].bias, apart.net[0].bias)


@pytest.mark.parametrize("own", [{"lr": 0.03}, {"momentum": 0.9}, {"weight_decay": 0.2}], ids=str)
def test_one_group_of_plain_sgd_differs(own):
    """Small parameters are updated by one call only if one learning rate is all that there is."""

    def prepare(model, optimizer):
        (group,) = optimizer.param_groups
        group["params"], last = group["params"][:4], group["params"][4:]
        optimizer.add_param_group({"params": last, **own})

    check(mlp, "sgd", {"lr": 0.1}, prepare=prepare)


@both_paths
@two_rules
def test_momentum_in_one_group_only(rule, options):
    if rule != "sgd":
        options = {**options, "betas": (0.9, 0.99)}

    def prepare(model, optimizer):
        (group,) = optimizer.param_groups
        group["params"], last = group["params"][:4], group["params"][4:]
        other = {"momentum": 0.0} if rule == "sgd" else {"betas": (0.5, 0.6)}
        optimizer.add_param_group({"params": last, **other})

    check(mlp, rule, options, prepare=prepare)


@two_rules
def test_changed_learning_rate(rule, options):
    def step(model, optimizer, i, width):
        optimizer.param_groups[0]["lr"] = 0.02 * (i + 1)
        usual_step(model, optimizer, i, width)

    check(mlp, rule, options, step=step)


@two_rules
def test_learning_rate_schedulers(rule, options):
    schedulers = {}

    def prepare(model, optimizer):
        schedulers[optimizer] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)

    def step(model, optimizer, i, width):
        usual_step(model, optimizer, i, width)
        schedulers[optimizer].step()

    check(mlp, rule, options, step=step, prepare=prepare)


@two_rules
def test_closure(rule, options):
    losses = []

    def step(model, optimizer, i, width):
        def closure():
            optimizer.zero_grad()
            return backward(model, i, width).item()

        losses.append(optimizer.step(closure))

    check(mlp, rule, options, step=step)
    assert len(losses) == 18
    assert losses[6:12] == pytest.approx(losses[12:], rel=1e-5)
    assert optimizer_returns_none(rule, options)


def optimizer_returns_none(rule, options):
    model = dfa.DFA(mlp())
    optimizer = fused(rule, options)(model)
    backward(model)
    return optimizer.step() is None


@two_rules
def test_step_without_a_backward_pass(rule, options):
    model = dfa.DFA(mlp())
    optimizer = fused(rule, options)(model)
    before = copy.deepcopy(model)
    optimizer.step()
    backward(model)
    optimizer.step()
    after = copy.deepcopy(model)
    assert_differ(before, after)
    optimizer.step()
    assert_equal(model, after)


def assert_equal(first, second):
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def assert_differ(first, second):
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("zero", ["optimizer", "model"])
@pytest.mark.parametrize("set_to_none", [True, False])
@two_rules
def test_zero_grad_drops_what_was_deferred(rule, options, zero, set_to_none):
    def step(model, optimizer, i, width):
        backward(model, i + 100, width)
        (optimizer if zero == "optimizer" else model).zero_grad(set_to_none=set_to_none)
        backward(model, i, width)
        optimizer.step()
        optimizer.zero_grad()

    check(mixed_mlp, rule, options, step=step)


@pytest.mark.parametrize("make, width", NETS.values(), ids=NETS)
def test_no_gradient_buffer_exists(make, width):
    model = dfa.DFA(make())
    optimizer = dfa.optim.SGD(model, 0.1)
    backward(model, width=width)
    # The last layer of the mixed network has the parameters of a norm before it in its segment.
    fused_layers = {"mixed": {3, 6}, "cnn": {8, 10}}
    name = next(n for n, (m, _) in NETS.items() if m is make)
    for parameter_name, p in model.net.named_parameters():
        layer = int(parameter_name.partition(".")[0])
        if layer in fused_layers.get(name, {0, 2, 4}):
            assert not p.requires_grad or p.grad.made is None, parameter_name
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@two_rules
def test_state_of_torch_continues(rule, options):
    """Three steps by torch.optim, three by the fused optimizer that took over its state."""
    start = train(mlp(), plain(rule, options), steps=0)
    optimizer = plain(rule, options)(start)
    for i in range(3):
        usual_step(start, optimizer, i, 5)
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))

    def load(model, other):
        other.load_state_dict(copy.deepcopy(state))

    def later(model, optimizer, i, width):
        usual_step(model, optimizer, i + 3, width)

    start.zero_grad()
    again = {"prepare": load, "step": later, "steps": 3}
    ref = train(copy.deepcopy(start.net), plain(rule, options), dtype=torch.float64, **again)
    same = train(copy.deepcopy(start.net), plain(rule, options), **again)
    out = train(copy.deepcopy(start.net), fused(rule, options), **again)
    assert_close(out, ref, same)


@every_rule
def test_torch_continues_from_the_fused_state(rule, options):
    model = dfa.DFA(mixed_mlp())
    optimizer = fused(rule, options)(model)
    torch.manual_seed(1)
    for i in range(3):
        usual_step(model, optimizer, i, 5)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    net = copy.deepcopy(model.net)
    random = torch.get_rng_state()
    for i in range(3, 6):
        usual_step(model, optimizer, i, 5)
    other = dfa.DFA(net)
    resumed = plain(rule, options)(other)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    torch.set_rng_state(random)
    for i in range(3, 6):
        usual_step(other, resumed, i, 5)
    assert_close(other, model, model)


@pytest.mark.parametrize(
    "rule, option, value", [("sgd", "maximize", True), ("sgd", "dampening", 0.5), ("adamw", "amsgrad", True)]
)
def test_state_with_an_option_that_the_rule_lacks(rule, option, value):
    """It must not be dropped silently."""
    state = PLAIN[rule](mlp().parameters(), lr=0.1, **{option: value}).state_dict()
    optimizer = FUSED[rule](dfa.DFA(mlp()), lr=0.1)
    with pytest.raises(ValueError, match=option):
        optimizer.load_state_dict(state)


@two_rules
def test_own_state_continues_bit_for_bit(rule, options):
    model = dfa.DFA(mlp())
    optimizer = fused(rule, options)(model)
    for i in range(3):
        usual_step(model, optimizer, i, 5)
    other = copy.deepcopy(model)
    resumed = fused(rule, options)(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in range(3, 6):
        usual_step(model, optimizer, i, 5)
        usual_step(other, resumed, i, 5)
    assert_equal(model, other)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("make, width", NETS.values(), ids=NETS)
@two_rules
def test_grad_scaler(rule, options, make, width, clip):
    """It skips the step whose gradients are not finite; clipping comes after its unscale_()."""
    scalers = {}

    def prepare(model, optimizer):
        scalers[optimizer] = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(model, optimizer, i, width):
        scaler = scalers[optimizer]
        optimizer.zero_grad()
        x, y = data(i, width=width)
        loss = F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)
        scaler.scale(loss * float("inf") if i == 2 else loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        scaler.step(optimizer)
        scaler.update()

    check(make, rule, options, width=width, step=step, prepare=prepare)


@every_rule
@pytest.mark.parametrize("make, width", NETS.values(), ids=NETS)
def test_capturable(make, width, rule, options):
    """Numbers and counts of steps that are read from the device give the same."""
    check_capturable(make, rule, options, width=width)


def check_capturable(make, rule, options, **how):
    ref = train(make(), plain(rule, options), dtype=torch.float64, **how)
    same = train(make(), plain(rule, options), **how)
    out = train(make(), capturable(rule, options), **how)
    assert_close(out, ref, same)
    exact = train(make(), capturable(rule, options), dtype=torch.float64, **how)
    for a, b in zip(exact.parameters(), ref.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def capturable(rule, options):
    return lambda model: FUSED[rule](model, **options, capturable=True)


@two_rules
def test_capturable_groups_and_schedulers(rule, options):
    """One group's rate is a number, another's a tensor that its scheduler fills in place."""
    schedulers = {}

    def prepare(model, optimizer):
        (group,) = optimizer.param_groups
        group["params"], last = group["params"][:4], group["params"][4:]
        rate = torch.tensor(0.03, dtype=torch.float64)
        optimizer.add_param_group({"params": last, "lr": rate, "weight_decay": 0.0})
        schedulers[optimizer] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)

    def step(model, optimizer, i, width):
        usual_step(model, optimizer, i, width)
        schedulers[optimizer].step()

    check_capturable(mlp, rule, options, prepare=prepare, step=step)


@two_rules
def test_refresh_brings_changes_to_the_device(rule, options):
    """And nothing else: what has not changed is not written again."""
    model = dfa.DFA(mlp())
    optimizer = capturable(rule, options)(model)
    usual_step(model, optimizer, 0, 5)
    table = optimizer._on_device.table
    before, version = table.clone(), table._version
    optimizer.refresh()
    assert table._version == version
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.refresh()
    assert table is optimizer._on_device.table
    assert (table[:, 0] == 0.5).all()
    assert torch.equal(table[:, 1:], before[:, 1:])


def test_a_change_under_capture_is_refused(monkeypatch):
    """The graph would bring it back at each replay."""
    optimizer = dfa.optim.SGD(dfa.DFA(mlp()), 0.1, capturable=True)
    with monkeypatch.context() as patch:
        patch.setattr(numbers_on_device, "is_captured", lambda device: True)
        with pytest.raises(RuntimeError, match=r"capturable: .*or there was none.*refresh\(\)"):
            optimizer.step()
    optimizer.refresh()
    optimizer.param_groups[0]["lr"] = 0.2
    monkeypatch.setattr(numbers_on_device, "is_captured", lambda device: True)
    with pytest.raises(RuntimeError, match=r"capturable: param_groups have changed.*refresh\(\)"):
        optimizer.step()


def test_capturable_needs_one_device():
    net = mlp()
    net[4].to("meta")
    with pytest.raises(ValueError, match=r"capturable.*\['cpu', 'meta'\]"):
        dfa.optim.SGD(dfa.DFA(net), 0.1, capturable=True).refresh()


@pytest.mark.parametrize("first, second", [("plain", "capturable"), ("capturable", "plain"), ("fused", "capturable"),
                                           ("capturable", "fused"), ("capturable", "capturable")])  # fmt: skip
@two_rules
def test_state_goes_on_in_a_capturable_optimizer(rule, options, first, second):
    """And from it in others, torch's too, which see the counts of steps."""
    kinds = {"plain": plain, "fused": fused, "capturable": capturable}
    model = dfa.DFA(mlp())
    optimizer = kinds[first](rule, options)(model)
    for i in range(3):
        usual_step(model, optimizer, i, 5)
    optimizer.zero_grad()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = dfa.DFA(copy.deepcopy(model.net))
    resumed = kinds[second](rule, options)(other)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    expected = train(mlp(), plain(rule, options))
    for i in range(3, 6):
        usual_step(other, resumed, i, 5)
    assert_close(other, expected, expected)
    if rule == "adamw":
        assert all(state["step"] == 6 for state in resumed.state.values())


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("rule", FUSED)
def test_distributed_model_is_refused(rule, one_process):
    parallel = nn.parallel.DistributedDataParallel(dfa.DFA(mlp()))
    with pytest.raises(TypeError, match=r"(?s)model.*DistributedDataParallel.*torch\.optim"):
        FUSED[rule](parallel, lr=0.1)


@pytest.mark.parametrize("rule", FUSED)
def test_model_inside_a_distributed_one_is_refused(rule, one_process):
    model = dfa.DFA(mlp())
    optimizer = FUSED[rule](model, lr=0.1)
    parallel = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match=r"(?s)model.*DistributedDataParallel.*torch\.optim"):
        parallel(data()[0])
    del optimizer


@pytest.mark.parametrize("model", [None, mlp(), [torch.ones(3)]])
@pytest.mark.parametrize("rule", FUSED)
def test_something_else_is_refused(rule, model):
    with pytest.raises(TypeError, match=rf"model.*{type(model).__name__}.*DFA"):
        FUSED[rule](model, lr=0.1)


@two_rules
def test_gradients_from_before_the_optimizer_are_added(rule, options):
    def prepare(model, optimizer):
        with model.backprop():
            backward(model)

    def step(model, optimizer, i, width):
        backward(model, i, width)
        optimizer.step()
        optimizer.zero_grad()

    check(mixed_mlp, rule, options, prepare=prepare, step=step)


@pytest.mark.parametrize("first", ["dfa", "backprop"])
@two_rules
def test_passes_of_both_kinds_before_a_step(rule, options, first):
    def step(model, optimizer, i, width):
        for kind in ("dfa", "backprop") if first == "dfa" else ("backprop", "dfa"):
            with model.backprop() if kind == "backprop" else contextlib.nullcontext():
                backward(model, i, width)
        optimizer.step()
        optimizer.zero_grad()

    check(mixed_mlp, rule, options, step=step)


@two_rules
def test_steps_by_backpropagation(rule, options):
    """Under backprop() there are gradients, and the optimizer uses them."""

    def step(model, optimizer, i, width):
        optimizer.zero_grad()
        with model.backprop():
            backward(model, i, width)
        optimizer.step()

    check(mixed_mlp, rule, options, step=step)


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield lambda model, fullgraph: torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    torch.compiler.reset()


COMPILED = {name: RULES[name] for name in ("plain", "nesterov decay", "adamw betas")}
compiled_rules = pytest.mark.parametrize("rule, options", COMPILED.values(), ids=COMPILED)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("make_optimizer", [fused, capturable])
@compiled_rules
def test_compiled_model_and_step(rule, options, make_optimizer, compiler):
    """Each in one piece. Nothing is put off, and no step but the first ones is compiled."""
    compiled, counts = {}, []

    def prepare(model, optimizer):
        loss = compiler(lambda x, y: F.cross_entropy(model(x), y), fullgraph=True)
        compiled[optimizer] = loss, compiler(optimizer.step, fullgraph=True)

    def step(model, optimizer, i, width):
        optimizer.zero_grad()
        loss, own_step = compiled[optimizer]
        loss(*data(i)).backward()
        assert not any(type(p.grad) is LazyGradient for p in model.parameters())
        own_step()
        assert all(p.grad is None for p in model.parameters())
        counts.append(graphs())

    out = train(mlp(), make_optimizer(rule, options), step=step, prepare=prepare)
    ref = train(mlp(), plain(rule, options), dtype=torch.float64)
    assert_close(out, ref, train(mlp(), plain(rule, options)))
    assert counts[2] == counts[-1]


@compiled_rules
def test_max_norm_of_a_compiled_step(rule, options, compiler):
    """In one piece where torch's compiler can look into clipping; that of 2.10 cannot."""
    steps, whole = {}, TorchVersion(torch.__version__) >= "2.11"

    def prepare(model, optimizer):
        steps[optimizer] = compiler(model, fullgraph=True), compiler(optimizer.step, fullgraph=whole)

    def step(model, optimizer, i, width):
        own_model, own_step = steps[optimizer]
        backward(own_model, i)
        own_step()

    out = train(mlp(), clipping(rule, options, 0.5), step=step, prepare=prepare)
    ref = train(mlp(), plain(rule, options), dtype=torch.float64, step=clipped_step(0.5))
    assert_close(out, ref, train(mlp(), plain(rule, options), step=clipped_step(0.5)))


@compiled_rules
def test_a_compiled_function_with_the_backward_pass_inside(rule, options, compiler):
    """Where the compiler breaks off there, what is left runs in parts."""
    functions = {}

    def prepare(model, optimizer):
        def whole(x, y):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        functions[optimizer] = compiler(whole, fullgraph=False)

    def step(model, optimizer, i, width):
        functions[optimizer](*data(i))

    out = train(mlp(), fused(rule, options), step=step, prepare=prepare)
    ref = train(mlp(), plain(rule, options), dtype=torch.float64)
    assert_close(out, ref, train(mlp(), plain(rule, options)))


@pytest.mark.parametrize("max_norm", [None, 0.5])
@compiled_rules
def test_a_whole_step_in_one_piece(rule, options, max_norm, compiler, monkeypatch):
    """Without zero_grad(), for a step leaves no gradient; after it the compiler would see none, which is refused."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this version of torch's compiler breaks off at backward()")
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
    functions = {}

    def prepare(model, optimizer):
        def whole(x, y, zero):
            if zero:
                optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        functions[optimizer] = compiler(whole, fullgraph=True)

    def step(model, optimizer, i, width):
        functions[optimizer](*data(i), False)

    plain_step = usual_step if max_norm is None else clipped_step(max_norm)
    out = train(mlp(), clipping(rule, options, max_norm), step=step, prepare=prepare)
    ref = train(mlp(), plain(rule, options), dtype=torch.float64, step=plain_step)
    assert_close(out, ref, train(mlp(), plain(rule, options), step=plain_step))
    (function,) = functions.values()
    with pytest.raises(Exception, match=r"the compiler sees no gradient.*zero_grad\(\)"):
        function(*data(0), True)


def test_a_compiled_step_after_a_pass_that_is_not(compiler):
    """Its gradients are owed to a step that is not compiled."""
    model = dfa.DFA(mlp())
    optimizer = dfa.optim.SGD(model, 0.1)
    backward(model)
    with pytest.raises(Exception, match=r"step: a backward pass that was not compiled.*compile both or neither"):
        compiler(optimizer.step, fullgraph=True)()
    compiler(optimizer.step, fullgraph=False)()
    assert_equal(model, train(mlp(), fused("sgd", {"lr": 0.1}), steps=1))


@compiled_rules
def test_some_passes_compiled_and_others_not(rule, options, compiler):
    models = {}

    def prepare(model, optimizer):
        models[model] = compiler(model, fullgraph=True)

    def step(model, optimizer, i, width):
        usual_step(models[model] if i % 2 else model, optimizer, i, width)

    out = train(mlp(), fused(rule, options), step=step, prepare=prepare)
    ref = train(mlp(), plain(rule, options), dtype=torch.float64)
    assert_close(out, ref, train(mlp(), plain(rule, options)))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_belongs_to_no_optimizer(duplicate):
    model = dfa.DFA(mlp())
    optimizer = dfa.optim.SGD(model, 0.1)
    backward(model)
    other = duplicate(model)
    backward(other)
    assert all(p.grad is not None for p in other.parameters())
    before = copy.deepcopy(other)
    optimizer.step()
    assert_equal(other, before)
    assert_differ(other, model)


def test_a_deleted_optimizer_lets_the_model_write_gradients_again():
    """Those that it was still to compute, too: a gradient belongs to its parameter."""
    model, expected = dfa.DFA(mlp()), dfa.DFA(mlp())
    optimizer = dfa.optim.SGD(model, 0.1)
    backward(model)
    backward(expected)
    assert all(type(p.grad) is LazyGradient for p in model.parameters())
    del optimizer
    gc.collect()
    for again in (False, True):
        if again:
            model.zero_grad()
            backward(model)
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            assert type(p.grad) is torch.Tensor
            assert torch.equal(p.grad, q.grad)


def test_a_second_optimizer_takes_over():
    model = dfa.DFA(mlp())
    first = dfa.optim.SGD(model, 0.1)
    second = dfa.optim.SGD(model, 0.1)
    backward(model)
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="another fused optimizer, which was made later"):
        first.step()
    assert_equal(model, before)
    second.step()
    assert_equal(model, train(mlp(), fused("sgd", {"lr": 0.1}), steps=1))


@pytest.mark.parametrize("when", ["before the step", "between two backward passes"])
def test_input_buffer_that_is_filled_anew(when):
    """The deferred gradient needs the input: right, or an error, never the gradient of another batch."""
    model = dfa.DFA(mlp())
    optimizer = dfa.optim.SGD(model, 0.1)
    x, y = data(0)
    F.cross_entropy(model(x), y).backward()
    x.copy_(data(1)[0])
    try:
        if when == "between two backward passes":
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    except RuntimeError as error:
        assert "in-place" in str(error) or "inplace" in str(error)
        return

    def step(model, optimizer, i, width):
        F.cross_entropy(model(data(0)[0]), y).backward()
        if when == "between two backward passes":
            F.cross_entropy(model(data(1)[0]), y).backward()
        optimizer.step()

    assert_equal(model, train(mlp(), fused("sgd", {"lr": 0.1}), steps=1, step=step))


# Norms of the networks' gradients lie between 0.3 and 3.
every_max_norm = pytest.mark.parametrize("max_norm", [0.1, 1.0, 100.0])


def clipping(rule, options, max_norm):
    return lambda model: FUSED[rule](model, **options, max_norm=max_norm)


def check_clipped(make, rule, options, max_norm, plain_step, step, **how):
    ref = train(make(), plain(rule, options), dtype=torch.float64, step=plain_step, **how)
    same = train(make(), plain(rule, options), step=plain_step, **how)
    out = train(make(), clipping(rule, options, max_norm), step=step, **how)
    assert_close(out, ref, same)
    return out


def clipped_step(max_norm, backwards=backward):
    """torch's way of a step with clipping."""

    def step(model, optimizer, i, width):
        optimizer.zero_grad()
        backwards(model, i, width)
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()

    return step


@every_max_norm
@every_rule
@pytest.mark.parametrize("make, width", NETS.values(), ids=NETS)
def test_max_norm(make, width, rule, options, max_norm):
    out = check_clipped(make, rule, options, max_norm, clipped_step(max_norm), usual_step, width=width)
    without = train(make(), fused(rule, options), width=width)
    clipped = not torch.allclose(out.net[-1].weight, without.net[-1].weight, rtol=1e-6, atol=1e-7)
    if make is not frozen_mlp and max_norm != 1.0:
        assert clipped == (max_norm < 1)


@every_max_norm
@two_rules
@pytest.mark.parametrize("make, width", NETS.values(), ids=NETS)
def test_clipping_by_torch(make, width, rule, options, max_norm):
    check_clipped(make, rule, options, None, clipped_step(max_norm), clipped_step(max_norm), width=width)


def twice(model, i, width):
    backward(model, i, width)
    backward(model, i + 100, width)


@two_rules
def test_max_norm_of_two_backward_passes(rule, options):
    def step(model, optimizer, i, width):
        optimizer.zero_grad()
        twice(model, i, width)
        optimizer.step()

    check_clipped(mixed_mlp, rule, options, 0.3, clipped_step(0.3, twice), step)


@pytest.mark.parametrize("max_norm", [None, 0.1, 100.0])
@two_rules
@pytest.mark.parametrize("make, width", NETS.values(), ids=NETS)
def test_lightnings_order(make, width, rule, options, max_norm):
    """Forward, zero_grad, backward and clipping, all within the closure of the step."""
    norms = []

    def step(model, optimizer, i, width):
        def closure():
            x, y = data(i, width=width)
            loss = F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)
            optimizer.zero_grad()
            loss.backward()
            if max_norm is not None:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                norms.append(nn.utils.clip_grad_norm_(parameters, max_norm))
            return loss

        optimizer.step(closure)

    check(make, rule, options, width=width, step=step)
    assert max_norm is None or min(norms) > 0.1


@two_rules
def test_max_norm_is_no_state(rule, options):
    """A state of torch's optimizer has none; the constructor's stays."""
    model = dfa.DFA(mlp())
    other = plain(rule, options)(model)
    usual_step(model, other, 0, 5)
    optimizer = clipping(rule, options, 0.5)(model)
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.max_norm == 0.5
    assert "max_norm" not in str(optimizer.state_dict())


@pytest.mark.parametrize("rule", FUSED)
@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan")])
def test_bad_max_norm(rule, max_norm):
    with pytest.raises(ValueError, match=rf"max_norm: got {max_norm}, expected a positive number or None"):
        FUSED[rule](dfa.DFA(mlp()), lr=0.1, max_norm=max_norm)


@pytest.mark.parametrize("n", [0, 1, 3])
@two_rules
def test_other_batch_sizes(rule, options, n):
    """An empty batch has a gradient of zero, which momentum and decay still act on."""

    def step(model, optimizer, i, width):
        optimizer.zero_grad()
        x, y = data(i, n if i % 2 else 8)
        F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y, reduction="sum").backward()
        optimizer.step()

    check(mlp, rule, options, step=step)


@pytest.mark.parametrize("rule", FUSED)
@pytest.mark.parametrize("name, value", [("lr", -0.1), ("lr", float("nan")), ("weight_decay", -1.0)])
def test_bad_numbers(rule, name, value):
    with pytest.raises(ValueError, match=rf"{name}.*{value}.*>= 0"):
        FUSED[rule](dfa.DFA(mlp()), **{"lr": 0.1, name: value})


def test_bad_numbers_of_one_rule():
    model = dfa.DFA(mlp())
    with pytest.raises(ValueError, match=r"momentum.*-0\.9.*>= 0"):
        dfa.optim.SGD(model, 0.1, momentum=-0.9)
    with pytest.raises(ValueError, match=r"nesterov.*momentum"):
        dfa.optim.SGD(model, 0.1, nesterov=True)
    with pytest.raises(ValueError, match=r"eps.*-1"):
        dfa.optim.AdamW(model, eps=-1)
    for betas in [(1.0, 0.9), (0.9, -0.1), (0.9, 1.0), (0.9,), (0.9, 0.9, 0.9), 0.9]:
        with pytest.raises(ValueError, match=r"betas.*\[0, 1\)"):
            dfa.optim.AdamW(model, betas=betas)


def test_defaults_are_those_of_torch():
    model = dfa.DFA(mlp())
    ours, theirs = dfa.optim.AdamW(model).defaults, torch.optim.AdamW(model.parameters()).defaults
    assert ours == {name: theirs[name] for name in ours}
    ours, theirs = dfa.optim.SGD(model, 0.1).defaults, torch.optim.SGD(model.parameters(), 0.1).defaults
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize("everywhere", [False, True])
def test_step_hooks_run_around_the_step(everywhere):
    model = dfa.DFA(mlp())
    optimizer = dfa.optim.SGD(model, 0.1)
    weight, seen = next(model.parameters()), []
    before = weight.detach().clone()
    everywhere_hooks = register_optimizer_step_pre_hook, register_optimizer_step_post_hook
    own_hooks = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
    handles = [
        register(lambda *args: seen.append(weight.detach().clone()))
        for register in (everywhere_hooks if everywhere else own_hooks)
    ]
    try:
        model(torch.ones(4, 5)).square().sum().backward()
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(seen[0], before)
    assert torch.equal(seen[1], weight) and not torch.equal(seen[1], before)


def test_a_profiler_sees_the_step():
    model = dfa.DFA(mlp())
    optimizer = dfa.optim.SGD(model, 0.1)
    model(torch.ones(4, 5)).square().sum().backward()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert any("Optimizer.step#SGD.step" in event.key for event in profile.key_averages())
