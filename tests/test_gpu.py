"""What only a CUDA device can show: every kernel in every precision, graphs, streams, the compiler, large offsets."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close_to_oracle
from torch import Tensor, nn
from triton_cases import CASES, DEVICE, FEEDBACKS, Call, feedback_of, make_call, plain_layer, plain_network

import dfa_kernels as dfa
from bench.cpu.large_networks import vgg16
from bench.gpu.forced import PRODUCER, kernel_planner
from bench.gpu.graphs import captured
from bench.gpu.kernel_counts import OUR_KERNELS, device_activities
from bench.gpu.precision import TruncatedProducts, tf32
from dfa_kernels.backends import torch_backend
from dfa_kernels.backends import triton as triton_backend
from dfa_kernels.backends.calls import TapsCall
from dfa_kernels.backends.triton import producer
from dfa_kernels.backends.triton.route import planned_by
from dfa_kernels.backward import deltas
from dfa_kernels.feedback import entries
from dfa_kernels.feedback.spec import KINDS
from dfa_kernels.updates import RULES as UPDATE_RULES

pytestmark = pytest.mark.gpu

KERNELS = {"strip": 33, "two_phase": 97, "grouped_gemm": 10, "products": 10}
"""The kernels, and the library's products after `deltas`, each with an error of a size that it is for."""
PRECISIONS = {"ieee": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
RULES = ["sgd", "momentum", "adamw"]
# Of an input of 2.3 billion numbers, for each kernel: strips are for few rows.
LARGE = {"strip": (512, 4_500_032), **dict.fromkeys(("two_phase", "grouped_gemm", "products"), (70_000, 32_768))}

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_precision = pytest.mark.parametrize("precision", PRECISIONS)
needs_producer = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or bool(producer.NO_GLUON),
    reason="a warp that loads is for sm_90 and a Triton whose Gluon is known",
)
either_kernel_fits = pytest.mark.parametrize("classes", [5, 1000])


def poison() -> None:
    """What the allocator hands out next is full of NaN, whether it comes from the pool of small blocks or of large."""
    blocks = [torch.full((2**17,), torch.nan, device=DEVICE) for _ in range(32)]
    blocks.append(torch.full((2**24,), torch.nan, device=DEVICE))


@contextmanager
def running(kernel: str, precision: str) -> Iterator[None]:
    with tf32(precision == "tf32"), planned_by(kernel_planner(kernel)):
        poison()
        yield


def make_network(kernel: str, width: int = 80, **changes: Any) -> dict[str, Any]:
    """Two hidden layers, the second one of this width, and an output layer; more than one tile of each.

    By default all widths are multiples of 16, so that the copy engine may be used where there is one.
    """
    layers = [plain_layer(width_in=160, width_out=144), plain_layer(("relu", 0.0, 0.0), width_in=144, width_out=width)]
    return plain_network(layers, **{"output_width": width, "rows": 70, "error_size": KERNELS[kernel], **changes})


def in_same_precision(precision: str, compute: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """Plain torch's result; for tf32 also with factors cut as tensor cores cut them, where a library may round them."""
    with tf32(precision == "tf32"):
        found = [compute()]
    if precision == "tf32":
        with tf32(False), TruncatedProducts():
            found.append(compute())
    return found


def farthest(results: list[Tensor], ref64: Tensor) -> Tensor:
    """The result that is farthest from the reference."""
    return max((r.cpu() for r in results), key=lambda r: (r.double() - ref64).abs().max().item() if r.numel() else 0.0)


def check_grads(call: Call, found: list[Tensor], precision: str) -> None:
    same = in_same_precision(precision, lambda: torch_backend.layer_grads(call.arguments(), torch.float32))
    for i, ((name, ref64, scale), out) in enumerate(zip(call.wanted_gradients(), found, strict=True)):
        assert out.dtype == torch.float32
        assert_close_to_oracle(out.cpu(), ref64, farthest([s[i] for s in same], ref64), scale, name)


def check_layer_grads(kernel: str, precision: str, network: dict[str, Any]) -> None:
    call = make_call(network, PRECISIONS[precision])
    with running(kernel, precision):
        found = triton_backend.layer_grads(call.arguments(), torch.float32)
        assert kernel in triton_backend.describe_layers(call.arguments(), torch.float32, "store", DEVICE)
    check_grads(call, found, precision)


@each_kernel
@each_precision
@pytest.mark.parametrize("place", FEEDBACKS, ids="-".join)
def test_layer_grads_with_every_feedback(kernel: str, precision: str, place: tuple[str, str]) -> None:
    feedback = {"place": place, "seed": 2**40 + 3, "normalize": True, "gain": 1.0, "nonzeros": None}
    check_layer_grads(kernel, precision, make_network(kernel, feedback=feedback))


@each_kernel
@each_precision
def test_layer_grads_with_every_activation(kernel: str, precision: str) -> None:
    layers = [plain_layer(case, width_in=48, width_out=64) for case in CASES]
    check_layer_grads(kernel, precision, plain_network(layers, output_width=64, rows=70, error_size=KERNELS[kernel]))


@each_kernel
@each_precision
@pytest.mark.parametrize("widths", [(128, 256, 64), (131, 257, 67)], ids=["aligned", "odd"])
def test_layer_grads_with_dropout_positions_and_any_layout(
    kernel: str, precision: str, widths: tuple[int, int, int]
) -> None:
    layers = [
        plain_layer(width_in=widths[0], width_out=widths[1], mask=True, layout="gaps"),
        plain_layer(width_in=widths[1], width_out=widths[0], positions=3, layout="transposed"),
        plain_layer(width_in=widths[0], width_out=widths[0], layout="offset"),
    ]
    changes = {"rows": 67, "error_size": KERNELS[kernel], "error_layout": "transposed"}
    network = plain_network(layers, output_width=widths[2], **changes)
    check_layer_grads(kernel, precision, network)


@each_kernel
@each_precision
@pytest.mark.parametrize("rows", [0, 1, 129])
def test_layer_grads_of_unusual_batches(kernel: str, precision: str, rows: int) -> None:
    check_layer_grads(kernel, precision, make_network(kernel, rows=rows))


@each_precision
@pytest.mark.parametrize("error_size", [16, 96, 97], ids=lambda size: f"E={size}")
@pytest.mark.parametrize("error_layout", ["plain", "gaps", "one row"])
def test_the_error_is_the_output_layers_delta_or_is_copied(precision: str, error_size: int, error_layout: str) -> None:
    network = make_network("two_phase", error_size=error_size, error_layout=error_layout)
    check_layer_grads("two_phase", precision, network)


@pytest.mark.parametrize("kernel", ["two_phase", "grouped_gemm"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_tiles_come_by_the_copy_engine_where_there_is_one(kernel: str, precision: str) -> None:
    call = make_call(make_network(kernel), PRECISIONS[precision])
    with running(kernel, precision):
        said = triton_backend.describe_layers(call.arguments(), torch.float32, "store", DEVICE)
    assert ("through TMA" in said) == (9 <= torch.cuda.get_device_capability()[0] < 12)


@each_kernel
@each_precision
@pytest.mark.parametrize("shift", [1, 2, 3])
@pytest.mark.parametrize("error_size", [32, 33], ids=lambda size: f"E={size}")
def test_layer_grads_of_misaligned_tensors(kernel: str, precision: str, shift: int, error_size: int) -> None:
    """Addresses that are no multiples of 16 bytes, after a launch on the same shapes at ones that are."""
    call = make_call(make_network(kernel, error_size=error_size), PRECISIONS[precision])
    with running(kernel, precision):
        triton_backend.layer_grads(call.arguments(), torch.float32)
        call.inputs = [shifted(x, shift) for x in call.inputs]
        call.saved = [shifted(h, shift) for h in call.saved]
        call.error = shifted(call.error, shift)
        found = triton_backend.layer_grads(call.arguments(), torch.float32)
    check_grads(call, found, precision)


def shifted(tensor: Tensor, elements: int) -> Tensor:
    """A contiguous copy that begins so many elements behind an aligned address."""
    memory = torch.full((tensor.numel() + elements,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    return memory[elements:].view(tensor.shape).copy_(tensor)


@each_kernel
@each_precision
def test_a_hundred_repeats_are_bitwise_equal(kernel: str, precision: str) -> None:
    layers = [plain_layer(width_in=304, width_out=528), plain_layer(width_in=528, width_out=528)]
    network = plain_network(layers, output_width=528, rows=300, error_size=KERNELS[kernel])
    call = make_call(network, PRECISIONS[precision])
    with running(kernel, precision):
        first = triton_backend.layer_grads(call.arguments(), torch.float32)
        for turn in range(99):
            if turn % 10 == 0:
                poison()
            again = triton_backend.layer_grads(call.arguments(), torch.float32)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"turn {turn}"


def wide_call(rows: int, precision: str) -> Call:
    """Tiles of 128 × 256 fill the GPU; none of the widths is a multiple of them."""
    layers = [plain_layer(width_in=784, width_out=2000), plain_layer(width_in=2000, width_out=2000)]
    return make_call(plain_network(layers, output_width=2000, rows=rows), PRECISIONS[precision])


@needs_producer
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 70, 512])
def test_a_warp_that_loads_changes_no_bit_of_weights_gradients(precision: str, rows: int) -> None:
    """In any of 20 repeats. Biases' sums over parts of the batch may be added up in another order."""
    call = wide_call(rows, precision)
    with running("grouped_gemm", precision):
        plain = triton_backend.layer_grads(call.arguments(), torch.float32)
    with running(PRODUCER, precision):
        assert PRODUCER in triton_backend.describe_layers(call.arguments(), torch.float32, "store", DEVICE)
        first = triton_backend.layer_grads(call.arguments(), torch.float32)
        for turn in range(20):
            poison()
            again = triton_backend.layer_grads(call.arguments(), torch.float32)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"turn {turn}"
    check_grads(call, first, precision)
    assert all(torch.equal(a, b) for a, b in zip(first[::2], plain[::2], strict=True))


@needs_producer
@pytest.mark.parametrize("rule", RULES)
def test_a_warp_that_loads_updates_as_the_plain_kernel_does(rule: str) -> None:
    call = wide_call(512, "bfloat16")
    name, hyper, states = numbers_of(rule)
    grads = triton_backend.layer_grads(call.arguments(), torch.float32)
    before = [[torch.rand_like(g) for g in grads] for _ in range(1 + states)]
    after = []
    for kernel in ("grouped_gemm", PRODUCER):
        weights, *state = [[t.clone() for t in tensors] for tensors in before]
        flat = [t for of_one in zip(*state, strict=True) for t in of_one]
        with running(kernel, "bfloat16"):
            triton_backend.layer_update_(call.arguments(), weights, flat, name, hyper * len(weights))
        after.append([*weights, *flat])
    for found, expected in zip(*after, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@each_kernel
@each_precision
@pytest.mark.parametrize("rule", RULES)
def test_updates_are_those_of_their_own_gradients(kernel: str, precision: str, rule: str) -> None:
    """`layer_update_` against the torch rules in float64, applied to the gradients that the same kernel stores."""
    call = make_call(make_network(kernel), PRECISIONS[precision])
    name, hyper, states = numbers_of(rule)
    with running(kernel, precision):
        grads = triton_backend.layer_grads(call.arguments(), torch.float32)
        weights = [torch.randn_like(g) for g in grads]
        state = [torch.rand_like(g) for g in grads for _ in range(states)]
        exact, plain = (updated(name, hyper, weights, state, grads, dtype) for dtype in (torch.float64, torch.float32))
        found = [*(w.clone() for w in weights), *(s.clone() for s in state)]
        first_state = len(weights)
        triton_backend.layer_update_(
            call.arguments(), found[:first_state], found[first_state:], name, hyper * len(weights)
        )
    for i, (out, ref64, same) in enumerate(zip(found, exact, plain, strict=True)):
        assert_close_to_oracle(out, ref64, same, 1.0, f"{rule} {i}")


def numbers_of(rule: str) -> tuple[str, list[float], int]:
    """(the rule's name, its numbers for one parameter, tensors of state for each parameter)."""
    if rule == "adamw":
        return "adamw", [0.01, 0.9, 0.999, 1e-3, 0.05, 3.0], 2
    return "sgd", [0.1, 0.9 * (rule == "momentum"), 0.05, float(rule == "momentum")], int(rule == "momentum")


def updated(
    name: str, hyper: list[float], weights: list[Tensor], state: list[Tensor], grads: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Parameters, then their state, after one update by the rule in this dtype."""
    weights, state = [w.to(dtype, copy=True) for w in weights], [s.to(dtype, copy=True) for s in state]
    each = len(state) // len(weights)
    for i, (weight, gradient) in enumerate(zip(weights, grads, strict=True)):
        own = state[i * each : (i + 1) * each]
        UPDATE_RULES[name].apply_(weight, own, hyper, gradient.to(dtype))
    return weights + state


@each_precision
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("place", [("gaussian", "dense"), ("rademacher", "procedural")], ids="-".join)
def test_project_taps_of_convolutions(precision: str, channels_last: bool, place: tuple[str, str]) -> None:
    dtype, rows, error_size = PRECISIONS[precision], 9, 70
    torch.manual_seed(0)
    feedback = dfa.Feedback(*place)
    shapes = [(16, 8, 8), (33, 3, 5)]
    saved = [torch.randn(rows, *shape).tanh().to(DEVICE, dtype) for shape in shapes]
    if channels_last:
        saved = [h.contiguous(memory_format=torch.channels_last) for h in saved]
    error, sizes = torch.randn(rows, error_size).to(DEVICE, dtype), [h[0].numel() for h in saved]

    def call(backend: Any, e: Tensor, saved: list[Tensor]) -> list[Tensor]:
        stored = feedback.stored(max(sizes), error_size, e.device)
        taps = TapsCall(e, stored, feedback.spec, sizes, saved, [None] * 2, ["tanh", "relu"], [0.0] * 4)
        found: list[Tensor] = backend.project_taps(taps)
        return found

    exact = call(torch_backend, error.cpu().double(), [h.cpu().double() for h in saved])
    same = in_same_precision(precision, lambda: call(torch_backend, error, saved))
    with tf32(precision == "tf32"):
        poison()
        found = call(triton_backend, error, saved)
    for i, (out, ref64) in enumerate(zip(found, exact, strict=True)):
        assert out.dtype == dtype
        assert out.stride() == saved[i].stride()
        assert_close_to_oracle(out.cpu(), ref64, farthest([s[i] for s in same], ref64), 1.0, f"tap {i}")


@each_precision
@pytest.mark.parametrize("place", FEEDBACKS, ids="-".join)
def test_feedback_projects_by_one_kernel(precision: str, place: tuple[str, str]) -> None:
    """But for one product with a stored U."""
    options = {"place": place, "seed": 2**40 + 3, "normalize": True, "gain": 1.0, "nonzeros": None}
    units = 600 if place[0] == "matrix" else 5000
    feedback, error = feedback_of(options, 70), torch.randn(9, 70).to(DEVICE, PRECISIONS[precision])
    exact = feedback.project(error.cpu().double(), units)
    call = TapsCall(
        error, feedback.stored(units, 70, DEVICE), feedback.spec, [units], [None], [None], ["identity"], [0.0, 0.0]
    )
    same = in_same_precision(precision, lambda: torch_backend.project_taps(call))
    with tf32(precision == "tf32"):
        names = device_activities(lambda: feedback.project(error, units), lambda: None)
        poison()
        found = feedback.project(error, units)
    if place not in (("gaussian", "dense"), ("uniform", "dense"), ("matrix", "dense")):
        assert len(names) == 1, names
        assert names[0].startswith("project_taps_kernel")
    assert found.dtype == error.dtype
    assert_close_to_oracle(found.cpu(), exact, farthest([s[0] for s in same], exact), 1.0)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "fastfood"])
def test_a_procedural_projection_needs_the_memory_of_its_result(kind: str) -> None:
    feedback, error = dfa.Feedback(kind, "procedural"), torch.randn(8, 1000, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = feedback.project(error, 64 * 224**2)
    assert torch.cuda.max_memory_allocated() - before < 1.01 * found.nbytes


@each_kernel
def test_offsets_beyond_31_bits(kernel: str) -> None:
    """An input of 2.3 billion numbers; its first columns and its last, which end far behind the 2^31st, are checked."""
    rows, width = LARGE[kernel]
    need = 3 * rows * width + 2**30
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < need:
        pytest.skip(f"needs {need / 1e9:.1f} GB of GPU memory, {free / 1e9:.1f} GB are free")
    x = torch.randn(rows, width, dtype=torch.bfloat16, device=DEVICE)
    network = plain_network([plain_layer(width_in=8, width_out=16)], output_width=16, error_size=KERNELS[kernel])
    call = make_call({**network, "rows": rows}, torch.bfloat16)
    ends = torch.cat([x[:, :64], x[:, -64:]], dim=1)
    call.inputs[0] = ends
    call.wanted[0][1] = call.wanted[1][1] = False
    ((_, ref64, scale), *_), same = call.wanted_gradients(), torch_backend.layer_grads(call.arguments(), torch.float32)
    call.inputs[0] = x
    with running(kernel, "bfloat16"):
        found = triton_backend.layer_grads(call.arguments(), torch.float32)[0]
    out = torch.cat([found[:, :64], found[:, -64:]], dim=1).cpu()
    assert_close_to_oracle(out, ref64, same[0].cpu(), scale)


def network(classes: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, classes))


def batch(seed: int = 1, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 20, generator=generator), torch.randint(classes, (16,), generator=generator)


def gradients(net: nn.Module, x: Tensor, y: Tensor, backend: str = "auto", compiled: bool = False) -> list[Tensor]:
    model: Any = dfa.DFA(net, backend=backend)
    if compiled:
        model(x)
        model = torch.compile(model, fullgraph=True)
    F.cross_entropy(model(x), y).backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def check_model(found: list[Tensor], exact: list[Tensor], same: list[Tensor]) -> None:
    """Against float64; a whole model's terms are no larger than its gradients by orders of magnitude."""
    for i, (out, ref64, s) in enumerate(zip(found, exact, same, strict=True)):
        assert_close_to_oracle(out.cpu(), ref64.cpu(), s.cpu(), 4 * ref64.abs().max().item(), f"parameter {i}")


def on_gpu(net: nn.Module, x: Tensor, y: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    return copy.deepcopy(net).cuda(), x.cuda(), y.cuda()


def test_gradients_are_those_of_the_cpu_in_float64() -> None:
    net, (x, y) = network().double(), batch()
    expected = gradients(copy.deepcopy(net), x.double(), y)
    found = gradients(net.cuda(), x.double().cuda(), y.cuda())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_feedback_is_the_same_bits_on_every_device(kind: str) -> None:
    feedback = dfa.Feedback(kind, seed=2**40 + 3)
    cpu, cuda = (feedback.stored(5000, 330, device) for device in ("cpu", "cuda"))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(cuda, cpu, strict=True))
    if kind != "fastfood":  # Its matrix is a product, rounded as the device's library does.
        for storage in ("dense", "procedural"):
            feedback = dfa.Feedback(kind, storage)
            assert torch.equal(feedback.matrix(70, 33, device="cuda").cpu(), feedback.matrix(70, 33))


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "rademacher"])
def test_kernels_make_the_entries_that_are_kept(kind: str) -> None:
    """The projection of the identity, in full float32: each sum has one term that is not 0."""
    error_size, units = 64, 3000
    stored = dfa.Feedback(kind, seed=2**40 + 3, normalize=False).stored(units, error_size, "cpu")
    procedural = dfa.Feedback(kind, "procedural", seed=2**40 + 3, normalize=False)
    error = torch.eye(error_size, device=DEVICE)
    with tf32(False):
        (found,) = triton_backend.project_taps(
            TapsCall(error, [], procedural.spec, [units], [None], [None], ["identity"], [0.0, 0.0])
        )
    expected = entries.unpack_signs(stored[0], error_size) if kind == "rademacher" else stored[0]
    assert torch.equal(found.cpu(), expected[:units].T)


@either_kernel_fits
def test_auto_runs_one_kernel_whatever_the_size_of_the_error(classes: int) -> None:
    net, (x, y) = network(classes), batch(classes=classes)
    exact = gradients(copy.deepcopy(net).double(), x.double(), y)
    found, same = (gradients(*on_gpu(net, x, y), backend=backend) for backend in ("auto", "torch"))
    check_model(found, exact, same)
    model = dfa.DFA(copy.deepcopy(net).cuda())
    model(x.cuda())
    assert "one launch of strip" in str(model.plan())


@either_kernel_fits
def test_a_compiled_model_has_the_gradients_of_an_eager_one(classes: int) -> None:
    torch._dynamo.reset()
    net, (x, y) = network(classes), batch(classes=classes)
    exact = gradients(copy.deepcopy(net).double(), x.double(), y)
    same = gradients(*on_gpu(net, x, y), backend="torch")
    check_model(gradients(*on_gpu(net, x, y), compiled=True), exact, same)


def make_step(classes: int, fused: bool) -> tuple[dfa.DFA, Callable[[], None]]:
    """A model and a whole step of it; with the same weights and batch each time."""
    x, y = (t.cuda() for t in batch(classes=classes))
    model = dfa.DFA(network(classes).cuda())
    optimizer: Any = dfa.optim.SGD(model, lr=0.1) if fused else torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return model, step


def weights_in_float64(classes: int, steps: int) -> list[Tensor]:
    net, (x, y) = network(classes).double(), batch(classes=classes)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        gradients(net, x.double(), y)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


@either_kernel_fits
@pytest.mark.parametrize("fused", [True, False])
def test_a_whole_step_is_captured_in_a_graph(classes: int, fused: bool) -> None:
    """Replays give the weights of as many eager steps, also when other work has used the same kernels in between."""
    (eager, eager_step), (model, step) = make_step(classes, fused), make_step(classes, fused)
    replay = captured(step, warm_up=3)
    other, other_step = make_step(classes, fused)
    for _ in range(4):
        replay()
        other_step()
        poison()
    for _ in range(7):
        eager_step()
    exact = weights_in_float64(classes, 7)
    check_model([p.detach() for p in model.parameters()], exact, [p.detach() for p in eager.parameters()])
    exact = weights_in_float64(classes, 4)
    check_model([p.detach() for p in other.parameters()], exact, [p.detach() for p in other.parameters()])


@each_kernel
@pytest.mark.parametrize("precision", ["ieee", "bfloat16"])
def test_a_captured_launch_gives_the_same_bits(kernel: str, precision: str) -> None:
    """Also of two launches, whose workspace and descriptors the graph keeps."""
    call = make_call(make_network(kernel), PRECISIONS[precision])
    found: list[Tensor] = []

    def run() -> None:
        found[:] = triton_backend.layer_grads(call.arguments(), torch.float32)

    with running(kernel, precision):
        run()
        expected = [gradient.clone() for gradient in found]
        replay = captured(run)
    for gradient in found:
        gradient.fill_(torch.nan)
    poison()
    replay()
    for gradient, same in zip(found, expected, strict=True):
        assert torch.equal(gradient, same)


@either_kernel_fits
def test_a_graph_is_replayed_on_another_stream(classes: int) -> None:
    (eager, eager_step), (model, step) = make_step(classes, True), make_step(classes, True)
    replay, stream = captured(step, warm_up=3), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):
            replay()
    for _ in range(23):
        eager_step()
    torch.cuda.synchronize()
    exact = weights_in_float64(classes, 23)
    check_model([p.detach() for p in model.parameters()], exact, [p.detach() for p in eager.parameters()])


@either_kernel_fits
def test_two_streams_at_once(classes: int) -> None:
    """Two models train at the same time, each on its stream; each ends as if it were alone."""
    alone = make_step(classes, True)
    for _ in range(30):
        alone[1]()
    pairs = [(*make_step(classes, True), torch.cuda.Stream()) for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(30):
        for _, step, stream in pairs:
            with torch.cuda.stream(stream):
                step()
    torch.cuda.synchronize()
    exact = weights_in_float64(classes, 30)
    for model, _, _ in pairs:
        check_model([p.detach() for p in model.parameters()], exact, [p.detach() for p in alone[0].parameters()])


@pytest.mark.parametrize("rule", RULES)
@either_kernel_fits
def test_fused_optimizers_train_as_torchs_do(classes: int, rule: str) -> None:
    net, (x, y) = network(classes), batch(classes=classes)

    def train(dtype: torch.dtype, device: str, fused: bool) -> list[Tensor]:
        own = copy.deepcopy(net).to(device, dtype)
        model = dfa.DFA(own, backend="auto" if fused else "torch")
        optimizer = make_optimizer(model, rule, fused)
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(device, dtype)), y.to(device)).backward()
            optimizer.step()
        return [p.detach() for p in own.parameters()]

    exact = train(torch.float64, "cpu", False)
    check_model(train(torch.float32, "cuda", True), exact, train(torch.float32, "cuda", False))


def make_optimizer(model: dfa.DFA, rule: str, fused: bool) -> torch.optim.Optimizer:
    if rule == "adamw":
        options: dict[str, Any] = dict(lr=0.01, eps=1e-2, weight_decay=0.1)
        return dfa.optim.AdamW(model, **options) if fused else torch.optim.AdamW(model.parameters(), **options)
    options = dict(lr=0.1, weight_decay=0.05)
    options |= dict(momentum=0.9, nesterov=True) if rule == "momentum" else {}
    return dfa.optim.SGD(model, **options) if fused else torch.optim.SGD(model.parameters(), **options)


def test_adamw_refuses_to_be_captured() -> None:
    x, y = (t.cuda() for t in batch())
    model = dfa.DFA(network().cuda())
    optimizer = dfa.optim.AdamW(model)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="counts its steps on the host"), torch.cuda.graph(graph):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_float16_under_a_scaler_keeps_float32_parameters() -> None:
    x, y = (t.cuda() for t in batch())
    model = dfa.DFA(network().cuda())
    exact = gradients(copy.deepcopy(model.net), x, y)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.0), torch.amp.GradScaler()
    with torch.autocast("cuda", torch.float16):
        loss = F.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for p, expected in zip(model.parameters(), exact, strict=True):
        assert p.grad.dtype == torch.float32
        assert (p.grad - expected).norm() <= 2**-7 * expected.norm()


@either_kernel_fits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(classes: int, dtype: torch.dtype) -> None:
    net, (x, y) = network(classes), batch(classes=classes)

    def train(backend: str) -> list[Tensor]:
        own, x_gpu, y_gpu = on_gpu(net, x, y)
        model = dfa.DFA(own, backend=backend)
        with torch.autocast("cuda", dtype):
            loss = F.cross_entropy(model(x_gpu), y_gpu)
        (loss * 64).backward()
        assert all(p.grad.dtype == torch.float32 for p in own.parameters())
        return [p.grad / 64 for p in own.parameters()]

    exact = gradients(copy.deepcopy(net).double(), x.double(), y)
    check_model(train("auto"), exact, train("torch"))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("in_turn", [False, True])
def test_a_convolutional_network(channels_last: bool, in_turn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """δ of all taps in one launch, or of one tap after the other as in large networks."""
    if in_turn:
        monkeypatch.setattr(deltas, "WORTH_TURNS", -(2**40))
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(24 * 4 * 4, 40), nn.Tanh(), nn.Linear(40, 10),
    )  # fmt: skip
    x, y = torch.randn(8, 3, 12, 12), torch.randint(10, (8,))
    exact = gradients(copy.deepcopy(net).double(), x.double(), y)

    def train(backend: str) -> list[Tensor]:
        own, x_gpu, y_gpu = on_gpu(net, x, y)
        if channels_last:
            own, x_gpu = own.to(memory_format=torch.channels_last), x_gpu.to(memory_format=torch.channels_last)
        return gradients(own, x_gpu, y_gpu, backend=backend)

    check_model(train("auto"), exact, train("torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vgg_needs_no_more_memory_than_by_backpropagation(dtype: torch.dtype) -> None:
    """At 224 x 224 and batch 32; bfloat16 under autocast."""
    torch.manual_seed(0)
    net = vgg16().cuda()
    x, y = torch.randn(32, 3, 224, 224, device=DEVICE), torch.arange(32, device=DEVICE)
    model = dfa.DFA(net, dfa.Feedback("fastfood", "procedural"))

    def peak(trained: nn.Module) -> int:
        for _ in range(2):
            net.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(trained(x), y)
            loss.backward()
        return torch.cuda.max_memory_allocated()

    assert peak(model) <= peak(net)


@either_kernel_fits
@pytest.mark.parametrize("rule", [None, "sgd", "adamw"])
def test_a_backward_pass_is_one_kernel(classes: int, rule: str | None) -> None:
    """From a given error, so that the loss's own kernels do not count; with a fused optimizer its step included."""
    x, _ = (t.cuda() for t in batch(classes=classes))
    model = dfa.DFA(network(classes).cuda())
    optimizer = None if rule is None else make_optimizer(model, rule, True)
    output: list[Tensor] = []
    error = torch.randn(16, classes, device=DEVICE)

    def prepare() -> None:
        (model if optimizer is None else optimizer).zero_grad()
        output[:] = [model(x)]

    def run() -> None:
        output[0].backward(error)
        if optimizer is not None:
            optimizer.step()

    names = device_activities(run, prepare)
    assert len(names) == 1, names
    assert names[0].startswith(OUR_KERNELS)


def test_a_model_on_another_gpu_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    net, (x, y) = network(), batch()
    expected = gradients(*on_gpu(net, x, y))
    found = gradients(copy.deepcopy(net).to("cuda:1"), x.to("cuda:1"), y.to("cuda:1"))
    for a, b in zip(found, expected, strict=True):
        assert a.device == torch.device("cuda", 1)
        assert torch.equal(a.cpu(), b.cpu())
