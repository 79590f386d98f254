"""Fastfood: its diagonals and its product against dense algebra in float64, and its statistics."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import hadamard
from scipy.stats import chi, norm
from test_entries import oracle, words_at

from dfa_kernels.feedback import entries, fastfood
from dfa_kernels.feedback.entries import Stream, fill
from dfa_kernels.feedback.fastfood import block_rows, fastfood_diagonals
from dfa_kernels.feedback.projection import project_unscaled, units_for
from dfa_kernels.feedback.spec import FeedbackSpec

CPU = torch.device("cpu")


def permutation_oracle(seed: int, block: int, d: int) -> list[int]:
    bits = d.bit_length() - 1
    keys = [word for call in range(2) for word in words_at(seed, Stream.FASTFOOD_PERMUTATION, block, call)]
    permutation = []
    for x in range(d):
        for a, b in zip(keys[::2], keys[1::2], strict=True):
            x = (x * (2 * a + 1) + b) & (d - 1)
            x ^= x >> max(1, bits // 2)
        permutation.append(x)
    return permutation


def factor_by_factor(error: torch.Tensor, diagonals: list[torch.Tensor]) -> torch.Tensor:
    """error Vᵀ with every factor of V a dense matrix, in error's dtype."""
    signs, permutation, gaussian, scaling = (part.to(error.dtype) for part in diagonals)
    d = signs.shape[1]
    h = torch.from_numpy(hadamard(d)).to(error.dtype)
    padded = F.pad(error, (0, d - error.shape[1]))
    blocks = []
    for n in range(signs.shape[0]):
        mixed = ((padded @ signs[n].diag()) @ h)[:, permutation[n].long()]
        blocks.append(mixed @ gaussian[n].diag() @ h @ scaling[n].diag())
    return torch.cat(blocks, dim=1)


def project(error: torch.Tensor, seed: int, rows: int) -> torch.Tensor:
    return project_unscaled(error, [], FeedbackSpec("fastfood", "procedural", seed), rows)


@pytest.mark.parametrize(("error_size", "d"), [(1, 1), (2, 2), (3, 4), (10, 16), (1000, 1024), (1024, 1024)])
def test_blocks_are_the_next_power_of_two(error_size, d):
    assert block_rows(error_size) == d
    assert [units_for(FeedbackSpec("fastfood"), rows, error_size) for rows in (1, d, d + 1)] == [1, 1, 2]


@pytest.mark.parametrize("error_size", [1, 2, 4, 50, 128])
@pytest.mark.parametrize("seed", [0, 2**64 - 3])
def test_permutation_is_the_oracles_bijection(error_size, seed):
    permutation = fastfood_diagonals(seed, range(5, 8), error_size, CPU)[1]
    d = block_rows(error_size)
    assert permutation.tolist() == [permutation_oracle(seed, block, d) for block in range(5, 8)]
    assert torch.equal(permutation.sort(1).values, torch.arange(d, dtype=torch.int32).expand(3, d))


def test_diagonals_come_from_their_streams():
    signs, _, gaussian, scaling = fastfood_diagonals(3, range(2, 6), 60, CPU)
    expected_signs = fill(torch.empty(4, 64), "rademacher", 3, row=2, stream=Stream.FASTFOOD_SIGNS)
    assert torch.equal(signs, expected_signs.to(torch.int8))
    assert torch.equal(gaussian, fill(torch.empty(4, 64), "gaussian", 3, row=2, stream=Stream.FASTFOOD_GAUSSIAN))
    z = fill(torch.empty(4, 64), "gaussian", 3, row=2, stream=Stream.FASTFOOD_SCALING).double()
    variance = 2 / (9 * 64)
    s = (64 * (1 - variance + z * math.sqrt(variance)) ** 3).sqrt()
    expected = s / (gaussian.double().norm(dim=1, keepdim=True) * 8)
    # In units of half a last bit: 3.5 of the norm's square and 0.5 of its root, 2.3 of the cube root's product and sum,
    # and 0.5 each of its root, the product and the quotient.
    torch.testing.assert_close(scaling.double(), expected, rtol=8 * 2.0**-24, atol=0)


def test_norms_do_not_depend_on_the_order_of_the_sum():
    rows = torch.randn(3, 2**15, generator=torch.Generator().manual_seed(0))
    rows[2, ::2] = 6.7
    norms = fastfood._norms(rows)
    assert torch.equal(norms, fastfood._norms(rows[:, torch.randperm(2**15)]))
    torch.testing.assert_close(norms[:, 0].double(), rows.double().norm(dim=1), rtol=1.2e-7, atol=0)


def test_streams_of_the_diagonals_are_not_the_entries():
    gaussian = fastfood_diagonals(3, range(1), 64, CPU)[2]
    assert gaussian[0, 0].item() != pytest.approx(oracle("gaussian", 3, 0, 0), abs=1e-3)


@pytest.mark.parametrize("d", [16, 1024])
def test_chi_is_close_to_chi(d):
    for quantile in (0.001, 0.01, 0.25, 0.5, 0.75, 0.99, 0.999):
        z = torch.full((1, d), norm.ppf(quantile), dtype=torch.float64)
        assert chi.cdf(fastfood._relative_chi(z)[0, 0].item() * math.sqrt(d), d) == pytest.approx(
            quantile, abs=0.0125 / d
        )


def test_chi_of_an_impossible_normal_is_zero():
    assert fastfood._relative_chi(torch.tensor([[-9.0]])).item() == 0.0


@pytest.mark.parametrize(("error_size", "rows"), [(1, 5), (2, 2), (10, 33), (16, 40), (100, 500)])
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_product_is_the_factors(error_size, rows, batch):
    error = torch.randn(batch, error_size, generator=torch.Generator().manual_seed(rows))
    diagonals = fastfood_diagonals(12, range(-(-rows // block_rows(error_size))), error_size, CPU)
    exact = factor_by_factor(error.double(), diagonals)[:, :rows]
    torch.testing.assert_close(project(error.double(), 12, rows), exact, rtol=1e-12, atol=1e-12)
    if batch:
        baseline = (factor_by_factor(error, diagonals)[:, :rows] - exact).abs().max()
        assert (project(error, 12, rows) - exact).abs().max() <= 2 * baseline + 1e-30


def test_rows_have_the_norms_and_moments_of_gaussian_rows():
    error_size, rows = 256, 8192
    v = project(torch.eye(error_size), 4, rows).T.double()
    norms = v.square().sum(1)
    assert norms.mean().item() == pytest.approx(error_size, rel=5 * math.sqrt(2 / v.numel()))
    assert norms.var().item() == pytest.approx(2 * error_size, rel=0.1)
    assert abs(v.mean()) < 5 / math.sqrt(v.numel())
    assert v.pow(4).mean().item() == pytest.approx(3, rel=0.05)
    assert (v.T @ v / rows - torch.eye(error_size)).abs().max() < 6 / math.sqrt(rows)


def test_passes_do_not_show(monkeypatch):
    error = torch.randn(3, 30)
    whole = project(error, 5, 1000)
    monkeypatch.setattr(entries, "entries_per_pass", lambda device: 1)
    # Products of other sizes may add in another order: rounding, but no other difference.
    torch.testing.assert_close(project(error, 5, 1000), whole, rtol=1e-5, atol=1e-5)


def test_fewer_rows_are_the_first_rows():
    error = torch.randn(3, 30, dtype=torch.float64)
    torch.testing.assert_close(project(error, 5, 70), project(error, 5, 1000)[:, :70], rtol=1e-13, atol=1e-13)


def test_rows_of_a_block_are_as_correlated_as_the_product_makes_them():
    """Cosines of two rows: V Vᵀ = S H G² H S / d, so 2/d is their mean square in a block, and 1/d in two."""
    d, blocks = 256, 48
    v = project(torch.eye(d), 11, blocks * d).T.double().view(blocks, d, d)
    cosines = F.normalize(v, dim=2) @ F.normalize(v, dim=2).transpose(1, 2)
    below, left = torch.tril_indices(d, d, -1)
    others = cosines[:, below, left]
    # Row 0 against all others holds every value of its block: H G² H depends on the xor of its two indices alone.
    torch.testing.assert_close(others.abs().amax(1), cosines[:, 0, 1:].abs().amax(1), rtol=1e-5, atol=0)
    assert cosines[:, 0, 1:].square().mean().item() * d == pytest.approx(2, abs=0.15)
    assert abs(cosines[:, 0, 1:].mean().item()) < 5 * math.sqrt(2 / d / (blocks * d))
    assert cosines[:, 0, 1:].abs().max().item() < 6 * math.sqrt(2 / d)
    between = F.normalize(v[:-1], dim=2) @ F.normalize(v[1:], dim=2).transpose(1, 2)
    assert between.square().mean().item() * d == pytest.approx(1, rel=0.02)
    assert between.abs().max().item() < 7 / math.sqrt(d)


@pytest.mark.parametrize("length", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("error_size", [64, 100, 256])
@pytest.mark.parametrize("concentrated", [False, True])
def test_approximates_the_gaussian_kernel_as_the_paper_bounds_it(error_size, length, concentrated):
    """The mean of cos(V v) over a block estimates exp(-|v|²/2): Le, Sarlos, Smola, section 5, for v of any direction.

    The variance of the estimate is at most ((1 - exp(-|v|²))²/2 + C(|v|)) / d, C(a) = 6 a⁴ (exp(-a²) + a²/3).
    """
    d, blocks = block_rows(error_size), 600
    v = torch.zeros(error_size, dtype=torch.float64)
    v[: 1 if concentrated else error_size] = 1
    v *= length / v.norm()
    estimates = project(v[None], 21, blocks * d).view(blocks, d).cos().mean(1)
    bound = ((1 - math.exp(-(length**2))) ** 2 / 2 + 6 * length**4 * (math.exp(-(length**2)) + length**2 / 3)) / d
    expected = math.exp(-(length**2) / 2)
    assert estimates.mean().item() == pytest.approx(expected, abs=5 * math.sqrt(bound / blocks))
    # Of 600 estimates the variance is known to some 6 %; that of independent rows is the first term alone.
    assert estimates.var().item() <= 1.2 * bound
    independent = (1 - math.exp(-(length**2))) ** 2 / 2 / d
    assert estimates.var().item() <= 3 * independent
    assert (estimates - expected).abs().max().item() <= 6 * math.sqrt(3 * independent)
