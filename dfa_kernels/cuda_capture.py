"""Work on a stream of its own, and recorded there as a CUDA graph: all that a graphed step needs of CUDA."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_OTHERS_MAY_LOAD_DATA = "thread_local"
"""What other threads do meanwhile, those of a data loader say, is no reason for a capture to fail."""


class WaitingError(RuntimeError):
    """Work that a graph is to hold waits for the device, where a graph's host is not there to go on."""


class CudaCapture:
    """A stream, and the memory that its graphs share: they are replayed one after the other, and keep nothing in it.

    All runs are on that one stream, since autograd runs a backward pass on the stream of its forward pass, and hands
    gradients over on the one that a parameter has met first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _unused_stream(device)
        weakref.finalize(self, _unused.setdefault(device, []).append, self._stream)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], T]) -> T:
        """Runs it now, in the order of the current stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        return result

    def run_without_waiting(self, work: Callable[[], T]) -> T:
        """As `run`.

        Raises:
            WaitingError: if it waits for the device, at the line that the message names.
        """
        with _no_waiting():
            return self.run(work)

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What replays it, and its result, which each replay overwrites. Nothing runs yet."""
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=_OTHERS_MAY_LOAD_DATA)
        # A capture that fails would leave its stream behind as the current one.
        with torch.cuda.stream(self._stream), capture:
            result = work()
        return graph.replay, result

    def random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self._device)

    def set_random_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, self._device)


_unused: dict[torch.device, list[torch.cuda.Stream]] = {}
"""Streams of captures that are gone, whose graphs went with them.

Libraries keep tens of megabytes for every stream that they have ever run on, and graphs work in them: so no two that
may run at once have one stream, and no stream is made anew while there is one.
"""


def _unused_stream(device: torch.device) -> torch.cuda.Stream:
    try:
        stream = _unused.setdefault(device, []).pop()
    except IndexError:
        return torch.cuda.Stream(device)
    # The last replay of a graph that is gone may still run, on whichever stream.
    torch.cuda.synchronize(device)
    return stream


@contextmanager
def _no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise WaitingError(f"{at.filename}:{at.lineno} waits for the device") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
