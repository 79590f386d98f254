"""Regenerated entries cost what the algorithm does: the compiler does not make a Philox call again for every entry."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_compile_ahead import INSTALLED, ROOT, THOROUGH, versions

# A call is 20 products of 32 x 32 bits and gives 4 normal or uniform entries, or 128 signs, of which a tile of 32
# columns uses a quarter; a program has two threads for each of its 128 rows of signs.
MOST_PRODUCTS = {"gaussian": 20 / 4, "uniform": 20 / 4, "rademacher": 2 * 20 / 32, "signs": 0}


@pytest.mark.parametrize("version", [v for v in versions() if getattr(v, "values", [v])[0] in (THOROUGH, INSTALLED)])
def test_products_an_entry(version: str, tmp_path: Path) -> None:
    folders = [ROOT] if version == INSTALLED else [ROOT / ".venv" / "triton" / version, ROOT]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, folders)), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests" / "rng_cost.py"), "sm_90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\w+): .*\n  32 x 32-bit products +(-?[\d.]+)$", done.stdout, re.MULTILINE)
    products = {source: float(count) for source, count in found}
    assert products.keys() == MOST_PRODUCTS.keys()
    assert {source: count for source, count in products.items() if count > MOST_PRODUCTS[source]} == {}
