"""Regenerated entries cost what the algorithm does: the compiler does not make a Philox call again for every entry."""

from __future__ import annotations

import re

from triton_versions import THOROUGH, output_under

# A call is 20 products of 32 x 32 bits and gives 4 normal or uniform entries, or 128 signs, of which a tile of 32
# columns uses a quarter; a program has two threads for each of its 128 rows of signs.
MOST_PRODUCTS = {"gaussian": 20 / 4, "uniform": 20 / 4, "rademacher": 2 * 20 / 32, "signs": 0}


def test_products_an_entry() -> None:
    printed = output_under(THOROUGH, "../bench/predict/rng_cost.py", "sm_90")
    found = re.findall(r"^(\w+): .*\n  32 x 32-bit products +(-?[\d.]+)$", printed, re.MULTILINE)
    products = {source: float(count) for source, count in found}
    assert products.keys() == MOST_PRODUCTS.keys()
    assert {source: count for source, count in products.items() if count > MOST_PRODUCTS[source]} == {}
