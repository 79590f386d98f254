"""The memory benchmark: the large networks are the known ones, Table 1 comes out, and what is written can be read."""

from __future__ import annotations

import copy
import csv
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close_to_oracle, cut_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dfa_kernels as dfa
from bench.cpu import feedback_memory
from bench.cpu.large_networks import GPT2, LARGE_NETWORKS, LargeNetwork
from dfa_kernels.feedback.fastfood import fastfood_diagonals
from dfa_kernels.feedback.projection import _feedback_parts
from dfa_kernels.feedback.spec import KINDS, FeedbackSpec

NETWORKS = {network.name: network for network in LARGE_NETWORKS}
TAPS = {"AlexNet": 7, "VGG-16": 15, "ResNet-50": 49, "ViT-B/16": 12, "GPT-2 124M": 12}
LARGEST = {
    "AlexNet": 64 * 55**2,
    "VGG-16": 64 * 224**2,
    "ResNet-50": 64 * 112**2,
    "ViT-B/16": 197 * 3072,
    "GPT-2 124M": 3072,
}


@pytest.fixture(scope="module")
def counted() -> dict[str, feedback_memory.Counted]:
    return {name: feedback_memory.count(network) for name, network in NETWORKS.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_and_taps(name: str, counted: dict[str, feedback_memory.Counted]) -> None:
    network, found = NETWORKS[name], counted[name]
    assert found.parameters == network.parameters
    assert (len(found.sizes), max(found.sizes)) == (TAPS[name], LARGEST[name])


def test_table_1(counted: dict[str, feedback_memory.Counted]) -> None:
    """VGG-16 on ImageNet: 55 and 13 GB in the paper."""
    found = counted["VGG-16"].memory
    assert round(found["naive"] / 1e9, 1) == 54.2
    assert round(found["unified"] / 1e9, 2) == 12.85


@pytest.mark.parametrize("name", NETWORKS)
def test_forms_agree_with_feedback_memory(name: str, counted: dict[str, feedback_memory.Counted]) -> None:
    found = counted[name]
    rows = {(row.form, row.storage): row.computed_bytes for row in feedback_memory.forms(found)}
    assert rows[("naive gaussian", "dense")] == found.memory["naive"] == 4 * sum(found.sizes) * found.error_size
    assert rows[("gaussian", "dense")] == rows[("uniform", "dense")] == found.memory["unified"]
    for kind in ("rademacher", "sparse", "fastfood"):
        assert rows[(kind, "dense")] == found.memory[kind] > 0
    assert [rows[(kind, "procedural")] for kind in KINDS] == [0] * len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_feedback_on_the_meta_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No random number is made there, which for VGG-16 would take many seconds: kept tensors have shapes only."""

    def no_numbers(*args: object) -> None:
        raise AssertionError("random numbers on the meta device")

    monkeypatch.setattr("dfa_kernels.feedback.entries.philox4x32", no_numbers)
    net, x = NETWORKS["VGG-16"].on_meta()
    feedback = dfa.Feedback(kind)
    model = dfa.DFA(net, feedback)
    assert model(x).shape == (1, 1000)
    kept = feedback.stored(3211264, 1000, "meta")
    assert {part.device.type for part in kept} == {"meta"}
    assert sum(part.nbytes for part in kept) == feedback.nbytes(3211264, 1000)


class LargestStorage(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def test_fastfood_is_made_in_pieces() -> None:
    """No temporary is larger than the largest result, and pieces change no value."""
    cpu = torch.device("cpu")
    with LargestStorage() as seen:
        whole = _feedback_parts(FeedbackSpec("fastfood", seed=3).encode(), 5, 20005, 16, cpu)
    assert seen.largest <= max(part.nbytes for part in whole)
    for some in (range(5, 105), range(8100, 8300), range(19905, 20005)):
        for part, alone in zip(whole, fastfood_diagonals(3, some, 16, cpu), strict=True):
            assert torch.equal(part[some.start - 5 : some.stop - 5], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_allocated_is_what_was_computed(kind: str) -> None:
    tensors, _ = feedback_memory.allocate(kind, "dense", [3001, 500], 37, "cpu")
    assert tensors == sum(dfa.Feedback(kind).nbytes(size, 37) for size in (3001, 500))
    assert feedback_memory.allocate(kind, "procedural", [3001], 37, "cpu")[0] == 0


def test_measured_growth() -> None:
    """In a process of its own, as the benchmark measures."""
    row = feedback_memory.Row("a network", "gaussian", "dense", 1, 20000, 1000, 80_000_000)
    feedback_memory.measure_row(row, [20000], "cpu")
    assert feedback_memory.agrees(row)
    assert row.measured_tensor_bytes == 80_000_000
    row.measured_growth_bytes = 90_000_000
    assert not feedback_memory.agrees(row)


def test_csv_and_json(tmp_path: Path, counted: dict[str, feedback_memory.Counted]) -> None:
    rows = feedback_memory.forms(counted["AlexNet"])
    rows[1].measured_tensor_bytes = rows[1].measured_growth_bytes = 774_400_000
    feedback_memory.write_csv(rows, tmp_path / "memory.csv")
    with (tmp_path / "memory.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows) == 1 + 2 * len(KINDS)
    assert read[0]["computed_bytes"] == str(counted["AlexNet"].memory["naive"])
    assert read[0]["measured_growth_bytes"] == ""
    assert read[1]["measured_growth_bytes"] == "774400000"
    options = Namespace(device="cpu", limit_gb=2.0)
    feedback_memory.write_json(rows, list(counted.values()), options, tmp_path / "memory.json")
    assert '"commit"' in (tmp_path / "memory.json").read_text()


def test_line_of_vgg(counted: dict[str, feedback_memory.Counted]) -> None:
    table = feedback_memory.markdown({"networks": [asdict(network) for network in counted.values()]})
    (vgg,) = [line for line in table.splitlines() if line.startswith("| VGG-16")]
    assert [cell.strip() for cell in vgg.split("|")[3:-1]] == [
        "54.22 GB", "12.85 GB", "0.41 GB", "0.51 GB", "41.7 MB", "0",
    ]  # fmt: skip


def test_chart(tmp_path: Path, counted: dict[str, feedback_memory.Counted]) -> None:
    feedback_memory.draw(list(counted.values()), tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_networks_compute_what_they_should() -> None:
    """Real passes of the networks with few parameters to make: shapes that the meta device only claims."""
    for network in (NETWORKS["ResNet-50"], LargeNetwork("small GPT-2", lambda: GPT2(11, 8, 16, 2, 2), (8,), 11, 0)):
        torch.manual_seed(0)
        x = torch.randint(11, (1, *network.input_shape)) if len(network.input_shape) == 1 else torch.randn(1, 3, 64, 64)
        out = network.make().eval()(x)
        assert out.shape[-1] == network.error_size
        assert out.isfinite().all()


def test_causal_attention() -> None:
    """A later token changes no earlier logit of GPT-2."""
    torch.manual_seed(0)
    net = GPT2(11, 8, 16, 2, 2).double()
    x = torch.randint(11, (1, 8))
    other = x.clone()
    other[0, 5] = (x[0, 5] + 1) % 11
    torch.testing.assert_close(net(x)[:, :5], net(other)[:, :5], rtol=0, atol=1e-12)
    assert (net(x)[:, 5:] - net(other)[:, 5:]).abs().max() > 1e-6


def test_gradients_of_tied_weights() -> None:
    """GPT-2's embedding is its output layer too: its gradient is the sum, as it is in the oracle."""
    torch.manual_seed(0)
    net = GPT2(37, 8, 16, 2, 2)
    x, y = torch.randint(37, (3, 8)), torch.randint(37, (24,))
    U = dfa.Feedback("rademacher", seed=3, normalize=False).matrix(64, 37)
    cuts = ["blocks.0.mlp.1", "blocks.1.mlp.1"]

    def loss(output: Tensor) -> Tensor:
        return F.cross_entropy(output.reshape(-1, 37), y)

    exact, _ = cut_gradients(copy.deepcopy(net).double(), cuts, x, loss, U.double())
    plain, scales = cut_gradients(copy.deepcopy(net), cuts, x, loss, U)
    loss(dfa.DFA(net, dfa.Feedback("rademacher", "procedural", seed=3))(x)).backward()
    for (name, p), ref64, same, scale in zip(net.named_parameters(), exact, plain, scales, strict=True):
        assert p.grad is not None and ref64 is not None and same is not None
        assert_close_to_oracle(p.grad, ref64, same, scale, name)
