"""The kernels' normals are the bits of those made outside of them: no product of theirs is fused with a sum."""

from __future__ import annotations

import json

import pytest
from test_compile_ahead import CARDS
from triton_versions import every_version, output_under


@pytest.mark.parametrize("version", every_version())
def test_no_sum_is_fused_with_a_product(version: str) -> None:
    rows = [json.loads(line) for line in output_under(version, "rounding.py", *map(str, CARDS)).splitlines()]
    assert [row["arch"] for row in rows] == list(CARDS)
    for row in rows:
        assert row["fused"] == 0, row
        assert row["ptx"] == ["add.rn.ftz.f32", "div.rn.f32", "fma.rn.f32", "mul.rn.ftz.f32"], row
