"""feedback_memory: the paper's known answer, and agreement with what is really kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dfa_kernels.feedback import Feedback
from dfa_kernels.feedback.memory import feedback_memory

VGG16_AT_224 = (
    [64 * 224**2] * 2 + [128 * 112**2] * 2 + [256 * 56**2] * 3 + [512 * 28**2] * 3 + [512 * 14**2] * 3 + [4096] * 2
)


def test_vgg16_on_imagenet():
    got = feedback_memory(VGG16_AT_224, 1000)
    assert got["naive"] == sum(VGG16_AT_224) * 4000 == pytest.approx(54.2e9, rel=1e-3)
    assert got["unified"] == 3211264 * 4000 == pytest.approx(12.85e9, rel=1e-3)
    assert got["rademacher"] == 3211264 * 128
    assert got["sparse"] == 3211264 * 32 * 5
    assert got["fastfood"] == 3211264 * 13 <= 0.05e9
    assert got["procedural"] == 0
    assert list(got) == ["naive", "unified", "rademacher", "sparse", "fastfood", "procedural"]


def test_half_precision_halves_the_matrices_only():
    single, half = (feedback_memory([100, 300], 10, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (half["naive"], half["unified"]) == (400 * 10 * 2, 300 * 10 * 2)
    assert all(half[key] == single[key] for key in ("rademacher", "sparse", "fastfood", "procedural"))


def test_any_iterable_of_sizes():
    assert feedback_memory(iter((30, 20)), 10) == feedback_memory([20, 30], 10)


def test_a_models_taps():
    model = SimpleNamespace(taps=[SimpleNamespace(size=20), SimpleNamespace(size=30)])
    assert feedback_memory(model, 10) == feedback_memory([20, 30], 10)


@pytest.mark.parametrize("kind", ["rademacher", "sparse", "fastfood"])
def test_agrees_with_what_is_kept(kind):
    kept = Feedback(kind).stored(301, 37, "cpu")
    assert feedback_memory([301, 20], 37)[kind] == sum(part.nbytes for part in kept)


@pytest.mark.parametrize("empty", [[], SimpleNamespace(taps=[])])
def test_no_sizes(empty):
    with pytest.raises(ValueError, match="model_or_sizes has no layer sizes"):
        feedback_memory(empty, 10)


def test_neither_model_nor_sizes():
    with pytest.raises(TypeError, match=r"model_or_sizes must be a model wrapped by DFA or an iterable .* got int"):
        feedback_memory(5, 10)


def test_a_model_that_is_not_wrapped():
    with pytest.raises(TypeError, match=r"must be a model wrapped by DFA or an iterable .* got Sequential"):
        feedback_memory(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 2)


@pytest.mark.parametrize(("sizes", "error_size"), [([0], 10), ([5], 0), ([5, -1], 10)])
def test_sizes_must_be_positive(sizes, error_size):
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        feedback_memory(sizes, error_size)


def test_dtype_must_be_floating():
    with pytest.raises(TypeError, match=r"dtype must be one of .*got torch\.int32"):
        feedback_memory([5], 10, torch.int32)
