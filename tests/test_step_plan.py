"""`DFA.plan`: what a backward pass runs, in words, without running anything."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dfa_kernels as dfa
from dfa_kernels import backends
from dfa_kernels.backends.calls import TapsCall
from dfa_kernels.backward import deltas


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Dropout(0.3), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Tanh(), nn.Conv2d(5, 5, 3), nn.BatchNorm2d(5), nn.Tanh(),
        nn.Flatten(), nn.Linear(80, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip


def lines_of(model, *shape, device="cpu"):
    """The plan after a forward pass."""
    model(torch.zeros(shape, device=device))
    return list(model.plan().lines)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """On a CPU: where there is a GPU, the kernels are not interpreted."""
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("the kernels are not interpreted")
    return request.param


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted")


def test_before_the_first_pass():
    model = dfa.DFA(mlp())
    with pytest.raises(RuntimeError, match=r"plan: .*forward pass.* there has been none yet"):
        model.plan()
    model(torch.zeros(2, 5))
    model.plan()
    with pytest.raises(RuntimeError, match="plan: "):
        copy.deepcopy(model).plan()


def test_linear_layers(backend):
    lines = lines_of(dfa.DFA(mlp(), backend=backend), 4, 5)
    assert lines[0] == f"backend {backend} on cpu"
    assert lines[1].startswith("linear layers 5→7, 7→6, 6→3: ")
    assert len(lines) == 2


def test_it_reads_as_lines():
    model = dfa.DFA(mlp())
    lines = lines_of(model, 4, 5)
    assert str(model.plan()) == "\n".join(lines)


def test_auto_says_what_was_picked():
    backend = backends.resolve("auto", torch.device("cpu"))
    assert lines_of(dfa.DFA(mlp()), 4, 5)[0] == f"backend {backend} on cpu"


@interpreted
def test_launches_and_reason_of_the_kernels():
    small, large = mlp(), nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 100))
    lines = lines_of(dfa.DFA(small, backend="triton"), 4, 5)
    assert "one launch of strip with " in lines[1]
    assert "float32; U from memory" in lines[1]
    assert "δ of 4 rows fits beside a tile" in lines[1]
    lines = lines_of(dfa.DFA(large, dfa.Feedback("fastfood", "procedural"), backend="triton"), 4, 5)
    assert "one launch of two_phase with " in lines[1]
    assert "U regenerated from its seed" in lines[1]
    assert "100 error components are larger than a tile" in lines[1]


def test_update(backend):
    model = dfa.DFA(mlp(), backend=backend)
    model(torch.zeros(4, 5))
    optimizer = dfa.optim.AdamW(model)
    assert "6→3, adamw update included: " in model.plan().lines[1]
    del optimizer
    assert "update" not in model.plan().lines[1]


def test_convolutions_and_segments_with_a_graph(backend):
    lines = lines_of(dfa.DFA(cnn(), backend=backend), 4, 3, 10, 10)
    assert lines[1].startswith("linear layers 80→6, 6→3: ")
    assert lines[2] == "fused convolutions (2): δ below, weight gradients from torch"
    assert lines[3] == "segments with local graphs (1): δ below, then autograd"
    assert lines[4].startswith("δ of these taps: ")
    assert "3 taps" in lines[4]
    assert len(lines) == 5


@pytest.mark.parametrize("batch", [1, 32])
def test_taps_of_vgg_take_turns_where_that_saves_much(batch):
    """Of 13.5 million units, 3.2 in the widest; in turns e Uᵀ and δ of the widest are there, at once all δ."""
    sizes = [64 * 224**2] * 2 + [128 * 112**2] * 2 + [256 * 56**2] * 3 + [512 * 28**2] * 3 + [512 * 14**2] * 3
    call = TapsCall(
        torch.empty(batch, 1000, device="meta"), [], dfa.Feedback("gaussian", "procedural").spec, sizes,
        [torch.empty(batch, size, device="meta") for size in sizes], [None] * 13, ["relu"] * 13, [0.0] * 26,
    )  # fmt: skip
    said = deltas.describe("triton", call, torch.device("cpu"))
    assert ("a tile of the projection serves all 13 taps" in said) == (batch == 1)
    assert ("saves 0.91 GB" in said) == (batch == 32)


@interpreted
def test_dtypes_that_the_kernels_leave_to_torch():
    model = dfa.DFA(mlp().double(), backend="triton")
    model(torch.zeros(4, 5, dtype=torch.float64))
    expected = "by the torch backend: the kernels compute in bfloat16, float16, float32, not in float64"
    assert expected in str(model.plan())


def test_frozen_layers_are_left_out(backend):
    net = mlp()
    net[0].requires_grad_(False)
    assert lines_of(dfa.DFA(net, backend=backend), 4, 5)[1].startswith("linear layers 7→6, 6→3: ")


def test_it_follows_the_last_pass():
    model = dfa.DFA(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)))
    assert "on cpu" in lines_of(model, 4, 5)[0]
    assert "on meta" in lines_of(model.to("meta"), 4, 5, device="meta")[0]


def test_a_pass_under_no_grad_will_do():
    model = dfa.DFA(mlp())
    with torch.no_grad():
        assert lines_of(model, 4, 5)[1].startswith("linear layers 5→7, 7→6, 6→3: ")


def test_it_keeps_no_activation_alive():
    model = dfa.DFA(cnn())
    model(torch.zeros(4, 3, 10, 10))
    assert model._sketch is not None and model._sketch.layers is not None and model._sketch.taps is not None
    (layers, of_layers), (_, of_taps) = model._sketch.layers, model._sketch.taps
    assert {tensor.device.type for tensor in (*of_layers, *of_taps.values())} == {"meta"}
    assert not layers.parameters


def test_the_plan_follows_what_learns_and_how():
    """Dropout that is off and weights that are frozen since the last pass are not in it any more."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
    model = dfa.DFA(net)
    x = torch.randn(4, 6)
    model(x)
    assert model._sketch is not None and model._sketch.layers is not None
    assert model._sketch.layers[0].dropout_mask == (2,)
    model.eval()
    model(x)
    assert model._sketch.layers[0].dropout_mask == (None,)
    assert "6→8" in str(model.plan())
    net[0].requires_grad_(False)
    model(x)
    assert "6→8" not in str(model.plan())
