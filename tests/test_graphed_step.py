"""`GraphedStep` with a stand-in for CUDA's capture: its replays run what was recorded again, on the same tensors."""

from __future__ import annotations

import copy
import logging
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dfa_kernels as dfa
from dfa_kernels import graphed_step, numbers_on_device
from dfa_kernels.cuda_capture import WaitingError


class Recorder:
    """Runs nothing while it records, as a capture does."""

    def __init__(self):
        self.warm_ups = self.records = self.replays = self.random = 0
        self.waits = False

    def run(self, work):
        self.random += 1
        return work()

    def run_without_waiting(self, work):
        self.warm_ups += 1
        if self.waits:
            raise WaitingError("model.py:7 waits for the device")
        return self.run(work)

    def record(self, work):
        self.records += 1
        loss = torch.full((), torch.nan)

        def replay():
            self.replays += 1
            loss.copy_(work())

        return replay, loss

    def random_state(self):
        """The device's, which every run of work there moves on."""
        return self.random

    def set_random_state(self, state):
        self.random = state


@pytest.fixture
def recorder(monkeypatch):
    """Stands for the capture. What a replay would write to an optimizer's memory is refused, as under a capture."""
    made = Recorder()
    monkeypatch.setattr(graphed_step, "capture_on", lambda device: made)
    record = made.record

    def strict(work):
        def captured():
            with monkeypatch.context() as patch:
                patch.setattr(numbers_on_device, "is_captured", lambda device: True)
                return work()

        return record(captured)

    made.record = strict
    return made


def noisy_net():
    """Fused layers, layers that autograd finishes, buffers and random numbers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)
    )


def plain_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))


def batches(n, rows=8):
    generator = torch.Generator().manual_seed(n)
    return [
        (torch.randn(rows, 5, generator=generator), torch.randint(3, (rows,), generator=generator)) for _ in range(n)
    ]


OPTIMIZERS = {
    "dfa SGD": lambda model: dfa.optim.SGD(model, 0.1, weight_decay=0.01, capturable=True),
    "dfa momentum": lambda model: dfa.optim.SGD(model, 0.1, momentum=0.9, nesterov=True, capturable=True),
    "dfa AdamW": lambda model: dfa.optim.AdamW(model, 0.01, capturable=True),
    "dfa SGD max_norm": lambda model: dfa.optim.SGD(model, 0.1, max_norm=0.5, capturable=True),
    "torch SGD": lambda model: torch.optim.SGD(model.parameters(), 0.1),
    "torch dampening": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, dampening=0.5),
    "torch Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), 0.1),
}
every_optimizer = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
PASSES = {"dfa": dfa.DFA, "bp": lambda net: net}
MAKERS = [("dfa", name) for name in OPTIMIZERS] + [("bp", name) for name in OPTIMIZERS if name.startswith("torch")]
every_training = pytest.mark.parametrize(
    "wrap, make_optimizer", [(PASSES[w], OPTIMIZERS[o]) for w, o in MAKERS], ids=[f"{w} {o}" for w, o in MAKERS]
)


def eager(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def state_of(model, optimizer):
    state = [(p.clone(), {k: v.clone() for k, v in optimizer.state[p].items()}) for p in model.parameters()]
    return state, [buffer.clone() for buffer in model.buffers()], torch.get_rng_state()


def assert_equal(found, expected):
    (states, buffers, random), (other_states, other_buffers, other_random) = found, expected
    for (p, state), (q, other) in zip(states, other_states, strict=True):
        assert torch.equal(p, q)
        assert state.keys() == other.keys()
        for name in state:
            assert torch.equal(state[name], other[name]), name
    assert all(torch.equal(a, b) for a, b in zip(buffers, other_buffers, strict=True))
    assert torch.equal(random, other_random)


def both(wrap, make_optimizer, make_net=noisy_net):
    """Two models alike, each with its optimizer."""
    models = wrap(make_net()), wrap(make_net())
    torch.manual_seed(1)
    return [(model, make_optimizer(model)) for model in models]


@every_training
def test_steps_are_those_of_an_eager_loop(wrap, make_optimizer, recorder):
    """Bit for bit, from the first one on, whatever the warm-up did; dropout draws the same numbers."""
    (model, optimizer), (other, own) = both(wrap, make_optimizer)
    data = batches(6)
    had_state = any(own.state.values())
    expected = [eager(other, own, x, y) for x, y in data]
    made_state = any(own.state.values()) and not had_state
    after = state_of(other, own)
    torch.manual_seed(1)
    step = dfa.GraphedStep(model, optimizer, F.cross_entropy, *data[0])
    losses = [step(x, y) for x, y in data]
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    assert_equal(state_of(model, optimizer), after)
    assert recorder.records == 1
    # What an optimizer makes in its first step must not be made again at each replay.
    assert recorder.replays == 6 - made_state
    assert all(p.grad is None for p in model.parameters())


@every_training
def test_the_warm_up_leaves_nothing_behind(wrap, make_optimizer, recorder):
    (model, optimizer), (other, own) = both(wrap, make_optimizer)
    data = batches(4)
    for trained, its in ((model, optimizer), (other, own)):
        torch.manual_seed(2)
        for x, y in data[:2]:
            eager(trained, its, x, y)
        its.zero_grad()
    addresses = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    dfa.GraphedStep(model, optimizer, F.cross_entropy, *data[2])
    assert (recorder.warm_ups, recorder.random) == (1, 0)
    assert_equal(state_of(model, optimizer), state_of(other, own))
    assert addresses == [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("name", ["dfa momentum", "dfa AdamW"])
def test_a_scheduler_needs_no_new_graph(name, recorder):
    """Its rates reach the device before a replay, which may bring nothing there itself; so do other numbers."""
    (model, optimizer), (other, own) = both(dfa.DFA, OPTIMIZERS[name])
    data = batches(8)
    step = dfa.GraphedStep(model, optimizer, F.cross_entropy, *data[0])
    torch.manual_seed(1)
    for _ in step_with_scheduler(optimizer, data, step):
        pass
    torch.manual_seed(1)
    for _ in step_with_scheduler(own, data, lambda x, y: eager(other, own, x, y)):
        pass
    assert_equal(state_of(model, optimizer), state_of(other, own))
    assert recorder.records == 1


def step_with_scheduler(optimizer, data, step):
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=len(data))
    for i, (x, y) in enumerate(data):
        optimizer.param_groups[0]["weight_decay"] = 0.01 * i
        yield step(x, y)
        scheduler.step()


def test_a_rate_that_torch_bakes_in_is_captured_again(recorder, caplog):
    """Up to a bound; then steps run eagerly, and the log says what helps."""
    (model, optimizer), (other, own) = both(PASSES["bp"], OPTIMIZERS["torch SGD"])
    x, y = batches(1)[0]
    step = dfa.GraphedStep(model, optimizer, F.cross_entropy, x, y)
    torch.manual_seed(1)
    for i in range(12):
        optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
        step(x, y)
    torch.manual_seed(1)
    for i in range(12):
        own.param_groups[0]["lr"] = 0.1 / (i + 1)
        eager(other, own, x, y)
    assert_equal(state_of(model, optimizer), state_of(other, own))
    assert recorder.records == graphed_step.MOST_GRAPHS
    (line,) = [record.message for record in caplog.records]
    assert "learning rate as a tensor" in line


@every_optimizer
def test_batches_of_other_shapes(make_optimizer, recorder):
    (model, optimizer), (other, own) = both(dfa.DFA, make_optimizer)
    data = [*batches(2), *batches(1, rows=3), *batches(2), *batches(1, rows=3)]
    step = dfa.GraphedStep(model, optimizer, F.cross_entropy, *data[0])
    torch.manual_seed(1)
    losses = [step(x, y) for x, y in data]
    torch.manual_seed(1)
    assert [loss.item() for loss in losses] == [eager(other, own, x, y).item() for x, y in data]
    assert_equal(state_of(model, optimizer), state_of(other, own))
    assert recorder.records == 2


@pytest.mark.parametrize("rows", [8, 7])
@every_optimizer
def test_micro_batches(make_optimizer, rows, recorder):
    """The gradient is that of the batch's mean loss, also where the parts are not equal."""
    (model, optimizer), (other, own) = both(dfa.DFA, make_optimizer, plain_net)
    data = batches(4, rows=rows)
    step = dfa.GraphedStep(model, optimizer, F.cross_entropy, *data[0], micro_batches=3)
    for x, y in data:
        own.zero_grad()
        losses = []
        for part_x, part_y in zip(x.tensor_split(3), y.tensor_split(3), strict=True):
            losses.append(F.cross_entropy(other(part_x), part_y) * (len(part_x) / rows))
            losses[-1].backward()
        own.step()
        loss = step(x, y)
        assert torch.equal(loss, torch.stack(losses).sum())
    assert_equal(state_of(model, optimizer), state_of(other, own))


def freeze(model, optimizer):
    model.net[0].weight.requires_grad_(False)


def reload(model, optimizer):
    other = dfa.DFA(noisy_net(), dfa.Feedback(seed=5))
    model.set_extra_state(other.get_extra_state())


CHANGES = {
    "eval": lambda model, optimizer: model.eval(),
    "part of it in eval": lambda model, optimizer: model.net[2].eval(),
    "frozen": freeze,
    "feedback": reload,
    "momentum": lambda model, optimizer: optimizer.param_groups[0].update(momentum=0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_graph_cannot_follow_is_captured_again(change, recorder):
    (model, optimizer), (other, own) = both(dfa.DFA, OPTIMIZERS["dfa SGD"])
    data = batches(6)
    step = dfa.GraphedStep(model, optimizer, F.cross_entropy, *data[0])
    for run, trained, its in ((step, model, optimizer), (lambda x, y: eager(other, own, x, y), other, own)):
        torch.manual_seed(1)
        for i, (x, y) in enumerate(data):
            if i == 3:
                change(trained, its)
            run(x, y)
    assert_equal(state_of(model, optimizer), state_of(other, own))
    assert recorder.records == 2


def test_backprop_has_a_graph_of_its_own(recorder):
    (model, optimizer), (other, own) = both(dfa.DFA, OPTIMIZERS["dfa AdamW"], plain_net)
    x, y = batches(1)[0]
    step = dfa.GraphedStep(model, optimizer, F.cross_entropy, x, y)
    for run, trained in ((step, model), (lambda x, y: eager(other, own, x, y), other)):
        for i in range(6):
            if i % 2:
                with trained.backprop():
                    run(x, y)
            else:
                run(x, y)
    assert_equal(state_of(model, optimizer), state_of(other, own))
    assert recorder.records == 2


def test_another_precision_of_products_is_captured_again(recorder):
    step = wrong(recorder)
    x, y = batches(1)[0]
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("ieee", "tf32", "ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = setting
            step(x, y)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert recorder.records == 2


def test_a_batch_that_requires_grad(recorder):
    """A graph's own batch must not grow a history."""
    step = wrong(recorder)
    x, y = batches(1)[0]
    x.requires_grad_()
    losses = [step(x, y) for _ in range(3)]
    assert not any(loss.requires_grad for loss in losses)
    assert not any(graph.x.requires_grad for graph in step._graphs.values())
    assert x.grad is None


def test_parameters_that_the_optimizer_does_not_have(recorder):
    """They stay as they are, and their gradients do not pile up."""
    model = plain_net()
    before = model[0].weight.clone()
    optimizer = torch.optim.SGD(model[2:].parameters(), 0.1)
    data = batches(4)
    step = dfa.GraphedStep(model, optimizer, F.cross_entropy, *data[0])
    for x, y in data:
        step(x, y)
    assert torch.equal(model[0].weight, before)
    assert all(p.grad is None for p in model.parameters())


def moved(model, optimizer):
    model.net[0].weight.data = model.net[0].weight.data.clone()


def replaced(model, optimizer):
    model.net[0].weight = nn.Parameter(model.net[0].weight.detach().clone())


def replaced_buffer(model, optimizer):
    model.net[4].running_mean = model.net[4].running_mean.clone()


def loaded(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


MOVES = [
    (moved, "model's 'weight'"),
    (replaced, "model's 'weight'"),
    (replaced_buffer, "model's 'running_mean'"),
    (loaded, "optimizer's 'momentum_buffer'"),
]


@pytest.mark.parametrize("change, name", MOVES)
def test_tensors_elsewhere_than_a_graph_knows(change, name, recorder):
    model = dfa.DFA(noisy_net())
    optimizer = OPTIMIZERS["dfa momentum"](model)
    data = batches(2)
    step = dfa.GraphedStep(model, optimizer, F.cross_entropy, *data[0])
    for x, y in data:
        step(x, y)
    change(model, optimizer)
    with pytest.raises(RuntimeError, match=rf"GraphedStep: the {name}.*make a new GraphedStep"):
        step(*data[0])


def test_a_checkpoint_loaded_before_the_first_step(recorder):
    """Nothing is captured yet, so it may be."""
    (model, optimizer), (other, own) = both(dfa.DFA, OPTIMIZERS["dfa AdamW"], plain_net)
    data = batches(5)
    for x, y in data[:2]:
        eager(other, own, x, y)
    own.zero_grad()
    step = dfa.GraphedStep(model, optimizer, F.cross_entropy, *data[0])
    model.load_state_dict(other.state_dict())
    optimizer.load_state_dict(copy.deepcopy(own.state_dict()))
    for x, y in data[2:]:
        assert torch.equal(step(x, y), eager(other, own, x, y))
    assert_equal(state_of(model, optimizer), state_of(other, own))


class Counting(nn.Module):
    """Replaces its buffer in each pass."""

    def __init__(self):
        super().__init__()
        self.net = plain_net()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen = self.seen + 1
        return self.net(x)


def test_a_buffer_that_each_pass_replaces(recorder, caplog):
    model = Counting()
    data = batches(3)
    step = dfa.GraphedStep(model, torch.optim.SGD(model.parameters(), 0.1), F.cross_entropy, *data[0])
    assert "eagerly: the model replaces its own parameters or buffers" in caplog.text
    for x, y in data:
        step(x, y)
    assert model.seen == 3
    assert recorder.records == 0


def test_a_step_that_waits_for_the_device(recorder, caplog):
    (model, optimizer), (other, own) = both(dfa.DFA, OPTIMIZERS["dfa SGD"])
    data = batches(3)
    recorder.waits = True
    step = dfa.GraphedStep(model, optimizer, F.cross_entropy, *data[0])
    assert "GraphedStep: steps run eagerly: model.py:7 waits for the device" in caplog.text
    torch.manual_seed(1)
    losses = [step(x, y) for x, y in data]
    torch.manual_seed(1)
    assert [loss.item() for loss in losses] == [eager(other, own, x, y).item() for x, y in data]
    assert recorder.records == 0


def test_on_a_cpu_the_same_steps_run_eagerly(caplog):
    caplog.set_level(logging.INFO, logger="dfa_kernels")
    model, other = dfa.DFA(noisy_net()), dfa.DFA(noisy_net())
    optimizer, own = dfa.optim.AdamW(model), dfa.optim.AdamW(other)
    data = batches(4)
    torch.manual_seed(1)
    step = dfa.GraphedStep(model, optimizer, F.cross_entropy, *data[0])
    assert [record.message for record in caplog.records if "GraphedStep" in record.message] == [
        "GraphedStep: steps run eagerly: CUDA graphs need a CUDA device, the model is on cpu"
    ]
    losses = [step(x, y) for x, y in data]
    torch.manual_seed(1)
    assert [loss.item() for loss in losses] == [eager(other, own, x, y).item() for x, y in data]


def test_autocast():
    model, other = dfa.DFA(plain_net()), dfa.DFA(plain_net())
    optimizer, own = dfa.optim.SGD(model, 0.1), dfa.optim.SGD(other, 0.1)
    data = batches(3)
    step = dfa.GraphedStep(model, optimizer, F.cross_entropy, *data[0], amp_dtype=torch.bfloat16)
    for x, y in data:
        own.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(other(x), y)
        loss.backward()
        own.step()
        assert torch.equal(step(x, y), loss)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("wrap", PASSES.values(), ids=PASSES)
def test_a_scaler(wrap, recorder):
    """Its scale, and steps that it skips, are those of an eager loop; the warm-up changes none."""

    def make(model):
        return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)

    (model, optimizer), (other, own) = both(wrap, make, plain_net)
    scaler, its = (torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2))
    data = batches(6)
    data[3][0][0, 0] = torch.inf
    step = dfa.GraphedStep(model, optimizer, F.cross_entropy, *data[0], amp_dtype=torch.float16, scaler=scaler)
    assert scaler.state_dict() == its.state_dict()
    scales = []
    for x, y in data:
        own.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(other(x), y)
        its.scale(loss).backward()
        its.step(own)
        its.update()
        step(x, y)
        assert scaler.state_dict() == its.state_dict()
        scales.append(scaler.get_scale())
    assert_equal(state_of(model, optimizer), state_of(other, own))
    assert scales[1] > scales[0]
    assert scales[3] < scales[2]
    assert recorder.records == 1


def wrong(recorder, **changes):
    model = dfa.DFA(plain_net())
    x, y = batches(1)[0]
    given = dict(model=model, optimizer=dfa.optim.SGD(model, 0.1, capturable=True), loss_fn=F.cross_entropy, x=x, y=y)
    return dfa.GraphedStep(**given | changes)


def test_bad_arguments(recorder):
    model = dfa.DFA(plain_net())
    x, _ = batches(1)[0]
    stranger = torch.optim.SGD(plain_net().parameters(), 0.1)
    fused, plain = dfa.optim.SGD(model, 0.1), torch.optim.SGD(model.parameters(), 0.1)
    adamw, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu")
    for error, message, changes in (
        (TypeError, r"model: got function.*Module", {"model": plain_net}),
        (TypeError, r"optimizer: got type.*Optimizer", {"optimizer": dfa.optim.SGD}),
        (TypeError, r"x: got list.*Tensor", {"x": [1.0]}),
        (TypeError, r"y: got NoneType.*Tensor", {"y": None}),
        (ValueError, r"optimizer: got SGD.*capturable=True", {"optimizer": fused, "model": model}),
        (ValueError, r"optimizer: got AdamW.*capturable=True", {"optimizer": adamw, "model": model}),
        (ValueError, r"optimizer: it has none of the model's parameters", {"optimizer": stranger}),
        (ValueError, r"loss_fn: got a tensor of shape \(8,\).*scalar", {"loss_fn": lambda h, y: h.sum(1)}),
        (ValueError, r"loss_fn: got float.*scalar", {"loss_fn": lambda h, y: 1.0}),
        (ValueError, r"amp_dtype: got torch\.float16 without a scaler.*bfloat16", {"amp_dtype": torch.float16}),
        (ValueError, r"amp_dtype: got torch\.float64", {"amp_dtype": torch.float64}),
        (ValueError, r"optimizer: got SGD.*fused=True", {"optimizer": plain, "model": model, "scaler": scaler}),
        (ValueError, r"micro_batches: got 0", {"micro_batches": 0}),
        (ValueError, r"x, y: got 8 and 8 rows.*9 micro_batches", {"micro_batches": 9}),
        (ValueError, r"x: got a batch on meta, expected cpu", {"x": x.to("meta")}),
    ):
        with pytest.raises(error, match=message):
            wrong(recorder, **changes)


def test_a_model_on_two_devices(recorder):
    net = plain_net()
    net[4].to("meta")
    with pytest.raises(ValueError, match=r"model: its tensors are on \['cpu', 'meta'\], expected one device"):
        dfa.GraphedStep(net, torch.optim.SGD(net.parameters(), 0.1), F.cross_entropy, *batches(1)[0])


def test_bad_batches(recorder):
    step = wrong(recorder)
    x, y = batches(1)[0]
    with pytest.raises(ValueError, match=r"x: got torch\.float64, expected torch\.float32"):
        step(x.double(), y)
    with pytest.raises(ValueError, match=r"y: got a batch on meta, expected cpu"):
        step(x, y.to("meta"))
    with pytest.raises(ValueError, match=r"loss_fn"):
        step.loss_fn = types.MethodType(lambda self, h, y: h, step)
        step(x[:3], y[:3])


@pytest.mark.parametrize("change", ["replaced", "added", "activation"])
@pytest.mark.parametrize("steps", [0, 1, 2], ids="after {} steps".format)
def test_another_module_in_the_model_is_no_part_of_its_graph(recorder, change, steps):
    net = plain_net()
    model = dfa.DFA(net)
    x, y = batches(1)[0]
    step = dfa.GraphedStep(model, dfa.optim.SGD(model, 0.1, capturable=True), F.cross_entropy, x, y)
    for _ in range(steps):
        step(x, y)
    if change == "replaced":
        net[4] = nn.Linear(6, 3)
    elif change == "added":
        net.append(nn.Dropout(0.5))
    else:
        net[1] = nn.Tanh()
    with pytest.raises(RuntimeError, match="modules of the model were replaced, added or removed since it was made"):
        step(x, y)
