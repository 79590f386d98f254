"""Which way a call goes: in how many launches, with what copied first, or to the torch backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_triton_plan import H200, meta
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import DEVICE, forced, watched

import dfa_kernels as dfa
from dfa_kernels.backends.calls import LayerCall
from dfa_kernels.backends.gradient_memory import LARGEST_BLOCK, GradientMemory
from dfa_kernels.backends.triton import operators
from dfa_kernels.backends.triton.route import MOST_LAYERS, looks_of, route_of


def deep(hidden: int) -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Linear(4, 4, bias=i % 3 > 0) for i in range(hidden)]
    return nn.Sequential(*[m for linear in first for m in (linear, nn.Tanh())], nn.Linear(4, 3)).to(DEVICE)


@pytest.mark.parametrize("hidden", [MOST_LAYERS - 1, MOST_LAYERS, 2 * MOST_LAYERS + 2])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, dfa.optim.SGD, dfa.optim.AdamW])
def test_any_number_of_layers_learns(hidden, optimizer):
    """One launch as far as they fit into one; then as few as possible."""
    results = []
    for backend in ("torch", "triton"):
        model = dfa.DFA(deep(hidden), backend=backend)
        own = optimizer(model.parameters() if optimizer is torch.optim.SGD else model, lr=0.1)
        with watched() as seen:
            model(torch.ones(2, 4, device=DEVICE)).square().sum().backward()
            own.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert len(seen.kernels) == -(-(hidden + 1) // MOST_LAYERS)
    assert (f"in {len(seen.kernels)} parts" in str(model.plan())) == (len(seen.kernels) > 1)
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def half_call(error: torch.Tensor) -> LayerCall:
    """A layer of 64 × 64 in bfloat16 and an output layer, all rows of them multiples of 16 bytes."""
    x, h = (meta(32, 64, dtype=torch.bfloat16) for _ in range(2))
    spec = dfa.Feedback(storage="procedural").spec
    return LayerCall(error, [], spec, [x, h], [h], [None], ["tanh"], [0.0, 0.0], [True] * 2, [True] * 2)


def test_an_error_that_tma_cannot_read_is_copied():
    """It begins elsewhere than at a multiple of 16 bytes, or all its rows are one."""
    wide = torch.zeros(32, 136, dtype=torch.bfloat16)
    plain, offset, repeated = wide[:, :128], wide[:, 4:132], wide[:1, :128].expand(32, 128)
    for error, copied in ((plain, False), (offset, True), (repeated, True)):
        with forced("two_phase"):
            plan = route_of(looks_of(half_call(error), torch.float32, "store"), H200).plan
        assert plan is not None
        assert plan.uses_tma
        assert (plan.copy_width > 0) == copied


def test_inputs_that_tma_cannot_read_are_copied():
    memory = torch.randn(65)
    for first, same in ((0, True), (1, False)):
        x = memory[first : first + 64].view(8, 8)
        found = operators._for_tma(x)
        assert torch.equal(found, x)
        assert found.data_ptr() % 16 == 0
        assert (found is x) == same


def test_dtypes_that_the_kernels_lack_go_to_torch():
    call = half_call(meta(32, 128, dtype=torch.bfloat16))
    for dtype, reason in ((torch.float64, "not in float64"), (None, "have gaps in memory")):
        route = route_of(looks_of(call, dtype, "store"), H200)
        assert route.plan is None
        assert reason in route.reason
    mask = torch.zeros(32, 64, device="meta")
    route = route_of(looks_of(call._replace(dropout_mask=[mask]), torch.float32, "store"), H200)
    assert "activations differ in dtype: bfloat16, float32" in route.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [8, 9])
def test_gradients_of_one_width_come_from_one_block(width, dtype):
    """Each of them by itself, where a kernel's fast way may begin: at a multiple of 16 bytes."""
    net = [meta(4, width, dtype=dtype) for _ in range(4)]
    spec = dfa.Feedback(storage="procedural").spec
    wanted = [True] * 4
    call = LayerCall(
        meta(4, 3, dtype=dtype), [], spec, net, net[:3], [None] * 3, ["tanh"] * 3, [0.0] * 6, wanted, wanted
    )
    route = route_of(looks_of(call, dtype, "store"), H200)
    for _ in range(2):
        grads = route.memory.allocate(DEVICE, dtype)
        shapes = [shape for out in (width, width, width, 3) for shape in ((out, width), (out,))]
        assert [tuple(grad.shape) for grad in grads] == shapes
        for i, grad in enumerate(grads):
            grad.fill_(i)
        for i, grad in enumerate(grads):
            assert grad.is_contiguous()
            assert grad.dtype == dtype
            assert (grad == i).all()
            assert grad.data_ptr() % 16 == 0
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == (2 if width == 8 else 8)
    versions = [grad._version for grad in grads]
    grads[0].zero_()
    assert [grad._version for grad in grads] == [versions[0] + 1, *versions[1:]]


def test_large_gradients_go_one_by_one():
    """Else the last one of them would keep the memory of all."""
    rows = LARGEST_BLOCK // (64 * 4)
    memory = GradientMemory([(rows, 64), (rows,), (4, 64), (8,), (rows - 4, 64)])
    assert memory.blocks(torch.float32) == [[1, 3], [0], [2, 4]]
    grads = memory.allocate(torch.device("meta"), torch.float32)
    assert [tuple(grad.shape) for grad in grads] == memory.shapes


class Called(TorchDispatchMode):
    """Names of the operators that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_memory_for_gradients_takes_no_kernel():
    """No kernel of torch's runs where a driver is told to compile PTX, which the CUDA library is checked under."""
    with Called() as called:
        GradientMemory([(8, 4), (8,), (2, 4)]).allocate(DEVICE, torch.float32)
    assert called.names == {"empty", "expand", "empty_like", "unsafe_split_with_sizes"}


def test_every_optimizer_of_torch_takes_such_gradients():
    """Clipping, adding up, zeroing and dropping them, too."""
    results = []
    for backend in ("torch", "triton"):
        model = dfa.DFA(deep(3), backend=backend)
        own = torch.optim.Adam(model.parameters(), lr=0.1)
        for i in range(3):
            own.zero_grad(set_to_none=i != 1)
            for _ in range(2):
                model(torch.ones(2, 4, device=DEVICE)).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            own.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
