"""What only a CUDA device can show."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dfa_kernels as dfa
from dfa_kernels.feedback_spec import KINDS

pytestmark = pytest.mark.gpu


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5))


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 20, generator=generator), torch.randint(5, (16,), generator=generator)


def gradients(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    model = dfa.DFA(net)
    F.cross_entropy(model(x), y).backward()
    return [p.grad for p in net.parameters()]


def test_gradients_are_those_of_the_cpu_in_float64():
    net, (x, y) = network().double(), batch()
    expected = gradients(copy.deepcopy(net), x.double(), y)
    found = gradients(net.cuda(), x.double().cuda(), y.cuda())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_feedback_has_the_same_entries_on_every_device(kind):
    for storage in ("dense", "procedural"):
        cpu = dfa.Feedback(kind, storage).matrix(70, 33)
        cuda = dfa.Feedback(kind, storage).matrix(70, 33, device="cuda").cpu()
        torch.testing.assert_close(cuda, cpu, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_a_whole_step_is_captured_in_a_graph(fused):
    """Replaying the captured step gives the weights of as many eager ones."""
    x, y = (t.cuda() for t in batch())
    eager, captured = dfa.DFA(network().cuda()), dfa.DFA(network().cuda())
    optimizers = [
        dfa.optim.SGD(m, lr=0.1) if fused else torch.optim.SGD(m.parameters(), lr=0.1) for m in (eager, captured)
    ]

    def step(model: dfa.DFA, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(captured, optimizers[1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, optimizers[1])
    for _ in range(4):
        graph.replay()
    for _ in range(7):
        step(eager, optimizers[0])
    for a, b in zip(captured.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_adamw_refuses_to_be_captured():
    x, y = (t.cuda() for t in batch())
    model = dfa.DFA(network().cuda())
    optimizer = dfa.optim.AdamW(model)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="counts its steps on the host"), torch.cuda.graph(graph):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_float16_under_a_scaler_keeps_float32_parameters():
    x, y = (t.cuda() for t in batch())
    model = dfa.DFA(network().cuda())
    exact = gradients(copy.deepcopy(model.net), x, y)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.0), torch.amp.GradScaler()
    with torch.autocast("cuda", torch.float16):
        loss = F.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for p, expected in zip(model.parameters(), exact, strict=True):
        assert p.grad.dtype == torch.float32
        assert (p.grad - expected).norm() <= 2**-7 * expected.norm()
