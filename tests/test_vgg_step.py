"""VGG-16 with feedback that is not kept as a matrix: a narrower one's gradients against the oracle's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close_to_oracle, cut_gradients
from torch import Tensor, nn

import dfa_kernels as dfa
from bench.cpu import vgg16_memory
from bench.cpu.large_networks import vgg16

CLASSES, SIDE = 20, 64


@pytest.fixture(scope="module")
def task() -> tuple[nn.Sequential, Tensor, Tensor]:
    """All widths a sixteenth of VGG-16's. Dropout is off, so that every run sees the same network."""
    torch.manual_seed(0)
    net = vgg16(CLASSES, SIDE, 16).eval()
    return net, torch.randn(3, 3, SIDE, SIDE), torch.randint(CLASSES, (3,))


@pytest.mark.parametrize("storage", ["dense", "procedural"])
@pytest.mark.parametrize("kind", ["fastfood", "rademacher", "gaussian"])
def test_gradients_of_a_narrow_vgg(task: tuple[nn.Sequential, Tensor, Tensor], kind: str, storage: str) -> None:
    net, x, y = task
    U = dfa.Feedback(kind, seed=5, normalize=False).matrix(4 * SIDE**2, CLASSES)
    cuts = [name for name, module in net.named_modules() if isinstance(module, nn.ReLU)]

    def loss(output: Tensor) -> Tensor:
        return F.cross_entropy(output, y)

    exact, _ = cut_gradients(copy.deepcopy(net).double(), cuts, x.double(), loss, U.double())
    plain, scales = cut_gradients(copy.deepcopy(net), cuts, x, loss, U)
    own = copy.deepcopy(net)
    model = dfa.DFA(own, dfa.Feedback(kind, storage, seed=5))
    loss(model(x)).backward()
    assert len(model.taps) == len(cuts) == 15
    for (name, p), ref64, same, scale in zip(own.named_parameters(), exact, plain, scales, strict=True):
        assert p.grad is not None and ref64 is not None and same is not None
        assert_close_to_oracle(p.grad, ref64, same, scale, name)


@pytest.mark.parametrize("form", vgg16_memory.FORMS, ids=lambda form: form.name)
def test_the_benchmark_s_own_check(form: vgg16_memory.Form) -> None:
    found, allowed = vgg16_memory.deviation(form, "cpu")
    assert 0 < found <= allowed < 1e-4


def test_the_check_notices_other_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    right = vgg16_memory.gradient_maker
    monkeypatch.setattr(vgg16_memory, "gradient_maker", lambda form, net, **options: right(form, net, seed=2))
    found, allowed = vgg16_memory.deviation(vgg16_memory.FORMS[2], "cpu")
    assert found > 1000 * allowed


def test_feedback_too_large_is_not_run() -> None:
    naive, unified = vgg16_memory.FORMS[:2]
    row = vgg16_memory._measured_apart(naive, "cpu", 2, 1, 12 * 10**9)
    assert row["fails"] == "needs 54.22 GB for feedback alone, the limit is 12.00 GB"
    assert vgg16_memory.feedback_bytes(unified) == 64 * 224**2 * 1000 * 4
