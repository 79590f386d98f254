"""Starting a planned kernel, and the counters that some launches need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..layout import ALIGNMENT
from .kernels.wide_networks import two_phase
from .launch_plan import LaunchPlan
from .problem import Target

Arguments = Sequence[Tensor | tuple[Tensor, ...] | TensorDescriptor]
Picker = Callable[[Sequence[Any]], Any]
Hyper = tuple[tuple[float, ...] | tuple[Tensor], ...]

INTERPRETED = type(two_phase).__name__ == "InterpretedFunction"
"""Whether TRITON_INTERPRET=1 was set when the kernels were made, so that they run on the CPU, slowly."""


@cache
def target_of(device: torch.device) -> Target:
    """What to plan for on this device. The interpreter is given four multiprocessors."""
    if device.type != "cuda":
        return Target(80, 4)
    properties = torch.cuda.get_device_properties(device)
    return Target(properties.major * 10 + properties.minor, properties.multi_processor_count)


def launch(plan: LaunchPlan, device: torch.device, tensors: Arguments, hyper: Hyper = ()) -> None:
    """One launch of the plan's kernel, on the current stream of the device that the tensors are on."""
    if INTERPRETED:
        plan.kernel[(plan.programs,)](*tensors, *plan.numbers, *hyper, *plan.constants)
    elif device.index == torch.cuda.current_device():
        _launch(plan, device.index, tensors, hyper)
    else:
        with torch.cuda.device(device):
            _launch(plan, device.index, tensors, hyper)


def launch_compiled(
    plan: LaunchPlan,
    device: torch.device,
    tensors: tuple[Tensor, ...],
    pickers: Sequence[Picker],
    numbers: tuple[float, ...] | tuple[Tensor],
) -> bool:
    """Whether the kernel is compiled and takes these tensors as they are; then it has started.

    pickers: make each argument of the tensors one after the other.
    """
    run = plan.compiled.get(device.index)
    if run is None or device.index != torch.cuda.current_device():
        return False
    addresses = tuple(map(_ADDRESS, tensors))
    in_memory = (numbers[0].data_ptr(),) if isinstance(numbers[0], Tensor) else ()
    if gcd(ALIGNMENT, *addresses, *in_memory) != ALIGNMENT:
        return False
    run(*[pick(addresses) for pick in pickers], *plan.numbers, in_memory or numbers, *plan.constants)
    return True


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Within it kernels start on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_device(device: torch.device) -> None:
    """ValueError for a device on which no kernel can run."""
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        raise ValueError(
            f"backend: 'triton' got tensors on {device}, expected cuda; on a CPU use 'auto' or 'torch', or set "
            "TRITON_INTERPRET=1 before the import to have the kernels interpreted, slowly"
        )


def _launch(plan: LaunchPlan, device: int, tensors: Arguments, hyper: Hyper) -> None:
    """Through Triton's compiler at first; from then on straight to the compiled kernel, with plain addresses.

    Tensors at other than multiples of 16 always go through it: what it makes depends on which of them do not.
    """
    addresses: list[Any] = []
    common = ALIGNMENT
    before: Any = None
    address: Any = None
    for argument in tensors:
        if argument is not before:
            before = argument
            if isinstance(argument, tuple):
                address = tuple(map(_ADDRESS, argument))
                common = gcd(common, *address)
            elif isinstance(argument, Tensor):
                address = argument.data_ptr()
                common = gcd(common, address)
            else:
                # What the copy engine takes is made of a descriptor by the compiled kernel. It begins at a multiple of
                # 16 bytes.
                address = argument
        addresses.append(address)
    numbers: Any = hyper
    if hyper and isinstance(hyper[0][0], Tensor):
        address = hyper[0][0].data_ptr()
        common = gcd(common, address)
        numbers = ((address,),)
    if plan.uses_tma:
        # The allocator is a context variable, so it is set here, on whichever thread autograd runs.
        triton.set_allocator(_scratch)
    aligned = common == ALIGNMENT
    if aligned and (run := plan.compiled.get(device)):
        run(*addresses, *plan.numbers, *numbers, *plan.constants)
        return
    grid = (plan.programs, 1, 1)
    compiled = plan.kernel[grid](*tensors, *plan.numbers, *hyper, *plan.constants, **plan.options)
    if aligned:
        plan.compiled[device] = compiled[grid]


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


_ADDRESS = Tensor.data_ptr

_counters: dict[tuple[Any, ...], Tensor] = {}


def counters(n: int, device: torch.device) -> Tensor:
    """At least n int32 zeros that nothing running beside this stream uses. The launch leaves zeros behind.

    A graph under capture gets its own, zeroed by the graph: it may be replayed on any stream.
    """
    if device.type != "cuda":
        return torch.zeros(n, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(n, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    saved = _counters.get(key)
    if saved is None or saved.numel() < n:
        saved = _counters[key] = torch.zeros(max(n, 4096), dtype=torch.int32, device=device)
    return saved
