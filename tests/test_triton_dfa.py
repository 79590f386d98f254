"""A wrapped network on the Triton backend: the gradients and updates of the torch backend, in one launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close_to_oracle
from torch import Tensor, nn
from triton_cases import DEVICE, watched

import dfa_kernels as dfa
from dfa_kernels.backends import torch_backend
from dfa_kernels.backends.calls import TapsCall
from dfa_kernels.backends.triton.launch import INTERPRETED
from dfa_kernels.backward import deltas

OPTIMIZERS = {
    "sgd": lambda model: dfa.optim.SGD(model, 0.1, weight_decay=0.05),
    "momentum": lambda model: dfa.optim.SGD(model, 0.1, momentum=0.9, nesterov=True),
    "adamw": lambda model: dfa.optim.AdamW(model, 0.01, eps=1e-3, weight_decay=0.1),
}


class LastPosition(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 33), nn.Tanh(), nn.Dropout(0.3), nn.Linear(33, 17), nn.Dropout(0.2), nn.GELU(),
        nn.Linear(17, 24, bias=False), nn.LeakyReLU(-0.5), nn.Linear(24, 5),
    )  # fmt: skip


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 17), nn.ReLU(), nn.Linear(17, 5))
    net[0].bias.requires_grad_(False)
    net[2].weight.requires_grad_(False)
    return net


def wide_output() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 33), nn.ELU(), nn.Linear(33, 16), nn.Sigmoid(), nn.Linear(16, 70))


def sequence() -> nn.Module:
    """The output has one row for the positions of a sequence, so they are units."""
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.ReLU(), LastPosition(), nn.Linear(7, 5))


def mixed() -> nn.Module:
    """Fused layers between layers that autograd finishes."""
    return nn.Sequential(
        nn.Linear(20, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 12), nn.SiLU(),
        nn.Linear(12, 5),
    )  # fmt: skip


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(24, 7), nn.Sigmoid(), nn.Linear(7, 5),
    )  # fmt: skip


NETS: dict[str, tuple[Any, tuple[int, ...], list[str]]] = {
    "mlp": (mlp, (9, 20), ["strip"]),
    "one row": (mlp, (1, 20), ["strip"]),
    "frozen": (frozen, (9, 20), ["strip"]),
    "wide output": (wide_output, (9, 20), ["strip"]),
    "positions as units": (sequence, (4, 3, 6), ["strip"]),
    "positions as rows": (mlp, (4, 3, 20), ["strip"]),
    "mixed": (mixed, (9, 20), ["project_taps_kernel", "strip"]),
    "cnn": (cnn, (4, 3, 10, 10), ["project_taps_kernel", "strip"]),
    "cnn, channels last": (cnn, (4, 3, 10, 10), ["project_taps_kernel", "strip"]),
}
every_net = pytest.mark.parametrize("name", NETS)


@pytest.fixture(autouse=True)
def masks_of_any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout that draws the same on every device and in every precision."""

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        saved = (torch.rand(x.shape) >= p).to(x)
        return x * saved / (1 - p)

    monkeypatch.setattr(F, "dropout", dropout)


def model_of(name: str, backend: str, dtype: torch.dtype = torch.float32, feedback: Any = None) -> dfa.DFA:
    torch.manual_seed(0)
    net = NETS[name][0]().to(DEVICE, dtype)
    if name.endswith("channels last"):
        net = net.to(memory_format=torch.channels_last)
    return dfa.DFA(net, feedback or dfa.Feedback(seed=4), backend=backend)


def loss_of(model: dfa.DFA, name: str, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(NETS[name][1], generator=generator).to(DEVICE, next(model.parameters()).dtype)
    x = x.contiguous(memory_format=torch.channels_last) if name.endswith("channels last") else x
    torch.manual_seed(seed)
    output = model(x)
    return F.cross_entropy(output.flatten(0, -2), torch.arange(output[..., 0].numel(), device=DEVICE) % 5)


def gradients(model: dfa.DFA, name: str) -> list[Tensor]:
    loss_of(model, name).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_close(found: list[Tensor], exact: list[Tensor], same: list[Tensor]) -> None:
    assert found
    for a, ref, torchs in zip(found, exact, same, strict=True):
        assert_close_to_oracle(a.detach(), ref.detach(), torchs.detach(), 1.0)


@every_net
def test_gradients(name: str) -> None:
    """One launch for all linear layers; where there are other segments, one for their δ."""
    exact = gradients(model_of(name, "torch", torch.float64), name)
    same = gradients(model_of(name, "torch"), name)
    model = model_of(name, "triton")
    loss = loss_of(model, name)
    with watched() as seen:
        loss.backward()
    assert seen.kernels == NETS[name][2]
    assert_close([p.grad for p in model.parameters() if p.grad is not None], exact, same)


@pytest.mark.parametrize("storage", ["dense", "procedural"])
@pytest.mark.parametrize("name", ["mixed", "cnn", "cnn, channels last"])
def test_gradients_with_each_tap_in_its_turn(name: str, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large networks have it: one product or launch for e Uᵀ, from which δ of one tap after the other is made."""
    monkeypatch.setattr(deltas, "WORTH_TURNS", -(2**40))
    feedback = dfa.Feedback("gaussian", storage, seed=4)
    exact = gradients(model_of(name, "torch", torch.float64, feedback), name)
    same = gradients(model_of(name, "torch", feedback=feedback), name)
    model = model_of(name, "triton", feedback=feedback)
    loss = loss_of(model, name)
    with watched() as seen:
        loss.backward()
    made = {"dense": "one product", "procedural": "one launch of project_taps_kernel"}[storage]
    assert seen.kernels == ["project_taps_kernel"] * (storage == "procedural") + ["strip"]
    assert f"e Uᵀ by {made}" in str(model.plan())
    assert_close([p.grad for p in model.parameters() if p.grad is not None], exact, same)


def test_small_taps_in_their_turn_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """e Uᵀ is scaled for the widest tap, where float16 would lose what smaller ones need of it."""
    monkeypatch.setattr(deltas, "WORTH_TURNS", -(2**40))
    error = (torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 2e-4).half().to(DEVICE)
    spec = dfa.Feedback("rademacher", "procedural").spec
    call = TapsCall(error, [], spec, [8, 2048], [None] * 2, [None] * 2, ["identity"] * 2, [0.0] * 4)
    exact = torch_backend.project_taps(call._replace(error=error.double()))
    for found, wanted in zip(deltas.deltas("triton", call), reversed(exact), strict=True):
        tiny = torch.finfo(torch.float16).tiny * torch.finfo(torch.float16).eps
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=tiny)


@pytest.mark.parametrize("kind", ["rademacher", "sparse", "uniform", "fastfood"])
def test_gradients_by_other_feedback(kind: str) -> None:
    feedback = dfa.Feedback(kind, "procedural", seed=2**50)
    exact = gradients(model_of("cnn", "torch", torch.float64, feedback), "cnn")
    same = gradients(model_of("cnn", "torch", feedback=feedback), "cnn")
    assert_close(gradients(model_of("cnn", "triton", feedback=feedback), "cnn"), exact, same)


def trained(model: dfa.DFA, optimizer: str, name: str, steps: int = 3) -> tuple[list[Tensor], list[str], list[str]]:
    """The parameters, and the kernels that the backward passes and the steps launched."""
    fused, backward, step = OPTIMIZERS[optimizer](model), [], []
    for i in range(steps):
        fused.zero_grad()
        loss = loss_of(model, name, i)
        with watched() as seen:
            loss.backward()
        backward += seen.kernels
        with watched() as seen:
            fused.step()
        step += seen.kernels
    return list(model.parameters()), backward, step


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["mlp", "frozen", "wide output", "positions as units", "mixed", "cnn"])
def test_backward_and_update(optimizer: str, name: str) -> None:
    """One launch for both, in step(); what autograd finishes gets its δ in the backward pass."""
    exact, *_ = trained(model_of(name, "torch", torch.float64), optimizer, name)
    same, *none = trained(model_of(name, "torch"), optimizer, name)
    found, backward, step = trained(model_of(name, "triton"), optimizer, name)
    assert none == [[], []]
    *others, last = NETS[name][2]
    assert backward == others * 3
    assert step == [last] * 3
    assert_close(found, exact, same)


def test_two_backward_passes_before_a_step() -> None:
    """Two gradients are added up, each from one launch, before the rule sees them."""
    results = []
    for backend, dtype in (("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)):
        model = model_of("mlp", backend, dtype)
        optimizer = dfa.optim.SGD(model, 0.1, momentum=0.9)
        for seed in (1, 2):
            loss_of(model, "mlp", seed).backward()
        with watched() as seen:
            optimizer.step()
        assert seen.kernels == (["strip"] * 2 if backend == "triton" else [])
        results.append(list(model.parameters()))
    assert_close(results[2], results[0], results[1])


def test_an_empty_batch_has_gradients_of_zero() -> None:
    model = model_of("mlp", "triton")
    model(torch.zeros(0, 20, device=DEVICE)).sum().backward()
    for p in model.parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, torch.zeros_like(p))


def test_a_compiled_model_has_the_same_gradients() -> None:
    """Compilers get an operator that they cannot look into."""
    torch.compiler.reset()
    exact = gradients(model_of("frozen", "torch", torch.float64), "frozen")
    same = gradients(model_of("frozen", "torch"), "frozen")
    model = model_of("frozen", "triton")
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss_of(compiled, "frozen").backward()
    assert_close([p.grad for p in model.parameters() if p.grad is not None], exact, same)
    torch.compiler.reset()


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter is for machines without a GPU")
def test_auto_never_means_the_interpreter() -> None:
    model = model_of("mlp", "auto")
    loss = loss_of(model, "mlp")
    with watched() as seen:
        loss.backward()
    assert seen.kernels == []
