"""What a launch runs, from shapes alone: no tensor here holds a number."""

from __future__ import annotations

import itertools
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import given, note, settings
from torch import Tensor
from triton_cases import (
    FRESH,
    GROUPED_GEMM,
    PROJECTIONS,
    STRIPS,
    TWO_PHASE,
    forced,
    make_call,
    plain_layer,
    plain_network,
    randoms,
    some_network,
    watched,
)

import dfa_kernels as dfa
from bench.gpu.precision import tf32
from dfa_kernels.backends import triton as triton_backend
from dfa_kernels.backends.calls import LayerCall, TapsCall
from dfa_kernels.backends.triton import choice, choice_wide, configs, describe, plan_taps, producer
from dfa_kernels.backends.triton.choice import plan_grouped
from dfa_kernels.backends.triton.configs import GemmConfig, ProjectionConfig, StripConfig, TwoPhaseConfig
from dfa_kernels.backends.triton.kernels.grouped_gemm_producer import shared_layout
from dfa_kernels.backends.triton.launch_plan import LaunchPlan, can_use_tma, derivatives_of, gradient_tiles, needs_int64
from dfa_kernels.backends.triton.operators import plan_project_taps
from dfa_kernels.backends.triton.plan_gemm import choose_configs, plan_grouped_gemm, plan_products
from dfa_kernels.backends.triton.plan_small import plan_strip
from dfa_kernels.backends.triton.plan_wide import plan_two_phase
from dfa_kernels.backends.triton.problem import LARGEST_FASTFOOD_ERROR, SPLIT, GroupedProblem, Target, alignment
from dfa_kernels.backends.triton.route import looks_of, route_of
from dfa_kernels.backends.triton.wide_tensors import tensors_of_both

H200 = Target(90, 132)
A100 = Target(80, 108)
LIMIT = 2**31


@pytest.fixture(autouse=True)
def without_gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that plans are the same with a GPU and without."""
    monkeypatch.setattr(producer, "NO_GLUON", "Triton's interpreter does not know Gluon")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layers_plan(
    widths: tuple[int, ...] = (20, 30),
    *,
    rows: int = 8,
    error_size: int = 4,
    positions: int = 1,
    output_width: int | None = None,
    error: Tensor | None = None,
    kind: str = "gaussian",
    dtype: torch.dtype = torch.float32,
    target: Target = H200,
) -> LaunchPlan:
    """The plan for layers of these widths, one after the other, and an output layer if it has a width."""
    pairs, long = list(itertools.pairwise(widths)), rows * positions
    inputs = [meta(long, width, dtype=dtype) for width, _ in pairs]
    inputs += [] if output_width is None else [meta(rows, output_width, dtype=dtype)]
    saved = [meta(long, out, dtype=dtype) for _, out in pairs]
    error = meta(rows, error_size, dtype=dtype) if error is None else error
    call = LayerCall(
        error, [], dfa.Feedback(kind, "procedural").spec, inputs, saved, [None] * len(saved), ["tanh"] * len(saved),
        [0.0] * 2 * len(saved), [True] * len(inputs), [True] * len(inputs),
    )  # fmt: skip
    found = route_of(looks_of(call, torch.float32, "store"), target).plan
    assert found is not None
    return found


def taps_plan(
    rows: int, sizes: list[int], error_size: int = 4, error: Tensor | None = None, kind: str = "gaussian"
) -> LaunchPlan:
    n = len(sizes)
    error = meta(rows, error_size) if error is None else error
    feedback = dfa.Feedback(kind, "procedural").spec
    call = TapsCall(error, [], feedback, sizes, [None] * n, [None] * n, ["identity"] * n, [0.0] * 2 * n)
    return plan_project_taps(call, H200)


def index(found: LaunchPlan) -> Any:
    return found.arguments["INDEX"]


def test_offsets_that_int32_holds() -> None:
    assert not needs_int64(LIMIT - 1, 0)
    assert needs_int64(5, LIMIT)


# Each makes one tensor of exactly `LIMIT` numbers when n is the number given, and all others smaller.
LARGE = {
    "inputs": (2**11, lambda n: layers_plan((n, 4), rows=2**20)),
    "inputs of several positions": (2**11, lambda n: layers_plan((n, 4), rows=2**19, positions=2)),
    "activations": (2**11, lambda n: layers_plan((4, n), rows=2**20)),
    "weights": (2**16, lambda n: layers_plan((2**15, n))),
    "feedback": (2**21, lambda n: layers_plan((1, n), rows=1, error_size=2**10)),
    "feedback of several positions": (2**20, lambda n: layers_plan((1, n), rows=1, positions=2, error_size=2**10)),
    "input of the output layer": (2**11, lambda n: layers_plan(rows=2**20, output_width=n)),
    "error of the output layer": (2**11, lambda n: layers_plan(rows=2**20, error_size=n // 16 * 16, output_width=4)),
    "projection": (2**16, lambda n: taps_plan(2**15, [8, n])),
    "feedback of taps": (2**21, lambda n: taps_plan(1, [n], error_size=2**10)),
}


@pytest.mark.parametrize("n, planned", LARGE.values(), ids=LARGE)
def test_tensors_of_more_than_31_bits_get_wide_offsets(n: int, planned: Any) -> None:
    assert index(planned(n)) == tl.int64
    assert index(planned(n - 1)) == tl.int32


def test_error_whose_elements_lie_far_apart() -> None:
    """What counts is how far its last number lies from its first, in either order in memory."""
    for rows, columns in ((2**20, 2**11), (2**11, 2**20)):
        error = meta(rows, columns)[:, :4] if rows > columns else meta(4, columns, rows)[0].t()[:, :4]
        near = error[: rows // 2, :2] if rows > columns else error[:, :2]
        for planned in (lambda e: layers_plan((2, 2), rows=e.shape[0], error=e), lambda e: taps_plan(0, [2], error=e)):
            assert index(planned(near)) == tl.int32
            assert index(planned(error)) == (tl.int64 if rows > columns else tl.int32)
    transposed = meta(2**7, 2**24).t()
    assert index(layers_plan((2, 2), rows=2**24, error=transposed)) == tl.int64
    assert index(taps_plan(0, [2], error=transposed)) == tl.int64
    assert index(layers_plan((2, 2), rows=2**24, error=transposed[:, :64])) == tl.int32
    assert index(taps_plan(0, [2], error=transposed[:, :64])) == tl.int32


def test_copy_of_the_error_is_wider_than_the_error() -> None:
    """Its rows are of 16 numbers at least."""
    for rows, expected in ((2**27, tl.int64), (2**27 - 1, tl.int32)):
        problem = layers_plan((1, 1), rows=rows, error_size=1, output_width=1).problem
        found = plan_two_phase(problem, TWO_PHASE[-1], H200)
        assert found.copy_width == 16
        assert index(found) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_tensor_memory_accelerator(dtype: torch.dtype) -> None:
    """Rows of a multiple of 16 bytes, on GPUs that have one."""
    half = dtype != torch.float32
    assert can_use_tma(dtype, 16, H200) == half
    assert can_use_tma(dtype, 8, Target(100, 100)) == half
    assert not can_use_tma(dtype, 16, Target(120, 100))
    assert not can_use_tma(dtype, 4, H200)
    assert not can_use_tma(dtype, 16, A100)
    # Large enough for the kernel that uses it.
    for width, aligned in ((1024, True), (1028, False)):
        found = layers_plan((width, width), rows=64, error_size=1000, output_width=width, dtype=dtype)
        assert found.name == "two_phase"
        assert found.uses_tma == (half and aligned)
        assert found.arguments["TMA"] == found.uses_tma


def test_tiles_that_need_the_accelerator() -> None:
    """The largest, which fill the GPU both times, are only for rows of a multiple of 16 bytes."""
    for width, aligned in ((8192, True), (8196, False)):
        found = layers_plan((width, width), rows=1024, error_size=1000, dtype=torch.bfloat16)
        assert isinstance(found.config, TwoPhaseConfig | GemmConfig)
        assert found.config.needs_tma == found.uses_tma == aligned


@pytest.mark.parametrize(
    "programs, warps, registers", [(1, 8, 255), (2, 4, 255), (2, 8, 128), (3, 4, 168), (4, 4, 128)]
)
def test_registers_that_the_programs_of_a_multiprocessor_share(programs: int, warps: int, registers: int) -> None:
    config = StripConfig(64, 64, 128, 256, warps, 2, programs)
    assert config.registers == registers
    assert registers * warps * 32 * programs <= 65536
    assert plan_strip(light_problem(torch.float32), config, H200).options["maxnreg"] == registers


@pytest.mark.parametrize(
    "dtype, precision, most",
    [(torch.bfloat16, "ieee", 512), (torch.float32, "tf32", 512), (torch.float32, "ieee", 384)],
)
def test_strips_are_for_batches_whose_delta_fits_beside_a_tile(dtype: torch.dtype, precision: str, most: int) -> None:
    """Rows of all positions count, each position's rounded up to whole parts."""
    with tf32(precision == "tf32"):
        for rows, positions in ((most, 1), (64, most // 64), (65, most // 128)):
            fits = layers_plan(rows=rows, positions=positions, dtype=dtype)
            assert fits.name == "strip"
            constants = fits.arguments
            assert constants["POSITIONS"] == positions
            assert constants["PARTS"] * constants["BLOCK_R"] >= rows
        for rows, positions in ((most + 1, 1), (65, most // 64)):
            larger = layers_plan(rows=rows, positions=positions, dtype=dtype)
            assert larger.name == "two_phase"
            assert f"{rows * positions} rows does not fit" in larger.why


@pytest.mark.parametrize(
    "rows, positions, width, inputs",
    [
        (128, 1, 20, 32), (64, 1, 21, 32), (96, 1, 21, 16), (128, 1, 21, 16), (32, 4, 20, 16), (64, 2, 20, 32),
        (16, 5, 20, 16), (16, 6, 20, None), (16, 8, 20, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("capability", [100, 103])
def test_products_of_a_strip_have_tensor_memory(
    rows: int, positions: int, width: int, inputs: int | None, capability: int
) -> None:
    """On sm_100 float32 in full takes six accumulators for each part of δ, a column for an input of the tile."""
    found = layers_plan((width, 32), rows=rows, positions=positions, target=Target(capability, 148))
    if inputs is None:
        assert found.name == "two_phase"
        assert f"δ of {rows * positions} rows does not fit beside a tile" in found.why
        return
    made, config = found.arguments, found.config
    assert isinstance(config, StripConfig)
    assert (found.name, config.block_n, made["BLOCK_N"]) == ("strip", inputs, inputs)
    assert 6 * inputs * made["PARTS"] * made["POSITIONS"] + config.block_r <= 512
    for other in (H200, Target(120, 148)):
        elsewhere = layers_plan((width, 32), rows=rows, positions=positions, target=other)
        assert elsewhere.arguments["BLOCK_N"] in {c.block_n for c in configs.configs_for(other[0], "ieee").strip}


def test_updates_with_dropout_have_registers_on_sm_100() -> None:
    """In float32 in full, in two parts: in one, a mask and an update beside δ of 128 rows went to the stack."""
    plain = replace(light_problem(torch.float32), dropout_mask=1)
    full = replace(plain, projected=replace(plain.projected, tf32=False))
    for rule, target, parts in (("adamw", Target(100, 148), 2), ("store", Target(100, 148), 1), ("adamw", H200, 1)):
        assert plan_grouped(replace(full, rule=rule), target).arguments["PARTS"] == parts


def test_what_is_worth_larger_tiles_goes_in_two_phases() -> None:
    small, large = layers_plan((3072, 800, 800), rows=128), layers_plan((784, 4096, 4096), rows=384)
    assert (small.name, large.name) == ("strip", "two_phase")
    assert "are worth larger tiles" in large.why


def test_delta_that_would_be_made_too_often_is_made_once() -> None:
    """For a large error; regenerated entries cost more than those in memory, and given projections nothing."""
    widths = (3072, 800, 800, 800)
    assert layers_plan(widths, rows=128, error_size=100).name == "strip"
    large = layers_plan(widths, rows=128, error_size=1000)
    assert large.name == "two_phase"
    assert "would make δ anew" in large.why
    given = layers_plan(widths, rows=128, error_size=LARGEST_FASTFOOD_ERROR + 1, kind="fastfood")
    assert (given.name, given.arguments["SOURCE"]) == ("strip", "projection")
    config, problem = configs.table()[90]["ieee"].strip[0], large.problem
    sources = [replace(problem.projected, source=source) for source in ("matrix", "gaussian")]
    stored, regenerated = (choice._repeated(replace(problem, projected=p), config, H200) for p in sources)
    assert stored < regenerated


def test_strips_fill_the_gpu_and_no_run_is_longer_than_it_has_to_be() -> None:
    """The paper's network: its 975 tiles for two programs on each of 132 multiprocessors, in runs of at most four."""
    with tf32(True):
        found = layers_plan((3072, 800, 800, 800), rows=128, error_size=10, output_width=800)
    assert isinstance(found.config, StripConfig)
    assert found.arguments["chunks"] == (12, 4, 4, 4)
    assert found.arguments["firsts"] == (0, 156, 208, 260)
    assert found.programs == 264 == H200.multiprocessors * found.config.programs


def light_problem(
    dtype: torch.dtype, widths: tuple[int, ...] = (3072, 800, 800, 800), **changes: Any
) -> GroupedProblem:
    """The paper's network in tf32 or half precision, U in memory."""
    problem = layers_plan(widths, rows=128, error_size=10, output_width=widths[-1], dtype=dtype).problem
    of_error = {name: changes.pop(name) for name in ("rows", "error_size", "source") if name in changes}
    how = replace(problem.projected, tf32=dtype == torch.float32, **({"source": "matrix"} | of_error))
    return replace(problem, projected=how, **({"parameter_dtype": dtype} | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rows": 127},
        {"rows": 256},
        {"rule": "sgd"},
        {"source": "gaussian"},
        {"source": "signs"},
        {"parameter_dtype": torch.float16},
        {"widths": (512,) * 10},
        {"error_size": 17},
        {"dropout_mask": 1},
        {"activations": ("tanh", "relu", "tanh")},
        {"activations": ("gelu",) * 3},
    ],
    ids=str,
)
def test_three_programs_share_a_multiprocessor_only_where_they_were_timed(
    changes: dict[str, Any], dtype: torch.dtype
) -> None:
    """Plain gradients in one whole part, δ from a few stored numbers a unit. What takes more registers has them all."""
    found = plan_grouped(light_problem(dtype, **changes), H200)
    three = not changes
    assert (found.config.programs, found.config.registers) == ((3, 168) if three else (2, 255))
    if three:
        assert (found.programs, found.arguments["chunks"]) == (343, (16, 5, 5, 5))
    assert plan_grouped(light_problem(dtype, **changes), A100).config.programs <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_are_read_a_tile_ahead_where_registers_are_left(dtype: torch.dtype) -> None:
    for rule in ("store", "sgd", "momentum", "adamw"):
        assert plan_grouped(light_problem(dtype, rule=rule), H200).arguments["PARAMETERS_AHEAD"] == (rule == "sgd")


@pytest.mark.parametrize(
    "change", [{}, {"rows": 96}, {"widths_in": (3070, 800, 800, 800)}, {"error_size": 17}], ids=str
)
def test_of_float32_in_full_only_what_was_timed_reads_parameters_ahead(change: dict[str, Any]) -> None:
    problem = light_problem(torch.float32, rule="sgd", **change)
    in_full = replace(problem, projected=replace(problem.projected, tf32=False))
    assert plan_grouped(in_full, H200).arguments["PARAMETERS_AHEAD"] == (not change)


@pytest.mark.parametrize(
    "change, warps, rows, stages",
    [
        ({"rule": "sgd"}, 4, 128, 3),
        ({"rule": "sgd", "rows": 17}, 4, 32, 3),
        ({"rows": 129}, 4, 128, 1),
        ({"rule": "sgd", "rows": 129}, 8, 64, 1),
        ({"positions": (2,)}, 8, 64, 1),
        ({"widths_in": (68,)}, 8, 32, 1),
        ({"error_size": 65}, 8, 64, 1),
    ],
    ids=str,
)
def test_strips_get_warps_for_what_takes_registers(change: dict[str, Any], warps: int, rows: int, stages: int) -> None:
    """Several parts and updates, rows that are no multiple of 16 bytes, errors in blocks."""
    problem = layers_plan((64, 64), rows=128, dtype=torch.bfloat16).problem
    of_error = {name: value for name, value in change.items() if name in ("rows", "error_size")}
    others = {name: value for name, value in change.items() if name not in of_error}
    problem = replace(problem, projected=replace(problem.projected, source="matrix", **of_error), **others)
    config = plan_strip(problem, configs.table()[90]["half"].strip[0], H200).config
    assert isinstance(config, StripConfig)
    assert (config.num_warps, config.block_r, config.num_stages) == (warps, rows, stages)
    assert config.num_warps * config.programs == 8


def wide_plan(width: int = 4096, rows: int = 1024, **changes: Any) -> LaunchPlan:
    """Half precision, an output layer, four hidden layers."""
    options = {"error_size": 10, "output_width": width, "dtype": torch.bfloat16} | changes
    return layers_plan((784, *(width,) * 4), rows=rows, **options)


@pytest.mark.parametrize(("width", "rows"), [(2048, 512), (4096, 1024), (8192, 4096)])
def test_wide_networks_take_two_launches_where_they_were_measured_to_be_shorter(width: int, rows: int) -> None:
    found = wide_plan(width, rows)
    assert found.first is not None
    assert (found.first.name, found.name) == ("deltas", "grouped_gemm")
    assert f"784-{width}x4" in found.why
    assert found.uses_tma


@pytest.mark.parametrize(
    "changes",
    [
        {"target": A100},
        {"target": Target(100, 148)},
        {"dtype": torch.float32},
        {"width": 4100},
        {"width": 1024, "rows": 600, "error_size": 100},
        {"positions": 2},
    ],
    ids=str,
)
def test_what_was_not_measured_is_one_launch_and_called_an_estimate(changes: dict[str, Any]) -> None:
    """Another card or precision, rows that the copy engine does not take, a small network, several positions."""
    found = wide_plan(**changes)
    assert (found.name, found.first) == ("two_phase", None)
    assert "an estimate" in found.why


def alike_plan(
    target: Target = A100, rule: str = "store", numbers_in_memory: bool = False, **changes: Any
) -> LaunchPlan:
    """The same with parameters in the precision of the products."""
    problem = wide_plan(**changes).problem
    parameters = problem.projected.dtype
    problem = replace(problem, parameter_dtype=parameters, rule=rule, numbers_in_memory=numbers_in_memory)
    return plan_grouped(problem, target)


@pytest.mark.parametrize("precision", ["half", "tf32"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"target": Target(100, 148)}, {"rule": "sgd"}, {"rule": "momentum"}, {"numbers_in_memory": True}],
    ids=str,
)
def test_what_was_not_measured_is_left_to_the_library_if_it_is_large(changes: dict[str, Any], precision: str) -> None:
    with tf32(precision == "tf32"):
        found = alike_plan(dtype=torch.bfloat16 if precision == "half" else torch.float32, **changes)
    assert (found.name, found.first) == ("deltas", None)
    assert "an estimate: nothing was measured on sm_" in found.why


@pytest.mark.parametrize("changes", [{"width": 4100}, {"positions": 2}], ids=str)
def test_so_is_what_measurements_of_the_card_do_not_hold_for(changes: dict[str, Any]) -> None:
    found = alike_plan(H200, **changes)
    assert found.name == "deltas"
    assert "an estimate: nothing of this size and alignment was measured" in found.why


def test_where_it_was_measured_the_shortest_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch within the margin; the library's products not for what they are no good for."""
    assert alike_plan(H200).name == "grouped_gemm"
    times = (
        (200.0, 99.0, 98.0, 100.0),
        (102.9, 110.0, 98.0, 100.0),
        (103.1, 110.0, 98.0, 100.0),
        (200.0, 101.0, 98.0, 100.0),
    )
    for way, expected in zip(times, ("grouped_gemm", "two_phase", "deltas", "deltas"), strict=True):
        monkeypatch.setattr(choice_wide, "MEASURED", {(90, "half"): (choice_wide.Measured("a", 10**10, *way),)})
        assert alike_plan(H200).name == expected
    assert "; the library's products, which took 100 µs on an H200 for a, one launch 200, two launches 101" in (
        alike_plan(H200).why
    )
    assert alike_plan(H200, "adamw").name == "grouped_gemm"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dtype": torch.float32}, "float32 in full took the library twice as long"),
        ({"rule": "adamw"}, "an update that no product can add to"),
        ({"rule": "sgd", "numbers_in_memory": True}, "an update that no product can add to"),
        ({"width": 2048}, "are little for a launch each layer"),
    ],
    ids=str,
)
def test_what_the_librarys_products_are_no_good_for(changes: dict[str, Any], why: str) -> None:
    found = alike_plan(**changes)
    assert found.name == "two_phase"
    assert why in found.why


def test_gradients_in_another_dtype_are_not_written_twice() -> None:
    assert "would be written twice" in wide_plan(target=A100).why


def test_the_call_tells_whether_numbers_are_in_memory() -> None:
    call = make_call(plain_network([plain_layer()])).arguments()
    for in_memory in (False, True):
        found = route_of(looks_of(call, torch.float32, "sgd", numbers_in_memory=in_memory), A100).plan
        assert found is not None
        assert found.problem.numbers_in_memory == in_memory


def test_delta_for_the_library_has_no_gaps() -> None:
    """Also where the copy engine would read it, whose rows are all as long as the widest layer's."""
    widths = (64, 128, 32)
    problem = layers_plan(widths, rows=40, output_width=32, error_size=10, dtype=torch.bfloat16).problem
    found = plan_products(problem, PROJECTIONS[0], H200)
    assert found.arguments["delta_strides"] == widths[1:]
    assert (found.delta_row, found.uses_tma) == (128 + 32, False)
    assert plan_grouped_gemm(problem, GROUPED_GEMM[0], PROJECTIONS[0], H200).delta_row == 2 * 128


def test_the_librarys_products_in_words() -> None:
    said = describe._describe(alike_plan())
    assert said.startswith("one launch of deltas with ")
    assert "; bfloat16; U regenerated from its seed), then the library's products for each of 5 layers: " in said
    assert said.endswith(
        "; by the library, an estimate: nothing was measured on sm_80 in this precision, and it has tiles "
        "for every card"
    )


def test_two_launches_in_words() -> None:
    said = describe._describe(wide_plan())
    assert said.startswith("two launches (bfloat16; U regenerated from its seed), deltas with ")
    assert ", then grouped_gemm with 132 programs of 8 warps, through TMA (tiles m 128 × n 256 × k 64): " in said
    assert said.endswith(
        "two launches, which took 200 µs on an H200 for 784-4096x4-10 b=1024, one launch 277, the library's products "
        "240; no warp of its own loads the tiles, with which they took 205 µs"
    )


def test_a_warp_that_loads_is_taken_where_it_was_faster_and_gluon_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = wide_plan(8192, 4096)
    assert plain.why.endswith("; no warp of its own loads the tiles: Triton's interpreter does not know Gluon")
    monkeypatch.setattr(producer, "NO_GLUON", "")
    assert wide_plan().name == "grouped_gemm"
    found = plan_grouped(plain.problem, H200)
    assert (found.name, found.config, found.programs) == ("grouped_gemm_producer", producer.CONFIG, 132)
    assert found.why.endswith("; a warp of its own loads the tiles, with which they took 2382 µs")
    assert found.options["maxnreg"] is None
    assert found.arguments["STAGES"] == 4
    assert {name: found.arguments[name] for name in ("total", "parts", "GROUP_M")} == {
        name: plain.arguments[name] for name in ("total", "parts", "GROUP_M")
    }


def test_descriptors_for_a_warp_that_loads() -> None:
    """In Gluon's layout: δ of both kinds, then every input; and as many arguments as the kernel has."""
    problem = wide_plan(rows=6, width=48).problem
    plan = plan_grouped_gemm(problem, producer.CONFIG, choose_configs(problem, H200)[1], H200)
    error, saved = torch.ones(6, 10), (torch.ones(6, 48, dtype=torch.bfloat16),) * 4
    inputs = (torch.ones(6, 784, dtype=torch.bfloat16), *saved)
    _, tensors = tensors_of_both(plan, error, (error,), inputs, saved, saved)
    hidden, output, _, *views, sums = tensors
    assert {view.layout for view in (*views, hidden, output)} == {shared_layout(2), shared_layout(3)}
    assert (hidden.shape, hidden.strides, hidden.block_shape) == ([4, 6, 48], [288, 48, 1], [1, 64, 128])
    assert (output.shape, output.strides, output.block_shape) == ([1, 6, 16], [96, 16, 1], [1, 64, 128])
    assert [view.shape for view in views[:6]] == [[6, 784], *[[6, 48]] * 4, [6, 784]]
    assert {tuple(view.block_shape) for view in views} == {(64, 256)}
    assert sums.dtype == torch.float32
    # Six tuples of destinations and state, and the rule's numbers.
    given = len(tensors) + 6 + len(plan.numbers) + 1 + len(plan.constants)
    assert given == len(plan.kernel.arg_names)


@pytest.mark.parametrize(
    ("version", "interpreted", "installed", "expected"),
    [
        ("3.6.0", False, True, ""),
        ("3.7.1+git0", False, True, ""),
        ("3.9.0", False, True, ""),
        ("3.10.0", False, True, "Gluon is known of Triton 3.6, 3.7, 3.9, this is 3.10.0"),
        ("3.6.0", False, False, "Gluon is known of Triton 3.6, 3.7, 3.9, this is 3.6.0"),
        ("3.6.0", True, True, "Triton's interpreter does not know Gluon"),
    ],
)
def test_versions_whose_gluon_is_known(version: str, interpreted: bool, installed: bool, expected: str) -> None:
    assert producer.reason_without_gluon(version, interpreted, installed) == expected


def test_why_no_warp_of_its_own_loads() -> None:
    plain = wide_plan()
    assert producer.reason_without(plain, H200, "") == ""
    assert producer.reason_without(plain, H200, "no Gluon") == "no Gluon"
    assert producer.reason_without(plain, Target(100, 148), "") == "it is for sm_90 and TMA"
    assert producer.reason_without(replace(plain, uses_tma=False), H200, "") == "it is for sm_90 and TMA"
    deep = [layers_plan((784, *(2048,) * n), rows=512, dtype=torch.bfloat16) for n in (8, 9)]
    deep = [replace(plain, problem=plan.problem) for plan in deep]
    assert [producer.reason_without(plan, H200, "") for plan in deep] == ["", "it is for up to 8 layers"]
    most = gradient_tiles(plain.problem, producer.CONFIG)
    assert producer.reason_without(plain, Target(90, most), "") == ""
    assert producer.reason_without(plain, Target(90, most + 1), "") == "tiles of 128 × 256 do not fill the GPU"


def test_a_measurement_within_the_margin_leaves_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for one, expected in ((102.9, "two_phase"), (103.1, "grouped_gemm")):
        rows = {(90, "half"): (choice_wide.Measured("a", 10**10, one, 100.0, 100.0, 101.0),)}
        monkeypatch.setattr(choice_wide, "MEASURED", rows)
        assert plan_grouped(wide_plan().problem, H200).name == expected


def test_multiply_adds_of_the_wanted_gradients() -> None:
    problem = layers_plan((20, 30, 40), rows=7, positions=2, output_width=5, error_size=3).problem
    assert choice_wide.multiply_adds(problem) == 7 * (2 * (20 * 30 + 30 * 40) + 5 * 3)
    assert choice_wide.multiply_adds(replace(problem, weights=0b010)) == 7 * 2 * 30 * 40


@pytest.mark.parametrize(("width", "rows"), [(4096, 1024), (8192, 4096), (2048, 512)])
def test_programs_of_deltas_run_all_at_once(width: int, rows: int) -> None:
    """And parts of a tile less would be too many; each part of the batch has rows, and all together have all."""
    first = wide_plan(width, rows).first
    assert first is not None
    most = H200.multiprocessors * first.config.programs
    columns, parts, part_rows = (first.arguments[name] for name in ("columns", "parts", "part_rows"))
    tile = first.arguments["BLOCK_R"]
    assert first.programs == columns * parts <= most < columns * -(-rows // (part_rows - tile))
    assert (parts - 1) * part_rows < rows <= parts * part_rows
    assert part_rows % tile == 0


@pytest.mark.parametrize("hidden", [1, 4, 5, 9, 31])
def test_every_layer_is_in_one_group_of_deltas(hidden: int) -> None:
    problem = layers_plan((64,) * (hidden + 1), rows=64, dtype=torch.bfloat16).problem
    first = plan_grouped_gemm(problem, *choose_configs(problem, H200), H200).first
    assert first is not None
    groups, layers = first.arguments["GROUPS"], first.arguments["LAYERS"]
    assert (groups - 1) * layers < hidden <= groups * layers
    assert layers <= 4


def test_nothing_is_written_that_nobody_reads() -> None:
    """Without hidden layers, and an output layer whose δ is the error itself, there is no first launch."""
    problem = layers_plan((), output_width=64, error_size=16, dtype=torch.bfloat16).problem
    for biases, launched in ((0, False), (1, True)):
        wanted = replace(problem, biases=biases)
        assert (plan_grouped_gemm(wanted, *choose_configs(wanted, H200), H200).first is not None) == launched


def test_a_projection_in_memory_needs_no_room_beside_a_tile() -> None:
    found = layers_plan(error_size=LARGEST_FASTFOOD_ERROR + 1, kind="fastfood")
    assert found.name == "strip"
    assert found.arguments["SOURCE"] == "projection"


@pytest.mark.parametrize(
    "error_size, block", [(10, 16), (1000, 1024), (LARGEST_FASTFOOD_ERROR, LARGEST_FASTFOOD_ERROR)]
)
def test_tiles_of_fastfood_are_whole_blocks(error_size: int, block: int) -> None:
    """And no larger than 64 numbers a thread."""
    grouped = layers_plan((64, 64), rows=4096, error_size=error_size, kind="fastfood").problem
    taps = taps_plan(128, [3000], error_size, kind="fastfood").problem
    for config in TWO_PHASE:
        check_blocks(plan_two_phase(grouped, config, H200), block)
    for tiles in PROJECTIONS:
        check_blocks(plan_taps.plan_projection(taps, tiles), block)


def check_blocks(made: LaunchPlan, block: int) -> None:
    constants = made.arguments
    assert constants["SOURCE"] == "fastfood_seed"
    assert 2 ** constants["BITS"] == block
    assert constants["BLOCK_U"] % block == 0
    assert constants["BLOCK_U"] * constants["BLOCK_R"] <= 64 * 32 * made.config.num_warps


def test_fastfood_is_held_like_any_other_feedback() -> None:
    """By tiles that are as high as its blocks; several positions begin elsewhere than its blocks do."""
    assert layers_plan(error_size=50, kind="fastfood").name == "strip"
    small = plan_strip(layers_plan(error_size=50, kind="fastfood").problem, STRIPS[0], H200)
    assert STRIPS[0].block_m < small.arguments["BLOCK_M"] == 64
    larger = layers_plan(error_size=65, kind="fastfood")
    assert larger.name == "two_phase"
    assert "larger than a tile" in larger.why
    several = layers_plan(error_size=50, kind="fastfood", positions=2)
    assert several.name == "two_phase"
    assert "with several positions" in several.why


@pytest.mark.parametrize("rows, most", [(1, 16), (30, 32), (100, 128), (10**5, 256)])
def test_a_regenerated_tile_serves_as_many_rows_as_there_are_registers(rows: int, most: int) -> None:
    taps = taps_plan(rows, [3000], 100, kind="gaussian").problem
    config = ProjectionConfig(64, 64, 32, 8, 2)
    made = plan_taps.plan_projection(taps, config)
    assert made.arguments["BLOCK_R"] == most


def test_output_layer_alone() -> None:
    found = layers_plan((), output_width=20)
    assert found.name == "strip"
    assert "the output layer alone" in found.why


@pytest.mark.parametrize("error_size", [10, 100])
def test_more_multiprocessors_get_smaller_tiles(error_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from_large_to_small = configs.Configs(
        *(tuple(reversed(rows)) for rows in (STRIPS, TWO_PHASE, PROJECTIONS, PROJECTIONS, GROUPED_GEMM))
    )
    monkeypatch.setattr(configs, "table", lambda: {80: dict.fromkeys(configs.ARITHMETICS, from_large_to_small)})
    problem = layers_plan((1024, 512, 512), error_size=error_size).problem
    made = [plan_grouped(problem, Target(90, n)) for n in (1, 100, 10**6)]
    areas = [m.config.block_m * m.config.block_n for m in made]
    assert areas == [128 * 128, 64 * 64, 16 * 16]
    taps = taps_plan(32, [1000], kind="gaussian").problem
    sizes = [plan_taps.plan_taps.__wrapped__(taps, Target(90, n)).config.block_u for n in (1, 12, 10**6)]
    assert sizes == [128, 64, 16]
    picked = taps_plan(128, [1000], kind="sparse").problem
    sizes = [plan_taps.plan_taps.__wrapped__(picked, Target(90, n)).config.block_u for n in (1, 50, 10**6)]
    assert sizes == [64, 64, 16]


def test_two_phases_start_no_more_programs_than_there_are_tiles() -> None:
    found = layers_plan((16, 16), rows=16, error_size=100, kind="fastfood")
    assert found.programs == found.arguments["total"] < H200.multiprocessors
    large = layers_plan((4096, 4096), rows=1024, error_size=100)
    assert large.programs == H200.multiprocessors * large.config.programs < large.arguments["total"]


def spans(length: int, block: int) -> range:
    return range(0, length, block)


def tiles_one_by_one(problem: GroupedProblem, config: Any) -> int:
    tiles = 0
    layers = enumerate(zip(problem.widths_in, problem.widths_out, strict=True))
    for i, (width, out) in layers:
        for _ in spans(out, config.block_m):
            if problem.weights >> i & 1:
                tiles += len(list(spans(width, config.block_n)))
            elif problem.biases >> i & 1:
                tiles += 1
    return tiles


def check_strips(problem: GroupedProblem, made: LaunchPlan) -> None:
    """Every tile of every wanted gradient is in one program's run, and every wanted bias in one first run."""
    config, numbers = made.config, made.arguments
    assert isinstance(config, StripConfig)
    programs = 0
    for i, (width, out) in enumerate(zip(problem.widths_in, problem.widths_out, strict=True)):
        tiles = len(spans(width, config.block_n)) * (problem.weights >> i & 1)
        count, first = numbers["chunks"][i], numbers["firsts"][i]
        assert first == programs
        assert count <= max(tiles, 1)
        assert count >= 1 or not (problem.weights | problem.biases) >> i & 1
        programs += count * len(spans(out, config.block_m))
    assert made.programs == programs


@settings(**FRESH, max_examples=60)
@given(random=randoms)
def test_tiles_are_counted_right(random: Random) -> None:
    kernel = random.choice(["strip", "two_phase"])
    network = some_network(random, kernel)
    note(str(network))
    call = make_call(network).arguments()
    found = route_of(looks_of(call, torch.float32, "store"), H200).plan
    assert found is not None
    config: Any
    for config in STRIPS:
        check_strips(found.problem, plan_strip(found.problem, config, H200))
    for config in TWO_PHASE:
        made = plan_two_phase(found.problem, config, H200)
        two: Any = made.config
        copies, projections, total = (made.arguments[name] for name in ("copies", "projections", "total"))
        rows = len(spans(network["rows"], two.block_r))
        units = len(spans(found.problem.widest, two.block_u))
        copied = len(spans(made.copy_width, two.block_u))
        assert (copies, projections) == (copied * rows, units * rows)
        assert total - copies - projections == tiles_one_by_one(found.problem, two)
        assert made.counters == 1 + units + copied
        assert (made.copy_width > 0) == made.arguments["COPY"]


def test_tiles_of_taps_are_counted_right() -> None:
    problem = taps_plan(70, [33, 200, 1]).problem
    for config in PROJECTIONS:
        expected = len(spans(200, config.block_u)) * len(spans(70, config.block_r))
        assert plan_taps._projection_tiles(problem, config) == expected


def test_a_problem_seen_before_has_its_plan() -> None:
    """Of other values, the same object; also for a fresh spec of the same feedback."""
    assert layers_plan() is layers_plan()
    assert taps_plan(8, [3, 5]) is taps_plan(8, [3, 5])
    first = make_call(plain_network([plain_layer()], seed=1))
    second = make_call(plain_network([plain_layer()], seed=2))
    with watched() as seen:
        for call in (first, second):
            triton_backend.layer_grads(call.arguments(), torch.float32)
    assert seen.plans[0] is seen.plans[1]


CHANGES: dict[str, dict[str, Any]] = {
    "rows": {"rows": 9},
    "error": {"error_size": 5},
    "feedback": {"kind": "uniform"},
    "layers": {"widths": (20, 31)},
    "positions": {"positions": 2},
    "precision": {"dtype": torch.float16},
    "output layer": {"output_width": 7},
    "error's strides": {"error": torch.empty(8, 5, device="meta")[:, :4]},
    "error's dtype": {"error": torch.empty(8, 4, dtype=torch.float16, device="meta")},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_problem_has_another_plan(change: dict[str, Any]) -> None:
    changed = layers_plan(**change)
    before = layers_plan()
    assert changed is not before
    assert (changed.arguments, changed.config) != (before.arguments, before.config)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("kernel", ["strip", "two_phase"])
def test_precision_of_float32_products_is_torchs(kernel: str, precision: str) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = precision
        with forced(kernel):
            made = layers_plan()
        taps = taps_plan(8, [3, 5])
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    constants = made.arguments
    assert (constants["PRECISION"], constants["DELTA_PRECISION"]) == (precision, precision)
    assert taps.arguments["DELTA_PRECISION"] == precision


def test_what_a_sparse_matrix_picks_of_the_error_is_not_rounded() -> None:
    """It is exact wherever it is a sum, and so it is where it is a product."""
    with tf32(True):
        found = layers_plan(kind="sparse")
    assert (found.name, found.arguments["DELTA_PRECISION"]) == ("strip", "tf32x3")


def test_sums_over_tiles_of_rows_need_wide_offsets_by_themselves() -> None:
    """With tiles of a row they are as many numbers as all layers' δ together."""
    for rows, expected in ((2**17 - 1, tl.int32), (2**17, tl.int64)):
        problem = layers_plan((4096,) * 5, rows=rows, error_size=4096, kind="fastfood").problem
        found = plan_two_phase(problem, TWO_PHASE[-1], H200)
        assert found.config.block_r == 1
        assert found.sums == 4 * 4096 * rows
        assert index(found) == expected


def test_offsets_of_both_launches_are_as_wide_as_either_needs() -> None:
    """Of the sums over tiles of a row; and of the δ of narrow layers that lies in rows as long as the widest one's."""
    for rows, expected in ((2**17 - 1, tl.int32), (2**17, tl.int64)):
        widths = {"widths": (4096,) * 4, "output_width": 4096, "error_size": 4096}
        problem = layers_plan(rows=rows, kind="fastfood", **widths).problem
        found = plan_grouped_gemm(problem, GROUPED_GEMM[-1], PROJECTIONS[-1], H200)
        assert found.first is not None
        assert found.first.arguments["parts"] == rows
        assert found.sums == 4 * 4096 * rows
        assert [index(found.first), index(found)] == [expected] * 2
    for rows, expected in ((2**16 - 1, tl.int32), (2**16, tl.int64)):
        problem = layers_plan((16, 8192, 16, 16, 16), rows=rows, dtype=torch.float16).problem
        found = plan_grouped_gemm(problem, GROUPED_GEMM[-1], PROJECTIONS[-1], H200)
        assert found.uses_tma
        assert found.first is not None
        assert [index(found.first), index(found)] == [expected] * 2


@pytest.mark.parametrize(
    "error, feedback, kind, dot, precision, is_rounded",
    [
        (torch.float16, torch.float32, "gaussian", tl.float32, "tf32x3", False),
        (torch.float16, torch.float16, "gaussian", tl.float16, "tf32", False),
        (torch.bfloat16, torch.float32, "gaussian", tl.float32, "tf32", True),
        (torch.bfloat16, torch.float16, "gaussian", tl.float32, "tf32", True),
        (torch.bfloat16, torch.float32, "rademacher", tl.bfloat16, "tf32", False),
        (torch.float32, torch.float32, "gaussian", tl.float32, SPLIT, False),
        (torch.float32, torch.float16, "gaussian", tl.float32, SPLIT, False),
    ],
    ids=str,
)
def test_entries_are_as_exact_as_what_delta_is_rounded_to(
    error: torch.dtype, feedback: torch.dtype, kind: str, dot: Any, precision: str, is_rounded: bool
) -> None:
    """Tensor cores would truncate them to tf32: bfloat16 has fewer bits, float16 as many."""
    projected = layers_plan(error=meta(8, 4, dtype=error)).problem.projected
    spec = dfa.Feedback(kind, "procedural", dtype=feedback).spec
    constants = replace(projected, feedback=spec, source=kind).constants()
    assert (constants["DOT"], constants["DELTA_PRECISION"], constants["ROUND"]) == (dot, precision, is_rounded)


def test_every_number_of_a_kernel_is_an_int32() -> None:
    """Whatever the seed: a launch is compiled for the types of its numbers."""
    for seed in (0, 2**31, 2**32 - 1, 2**63, 2**64 - 1):
        problem = layers_plan().problem
        projected = replace(problem.projected, feedback=dfa.Feedback(seed=seed).spec)
        made = plan_grouped(replace(problem, projected=projected), H200)
        assert all(-LIMIT <= n < LIMIT for n in made.numbers if isinstance(n, int))
        low, high = made.arguments["key0"], made.arguments["key1"]
        assert (low & 0xFFFFFFFF) + ((high & 0xFFFFFFFF) << 32) == seed


@pytest.mark.parametrize(
    "widths, expected", [([16, 64], 16), ([24], 8), ([4, 16], 4), ([6, 10], 2), ([7, 16], 1), ([0, 32], 16), ([], 16)]
)
def test_alignment(widths: list[int], expected: int) -> None:
    assert alignment(widths[:1], widths[1:]) == expected


def test_derivatives_are_known_by_their_source() -> None:
    """Two activations' kernels must not be mistaken for each other in Triton's cache on disk."""
    functions = [derivatives_of([name])[0] for name in ("tanh", "relu")]
    assert derivatives_of(["relu", "tanh", "relu"])[1] == (0, 1, 0)
    assert [list(derivatives) for derivatives in functions] != [[], []]
    assert functions[0] != functions[1]
    assert functions[0].cache_key != functions[1].cache_key


class TestConfigs:
    @pytest.mark.parametrize("arithmetic", configs.ARITHMETICS)
    def test_of_a_gpu_are_those_of_the_newest_known_that_is_not_newer(self, arithmetic: str) -> None:
        known = configs.table()
        assert {80, 86, 89, 90, 100, 120} <= set(known)
        for capability, expected in ((75, 80), (80, 80), (87, 86), (90, 90), (103, 100), (121, 120), (200, 120)):
            assert configs.configs_for(capability, arithmetic) is known[expected][arithmetic]

    def test_lists_go_from_large_tiles_to_small(self) -> None:
        for by_arithmetic in configs.table().values():
            assert set(by_arithmetic) == set(configs.ARITHMETICS)
            for table in by_arithmetic.values():
                grouped = [[c.block_m * c.block_n for c in rows] for rows in (table.strip, table.two_phase)]
                for areas in (*grouped, [c.block_u * c.block_r for c in table.project_taps]):
                    assert areas
                    assert areas == sorted(areas, reverse=True)

    @pytest.mark.parametrize("tiles, expected", [([8], 0), ([3, 8, 9], 1), ([3, 5, 7], 2), ([8, 100], 0), ([9, 1], 0)])
    def test_first_that_fills(self, tiles: list[int], expected: int) -> None:
        assert configs.first_that_fills(tiles, 8) == expected
