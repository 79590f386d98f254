"""float32 products as Triton's "bf16x6" makes them: how far they are from exact ones, and what is not finite.

No GPU is needed: the six products of three bfloat16 are exact in float32, so it is their sums that round.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_versions import every_version, output_under

# Of a factor below it, the last parts are smaller than bfloat16's smallest number.
SMALLEST = 2.0**-102
SMALLEST_PART = 2.0**-133


def split(x: Tensor) -> list[Tensor]:
    """Three bfloat16, as float32, that add up to x."""
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16().float())
        x = x - parts[-1]
    return parts


def summed(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """total + a b, rounded to float32 after every addition."""
    for k in range(a.shape[1]):
        total = total + a[:, k, None] * b[None, k]
    return total


def split_product(a: Tensor, b: Tensor) -> Tensor:
    """The products in Triton's order, from the smallest on; what of theirs is no number gives way to the largest's."""
    parts_a, parts_b = split(a), split(b)
    total = torch.zeros(a.shape[0], b.shape[1])
    for i, j in ((1, 1), (2, 0), (0, 2), (1, 0), (0, 1)):
        total = summed(parts_a[i], parts_b[j], total)
    return summed(parts_a[0], parts_b[0], total.nan_to_num(0.0, torch.inf, -torch.inf))


def plain_product(a: Tensor, b: Tensor) -> Tensor:
    return summed(a, b, torch.zeros(a.shape[0], b.shape[1]))


def distance(found: Tensor, exact: Tensor, size: Tensor) -> float:
    """Largest error, relative to the sum of the absolute values of what is added up."""
    return float(((found.double() - exact).abs() / size).max())


SCALES = {
    "alike": lambda rows: torch.ones(rows),
    "rows of 1e20 and 1e-20": lambda rows: torch.where(torch.arange(rows) % 2 == 0, 1e20, 1e-20),
    "any size": lambda rows: 10.0 ** torch.linspace(-17, 17, rows),
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("along", ["outputs", "batch"])
def test_six_products_are_as_good_as_float32(scale, along):
    """Within twice its error, also where rows differ by 40 orders of magnitude."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(32, 128, generator=generator), torch.randn(128, 32, generator=generator)
        a = a * (scale(32)[:, None] if along == "outputs" else scale(128)[None, :])
        exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        assert distance(split_product(a, b), exact, size) <= 2 * distance(plain_product(a, b), exact, size)


@pytest.mark.parametrize("factor", [1e-33, 1e-36, 1e-39, 1e-43])
def test_factors_smaller_than_their_parts_can_be(factor):
    """What is lost of them is less than bfloat16's smallest number, times the other factor: nothing that is learned."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 64, generator=generator) * factor, torch.randn(64, 16, generator=generator)
    assert a.abs().min() < SMALLEST
    exact = a.double() @ b.double()
    lost = SMALLEST_PART * b.double().abs().sum(0, keepdim=True)
    plain = (plain_product(a, b) - exact).abs().max()
    assert ((split_product(a, b) - exact).abs() <= 2 * plain + lost).all()


def test_what_is_not_finite_stays_what_it_is():
    """As in float32: infinity times a number is infinity; times 0, or beside its opposite, it is none."""
    a, b = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), torch.ones(16, 3)
    a[0, 3], a[1, 4], a[2, 5], a[2, 6] = torch.inf, torch.nan, torch.inf, -torch.inf
    b[3, 2] = 0.0
    torch.testing.assert_close(split_product(a, b), plain_product(a, b), equal_nan=True, rtol=1e-5, atol=1e-5)
    b[2, 1] = -torch.inf
    assert torch.equal(split_product(a, b).isfinite(), plain_product(a, b).isfinite())


@pytest.mark.parametrize("version", every_version())
def test_triton_makes_these_products_in_this_order(version):
    """And replaces what is no number before the last one, in every version."""
    assert output_under(version, "split_products.py").split() == [
        "mid*mid", "low*high", "high*low", "mid*high", "high*mid", "no-nan", "high*high",
    ]  # fmt: skip
