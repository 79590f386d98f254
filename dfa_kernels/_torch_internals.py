"""What this package reads of torch that torch does not promise to keep: one function each, one test each."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._C._dynamo.guards import TensorGuards
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._pytree import tree_map_only

F = TypeVar("F", bound=Callable[..., Any])


def backward_reaches(nodes: Iterable[Any]) -> list[bool]:
    """Within a backward pass: whether it runs these nodes of the graph, which hand parameters their gradients."""
    try:
        return [*map(torch._C._will_engine_execute_node, nodes)]
    except RuntimeError as error:
        raise RuntimeError(
            "torch.autograd.grad: it cannot go through a pass whose gradients a fused optimizer computes; use "
            "backward(), or a pass within `with model.backprop():`"
        ) from error


def eager_apply(node: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``node.apply`` where no compiler and no transform of torch.func is at work, which does not look for them."""
    apply: Callable[..., Any] = super(torch.autograd.Function, node).apply  # type: ignore[misc]
    return apply


def take_saved_tensors(ctx: Any) -> tuple[Tensor, ...]:
    """Within a node's backward pass: its saved tensors, which only the caller keeps alive from then on.

    Unless the graph is retained; a compiler sees to its own memory.
    """
    saved: tuple[Tensor, ...] = ctx.saved_tensors
    if not torch.compiler.is_compiling():
        ctx.maybe_clear_saved_tensors()
    return saved


def forward_mode_is_on() -> bool:
    """Whether forward-mode differentiation is on, inside torch.compile too."""
    return forward_ad._current_level >= 0


def is_inside_ddp() -> bool:
    """Whether DistributedDataParallel runs its module's forward pass."""
    return DistributedDataParallel._active_ddp_module is not None


def step_is_observed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook, of this optimizer or of all, or a profiler waits for its steps."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or torch._C._autograd._profiler_enabled()
    )


_hooks, _late_hooks = attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks")


def any_gradient_is_awaited(parameters: Sequence[Tensor]) -> bool:
    """Whether a hook waits for the gradient of one of the parameters."""
    return any(map(_hooks, parameters)) or any(map(_late_hooks, parameters))


def add_each_(tensors: Sequence[Tensor], others: Sequence[Tensor], alpha: float) -> None:
    """tensor += alpha · other for each of them, in one call."""
    torch._foreach_add_(list(tensors), list(others), alpha=alpha)


def add_one_(tensors: Sequence[Tensor]) -> None:
    """tensor += 1 for each of them, in one call."""
    torch._foreach_add_(list(tensors), 1.0)


_fused_sgd: Callable[..., None] = torch._fused_sgd_
_fused_adamw: Callable[..., None] = torch._fused_adamw_
_UNUSED: dict[str, Any] = dict(maximize=False, grad_scale=None, found_inf=None)


def fused_sgd_(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], velocities: Sequence[Tensor], **numbers: Any
) -> None:
    """What torch.optim.SGD(fused=True) does with lr, momentum, weight_decay and nesterov, from its second step on.

    On a CPU it takes one number after the other in memory, whatever the strides say.
    """
    lists = list(parameters), list(gradients), list(velocities)
    _fused_sgd(*lists, dampening=0.0, is_first_step=False, **numbers, **_UNUSED)
    # Torch does not tell graphs that saved one of these.
    torch.autograd.graph.increment_version([*parameters, *velocities])


def fused_adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    step: float,
    **numbers: Any,
) -> None:
    """What torch.optim.AdamW(fused=True) does with lr, beta1, beta2, eps and weight_decay in this step; as above."""
    lists = list(parameters), list(gradients), list(means), list(squares)
    steps = [torch.tensor(step, dtype=torch.float32, device="cpu")] * len(means)
    _fused_adamw(*lists, [], steps, amsgrad=False, **numbers, **_UNUSED)
    torch.autograd.graph.increment_version([*parameters, *means, *squares])


def cuda_matmul_precision() -> str:
    """torch.backends.cuda.matmul.fp32_precision, for a sixth of the time."""
    precision: str = torch._C._get_fp32_precision_getter("cuda", "matmul")
    return precision


def map_tensors(change: Callable[[Any], Any], tree: Any, kind: type[Tensor] = Tensor) -> Any:
    """The tree of lists, tuples, dicts and what else is registered as one, with every tensor of that kind changed."""
    return tree_map_only(kind, change, tree)


module_calls_are_observed: Callable[[], Any] = nn.modules.module._has_any_global_hook
"""Whether a hook waits for the calls of all modules."""


def call_hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Where the module keeps the hooks that wait for its calls or their gradients, all its life."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def tensors_by_name(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Every parameter and buffer, with the dictionary of its module in which it stands by that name."""
    holders = [holder for each in module.modules() for holder in (each._parameters, each._buffers)]
    return [(holder, name, tensor) for holder in holders for name, tensor in holder.items() if tensor is not None]


def is_under_functorch() -> bool:
    """Whether a transform of torch.func (grad, vmap, …) runs what is called here."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile or its own `compile` has made the module's calls compiled ones."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def is_traced() -> bool:
    """Whether torch.jit.trace records what is called here."""
    return torch._C._get_tracing_state() is not None


def compiler_is_loaded() -> bool:
    """Whether anybody can have compiled anything."""
    return "torch._dynamo" in sys.modules


compiler_at_work: Callable[[], Any] = get_eval_frame_callback
"""The compiler that waits for the Python frames that are run here; None where none does.

It is no function of Python, whose frame would be one of them.
"""


def operators_are_watched() -> bool:
    """Whether a mode sees every operator that is called here, one of make_fx before dispatch included."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)


_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def memory_of(tensors: Iterable[Tensor]) -> set[int]:
    """What tells the pieces of memory apart that these tensors lie in; a view lies in that of its base."""
    return {tensor.untyped_storage()._cdata for tensor in tensors if has_memory(tensor)}


def lie_in(tensors: Iterable[Tensor], memory: set[int]) -> bool:
    """Whether one of these tensors, which have memory, lies in a piece of it; without a set of its own."""
    return any([tensor.untyped_storage()._cdata in memory for tensor in tensors])


has_memory: Callable[[Tensor], bool] = torch._C._has_storage
"""Whether the tensor's numbers lie in memory of its own or another's; those of a batched tensor do not."""


def is_in_memory(tensor: Tensor) -> bool:
    """Whether it is a plain tensor or parameter on the CPU, whose numbers are those in its memory."""
    keys = torch._C._dispatch_keys(tensor).raw_repr()
    return type(tensor) in (Tensor, nn.Parameter) and keys == _plain_keys()


@cache
def _plain_keys() -> int:
    with torch.inference_mode(False):
        keys: int = torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr()
    return keys


any_autocast_is_on: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is on for some kind of device."""

BelowAutograd: Callable[[], AbstractContextManager[Any]] = torch._C._AutoDispatchBelowAutograd
"""Within it no operator records a graph, and none looks whether it should, which torch.no_grad() leaves to each."""

WithoutAutocast: Callable[[], AbstractContextManager[Any]] = torch._C._DisableAutocast
"""Within it autocast is off on all devices."""


class WithoutGradients:
    """What torch.no_grad() does outside a compiler, in a third of its time."""

    def __enter__(self) -> None:
        self._before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)

    def __exit__(self, *exception: Any) -> None:
        torch._C._set_grad_enabled(self._before)


class ForcedEager:
    """What torch.compiler.set_stance("force_eager") does outside a compiler, which is loaded, in a tenth of its time.

    Within it what is compiled on its own runs as it is.
    """

    def __enter__(self) -> None:
        frames = sys.modules["torch._dynamo.eval_frame"]
        self._before, frames._stance = frames._stance, _eager_stance()  # type: ignore[attr-defined]

    def __exit__(self, *exception: Any) -> None:
        sys.modules["torch._dynamo.eval_frame"]._stance = self._before  # type: ignore[attr-defined]


@cache
def _eager_stance() -> Any:
    return sys.modules["torch._dynamo.eval_frame"].DynamoStance("force_eager")


def constant_when_compiled(function: F) -> F:
    """What torch.compiler.assume_constant_result does, which loads the compiler to do it, and that takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def show_to_modes(functions: Iterable[Any]) -> None:
    """From now on torch.compile, which is loaded, shows these functions to a TorchFunctionMode, as it shows most.

    It leaves out what `torch.overrides` calls ignored, torch.relu_ and F.tanh among them.
    """
    shown: set[Any] = sys.modules["torch._dynamo.variables.torch"].get_overridable_functions()
    shown.update(functions)


def checkpointed_region() -> Any:
    """The non-reentrant checkpoint that what is called here is inside of; None outside."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks if hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook.") else None


def raw_stream(device: int) -> int:
    """The current stream of the CUDA device with this index, as its driver takes it; without the object around it."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


Likeness = Callable[..., bool]


def likeness_of(tensors: Sequence[Tensor]) -> Likeness:
    """What tells whether so many tensors are like these: in type, dtype, device, shape, strides and requires_grad.

    Where they begin does not count. Those that are may hear no, those that are not never hear yes.
    """
    # Torch says no where a tensor is there twice, so what comes again is compared apart.
    groups: defaultdict[int, list[int]] = defaultdict(list)
    times: Counter[int] = Counter()
    for place, tensor in enumerate(tensors):
        groups[times[id(tensor)]].append(place)
        times[id(tensor)] += 1
    checks: list[tuple[Likeness, list[int]]] = [
        (TensorGuards(*[tensors[i] for i in places], dynamic_dims_sizes=None, dynamic_dims_strides=None).check, places)
        for places in groups.values()
    ]
    if len(checks) == 1:
        return checks[0][0]
    return lambda *others: all([check(*[others[i] for i in places]) for check, places in checks])
