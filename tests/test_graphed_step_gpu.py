"""`GraphedStep` on a CUDA device: replays are eager steps, to the last bit."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfa_kernels as dfa
from bench.gpu.graphs import nothing
from bench.gpu.kernel_counts import OUR_KERNELS, device_activities

pytestmark = pytest.mark.gpu


def network(noise: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(48, 64), nn.Tanh(), nn.Dropout(noise), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    ).cuda()  # fmt: skip


def normed_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (3, 4, 4)), nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 32), nn.Tanh(), nn.Linear(32, 10),
    ).cuda()  # fmt: skip


def batches(n: int, rows: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(n)
    made = [
        (torch.randn(rows, 48, generator=generator), torch.randint(10, (rows,), generator=generator)) for _ in range(n)
    ]
    return [(x.cuda(), y.cuda()) for x, y in made]


Make = Callable[[nn.Module], torch.optim.Optimizer]
FUSED: dict[str, Make] = {
    "SGD": lambda model: dfa.optim.SGD(model, 0.1, weight_decay=0.01, capturable=True),
    "momentum": lambda model: dfa.optim.SGD(model, 0.1, momentum=0.9, nesterov=True, capturable=True),
    "AdamW": lambda model: dfa.optim.AdamW(model, 0.01, capturable=True),
    "SGD max_norm": lambda model: dfa.optim.SGD(model, 0.1, max_norm=0.5, capturable=True),
}
TORCH: dict[str, Make] = {
    "torch SGD": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    "torch AdamW": lambda model: torch.optim.AdamW(model.parameters(), 0.01, capturable=True),
    "torch AdamW fused": lambda model: torch.optim.AdamW(model.parameters(), 0.01, capturable=True, fused=True),
}
ALL = FUSED | TORCH
CASES = [(rule, name) for rule in ("dfa", "bp") for name in (ALL if rule == "dfa" else TORCH)]


def pair(rule: str, optimizer: str, net: nn.Module) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    """Two alike: one for graphs, one for eager steps."""
    models = [dfa.DFA(copy.deepcopy(net)) if rule == "dfa" else copy.deepcopy(net) for _ in range(2)]
    return [(model, ALL[optimizer](model)) for model in models]


def eager(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    tensors, others = [*model.parameters(), *model.buffers()], [*other.parameters(), *other.buffers()]
    for a, b in zip(tensors, others, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("rule, optimizer", CASES)
def test_replays_are_eager_steps(rule: str, optimizer: str, noise: float) -> None:
    """Bit for bit: fresh dropout masks, counts of steps, losses, and a smaller batch at the end."""
    (model, own), (other, its) = pair(rule, optimizer, network(noise))
    data = [*batches(6), *batches(1, rows=7), *batches(3), *batches(1, rows=7)]
    torch.manual_seed(1)
    expected = [eager(other, its, x, y) for x, y in data]
    torch.manual_seed(1)
    step = dfa.GraphedStep(model, own, F.cross_entropy, *data[0])
    losses = [step(x, y) for x, y in data]
    assert len(step._graphs) == 2
    assert torch.stack(losses).tolist() == torch.stack(expected).tolist()
    assert_equal(model, other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for name, value in its.state[q].items():
            assert torch.equal(own.state[p][name], value), name


@pytest.mark.parametrize("optimizer", FUSED)
def test_norms_and_convolutions(optimizer: str) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        (model, own), (other, its) = pair("dfa", optimizer, normed_network())
        data = batches(5)
        step = dfa.GraphedStep(model, own, F.cross_entropy, *data[0])
        for x, y in data:
            assert torch.equal(step(x, y), eager(other, its, x, y))
        assert_equal(model, other)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("optimizer", ["momentum", "AdamW"])
def test_schedulers_need_no_new_graph(optimizer: str) -> None:
    (model, own), (other, its) = pair("dfa", optimizer, network())
    data = batches(8)
    step = dfa.GraphedStep(model, own, F.cross_entropy, *data[0])
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9) for o in (own, its)]
    for x, y in data:
        # No waiting in between: later rates must not overtake replays.
        step(x, y)
        schedules[0].step()
    for x, y in data:
        eager(other, its, x, y)
        schedules[1].step()
    assert len(step._graphs) == 1
    assert_equal(model, other)


def test_torchs_sgd_follows_a_rate_on_the_device() -> None:
    net = network()
    models = [copy.deepcopy(net) for _ in range(2)]
    own, its = [torch.optim.SGD(model.parameters(), torch.tensor(0.1, device="cuda"), fused=True) for model in models]
    data = batches(6)
    step = dfa.GraphedStep(models[0], own, F.cross_entropy, *data[0])
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8) for optimizer in (own, its)]
    for x, y in data:
        step(x, y)
        schedules[0].step()
        eager(models[1], its, x, y)
        schedules[1].step()
    assert len(step._graphs) == 1
    assert_equal(*models)


@pytest.mark.parametrize("optimizer", ["SGD", "torch AdamW"])
def test_micro_batches(optimizer: str) -> None:
    (model, own), (other, its) = pair("dfa", optimizer, network())
    data = batches(4)
    step = dfa.GraphedStep(model, own, F.cross_entropy, *data[0], micro_batches=4)
    for x, y in data:
        its.zero_grad()
        for part_x, part_y in zip(x.chunk(4), y.chunk(4), strict=True):
            (F.cross_entropy(other(part_x), part_y) * 0.25).backward()
        its.step()
        step(x, y)
    assert_equal(model, other)


@pytest.mark.parametrize("rule", ["dfa", "bp"])
def test_float16_with_a_scaler(rule: str) -> None:
    """A batch whose gradients overflow is skipped, and the scale halves, as eagerly."""
    models = [dfa.DFA(network()) if rule == "dfa" else network() for _ in range(2)]
    own, its = [torch.optim.SGD(model.parameters(), 0.1, fused=True) for model in models]
    scaler, other = (torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=2) for _ in range(2))
    data = batches(6)
    data[3][0][0, 0] = torch.inf
    step = dfa.GraphedStep(models[0], own, F.cross_entropy, *data[0], amp_dtype=torch.float16, scaler=scaler)
    for x, y in data:
        its.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(models[1](x), y)
        other.scale(loss).backward()
        other.step(its)
        other.update()
        step(x, y)
        assert scaler.get_scale() == other.get_scale()
    assert len(step._graphs) == 1
    assert_equal(*models)


def test_bfloat16_by_autocast() -> None:
    (model, own), (other, its) = pair("dfa", "SGD", network())
    data = batches(4)
    step = dfa.GraphedStep(model, own, F.cross_entropy, *data[0], amp_dtype=torch.bfloat16)
    for x, y in data:
        its.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(other(x), y)
        loss.backward()
        its.step()
        assert torch.equal(step(x, y), loss.detach())
    assert_equal(model, other)


class Waiting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum().item() < torch.inf else x


def test_a_model_that_waits_for_the_device_steps_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    model, other = Waiting(), Waiting()
    own, its = [torch.optim.SGD(each.parameters(), 0.1) for each in (model, other)]
    data = batches(3)
    step = dfa.GraphedStep(model, own, F.cross_entropy, *data[0])
    assert f"{__file__}" in caplog.text
    for x, y in data:
        assert torch.equal(step(x, y), eager(other, its, x, y))
    assert_equal(model, other)


def test_a_step_does_not_wait_for_the_device() -> None:
    model = dfa.DFA(network())
    data = batches(2)
    step = dfa.GraphedStep(model, dfa.optim.AdamW(model, capturable=True), F.cross_entropy, *data[0])
    for x, y in data:
        step(x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*data[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_replay_is_one_launch_of_ours_and_few_others() -> None:
    model = dfa.DFA(network())
    data = batches(3)
    step = dfa.GraphedStep(model, dfa.optim.SGD(model, 0.1, capturable=True), F.cross_entropy, *data[0])
    for x, y in data:
        step(x, y)
    names = device_activities(lambda: step(*data[0]), nothing)
    assert sum(name.startswith(OUR_KERNELS) for name in names) == 1, names


def test_moved_parameters_are_refused() -> None:
    model = dfa.DFA(network())
    data = batches(2)
    step = dfa.GraphedStep(model, dfa.optim.SGD(model, 0.1, capturable=True), F.cross_entropy, *data[0])
    for x, y in data:
        step(x, y)
    model.net[0].weight.data = model.net[0].weight.data.clone()
    with pytest.raises(RuntimeError, match=r"model's 'weight'.*make a new GraphedStep"):
        step(*data[0])


def test_a_dropped_step_gives_its_memory_back() -> None:
    def use() -> Any:
        model = dfa.DFA(network())
        x, y = batches(1)[0]
        step = dfa.GraphedStep(model, dfa.optim.SGD(model, 0.1, capturable=True), F.cross_entropy, x, y)
        for _ in range(3):
            step(x, y)

    use()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        use()
        gc.collect()
        torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
