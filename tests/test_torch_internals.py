"""What is read of torch without its promise: that it still says what the package takes it to say."""

from __future__ import annotations

import subprocess
import sys
import time
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dfa_kernels import _torch_internals


def nothing(*_: Any) -> None:
    return None


def test_backward_reaches():
    """Else a fused optimizer would enter a gradient of a backward pass that was for something else."""
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    seen = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            seen.append(_torch_internals.backward_reaches([node for node, _ in ctx.next_functions]))
            return gradient * 2, gradient

    Node.apply(x, w).sum().backward(inputs=[x])
    Node.apply(x, w).sum().backward(inputs=[w])
    Node.apply(x, w).sum().backward()
    assert seen == [[True, False], [False, True], [True, True]]


@pytest.mark.parametrize("retain_graph", [False, True])
def test_take_saved_tensors(retain_graph):
    """Else every activation would live as long as the backward pass of the whole network."""
    x = torch.ones(2, requires_grad=True)
    alive = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x * 2)
            return x * 3

        @staticmethod
        def backward(ctx, gradient):
            (saved,) = _torch_internals.take_saved_tensors(ctx)
            storage = weakref.ref(saved.untyped_storage())
            assert saved.tolist() == [2, 2]
            del saved
            alive.append(storage() is not None)
            return gradient

    Node.apply(x).sum().backward(retain_graph=retain_graph)
    assert alive == [retain_graph]


def test_forward_mode_is_on():
    """Else a compiled Hadamard transform would have no tangent."""
    assert not _torch_internals.forward_mode_is_on()
    with forward_ad.dual_level():
        assert _torch_internals.forward_mode_is_on()


def test_is_inside_ddp(tmp_path):
    """Else the gradients that a fused optimizer defers would not be reduced, silently."""
    seen = []

    class Net(nn.Linear):
        def forward(self, x):
            seen.append(_torch_internals.is_inside_ddp())
            return super().forward(x)

    net = Net(2, 2)
    net(torch.ones(1, 2))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        DistributedDataParallel(net)(torch.ones(1, 2))
    finally:
        torch.distributed.destroy_process_group()
    assert seen == [False, True]


@pytest.mark.parametrize(
    "register",
    [
        lambda optimizer: optimizer.register_step_pre_hook(nothing),
        lambda optimizer: optimizer.register_step_post_hook(nothing),
        lambda optimizer: register_optimizer_step_pre_hook(nothing),
        lambda optimizer: register_optimizer_step_post_hook(nothing),
    ],
    ids=["own, before", "own, after", "global, before", "global, after"],
)
def test_step_is_observed_by_a_hook(register):
    """Else a fused optimizer's step would not run it."""
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    assert not _torch_internals.step_is_observed(optimizer)
    handle = register(optimizer)
    assert _torch_internals.step_is_observed(optimizer)
    handle.remove()
    assert not _torch_internals.step_is_observed(optimizer)


def test_step_is_observed_by_a_profiler():
    """Else a fused optimizer's step would be missing from its record."""
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    with torch.profiler.profile():
        assert _torch_internals.step_is_observed(optimizer)


def test_any_gradient_is_awaited():
    """Else a deferred gradient, which never exists, would leave the hook without a call."""
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
        assert not _torch_internals.any_gradient_is_awaited(parameters)
        getattr(parameters[1], register)(nothing)
        assert _torch_internals.any_gradient_is_awaited(parameters), register


def test_any_autocast_is_on():
    """Else a pass under autocast would be taken for one like the last."""
    assert not _torch_internals.any_autocast_is_on()
    with torch.autocast("cpu"):
        assert _torch_internals.any_autocast_is_on()
        with torch.autocast("cpu", enabled=False):
            assert not _torch_internals.any_autocast_is_on()


def test_operators_are_watched():
    """Else what counts or records operators would miss those of gradients."""
    assert not _torch_internals.operators_are_watched()
    with FlopCounterMode(display=False):
        assert _torch_internals.operators_are_watched()
    seen = []

    def function(x):
        seen.append(_torch_internals.operators_are_watched())
        return x + 1

    make_fx(function, pre_dispatch=True)(torch.ones(2))
    assert seen == [True]


def test_is_in_memory():
    """Else addresses of something else than numbers would be taken, or of nothing."""
    x = torch.randn(3, 4)
    for plain in (x, x.t(), x.requires_grad_(), nn.Parameter(x), x.detach()):
        assert _torch_internals.is_in_memory(plain)
    more = [
        torch._efficientzerotensor(2),
        torch._neg_view(x),
        x.to_sparse(),
        x.to("meta"),
        torch.ones(2, dtype=torch.cfloat),
    ]
    for other in (*more[:4], more[4].conj(), x.as_subclass(Other)):
        assert not _torch_internals.is_in_memory(other)

    def batched(row):
        assert not _torch_internals.is_in_memory(row)
        return row

    torch.vmap(batched)(x)


class Other(torch.Tensor):
    """A tensor that may be anything."""


def test_memory_of():
    """Else an update would change what another gradient is still computed from."""
    x, y = torch.randn(3, 4), torch.randn(3)
    assert _torch_internals.memory_of([x]) == _torch_internals.memory_of([x[1:].t(), nn.Parameter(x)])
    assert _torch_internals.memory_of([x]).isdisjoint(_torch_internals.memory_of([y, x.clone()]))
    assert _torch_internals.memory_of([x.to_sparse()]) == set()
    assert _torch_internals.lie_in([y, x[1:]], _torch_internals.memory_of([x]))
    assert not _torch_internals.lie_in([y, x.clone()], _torch_internals.memory_of([x]))


def test_has_memory():
    """Else the address of what has none would be asked for."""
    assert _torch_internals.has_memory(torch.ones(2))
    seen = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            seen.append(_torch_internals.has_memory(gradient))
            return gradient * 2

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Node.apply(x), x, torch.ones(3, 2), is_grads_batched=True)
    assert seen == [False]


def test_without_autocast():
    """Else the products of gradients would be rounded."""
    x = torch.ones(2, 2)
    with torch.autocast("cpu"):
        with _torch_internals.WithoutAutocast():
            assert (x @ x).dtype == torch.float32
            assert not torch.is_autocast_enabled("cpu")
        assert (x @ x).dtype == torch.bfloat16


def test_below_autograd():
    """Else an update would be refused, or seen by no graph that needs what it overwrote."""
    p = nn.Parameter(torch.ones(2, 2))
    with _torch_internals.BelowAutograd():
        assert not (p @ p).requires_grad
        p.add_(1)
        torch._foreach_add_([p], [torch.ones(2, 2)])
    assert p._version == 2
    assert p.is_leaf
    assert (p @ p).requires_grad


def test_without_gradients():
    """Else what runs within it would keep a graph, or what comes after it have none."""
    p = nn.Parameter(torch.ones(2))
    for before in (True, False):
        with torch.set_grad_enabled(before):
            with pytest.raises(ZeroDivisionError), _torch_internals.WithoutGradients():
                assert not (p * 2).requires_grad
                raise ZeroDivisionError
            assert torch.is_grad_enabled() == before


def test_eager_apply():
    """Else an output would lack its node."""

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 3

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 3

    x = torch.ones(2, requires_grad=True)
    _torch_internals.eager_apply(Node)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3, 3]


def test_module_calls_are_observed():
    """Else the short way through a Sequential, which calls no module, would not run the hook."""
    assert not _torch_internals.module_calls_are_observed()
    handle = nn.modules.module.register_module_forward_hook(nothing)
    assert _torch_internals.module_calls_are_observed()
    handle.remove()


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_call_hooks(kind):
    """As for hooks of all modules."""
    module = nn.Linear(1, 1)
    hooks = _torch_internals.call_hooks(module)
    assert not any(hooks)
    getattr(module, f"register_{kind}")(nothing)
    assert any(hooks)


def test_add_one_():
    tensors = [torch.zeros(()), torch.arange(2.0)]
    _torch_internals.add_one_(tensors)
    assert [x.tolist() for x in tensors] == [1.0, [1.0, 2.0]]


@pytest.mark.parametrize("nesterov", [False, True])
def test_fused_sgd_(nesterov: bool) -> None:
    p, g, m = (torch.randn(37, dtype=torch.float64) for _ in range(3))
    gradient = g + 0.1 * p
    velocity = 0.9 * m + gradient
    expected = p - 0.5 * (gradient + 0.9 * velocity if nesterov else velocity)
    _torch_internals.fused_sgd_([p], [g], [m], lr=0.5, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
    torch.testing.assert_close([p, m], [expected, velocity])
    assert [x._version for x in (p, g, m)] == [1, 0, 1]


def test_fused_adamw_() -> None:
    p, g, m = (torch.randn(37, dtype=torch.float64) for _ in range(3))
    v = m.square()
    mean, square = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    expected = p * (1 - 0.5 * 0.1) - 0.5 * mean / (1 - 0.9**3) / ((square / (1 - 0.99**3)).sqrt() + 1e-8)
    numbers = dict(lr=0.5, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    _torch_internals.fused_adamw_([p], [g], [m], [v], 3.0, **numbers)
    torch.testing.assert_close([p, m, v], [expected, mean, square])
    assert [x._version for x in (p, g, m, v)] == [1, 0, 1, 1]


def test_add_each_():
    """Sizes, dtypes and devices of the pairs are their own, and autograd sees that the tensors have changed."""
    tensors = [torch.ones(3), torch.ones(2, 2, dtype=torch.float64), torch.ones(0)]
    versions = [tensor._version for tensor in tensors]
    _torch_internals.add_each_(tensors, [torch.arange(3.0), torch.eye(2), torch.ones(0)], -0.5)
    assert tensors[0].tolist() == [1, 0.5, 0]
    assert tensors[1].tolist() == [[0.5, 1], [1, 0.5]]
    assert [tensor._version for tensor in tensors] == [version + 1 for version in versions]


def test_map_tensors():
    """Else a network whose inputs are in dicts or named tuples would not be run on a batch of another size."""
    packed = nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    tree = ([torch.ones(2)], {"mask": (torch.ones(3), None, "text")}, packed)
    (first,), named, again = _torch_internals.map_tensors(lambda x: x * 2, tree)
    assert first.tolist() == [2, 2]
    assert named["mask"][0].tolist() == [2, 2, 2]
    assert named["mask"][1:] == (None, "text")
    assert again.data.tolist() == [2, 2, 2]
    assert _torch_internals.map_tensors(len, [torch.ones(2), nn.Parameter(torch.ones(3))], nn.Parameter)[1] == 3


def test_is_under_functorch():
    """Else a transform of torch.func would end in an error that names no way out."""
    seen = []

    def f(x):
        seen.append(_torch_internals.is_under_functorch())
        return x.sum()

    x = torch.ones(2)
    f(x)
    torch.func.grad(f)(x)
    torch.func.vmap(f)(x[None])
    torch.func.functional_call(nn.Linear(2, 2), {}, (x,))
    f(x)
    assert seen == [False, True, True, False]


def test_is_compiled():
    """Else nobody would be told that what is compiled inside DFA runs uncompiled."""
    inside, outside = nn.Linear(1, 1), nn.Linear(1, 1)
    assert not _torch_internals.is_compiled(inside)
    inside.compile()
    assert _torch_internals.is_compiled(inside)
    assert _torch_internals.is_compiled(torch.compile(outside))
    assert not _torch_internals.is_compiled(outside)


def test_is_traced():
    """Else torch.jit.trace would end in an error that names no way out."""
    seen = []

    def f(x):
        seen.append(_torch_internals.is_traced())
        return x + 1

    torch.jit.trace(f, torch.ones(1), check_trace=False)
    f(torch.ones(1))
    assert seen == [True, False]


def test_compiler_is_loaded():
    """Else a network that is compiled inside `DFA` would be, or importing the package would load the compiler."""
    program = """
import torch, dfa_kernels
from dfa_kernels._torch_internals import compiler_is_loaded
before = compiler_is_loaded()
torch.compile(torch.sin, backend="eager")(torch.ones(1))
print(before, compiler_is_loaded())
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "True"]


def test_compiler_at_work():
    """Else what a compiler has given up would be compiled in pieces, or a pass without any would take longer."""
    seen = []

    def function(x):
        with Unknown():
            torch._dynamo.graph_break()
            if not torch.compiler.is_compiling():
                seen.append(_torch_internals.compiler_at_work() is not None)
            return x + 1

    function(torch.ones(1))
    torch.compile(function, backend="eager")(torch.ones(1))
    assert seen == [False, True]


class Unknown:
    """Compilers give up a function rather than leave such a block in its middle."""

    def __enter__(self):
        pass

    def __exit__(self, *exception):
        pass


def test_forced_eager():
    """Else a network that is compiled inside `DFA` would be."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    call = torch.compile(lambda x: x + 1, backend=backend)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="fail_on_recompile"):
        with _torch_internals.ForcedEager():
            call(torch.ones(1))
        assert not compiled
        # The caller's own stance is back.
        call(torch.ones(1))
    call(torch.ones(1))
    assert len(compiled) == 1


def test_constant_when_compiled():
    """Else the choice of a backend, which reads what a compiler cannot, would break a whole graph."""

    @_torch_internals.constant_when_compiled
    def number():
        time.sleep(0)
        return 3

    @torch.compile(backend="eager", fullgraph=True)
    def f(x):
        return x * number()

    assert f(torch.ones(1)).item() == 3


def test_checkpointed_region():
    """Else what a checkpoint computes again without cuts could stand in for what it saved."""
    seen = []

    def look(x):
        seen.append(_torch_internals.checkpointed_region())
        return x * 2

    x = torch.ones(2, requires_grad=True)
    checkpoint(lambda x: look(look(x)), x, use_reentrant=False)
    checkpoint(look, x, use_reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        look(x)
    look(x)
    assert seen[0] is not None
    assert seen[0] == seen[1] != seen[2] is not None
    assert seen[3:] == [None, None]


class Negated(TorchFunctionMode):
    """relu_ of x is −relu(x)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return -result if func is torch.relu_ else result


def test_show_to_modes():
    """Else a compiled network's torch.relu_ would be no activation."""

    def call(x):
        with Negated():
            return torch.relu_(x * 2)

    torch.compile(torch.ones_like, backend="eager")(torch.ones(2))
    _torch_internals.show_to_modes([torch.relu_])
    assert torch.compile(call, backend="eager", fullgraph=True)(torch.ones(2)).tolist() == [-2, -2]


def test_tensors_by_name():
    """Else a graphed step would not see that a parameter or a buffer was replaced."""
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3))
    found = {name: tensor for _, name, tensor in _torch_internals.tensors_by_name(net)}
    assert found.keys() == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    held = [(holder, name) for holder, name, tensor in _torch_internals.tensors_by_name(net) if tensor.dim() == 2]
    net[0].weight = nn.Parameter(torch.zeros(3, 2))
    ((holder, name),) = held
    assert holder[name] is net[0].weight


def test_cuda_matmul_precision():
    """Else products would be split, or not, whatever the setting says."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert _torch_internals.cuda_matmul_precision() == setting
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    torch.set_float32_matmul_precision("high")
    try:
        assert _torch_internals.cuda_matmul_precision() == torch.backends.cuda.matmul.fp32_precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_likeness_of():
    """Else a launch would take tensors for what others were."""
    shape, memory = (4, 8), torch.zeros(65)
    first, second = torch.zeros(shape), torch.zeros(shape)
    is_like = _torch_internals.likeness_of([first, second])
    with torch.no_grad():
        assert is_like(second, torch.ones(shape))
    assert is_like(first, memory[1:33].view(shape))
    others = [
        torch.zeros(8, 4),
        torch.zeros(32),
        torch.zeros(8, 4).t(),
        torch.zeros(4, 16)[:, ::2],
        torch.zeros(shape, dtype=torch.int32),
        torch.zeros(shape, dtype=torch.float16),
        torch.zeros(shape, device="meta"),
        nn.Parameter(torch.zeros(shape)),
    ]
    for other in others:
        assert not is_like(first, other)
        assert not is_like(other, second)
    first.data = torch.zeros(8, 4).t()
    assert not is_like(first, second)
    assert not _torch_internals.likeness_of([torch.zeros(0, 4)])(torch.zeros(0, 5))
    assert _torch_internals.likeness_of([])()


def test_likeness_of_tensors_that_are_there_twice():
    small, large = torch.zeros(2, 3), torch.zeros(4, 3)
    is_like = _torch_internals.likeness_of([small, large, small, small, large])
    assert is_like(small, large, small, small, large)
    assert is_like(small, large, *[t.clone() for t in (small, small, large)])
    for i, wrong in enumerate([large, small, large, large, small]):
        others = [small, large, small, small, large]
        others[i] = wrong.clone()
        assert not is_like(*others)


@pytest.mark.gpu
def test_raw_stream():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert _torch_internals.raw_stream(torch.cuda.current_device()) == stream.cuda_stream
    assert _torch_internals.raw_stream(torch.cuda.current_device()) == torch.cuda.current_stream().cuda_stream
