"""`layer_grads` as Triton kernels, against the formulas; without a GPU they are interpreted."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from oracle import assert_close_to_oracle
from test_triton_philox import to_tf32
from torch import Tensor
from triton_cases import (
    CASES,
    DEVICE,
    FEEDBACKS,
    FRESH,
    LAYOUTS,
    Call,
    forced,
    in_64_bits,
    launched,
    make_call,
    plain_layer,
    plain_network,
    randoms,
    some_network,
    watched,
)

import dfa_kernels as dfa
from bench.gpu.precision import tf32
from dfa_kernels.activations import ACTIVATIONS
from dfa_kernels.backends import torch_backend
from dfa_kernels.backends import triton as triton_backend
from dfa_kernels.backends.triton import choice, choice_wide, launch, operators, route
from dfa_kernels.feedback.spec import KINDS

KERNELS = ["strip", "two_phase", "grouped_gemm", "products"]
both_kernels = pytest.mark.parametrize("kernel", KERNELS)


def run(call: Call, kernel: str, start: int = 0, multiprocessors: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    """The gradients, made by this kernel alone."""
    with forced(kernel, start, multiprocessors), watched() as seen:
        found = triton_backend.layer_grads(call.arguments(), dtype)
    assert launched(seen, kernel)
    return found


def check(call: Call, found: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    """As near to the formulas in float64 as the torch backend."""
    same = torch_backend.layer_grads(call.arguments(), dtype)
    for (name, ref, scale), out, torchs in zip(call.wanted_gradients(), found, same, strict=True):
        assert out.dtype == dtype
        assert_close_to_oracle(out.cpu(), ref, torchs.cpu(), scale, name)


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width", [160, 164])
@pytest.mark.parametrize("dense", [True, False])
def test_tiles_of_x_that_wait_in_registers(width: int, dense: bool) -> None:
    """Several to a program, the last one whole or not; only where δ takes few registers."""
    feedback = {"place": ("gaussian", "dense" if dense else "procedural"), "seed": 7, "normalize": True, "gain": 1.0}
    layers = [plain_layer(width_in=width, width_out=48), plain_layer(width_in=48, width_out=width)]
    network = plain_network(layers, output_width=width, rows=16, error_size=10, feedback={**feedback, "nonzeros": None})
    call = make_call(network)
    with forced("strip", multiprocessors=1), watched() as seen:
        found = triton_backend.layer_grads(call.arguments(), torch.float32)
    (plan,) = seen.plans
    assert plan.arguments["INPUTS_AHEAD"] == dense
    assert (
        max(-(-w // plan.config.block_n) // n for w, n in zip((width, 48), plan.arguments["chunks"], strict=False)) > 1
    )
    check(call, found)


@both_kernels
@settings(**FRESH, max_examples=32)
@given(random=randoms)
def test_any_network(kernel: str, random: Random) -> None:
    network = some_network(random, kernel)
    note(str(network))
    call = make_call(network)
    check(call, run(call, kernel, network["config"]))


@both_kernels
@pytest.mark.parametrize("first", range(0, len(CASES), 6))
def test_every_activation(kernel: str, first: int) -> None:
    layers = [plain_layer(case, mask=i % 3 == 0) for i, case in enumerate(CASES[first : first + 6])]
    call = make_call(plain_network(layers))
    check(call, run(call, kernel, 1))


def test_cases_are_all_activations() -> None:
    assert {case[0] for case in CASES} == set(ACTIVATIONS)
    assert {kind for kind, _ in FEEDBACKS} == {*KINDS, "matrix"}


@both_kernels
@pytest.mark.parametrize("place", FEEDBACKS, ids="-".join)
def test_every_feedback(kernel: str, place: tuple[str, str]) -> None:
    """Errors so wide that packed signs take several words and, where the kernel takes them, several Philox calls."""
    # With several positions the plan leaves Fastfood to the other kernel, and with blocks larger than a tile.
    small = kernel == "strip" and place[0] == "fastfood"
    layers = [plain_layer(width_out=35), plain_layer(positions=1 if small else 2), plain_layer(width_out=17)]
    network = plain_network(layers, error_size=61 if small else 130)
    network["feedback"].update(place=place, gain=-0.5)
    call = make_call(network)
    check(call, run(call, kernel, 1))


@both_kernels
@pytest.mark.parametrize("place", [("gaussian", "dense"), ("sparse", "dense"), ("fastfood", "dense")], ids="-".join)
def test_feedback_without_the_scale_of_each_layer(kernel: str, place: tuple[str, str]) -> None:
    network = plain_network([plain_layer(width_out=35), plain_layer(width_out=17)])
    network["feedback"].update(place=place, normalize=False, gain=3.0)
    call = make_call(network)
    check(call, run(call, kernel, 1))


@both_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", [("gaussian", "dense"), ("fastfood", "procedural")], ids="-".join)
def test_every_layout(kernel: str, layout: str, place: tuple[str, str]) -> None:
    network = plain_network([plain_layer(layout=layout, mask=True), plain_layer()], error_layout=layout)
    network["feedback"]["place"] = place
    call = make_call(network)
    check(call, run(call, kernel))


@both_kernels
@pytest.mark.parametrize("layout", ["one row", "one number"])
def test_error_of_a_broadcast_gradient(kernel: str, layout: str) -> None:
    """The gradient of a sum has strides of zero."""
    call = make_call(plain_network([plain_layer(), plain_layer()], error_layout=layout))
    check(call, run(call, kernel))


@both_kernels
def test_every_choice_of_gradients(kernel: str) -> None:
    """A tile of the inputs is only for the weights; the bias is summed once, however many there are."""
    wide = [plain_layer(width_in=70, width_out=40) for _ in range(4)]
    network = plain_network(wide, wanted=([True, True, False, False, True], [True, False, True, False, False]))
    call = make_call(network)
    check(call, run(call, kernel, 1))


@both_kernels
def test_no_gradient_wanted(kernel: str) -> None:
    call = make_call(plain_network([plain_layer()], wanted=([False] * 2, [False] * 2)))
    with forced(kernel), watched() as seen:
        assert triton_backend.layer_grads(call.arguments(), torch.float32) == []
    assert seen.kernels == []


@both_kernels
def test_an_output_layer_alone(kernel: str) -> None:
    call = make_call(plain_network([], error_size=17))
    check(call, run(call, kernel))


@both_kernels
@pytest.mark.parametrize("place", FEEDBACKS, ids="-".join)
def test_empty_batch(kernel: str, place: tuple[str, str]) -> None:
    network = plain_network([plain_layer(mask=True), plain_layer()], rows=0)
    network["feedback"]["place"] = place
    for gradient in run(make_call(network), kernel):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@both_kernels
@settings(**FRESH, max_examples=4)
@given(random=randoms)
def test_the_same_bits_again(kernel: str, random: Random) -> None:
    """Also with other numbers of programs, which share the tiles in other ways."""
    network = some_network(random, kernel, most_hidden=3)
    note(str(network))
    call = make_call(network)
    first = run(call, kernel, network["config"])
    for multiprocessors in (4, 1, 7):
        assert_same(run(call, kernel, network["config"], multiprocessors), first)


@both_kernels
def test_gradients_in_the_parameters_dtype(kernel: str) -> None:
    """Rounded once, from sums in float32. Not in bfloat16, which the interpreter truncates to."""
    call = make_call(plain_network([plain_layer(), plain_layer(positions=2)]))
    assert_same(run(call, kernel, 1, dtype=torch.float16), [g.half() for g in run(call, kernel, 1)])


@both_kernels
@pytest.mark.parametrize("error_size", [16, 19])
@pytest.mark.parametrize("error_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("place", [("gaussian", "dense"), ("rademacher", "procedural")], ids="-".join)
def test_activations_in_half_precision(
    kernel: str, error_size: int, error_dtype: torch.dtype, place: tuple[str, str]
) -> None:
    network = plain_network([plain_layer(("gelu", 0.0, 0.0), mask=True), plain_layer()], error_size=error_size)
    network["feedback"]["place"] = place
    call = make_call(network, torch.float16)
    call.error = call.error.to(error_dtype)
    check(call, run(call, kernel, 1))


@both_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "sparse"])
def test_feedback_in_another_precision(kernel: str, dtype: torch.dtype, kind: str) -> None:
    """Entries are rounded to it, in memory and when made anew."""
    call = make_call(plain_network([plain_layer(), plain_layer(width_out=17)]))
    for storage in ("dense", "procedural"):
        call.feedback = dfa.Feedback(kind, storage, seed=2**40 + 3, dtype=dtype)
        check(call, run(call, kernel, 1))


ALIGNED = [plain_layer(width_in=32, width_out=48, mask=True), plain_layer(width_in=64, width_out=16)]
# The output layer's δ is the error itself, a copy of it, not there; the inputs lie where descriptors cannot begin.
BY_DESCRIPTORS: dict[str, dict[str, Any]] = {
    "error": {"error_size": 16},
    "copy": {"error_size": 19},
    "wide error": {"error_size": 72},
    "no output layer": {"output_width": None, "wanted": ([True] * 2, [True] * 2)},
    "offset": {"layers": [dict(layer, layout="offset") for layer in ALIGNED]},
    "only biases": {"wanted": ([False] * 3, [True] * 3)},
    "alike": {"layers": ALIGNED[1:] * 4, "wanted": ([True] * 5, [True] * 3 + [False, True])},
    "sixteen layers": {"layers": ALIGNED[1:] * 15, "wanted": ([True] * 16, [True] * 16)},
}


@pytest.mark.skipif(not launch.INTERPRETED, reason="a GPU has descriptors or it has not")
@pytest.mark.parametrize("config", [1, 2])
@pytest.mark.parametrize("changes", BY_DESCRIPTORS.values(), ids=BY_DESCRIPTORS)
def test_tiles_through_descriptors(changes: dict[str, Any], config: int) -> None:
    """Hidden layers of different widths share a descriptor, whose rows are NaN behind the narrower one's δ."""
    call = make_call(plain_network(**{"layers": ALIGNED, "output_width": 24, "rows": 40, **changes}), torch.float16)
    with forced("grouped_gemm", config, capability=90), watched() as seen:
        found = triton_backend.layer_grads(call.arguments(), torch.float32)
    assert launched(seen, "grouped_gemm")
    assert seen.plans[-1].uses_tma
    check(call, found)


class Recorded(dict[Any, Any]):
    """In a compiled kernel's place: keeps what it is called with."""

    def __missing__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.setdefault(grid, arguments)


def test_delta_of_all_layers_is_of_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the error is of another, and there is no output layer that it would be copied for."""
    started: list[tuple[Any, ...]] = []
    monkeypatch.setattr(operators, "launch", lambda *arguments: started.append(arguments))
    call = make_call(plain_network(ALIGNED, output_width=None, wanted=([True] * 2, [True] * 2)), torch.float16)
    call.error = call.error.float()
    with forced("grouped_gemm"):
        triton_backend.layer_grads(call.arguments(), torch.float32)
    assert [tensor.dtype for tensor in started[-1][2][:2]] == [torch.float16] * 2


@pytest.mark.skipif(not launch.INTERPRETED, reason="a GPU has descriptors or it has not")
def test_a_compiled_kernel_takes_descriptors_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """And plain addresses beside them, an argument for each of the kernel's."""
    started: list[tuple[Any, ...]] = []
    monkeypatch.setattr(operators, "launch", lambda *arguments: started.append(arguments))
    call = make_call(plain_network(ALIGNED, output_width=24, rows=40), torch.float16)
    with forced("grouped_gemm", capability=90):
        triton_backend.layer_grads(call.arguments(), torch.float32)
    (plan, _, tensors, hyper), compiled = started[-1], Recorded()
    monkeypatch.setitem(plan.compiled, 0, compiled[plan.programs, 1, 1])
    launch._launch(plan, 0, tensors, hyper)
    given = dict(zip(plan.kernel.arg_names, compiled[plan.programs, 1, 1], strict=True))
    assert [given["delta"], given["x0"], given["x15"]] == [tensors[0], tensors[3], tensors[18]]
    assert given["delta"].block_shape == [1, plan.config.block_k, plan.config.block_m]
    assert given["weights"] == tuple(weight.data_ptr() for weight in tensors[20])
    assert given["sums"] == tensors[19].data_ptr()
    assert (given["total"], given["BLOCK_M"]) == (plan.arguments["total"], plan.config.block_m)


@pytest.mark.parametrize(
    "changes", [{"rows": 0}, {"layers": [plain_layer(positions=2, width_in=32, width_out=48)]}, {"layers": []}], ids=str
)
def test_what_descriptors_cannot_describe(changes: dict[str, Any]) -> None:
    """No rows, layers of several positions, no hidden layer."""
    every = [True] * (len(changes.get("layers", ALIGNED)) + 1)
    network = plain_network(**{"layers": ALIGNED, **changes}, output_width=24, wanted=(every, every), error_size=16)
    call = make_call(network, torch.float16)
    with forced("grouped_gemm", 1, capability=90), watched() as seen:
        found = triton_backend.layer_grads(call.arguments(), torch.float32)
    assert not seen.plans[-1].uses_tma
    check(call, found)


def test_float64_is_left_to_the_torch_backend() -> None:
    call = make_call(plain_network([plain_layer(), plain_layer()]), torch.float64)
    with watched() as seen:
        found = triton_backend.layer_grads(call.arguments(), torch.float64)
    assert seen.kernels == []
    assert_same(found, torch_backend.layer_grads(call.arguments(), torch.float64))


def test_activations_that_differ_in_dtype_are_left_to_the_torch_backend() -> None:
    call = make_call(plain_network([plain_layer(), plain_layer()]))
    call.inputs[0], call.saved[0] = call.inputs[0].half(), call.saved[0].half()
    with watched() as seen:
        found = triton_backend.layer_grads(call.arguments(), torch.float32)
    assert seen.kernels == []
    assert_same(found, torch_backend.layer_grads(call.arguments(), torch.float32))


@pytest.mark.parametrize(("kernel", "error_size"), [("strip", 10), ("strip", 130), ("two_phase", 70)])
def test_by_the_plan_and_tables_of_the_package(kernel: str, error_size: int) -> None:
    """The kernel that the plan chooses, with tiles from its table, gives the same gradients again."""
    network = plain_network([plain_layer(), plain_layer(positions=2, mask=True)], error_size=error_size)
    network["feedback"]["place"] = ("gaussian" if kernel == "strip" else "fastfood", "dense")
    call = make_call(network)
    for _ in range(2):
        with watched() as seen:
            found = triton_backend.layer_grads(call.arguments(), torch.float32)
        assert seen.kernels == [kernel]
        check(call, found)


def test_products_of_the_library_where_the_plan_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In tf32 on a card of which nothing was measured: one launch, however many layers."""
    monkeypatch.setattr(choice_wide, "LEAST_FOR_PRODUCTS", 1)
    network = plain_network([plain_layer(), plain_layer(positions=2, mask=True)], error_size=70)
    network["feedback"]["place"] = ("fastfood", "dense")
    call = make_call(network)
    with tf32(True), route.planned_by(choice.plan_grouped), watched() as seen:
        found = triton_backend.layer_grads(call.arguments(), torch.float32)
        said = triton_backend.describe_layers(call.arguments(), torch.float32, "store", DEVICE)
    assert launched(seen, "products")
    assert seen.kernels == ["deltas"]
    assert "then the library's products for each of 3 layers" in said
    check(call, found)


@both_kernels
def test_offsets_in_int64_give_the_same_bits(kernel: str) -> None:
    network = plain_network([plain_layer(mask=True), plain_layer(positions=2), plain_layer(width_out=17)])
    for place in (("matrix", "dense"), ("rademacher", "dense"), ("sparse", "procedural"), ("fastfood", "procedural")):
        network["feedback"]["place"] = place
        call = make_call(network)
        expected = run(call, kernel, 1)
        with in_64_bits():
            assert_same(run(call, kernel, 1), expected)


@both_kernels
def test_an_error_that_is_not_finite_stays_in_its_own_bias(kernel: str) -> None:
    """The output layer's bias is summed from the error itself."""
    call = make_call(plain_network([plain_layer()], error_size=5))
    call.error[2, 3] = torch.inf
    found = run(call, kernel)[-1]
    assert found.isfinite().tolist() == [True, True, True, False, True]
    torch.testing.assert_close(found[:3], call.error[:, :3].sum(0), rtol=1e-5, atol=1e-6)


def test_factors_are_rounded_to_the_nearest_tf32_but_not_what_biases_are_summed_from() -> None:
    """Tensor cores would truncate them. What is no number stays none."""
    call = make_call(plain_network([], error_size=17))
    with tf32(True):
        weight, bias = run(call, "strip")
    exact = to_tf32(call.error.cpu()).T @ to_tf32(call.inputs[0].cpu())
    torch.testing.assert_close(weight.cpu().double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(bias, call.error.sum(0), rtol=1e-6, atol=1e-6)
    call.error[3, 4] = torch.nan
    with tf32(True):
        weight, bias = run(call, "strip")
    assert weight.isnan().any(1).nonzero().tolist() == bias.isnan().nonzero().tolist() == [[4]]


@both_kernels
def test_biases_are_sums_of_delta_before_it_is_rounded(kernel: str) -> None:
    """float16 with a U of signs, so that nothing else is rounded: as if all had been float32."""
    network = plain_network([plain_layer(width_out=33), plain_layer(positions=3)], rows=70, error_size=9)
    network["feedback"].update(place=("rademacher", "dense"))
    call = make_call(network, torch.float16)
    found = run(call, kernel)
    exact, same = (torch_backend.layer_grads(in_dtype(call, dtype), dtype) for dtype in (torch.float64, torch.float32))
    for (name, _, scale), *tensors in zip(call.wanted_gradients(), found, exact, same, strict=True):
        if name.startswith("b"):
            assert_close_to_oracle(*(tensor.cpu() for tensor in tensors), scale, name)


def in_dtype(call: Call, dtype: torch.dtype) -> list[Any]:
    """The call's arguments with these very numbers in another dtype."""
    tensors = {"inputs": call.inputs, "saved": call.saved}
    converted = {name: [tensor.to(dtype) for tensor in group] for name, group in tensors.items()}
    return replace(call, error=call.error.to(dtype), **converted).arguments()
