"""The two phases of a launch: whoever reads δ has waited for it. The interpreter runs one program after the other, so
that a wait too few changes no number there; here every access to δ is held against the counters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from triton.runtime import interpreter
from triton_cases import forced, make_call, plain_layer, plain_network, watched

from dfa_kernels.backends import triton as triton_backend
from dfa_kernels.backends.triton import operators
from dfa_kernels.backends.triton.launch import INTERPRETED
from dfa_kernels.backends.triton.launch_plan import LaunchPlan

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="looks into the interpreter")


class Order:
    """What one ticket after the other did: which counters it waited for, which δ it read and wrote, what it announced.

    δ is named by the counter that tells when it is ready.
    """

    def __init__(self, plan: LaunchPlan, tensors: tuple[Any, ...]) -> None:
        arguments, problem = plan.arguments, plan.problem
        self.row_tiles = -(-problem.projected.rows // arguments["BLOCK_R"])
        self.block = arguments["BLOCK_U"]
        self.unit_tiles = -(-problem.widest // self.block)
        self.copies = plan.copy_width > 0
        self.problem, self.counters, self.rooms = problem, tensors[0], tensors[6]
        self.announced = np.zeros(plan.counters, dtype=int)
        self.read: set[int] = set()
        self._next_ticket()

    def _next_ticket(self) -> None:
        self.waited: set[int] = set()
        self.written: set[int] = set()
        self.has_announced = False

    def ready_counters(self, pointers: Any, mask: Any) -> set[int]:
        """The counters of the elements of δ among what is accessed."""
        found: set[int] = set()
        at = pointers.data[mask.data.astype(bool)].astype(np.int64)
        for i, room in enumerate(self.rooms):
            offset = at[(at >= room.data_ptr()) & (at < room.data_ptr() + room.nbytes)] - room.data_ptr()
            row, out = np.divmod(offset // room.itemsize, room.shape[1])
            if i < self.problem.hidden:
                unit = row % self.problem.positions[i] * room.shape[1] + out
                found |= set((1 + unit // self.block).tolist())
            elif self.copies:
                found |= set((1 + self.unit_tiles + out // self.block).tolist())
        return found

    def load(self, pointers: Any, mask: Any) -> None:
        read = self.ready_counters(pointers, mask)
        assert read <= self.waited, "δ is read before it is complete"
        self.read |= read

    def store(self, pointers: Any, mask: Any) -> None:
        written = self.ready_counters(pointers, mask)
        assert not (written and self.has_announced), "δ is written after it was said to be complete"
        self.written |= written

    def add(self, pointer: Any, value: Any, before: Any) -> None:
        counter = (int(pointer.data.item()) - self.counters.data_ptr()) // 4
        if counter == 0:
            self._next_ticket()
        elif value.data.item():
            assert self.written == {counter}, "δ of other units than was written is said to be complete"
            self.announced[counter] += 1
            self.has_announced = True
        elif before.data.item() == self.row_tiles:
            self.waited.add(counter)


@contextmanager
def followed() -> Iterator[list[Order]]:
    """Launches of the kernel with two phases, followed step by step."""
    orders: list[Order] = []
    builder, start = interpreter.InterpreterBuilder, operators.launch
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def followed_launch(plan: LaunchPlan, device: torch.device, tensors: Any, *rest: Any) -> None:
        orders.append(Order(plan, tensors))
        start(plan, device, tensors, *rest)

    def followed_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        orders[-1].load(pointers, mask)
        return load(self, pointers, mask, *rest)

    def followed_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        orders[-1].store(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def followed_add(self: Any, operation: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        before = atomic(self, operation, pointer, value, *rest)
        orders[-1].add(pointer, value, before)
        return before

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(operators, "launch", followed_launch))
        stack.enter_context(mock.patch.object(builder, "create_masked_load", followed_load))
        stack.enter_context(mock.patch.object(builder, "create_masked_store", followed_store))
        stack.enter_context(mock.patch.object(builder, "create_atomic_rmw", followed_add))
        yield orders


NETWORKS: dict[str, dict[str, Any]] = {
    "a row": plain_network([plain_layer(width_out=35), plain_layer(width_out=50)], rows=1),
    "tiles that end within others": plain_network([plain_layer(width_out=70), plain_layer(width_out=45)], rows=33),
    "several positions": plain_network([plain_layer(width_out=27, positions=3), plain_layer(width_out=70)]),
    "an error that is copied": plain_network([plain_layer(width_out=35)], error_size=131, output_width=33),
    "an error that is not": plain_network([plain_layer(width_out=35)], error_size=144, output_width=33),
    "no output layer": plain_network([plain_layer(width_out=70)], output_width=None, wanted=([True], [True])),
    "no hidden layer": plain_network([], error_size=67),
    "empty batch": plain_network([plain_layer(width_out=35)], rows=0),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("config", range(4))
def test_delta_is_complete_before_it_is_read(network: dict[str, Any], config: int) -> None:
    call = make_call(network)
    with forced("two_phase", config), watched(), followed() as orders:
        triton_backend.layer_grads(call.arguments(), torch.float32)
    (order,) = orders
    assert (order.announced[1:] == order.row_tiles).all()
    assert len(order.read) == (order.row_tiles > 0) * (len(order.announced) - 1)
