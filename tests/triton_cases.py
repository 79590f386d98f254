"""Calls of the operators for the tests of the Triton kernels: what they get, what runs, what the formulas say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import torch
from hypothesis import Phase
from hypothesis import strategies as st
from oracle import Layer, LayerGrad, layer_gradient
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime import interpreter

import dfa_kernels as dfa
from dfa_kernels.activations import ACTIVATIONS
from dfa_kernels.backends import torch_backend
from dfa_kernels.backends.calls import LayerCall
from dfa_kernels.backends.triton import launch, operators, route
from dfa_kernels.backends.triton import launch_plan as plan_module
from dfa_kernels.backends.triton.configs import GemmConfig, ProjectionConfig, StripConfig, TwoPhaseConfig
from dfa_kernels.backends.triton.launch_plan import LaunchPlan
from dfa_kernels.backends.triton.plan_gemm import plan_grouped_gemm, plan_products
from dfa_kernels.backends.triton.plan_small import plan_strip
from dfa_kernels.backends.triton.plan_wide import plan_two_phase
from dfa_kernels.backends.triton.problem import GroupedProblem, Target

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

CASES = [
    ("identity", 0.0, 0.0),
    ("tanh", 0.0, 0.0),
    ("relu", 0.0, 0.0),
    ("leaky_relu", 0.01, 0.0),
    ("leaky_relu", 0.0, 0.0),
    ("leaky_relu", -0.5, 0.0),
    ("abs", 0.0, 0.0),
    ("sigmoid", 0.0, 0.0),
    ("gelu", 0.0, 0.0),
    ("gelu", 1.0, 0.0),
    ("silu", 0.0, 0.0),
    ("elu", 1.0, 0.0),
    ("elu", 0.3, 0.0),
    ("elu", -0.7, 0.0),
    ("softplus", 1.0, 20.0),
    ("softplus", 3.0, 2.0),
    ("hardtanh", -1.0, 1.0),
    ("hardtanh", -0.3, 2.0),
]
FEEDBACKS = [
    *[
        (kind, storage)
        for kind in ("gaussian", "rademacher", "uniform", "sparse")
        for storage in ("dense", "procedural")
    ],
    ("fastfood", "dense"),
    ("fastfood", "procedural"),
    ("matrix", "dense"),
]
WIDTHS = [1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 64, 67, 97, 127, 128, 199, 200]
BATCHES = [0, 1, 2, 15, 16, 17, 31, 33, 64, 67, 70]
ERROR_SIZES = [1, 2, 3, 10, 16, 17, 31, 33, 63, 64]
LARGE_ERROR_SIZES = [65, 97, 127, 128, 129, 130]
LAYOUTS = ["plain", "gaps", "offset", "transposed"]

# From small tiles to large: a test begins at one of them and goes on to the first with few enough steps.
STRIPS = [
    StripConfig(16, 16, 32, 512, 4, 1),
    StripConfig(32, 16, 64, 512, 4, 2, 2),
    StripConfig(16, 64, 32, 512, 8, 1),
    StripConfig(64, 64, 32, 512, 4, 1, 3),
    StripConfig(128, 128, 64, 512, 4, 1),
]
TWO_PHASE = [
    TwoPhaseConfig(16, 16, 16, 16, 16, 16, 1, 1, 4, 1),
    TwoPhaseConfig(32, 16, 32, 16, 32, 16, 2, 2, 4, 1),
    TwoPhaseConfig(16, 32, 64, 32, 16, 32, 3, 1, 4, 1),
    TwoPhaseConfig(64, 32, 16, 64, 64, 16, 8, 2, 4, 1),
    TwoPhaseConfig(128, 64, 32, 128, 128, 32, 8, 1, 4, 1),
]
GROUPED_GEMM = [
    GemmConfig(c.block_m, c.block_n, c.block_k, c.group_m, c.programs, c.num_warps, c.num_stages) for c in TWO_PHASE
]
PROJECTIONS = [
    ProjectionConfig(16, 16, 16, 4, 1),
    ProjectionConfig(64, 32, 32, 4, 1),
    ProjectionConfig(128, 64, 64, 4, 1),
]
MOST_STEPS = 30
GUARD = 64


def guarded(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(memory full of NaN, a dense view of shape and stride inside of it)."""
    numel = math.prod(shape)
    memory = torch.full((numel + 2 * GUARD,), math.nan, dtype=dtype, device=DEVICE)
    return memory, memory.as_strided(shape, stride, GUARD)


def in_nans(tensor: Tensor) -> Tensor:
    """A contiguous copy with NaN on both sides of it in memory."""
    plain = tensor.to(DEVICE).contiguous()
    view = guarded(plain.shape, plain.stride(), plain.dtype)[1]
    return view.copy_(plain)


def margins_are_nan(view: Tensor) -> bool:
    """Whether nothing was written beside a dense view of `guarded` memory."""
    memory = view.as_strided((view.numel() + 2 * GUARD,), (1,), view.storage_offset() - GUARD)
    return bool(memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all())


def lay(tensor: Tensor, layout: str) -> Tensor:
    """The same values [rows, columns], elsewhere in memory, with NaN around and between them."""
    rows, columns = tensor.shape
    if layout == "transposed":
        return in_nans(tensor.t()).t()
    if layout == "gaps":
        memory = in_nans(torch.full((rows, 2 * columns), math.nan, dtype=tensor.dtype))
        return memory[:, ::2].copy_(tensor)
    if layout == "offset":
        memory = in_nans(torch.full((rows, columns + 3), math.nan, dtype=tensor.dtype))
        return memory[:, 1 : columns + 1].copy_(tensor)
    return in_nans(tensor)


def lay_error(error: Tensor, layout: str) -> Tensor:
    """`lay`, or one row for all (a broadcast gradient), or one number for all (that of a sum)."""
    if layout == "one row" and error.shape[0]:
        return in_nans(error[:1]).expand(error.shape)
    if layout == "one number" and error.shape[0]:
        return in_nans(error[:1, :1]).expand(error.shape)
    return lay(error, layout if layout in LAYOUTS else "plain")


class Poison(TorchFunctionMode):
    """Fresh memory is full of NaN, with more of it on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in (torch.empty, torch.empty_like, Tensor.new_empty) or not out.numel():
            return out
        view = guarded(tuple(out.shape), out.stride(), out.dtype)[1]
        self.made.append(view)
        return view


@dataclass
class Launches:
    """What ran."""

    plans: list[LaunchPlan] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    counters: list[Tensor] = field(default_factory=list)
    deltas_by_torch: int = 0


MARK = 7


@contextmanager
def patched_once() -> Iterator[None]:
    """During one launch. The interpreter patches the language for every call of a device function; a module's first is
    enough, in half of the time.
    """
    patch: Any = interpreter._patch_lang
    scopes: dict[str, Any] = {}

    def patch_module(fn: Any) -> Any:
        if fn.__module__ not in scopes:
            scopes[fn.__module__] = patch(fn)
        return scopes[fn.__module__]

    with mock.patch.object(interpreter, "_patch_lang", patch_module):
        yield


def reach(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's memory: first, and one behind the last."""
    spans = zip(tensor.shape, tensor.stride(), strict=True)
    numbers = 1 + sum((n - 1) * stride for n, stride in spans) if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + numbers * tensor.itemsize


@contextmanager
def in_bounds(arguments: Iterable[Any]) -> Iterator[None]:
    """During one launch: a kernel that touches memory of no argument fails, even if it does not use what it reads."""
    each_one = [t for each in arguments for t in (each if isinstance(each, tuple) else (each,))]
    tensors = [t for t in (getattr(t, "base", t) for t in each_one) if isinstance(t, Tensor)]
    spans = np.array(sorted(map(reach, tensors)), dtype=np.uint64)
    starts, ends = spans[:, 0], np.maximum.accumulate(spans[:, 1])

    def check(pointers: Any, mask: Any) -> None:
        # Of a descriptor's tile the mask is an array itself.
        first = pointers.data[np.asarray(mask if isinstance(mask, np.ndarray) else mask.data, dtype=bool)]
        if first.size:
            # One tensor holds all that an access touches.
            holder = int(np.searchsorted(starts, first.min(), side="right")) - 1
            end = int(first.max()) + pointers.get_element_ty().primitive_bitwidth // 8
            assert holder >= 0 and end <= ends[holder], "memory of no argument"

    builder = interpreter.InterpreterBuilder
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def checked_atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return atomic(self, operation, pointers, value, mask, *rest)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(builder, "create_masked_load", checked_load))
        stack.enter_context(mock.patch.object(builder, "create_masked_store", checked_store))
        stack.enter_context(mock.patch.object(builder, "create_atomic_rmw", checked_atomic))
        yield


@contextmanager
def in_64_bits() -> Iterator[None]:
    """Launches with offsets in int64, none of which is the product of narrower numbers: that would have overflowed."""
    builder = interpreter.InterpreterBuilder
    multiply = builder.create_mul

    def checked(self: Any, left: Any, right: Any) -> Any:
        assert left.data.size == 1 or left.data.dtype != np.int32, "a tile of int32 is multiplied"
        return multiply(self, left, right)

    wide = mock.patch.object(plan_module, "needs_int64", lambda *counts: True)
    with wide, mock.patch.object(builder, "create_mul", checked):
        yield


@contextmanager
def watched() -> Iterator[Launches]:
    """Fresh memory is poisoned, launches are counted and stay in bounds; afterwards every counter is zero again."""
    seen = Launches()
    start, start_compiled, run = launch.launch, launch.launch_compiled, interpreter.GridExecutor.__call__
    by_torch = torch_backend.layer_deltas

    def counting_launch(plan: LaunchPlan, *args: Any) -> None:
        seen.plans.append(plan)
        if not launch.INTERPRETED:
            seen.kernels.append(plan.name)
        start(plan, *args)

    def counting_launch_compiled(plan: LaunchPlan, *args: Any) -> bool:
        started = start_compiled(plan, *args)
        if started:
            seen.plans.append(plan)
            seen.kernels.append(plan.name)
        return started

    def counting_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.kernels.append(self.fn.__name__)
        with patched_once(), in_bounds(args):
            return run(self, *args, **kwargs)

    def counting_deltas(call: LayerCall) -> Any:
        seen.deltas_by_torch += 1
        return by_torch(call)

    def counters(n: int, device: torch.device) -> Tensor:
        made = torch.zeros(n + GUARD, dtype=torch.int32, device=device)
        made[n:] = MARK
        seen.counters.append(made)
        return made

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(operators, "launch", counting_launch))
        stack.enter_context(mock.patch.object(operators, "launch_compiled", counting_launch_compiled))
        stack.enter_context(mock.patch.object(operators, "counters", counters))
        stack.enter_context(mock.patch.object(torch_backend, "layer_deltas", counting_deltas))
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", counting_run))
        poison = stack.enter_context(Poison())
        yield seen
    assert all(margins_are_nan(view) for view in poison.made)
    for made in seen.counters:
        assert not made[:-GUARD].any()
        assert (made[-GUARD:] == MARK).all()


def steps_of(problem: GroupedProblem, config: StripConfig | TwoPhaseConfig | GemmConfig) -> int:
    """About how many products of tiles a launch computes."""
    rows, steps = problem.projected.rows, 0
    for width, out, span in zip(problem.widths_in, problem.widths_out, problem.positions, strict=True):
        tiles = -(-out // config.block_m) * -(-width // config.block_n)
        deep = config.block_r if isinstance(config, StripConfig) else config.block_k
        steps += tiles * max(1, -(-rows * span // deep))
    if isinstance(config, TwoPhaseConfig):
        tiles = -(-problem.widest // config.block_u) * -(-rows // config.block_r)
        steps += tiles * -(-problem.projected.error_size // config.block_e)
    # Rows of U that are made anew one entry after the other.
    slow = problem.projected.source == "sparse_seed" and problem.projected.error_size > 1
    return steps * 4 if slow else steps


def few_steps(configs: list[Any], start: int, problem: GroupedProblem) -> Any:
    """The first config from `start` on that the interpreter gets done with soon, else the last."""
    return next((config for config in configs[start:] if steps_of(problem, config) <= MOST_STEPS), configs[-1])


def deltas_config(problem: GroupedProblem, start: int) -> ProjectionConfig:
    """Of the launch before `grouped_gemm`; the interpreter takes as long for small tiles as for large ones."""

    def tiles(config: ProjectionConfig) -> int:
        return -(-problem.widest // config.block_u) * -(-problem.projected.rows // config.block_r)

    configs = PROJECTIONS[min(start, len(PROJECTIONS) - 1) :]
    return next((config for config in configs if tiles(config) <= MOST_STEPS), configs[-1])


def launched(seen: Launches, kernel: str, calls: int = 1) -> bool:
    """Whether every call was one launch of this kernel, after one of `deltas` where that has something to write.

    Of "products" that is all that is launched; the rest is torch's, but δ never.
    """
    if kernel == "products":
        return not seen.deltas_by_torch and seen.kernels == ["deltas"] * (calls if seen.plans else 0)
    plans = [plan for plan in seen.plans if plan.name != "deltas"]
    names = [name for plan in plans for name in (["deltas"] if plan.first else []) + [plan.name]]
    return len(plans) == calls and {plan.name for plan in plans} <= {kernel} and seen.kernels == names


def forced(
    kernel: str, start: int = 0, multiprocessors: int = 4, capability: int | None = None
) -> AbstractContextManager[None]:
    """`layer_grads` and `layer_update_` run this kernel, whatever the plan would choose."""

    def plan(problem: GroupedProblem, target: Target) -> LaunchPlan:
        configs: list[Any] = {"strip": STRIPS, "two_phase": TWO_PHASE}.get(kernel, GROUPED_GEMM)
        config = few_steps(configs, start, problem)
        aimed = Target(capability or target.capability, multiprocessors)
        if kernel == "products":
            return plan_products(problem, deltas_config(problem, start), aimed)
        if kernel == "grouped_gemm":
            return plan_grouped_gemm(problem, config, deltas_config(problem, start), aimed)
        planned = plan_strip if kernel == "strip" else plan_two_phase
        return planned(problem, config, Target(target.capability, multiprocessors))

    return route.planned_by(plan)


@lru_cache(maxsize=256)
def make_feedback(
    kind: str, storage: str, seed: int, error_size: int, normalize: bool, gain: float, nonzeros: int | None
) -> dfa.Feedback:
    if kind == "matrix":
        U = torch.randn(600, error_size, generator=torch.Generator().manual_seed(seed % 1000))
        return dfa.Feedback.from_matrix(U, normalize=normalize, gain=gain)
    nonzeros = min(nonzeros, error_size) if nonzeros and kind == "sparse" else None
    return dfa.Feedback(kind, storage, seed=seed, normalize=normalize, gain=gain, nonzeros=nonzeros)


@lru_cache(maxsize=256)
def entries(feedback: dfa.Feedback, size: int, error_size: int) -> Tensor:
    """U [size, E] in float64, without any scale."""
    spec = feedback.spec
    if spec.kind == "matrix":
        return feedback.stored(size, error_size, "cpu")[0][:size].double()
    plain = dfa.Feedback(
        spec.kind, spec.storage, seed=spec.seed, dtype=spec.dtype, nonzeros=spec.nonzeros, normalize=False
    )
    return plain.matrix(size, error_size).double()


def scaled(feedback: dfa.Feedback, size: int, error_size: int) -> Tensor:
    """B [size, E] in float64."""
    scale = 1 / math.sqrt(size * error_size) if feedback.spec.normalize else 1.0
    return entries(feedback, size, error_size) * (feedback.spec.gain * scale)


def some_feedback(random: Random) -> dict[str, Any]:
    return {
        "place": random.choice(FEEDBACKS),
        "seed": random.randrange(2**64),
        "normalize": random.choice([True, False]),
        "gain": random.choice([1.0, -0.5, 3.0]),
        "nonzeros": random.choice([None, 1, 2, 5, 9]),
    }


def feedback_of(options: dict[str, Any], error_size: int) -> dfa.Feedback:
    rest = {name: value for name, value in options.items() if name != "place"}
    return make_feedback(*options["place"], error_size=error_size, **rest)


# Hypothesis repeats parts of an example in the next ones, which is good for finding what makes text or lists special,
# but leaves few different networks. So it only draws the seed.
randoms = st.randoms(use_true_random=True)
FRESH: dict[str, Any] = {"deadline": None, "derandomize": True, "phases": [Phase.generate]}


def some_network(random: Random, kernel: str, most_hidden: int = 5) -> dict[str, Any]:
    """All of a call but its numbers. Without hidden layers there is an output layer."""
    feedback = some_feedback(random)
    # The plan leaves Fastfood of larger errors to the other kernel, and at several positions.
    small = kernel == "strip" and feedback["place"][0] == "fastfood"
    positions = [1] if small else [1, 1, 1, 2, 3]
    hidden = random.randint(0, most_hidden)
    has_output = hidden == 0 or random.random() < 0.5
    return {
        "layers": [_some_layer(random, positions) for _ in range(hidden)],
        "output_width": random.choice(WIDTHS) if has_output else None,
        "rows": random.choice(BATCHES),
        "error_size": random.choice(ERROR_SIZES if small else ERROR_SIZES + LARGE_ERROR_SIZES),
        "error_layout": random.choice(["plain", "plain", *LAYOUTS, "one row", "one number"]),
        "feedback": feedback,
        "wanted": _some_wanted(random, hidden + has_output),
        "config": random.randrange(5),
        "seed": random.randrange(10**6),
    }


def _some_layer(random: Random, positions: list[int]) -> dict[str, Any]:
    return {
        "case": random.choice(CASES),
        "width_in": random.choice(WIDTHS),
        "width_out": random.choice(WIDTHS),
        "positions": random.choice(positions),
        "mask": random.choice([False, False, True]),
        "layout": random.choice(["plain", *LAYOUTS]),
    }


def _some_wanted(random: Random, layers: int) -> tuple[list[bool], list[bool]]:
    """Of weights and of biases; at least one gradient."""
    weights, biases = ([random.random() < 2 / 3 for _ in range(layers)] for _ in range(2))
    return ([True] * layers if not any(weights + biases) else weights), biases


def plain_layer(
    case: tuple[str, float, float] = ("tanh", 0.0, 0.0),
    width_in: int = 19,
    width_out: int = 21,
    positions: int = 1,
    mask: bool = False,
    layout: str = "plain",
) -> dict[str, Any]:
    """A hidden layer of `plain_network`."""
    return {
        "case": case, "width_in": width_in, "width_out": width_out, "positions": positions, "mask": mask,
        "layout": layout,
    }  # fmt: skip


def plain_network(layers: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A small network as `some_network` makes them, with an output layer and all gradients wanted."""
    every = [True] * (len(layers) + 1)
    feedback = {"place": ("gaussian", "dense"), "seed": 5, "normalize": True, "gain": 1.0, "nonzeros": None}
    network = {
        "layers": layers, "output_width": 18, "rows": 17, "error_size": 10, "error_layout": "plain",
        "feedback": feedback, "wanted": (every, every), "config": 0, "seed": 0,
    }  # fmt: skip
    return {**network, **changes}


def keep(case: tuple[str, float, float], a: Tensor) -> Tensor:
    """What a fused segment keeps of the pre-activation a."""
    row = ACTIVATIONS[case[0]]
    return row.apply(a.clone(), *case[1:]) if row.keeps_output(*case[1:]) else a


@dataclass
class Call:
    """One call of `layer_grads`, and what the oracle needs to know of it."""

    feedback: dfa.Feedback
    error: Tensor
    inputs: list[Tensor]
    pre: list[Tensor]
    saved: list[Tensor]
    masks: list[Tensor | None]
    cases: list[tuple[str, float, float]]
    wanted: tuple[list[bool], list[bool]]

    def arguments(self) -> LayerCall:
        """What the operators take."""
        rows = self.error.shape[0]
        widest = max((a.numel() // rows if rows else a.shape[1] for a in self.pre), default=1)
        stored = self.feedback.stored(widest, self.error.shape[1], DEVICE)
        names, numbers = [case[0] for case in self.cases], [number for case in self.cases for number in case[1:]]
        return LayerCall(
            self.error, stored, self.feedback.spec, self.inputs, self.saved, self.masks, names, numbers, *self.wanted,
        )  # fmt: skip

    def reference(self) -> list[LayerGrad]:
        """Every layer's gradients by the formulas, in float64."""
        e = self.error.cpu().double()
        return [self._reference(i, e) for i in range(len(self.inputs))]

    def _reference(self, i: int, e: Tensor) -> LayerGrad:
        x = self.inputs[i].cpu().double()
        if i == len(self.saved):
            return layer_gradient(Layer(x), x, x, e, None, True)
        a, mask = self.pre[i].double(), self.masks[i]
        layer = Layer(x, None, *self.cases[i], None if mask is None else mask.cpu().double())
        size = a.numel() // e.shape[0] if e.shape[0] else a.shape[1]
        return layer_gradient(layer, x, a, e, scaled(self.feedback, size, e.shape[1]), True)

    def wanted_gradients(self) -> list[tuple[str, Tensor, float]]:
        """(name, gradient, size of its terms) of those asked for, in the order of the operators."""
        found = []
        for i, (gradient, weight, bias) in enumerate(zip(self.reference(), *self.wanted, strict=True)):
            found += [(f"W{i}", gradient.weight, gradient.weight_scale)] if weight else []
            found += [(f"b{i}", gradient.bias, gradient.bias_scale)] if bias else []
        return found


def make_call(network: dict[str, Any], dtype: torch.dtype = torch.float32) -> Call:
    torch.manual_seed(network["seed"])
    rows, error_size = network["rows"], network["error_size"]
    inputs, pre, saved, masks = [], [], [], []
    for layer in network["layers"]:
        long, layout = rows * layer["positions"], layer["layout"]
        a = torch.randn(long, layer["width_out"], dtype=dtype)
        inputs.append(lay(torch.randn(long, layer["width_in"], dtype=dtype), layout))
        pre.append(a)
        saved.append(lay(keep(layer["case"], a), layout))
        masks.append(lay(torch.randint(2, a.shape).to(dtype) * 1.25, layout) if layer["mask"] else None)
    if network["output_width"] is not None:
        inputs.append(lay(torch.randn(rows, network["output_width"], dtype=dtype), "offset"))
    error = lay_error(torch.randn(rows, error_size, dtype=dtype), network["error_layout"])
    cases = [layer["case"] for layer in network["layers"]]
    return Call(
        feedback_of(network["feedback"], error_size), error, inputs, pre, saved, masks, cases, network["wanted"]
    )
