"""Nothing overwrites what an asynchronous product still reads: the reader of the compiler's code, and what it finds.

Of the package's own kernels `test_compile_ahead.py` asks the same.
"""

from __future__ import annotations

import json

import pytest
from async_products import overwritten
from triton_versions import every_version, output_under

RING = "!ttg.memdesc<{0}x64x128xbf16, #shared, #smem, mutable>"
# A loop whose copy for the turn after next goes to a ring of {slots} slots; {wait} stands where the loop waits for
# products, before the copy.
LOOP = """
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %start = arith.constant -1 : i32
  %slots = arith.constant {slots} : i32
  %acc = arith.constant dense<0.000000e+00> : tensor<128x128xf32, #mma>
  %ring = ttg.local_alloc : () -> {ring} loc(#loc1)
  %done = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared1, #smem, mutable>
  %done0 = ttg.memdesc_index %done[%c0] : x
  %s0 = ttg.memdesc_index %ring[%c0] : x
  %t0 = ttg.async_copy_global_to_local %p, %s0 mask %m : x
  %s1 = ttg.memdesc_index %ring[%c1] : x
  %t1 = ttg.async_copy_global_to_local %p, %s1 mask %m : x
  %out:5 = scf.for %i = %c0 to %n step %c1 iter_args(%a = %acc, %put = %c1, %get = %start, {flags}) -> (x)  : i32 {{
    %get1 = arith.addi %get, %c1 : i32
    %get2 = arith.cmpi sge, %get1, %slots : i32
    %get3 = arith.select %get2, %c0, %get1 : i32
    %tile = ttg.memdesc_index %ring[%get3] : x
    %turned = ttg.memdesc_trans %tile {{order = array<i32: 1, 0>}} : x
    %flag1 = arith.xori %flag, %c1 : i32
    %done1 = ttg.memdesc_index %done[%flag] : x
    {product}
    {wait}
    %put1 = arith.addi %put, %c1 : i32
    %put2 = arith.cmpi sge, %put1, %slots : i32
    %put3 = arith.select %put2, %c0, %put1 : i32
    %next = ttg.memdesc_index %ring[%put3] : x
    %t = ttg.async_copy_global_to_local %p, %next mask %m : x
    scf.yield %r, %put3, %get3, %flag1, %done1 : x
  }} loc(#loc2)
"""
HOPPER = "%r = ttng.warp_group_dot %turned, %tile, %a {inputPrecision = 0 : i32, isAsync = true} : x"
BLACKWELL = "ttng.tc_gen5_mma %turned, %tile, %acc, %true, %true, %done1[%true] {is_async} : x"
TOLD = "%ring, slot {}, is overwritten while a product reads it"


def loop(slots: int, product: str, wait: str) -> str:
    flags = "%flag = %c0, %b = %done0"
    return LOOP.format(slots=slots, ring=RING.format(slots), flags=flags, product=product, wait=wait)


@pytest.mark.parametrize(("slots", "pendings", "right"), [(2, 0, True), (2, 1, False), (3, 1, True), (3, 2, False)])
def test_rings_of_hopper(slots: int, pendings: int, right: bool) -> None:
    """A copy for the turn after next, behind a wait that leaves n products pending, needs 2 + n slots."""
    wait = f"%w = ttng.warp_group_dot_wait %r, %turned {{pendings = {pendings} : i32}} : x"
    assert (overwritten(loop(slots, HOPPER, wait)) == []) == right


def test_which_slot_is_overwritten_is_said() -> None:
    wait = "%w = ttng.warp_group_dot_wait %r {pendings = 1 : i32} : x"
    assert overwritten(loop(2, HOPPER, wait)) == [TOLD.format(0), TOLD.format(1)]


@pytest.mark.parametrize(("slots", "barrier", "right"), [(2, "%done1", True), (2, "%b", False), (3, "%b", True)])
def test_rings_of_blackwell(slots: int, barrier: str, right: bool) -> None:
    """A wait for this turn's product, or for that of the turn before."""
    wait = f"ttng.wait_barrier {barrier}, %flag deps %turned : x"
    assert (overwritten(loop(slots, BLACKWELL, wait)) == []) == right


def test_a_product_that_nobody_waits_for() -> None:
    assert overwritten(loop(4, BLACKWELL, "")) != []


def test_products_that_the_program_waits_for_at_once() -> None:
    assert overwritten(loop(2, HOPPER.replace(", isAsync = true", ""), "")) == []


def test_what_is_left_under_way_meets_the_next_turn_of_an_outer_loop() -> None:
    """Three slots are enough within a loop, but not for the first copies of the next one."""
    wait = "%w = ttng.warp_group_dot_wait %r, %turned {pendings = 1 : i32} : x"
    inner = loop(3, HOPPER, wait)
    first = inner.index("  %s0")
    outer = inner[:first] + "  scf.while : () -> () {\n    scf.condition(%c)\n  } do {\n"
    outer += "\n".join(f"  {line}" for line in inner[first:].splitlines()) + "\n    scf.yield\n  }\n"
    assert overwritten(inner) == []
    assert overwritten(outer) != []
    waited = outer.replace(
        "    scf.yield\n", "    %e = ttng.warp_group_dot_wait %out {pendings = 0 : i32} : x\n    scf.yield\n"
    )
    assert overwritten(waited) == []


def test_a_product_that_is_begun_for_a_later_turn_is_not_begun_in_the_last() -> None:
    """Which is known where the number of turns is."""
    code = """
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %last = arith.subi %n, %c1 : i32
  %tile = ttg.local_alloc : () -> x
  %done = ttg.local_alloc : () -> x
  scf.for %i = %c0 to %n step %c1  : i32 {
    %more = arith.cmpi slt, %i, %last : i32
    ttng.wait_barrier %done, %c0 deps %tile : x
    ttng.tc_gen5_mma %tile, %tile, %acc[], %c0, %more, %done[%true] {is_async} : x
  }
  ttg.local_store %value, %tile : x
"""
    assert overwritten(code, {"n": 3}) == []
    assert overwritten(code) == ["%tile is overwritten while a product reads it"]
    assert overwritten(code.replace("%more,", "%c1,"), {"n": 3}) != []
    assert overwritten(code.replace("%c0 deps", "%c0, %c0 deps"), {"n": 3}) != []


def test_what_cannot_be_followed_is_refused() -> None:
    with pytest.raises(ValueError, match="warp_specialize"):
        overwritten("    ttg.warp_specialize(%a) attributes {}")
    unknown = loop(3, HOPPER, "").replace("arith.constant -1 : i32", "tt.get_program_id x : i32")
    hidden = loop(3, HOPPER.replace(": x", "} : !ttg.memdesc<64x128xbf16, #smem> * x").replace("%turned", "%none"), "")
    with pytest.raises(ValueError, match="%none: expected memory that is known"):
        overwritten(hidden)
    with pytest.raises(ValueError, match="%get3: expected a number that is known, the slot of %ring"):
        overwritten(unknown)


@pytest.mark.parametrize("version", every_version())
def test_a_tile_with_a_second_use_is_overwritten_on_hopper(version: str) -> None:
    """Which is why no kernel of the package has one. On sm_100 Triton waits for the product first."""
    rows = [json.loads(line) for line in output_under(version, "second_use.py").splitlines()]
    assert len(rows) == 16
    for row in rows:
        assert bool(row["overwritten"]) == (row["second_use"] and row["arch"] == 90), row
