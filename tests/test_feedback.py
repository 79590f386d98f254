"""Feedback: one U whatever the storage, its projection against float64, what is kept, and what is refused."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfa_kernels.feedback import Feedback, entries
from dfa_kernels.feedback.entries import default_nonzeros, fill, sparse_entries
from dfa_kernels.feedback.projection import project_unscaled
from dfa_kernels.feedback.spec import KINDS, STORAGES, FeedbackSpec

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CPU = torch.device("cpu")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def within_baseline(got: torch.Tensor, error: torch.Tensor, b: torch.Tensor, precision: torch.dtype) -> bool:
    """No further from error @ bᵀ than twice what torch's own product in that precision is."""
    exact = error.double().numpy().astype(np.longdouble) @ b.double().numpy().T.astype(np.longdouble)
    baseline = np.abs((error.to(precision) @ b.to(precision).T).double().numpy() - exact).max()
    return bool(np.abs(got.double().numpy() - exact).max() <= 2 * baseline + torch.finfo(precision).tiny)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        self.bytes = max([self.bytes, *(t.untyped_storage().nbytes() for t in tensors)])
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_storages_share_every_entry(kind, dtype):
    dense, procedural = (Feedback(kind, storage, seed=2**63 + 9, dtype=dtype) for storage in STORAGES)
    b = dense.matrix(301, 37)
    assert b.dtype == dtype
    assert torch.equal(b, procedural.matrix(301, 37))
    assert torch.equal(b, dense.matrix(301, 37))


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_is_the_scaled_entries(kind, dtype):
    u = fill(torch.empty(40, 33, dtype=dtype), kind, 3)
    assert torch.equal(Feedback(kind, seed=3, dtype=dtype).matrix(40, 33), u * (1 / math.sqrt(40 * 33)))
    plain = Feedback(kind, seed=3, dtype=dtype, normalize=False)
    assert torch.equal(plain.matrix(40, 33), u)


@pytest.mark.parametrize("nonzeros", [None, 1, 5, 33])
def test_sparse_matrix_is_its_indices_and_signs(nonzeros):
    k = nonzeros or default_nonzeros(33)
    indices, signs = sparse_entries(3, range(40), 33, k, CPU)
    expected = torch.zeros(40, 33, dtype=torch.float64)
    expected.scatter_(1, indices.long(), signs.double() * math.sqrt(33 / k))
    got = Feedback("sparse", seed=3, nonzeros=nonzeros, normalize=False, dtype=torch.float64).matrix(40, 33)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGES)
def test_smaller_layers_use_the_first_rows(kind, storage):
    feedback = Feedback(kind, storage, normalize=False)
    assert torch.equal(feedback.matrix(13, 21), feedback.matrix(200, 21)[:13])


@pytest.mark.parametrize("kind", KINDS)
def test_scale(kind):
    unit = Feedback(kind, normalize=False).matrix(50, 20)
    torch.testing.assert_close(Feedback(kind).matrix(50, 20), unit / math.sqrt(1000), rtol=3e-7, atol=0)
    torch.testing.assert_close(Feedback(kind, normalize=False, gain=-2.5).matrix(50, 20), -2.5 * unit)
    assert FeedbackSpec(gain=3.0).scale(50, 20) == 3 / math.sqrt(1000)
    assert FeedbackSpec(gain=3.0, normalize=False).scale(50, 20) == 3.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_projection_is_the_product_with_the_matrix(kind, storage, dtype):
    feedback = Feedback(kind, storage, seed=7, dtype=dtype, normalize=False)
    b = feedback.matrix(301, 37)
    error = randn(9, 37, dtype=dtype)
    got = feedback.project(error, 301)
    assert got.dtype == dtype
    assert within_baseline(got, error, b, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGES)
def test_float64_errors_are_projected_in_float64(kind, storage):
    feedback = Feedback(kind, storage, seed=7)
    error = randn(5, 37, dtype=torch.float64)
    exact = error @ Feedback(kind, seed=7, normalize=False).matrix(60, 37).double().T / math.sqrt(60 * 37)
    # Entries of fastfood are themselves results of float32 arithmetic on the diagonals that define it.
    tolerance = 1e-6 if kind == "fastfood" else 1e-14
    torch.testing.assert_close(feedback.project(error, 60), exact, rtol=0, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(STORAGES),
    st.lists(st.sampled_from([0, 1, 2, 3]), max_size=3),
    st.sampled_from([1, 2, 3, 10, 16, 67]),
    st.sampled_from([1, 2, 17, 64, 101]),
    st.booleans(),
)
def test_any_shape_and_stride(kind, storage, leading, error_size, size, strided):
    feedback = Feedback(kind, storage, seed=1, dtype=torch.float64)
    error = randn(*leading, 2 * error_size, dtype=torch.float64)
    error = error[..., ::2] if strided else error[..., :error_size].contiguous()
    got = feedback.project(error, size)
    torch.testing.assert_close(got, error @ feedback.matrix(size, error_size).T, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_passes_do_not_show(kind, monkeypatch):
    feedback, error = Feedback(kind, "procedural", dtype=torch.float64), randn(4, 50, dtype=torch.float64)
    expected = error @ feedback.matrix(777, 50).T
    monkeypatch.setattr(entries, "entries_per_pass", lambda device: 1000)
    for storage in STORAGES:
        got = Feedback(kind, storage, dtype=torch.float64).project(error, 777)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGES)
def test_projection_repeats_bit_for_bit(kind, storage):
    error = randn(6, 50)
    first, second = (Feedback(kind, storage, seed=3).project(error, 500) for _ in range(2))
    assert torch.equal(first, second)


def test_mixed_precision_returns_the_errors_dtype():
    feedback = Feedback(dtype=torch.bfloat16)
    error = randn(4, 20)
    got = feedback.project(error, 30)
    assert got.dtype == torch.float32
    scaled = (error * (1 / math.sqrt(600))).bfloat16()
    assert torch.equal(got, (scaled @ fill(torch.empty(30, 20, dtype=torch.bfloat16), "gaussian", 0).T).float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGES)
def test_half_precision_holds_sums_that_it_could_not_before_scaling(kind, storage):
    """Of 10,000 components of 1000 each: sums reach 10^5, twice what float16 holds, and scaled ones 100."""
    error = torch.full((1, 10_000), 1000.0)
    half = Feedback(kind, storage, dtype=torch.float16).project(error, 200)
    exact = Feedback(kind, storage).project(error.double(), 200)
    assert (half - exact).abs().max() < 0.02 * exact.abs().max()


def test_autocast_does_not_lower_the_precision():
    feedback, error = Feedback(), randn(4, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = feedback.project(error, 30)
    assert torch.equal(inside, feedback.project(error, 30))


@pytest.mark.parametrize("kind", KINDS)
def test_nbytes_is_what_is_stored(kind):
    for dtype in DTYPES:
        feedback = Feedback(kind, dtype=dtype)
        assert feedback.nbytes(301, 37) == sum(part.nbytes for part in feedback.stored(301, 37, "cpu"))
    assert Feedback(kind, "procedural").nbytes(10**12, 10**6) == 0
    assert Feedback(kind, "procedural").stored(10**12, 10**6, "cpu") == []


def test_nbytes_allocates_nothing():
    assert Feedback().nbytes(10**12, 1000) == 4 * 10**15


@pytest.mark.parametrize("kind", KINDS)
def test_stored_is_kept_and_grows_without_changing(kind):
    feedback = Feedback(kind, seed=4)
    small = feedback.stored(20, 37, "cpu")
    before = [part.clone() for part in small]
    assert all(a is b for a, b in zip(small, feedback.stored(15, 37, CPU), strict=True))
    large = feedback.stored(500, 37, "cpu")
    assert same([part[: len(b)] for part, b in zip(large, before, strict=True)], before)
    assert large[0].shape[0] > before[0].shape[0]
    assert same(feedback.stored(20, 37, "cpu"), large)
    assert same(large, Feedback(kind, seed=4).stored(500, 37, "cpu"))


def test_stored_per_error_size():
    feedback = Feedback()
    assert feedback.stored(20, 10, "cpu")[0].shape == (20, 10)
    assert feedback.stored(20, 11, "cpu")[0].shape == (20, 11)
    assert torch.equal(feedback.stored(20, 10, "cpu")[0], fill(torch.empty(20, 10), "gaussian", 0))


def test_own_device_wins():
    assert Feedback(device="meta").stored(3, 4, "cpu")[0].device.type == "meta"
    assert Feedback(device="cpu").stored(3, 4, "meta")[0].device.type == "cpu"
    assert Feedback(device="cpu").matrix(3, 4, device="meta").device.type == "meta"


def test_stored_under_inference_mode_serves_training():
    feedback = Feedback()
    with torch.inference_mode():
        u = feedback.stored(3, 4, "cpu")[0]
    assert not u.is_inference()


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sparse", "fastfood"])
def test_a_compiler_changes_no_entry(kind):
    feedback = Feedback(kind, seed=8)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(error):
        return [part.clone() for part in feedback.stored(40, error.shape[1], error.device)]

    assert same(compiled(randn(2, 10)), Feedback(kind, seed=8).stored(40, 10, "cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_operator_is_well_formed(kind):
    arguments = (FeedbackSpec(kind, seed=8).encode(), 2, 5, 10, CPU)
    torch.library.opcheck(torch.ops.dfa_kernels.feedback_parts.default, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_leave_the_stored_behind(kind):
    feedback = Feedback(kind, seed=6, gain=2.0, device="cpu")
    error = randn(3, 100)
    expected = feedback.project(error, 2000)
    dumped = pickle.dumps(feedback)
    assert len(dumped) < 1500
    for other in (
        copy.deepcopy(feedback),
        pickle.loads(dumped),
        Feedback.from_state_dict(feedback.state_dict()),
    ):
        assert (other.spec, other._kept) == (feedback.spec, {})
        assert torch.equal(other.project(error, 2000), expected)
    assert feedback._kept


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_dict_survives_a_weights_only_load():
    feedback = Feedback("sparse", "procedural", seed=2**64 - 1, dtype=torch.float16, gain=0.5, nonzeros=3)
    state = saved_and_loaded(feedback.state_dict())
    assert all(isinstance(value, (str, int, float, type(None))) for value in state.values())
    assert Feedback.from_state_dict(state).spec == feedback.spec


def test_state_dict_carries_a_given_matrix():
    feedback = Feedback.from_matrix(randn(20, 10).bfloat16(), gain=0.5, normalize=False)
    other = Feedback.from_state_dict(saved_and_loaded(feedback.state_dict()))
    assert other.spec == feedback.spec
    assert torch.equal(other.matrix(20, 10), feedback.matrix(20, 10))


@pytest.mark.parametrize("kind", KINDS)
def test_spec_encodes_to_compact_json(kind):
    spec = FeedbackSpec(kind, "procedural", 2**64 - 1, torch.bfloat16, False, 0.1, 3 if kind == "sparse" else None)
    text = spec.encode()
    assert " " not in text
    assert json.loads(text)["dtype"] == "bfloat16"
    assert FeedbackSpec.decode(text) == spec
    assert FeedbackSpec.decode(text) is FeedbackSpec.decode(text)


@pytest.mark.parametrize("convert", [lambda u: u, lambda u: u.numpy(), lambda u: u.T.contiguous().T])
def test_from_matrix_projects_by_it(convert):
    u = randn(30, 10)
    feedback = Feedback.from_matrix(convert(u))
    error = randn(2, 3, 10)
    assert torch.equal(feedback.matrix(30, 10), u * (1 / math.sqrt(300)))
    plain = Feedback.from_matrix(convert(u), normalize=False).project(error, 12)
    assert within_baseline(plain.reshape(6, 12), error.reshape(6, 10), u[:12], torch.float32)
    scaled = feedback.project(error, 12).reshape(6, 12)
    assert within_baseline(scaled, error.reshape(6, 10), u[:12] / math.sqrt(120), torch.float32)
    assert feedback.nbytes(12, 10) == 30 * 10 * 4
    assert torch.equal(feedback.stored(12, 10, "cpu")[0], u)


def test_from_matrix_options():
    u = randn(30, 10)
    assert Feedback.from_matrix(u.numpy().astype(np.float64)).spec.dtype == torch.float64
    half = Feedback.from_matrix(u, dtype=torch.float16, normalize=False, gain=2.0)
    assert torch.equal(half.matrix(5, 10), u[:5].half() * 2)
    assert Feedback.from_matrix(u, device="meta").stored(3, 10, "cpu")[0].device.type == "meta"


def test_from_matrix_keeps_a_copy():
    u = randn(6, 4)
    before, feedback = u.clone(), Feedback.from_matrix(u, normalize=False)
    u.zero_()
    assert torch.equal(feedback.matrix(6, 4), before)
    for other in (copy.deepcopy(feedback), pickle.loads(pickle.dumps(feedback))):
        assert torch.equal(other.matrix(6, 4), before)


def test_from_matrix_allows_what_is_not_finite():
    u = torch.tensor([[math.nan, 1.0], [math.inf, 2.0]])
    got = Feedback.from_matrix(u, normalize=False).matrix(2, 2)
    torch.testing.assert_close(got, u, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_needs_bounded_memory(kind, storage, dtype, monkeypatch):
    """The whole U has 64 MB; neither form of it may show up, nor anything else of that order."""
    monkeypatch.setattr(entries, "entries_per_pass", lambda device: 2**14)
    feedback, error = Feedback(kind, storage), randn(2, 256).to(dtype)
    stored = [] if storage == "procedural" else feedback.stored(2**16, 256, "cpu")
    with Largest() as largest:
        project_unscaled(error, stored, feedback.spec, 2**16)
    kept = feedback.nbytes(2**16, 256)
    assert largest.bytes <= max(kept, 2 * 2**16 * dtype.itemsize)


def test_making_entries_needs_bounded_memory(monkeypatch):
    monkeypatch.setattr(entries, "entries_per_pass", lambda device: 2**12)
    out = torch.empty(4096, 64)
    with Largest() as largest:
        for kind in ("gaussian", "uniform", "rademacher"):
            fill(out[:2048], kind, 0)
    # `out` itself comes back from assignments; int64 words of one pass are the largest temporaries.
    assert largest.bytes == out.nbytes


@pytest.mark.parametrize(
    ("feedback", "text"),
    [
        (Feedback(), "Feedback()"),
        (Feedback("sparse", seed=3, nonzeros=4), "Feedback(kind='sparse', seed=3, nonzeros=4)"),
        (Feedback("uniform", "procedural"), "Feedback(kind='uniform', storage='procedural')"),
        (Feedback(dtype=torch.bfloat16, device="cpu"), "Feedback(dtype=torch.bfloat16, device='cpu')"),
        (Feedback.from_matrix(torch.ones(3, 2), gain=2.0), "Feedback.from_matrix(<3 x 2>, gain=2.0)"),
    ],
)
def test_repr(feedback, text):
    assert repr(feedback) == text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "normal"}, ValueError, "kind must be one of 'gaussian'.*got 'normal'"),
        ({"kind": ["gaussian"]}, ValueError, "kind must be one of"),
        ({"kind": "matrix"}, ValueError, "Feedback.from_matrix"),
        ({"storage": "disk"}, ValueError, "storage must be one of 'dense', 'procedural', got 'disk'"),
        (
            {"seed": -1},
            ValueError,
            "seed must be an integer of at least 0 and at most 18446744073709551615, got -1",
        ),
        ({"seed": 2**64}, ValueError, "seed must be .* got 18446744073709551616"),
        ({"seed": 0.5}, TypeError, r"seed must be .* got 0\.5 \(float\)"),
        ({"seed": True}, TypeError, r"seed must be .* got True \(bool\)"),
        ({"dtype": torch.int64}, TypeError, r"dtype must be one of .* got torch\.int64"),
        ({"dtype": torch.complex64}, TypeError, r"dtype must be one of .* got torch\.complex64"),
        ({"gain": math.inf}, ValueError, "gain must be a finite number, got inf"),
        ({"gain": "1"}, ValueError, "gain must be a finite number, got '1'"),
        ({"nonzeros": 3}, ValueError, "nonzeros is for kind 'sparse', got nonzeros=3 for 'gaussian'"),
        ({"kind": "sparse", "nonzeros": 0}, ValueError, "nonzeros must be an integer of at least 1, got 0"),
        ({"kind": "sparse", "nonzeros": 2.0}, TypeError, "nonzeros must be an integer of at least 1"),
    ],
)
def test_bad_specifications(arguments, error, message):
    with pytest.raises(error, match=message):
        Feedback(**arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("size", "error_size", "error", "message"),
    [
        (0, 5, ValueError, "size must be an integer of at least 1, got 0"),
        (5, -2, ValueError, "error_size must be an integer of at least 1, got -2"),
        (5.0, 5, TypeError, r"size must be an integer of at least 1, got 5\.0 \(float\)"),
        (5, None, TypeError, "error_size must be .* got None"),
        (True, 5, TypeError, r"size must be .* got True \(bool\)"),
    ],
)
def test_bad_shapes(kind, size, error_size, error, message):
    feedback = Feedback(kind)
    for call in (feedback.matrix, feedback.nbytes, lambda *shape: feedback.stored(*shape, "cpu")):
        with pytest.raises(error, match=message):
            call(size, error_size)
    kept = feedback.stored(10, 5, "cpu")
    if error_size == 5:
        with pytest.raises(error, match=message):
            feedback.stored(size, error_size, "cpu")
    assert feedback.stored(10, 5, "cpu") is kept


def test_numpy_sizes_are_integers():
    assert Feedback().nbytes(np.int64(3), np.int32(5)) == 60


def test_too_many_nonzeros():
    feedback = Feedback("sparse", nonzeros=11)
    for call in (lambda: feedback.nbytes(5, 10), lambda: feedback.project(randn(2, 10), 5)):
        with pytest.raises(ValueError, match="nonzeros must be at most the error size 10, got 11"):
            call()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            torch.ones(2, 3, dtype=torch.int64),
            TypeError,
            r"error must be a floating tensor, got torch\.int64",
        ),
        ([1.0], TypeError, "error must be a floating tensor, got list"),
        (torch.tensor(1.0), ValueError, r"error must have shape \[\.\.\., E\], got a 0-d tensor"),
        (torch.ones(3, 0), ValueError, "error_size must be an integer of at least 1, got 0"),
    ],
)
def test_bad_errors(error, kind, message):
    with pytest.raises(kind, match=message):
        Feedback().project(error, 5)


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (torch.ones(3, 3, dtype=torch.int32), TypeError, r"matrix must be floating, got dtype torch\.int32"),
        (torch.ones(3), ValueError, r"matrix must have shape .*, got \[3\]"),
        (torch.ones(3, 0), ValueError, r"matrix must have shape .*, got \[3, 0\]"),
    ],
)
def test_bad_matrices(matrix, error, message):
    with pytest.raises(error, match=message):
        Feedback.from_matrix(matrix)


def test_given_matrix_too_small():
    feedback = Feedback.from_matrix(torch.ones(6, 4))
    with pytest.raises(ValueError, match="error_size must be 4, the columns of the given matrix, got 5"):
        feedback.project(torch.ones(2, 5), 3)
    with pytest.raises(ValueError, match="size must be at most 6, the rows of the given matrix, got 7"):
        feedback.matrix(7, 4)


def test_given_matrix_cannot_be_procedural():
    with pytest.raises(ValueError, match=r"'matrix'.*'procedural'"):
        FeedbackSpec("matrix", "procedural")


def test_numpy_numbers_are_numbers():
    feedback = Feedback("sparse", seed=np.int64(3), nonzeros=np.int32(2), gain=np.float32(3.0))
    assert torch.equal(feedback.matrix(4, 8), Feedback("sparse", seed=3, nonzeros=2, gain=3.0).matrix(4, 8))


@pytest.mark.parametrize("gain", [10**400, 1e300, float("nan"), "1"])
def test_a_gain_that_float32_cannot_hold_is_refused(gain):
    with pytest.raises(ValueError, match="gain must be a finite number"):
        Feedback(gain=gain)


def test_fastfood_does_not_depend_on_the_default_dtype():
    expected = Feedback("fastfood").matrix(20, 7)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(Feedback("fastfood").matrix(20, 7), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_fastfood_matrix_of_a_wide_error_is_made_in_pieces(monkeypatch):
    expected = Feedback("fastfood").matrix(40, 33)
    monkeypatch.setattr("dfa_kernels.feedback.entries.entries_per_pass", lambda device: 100)
    torch.testing.assert_close(Feedback("fastfood").matrix(40, 33), expected, rtol=1e-6, atol=1e-7)
