"""Capturing a piece of a training step in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

Work = Callable[[], object]


def nothing() -> None:
    pass


def captured(run: Work, prepare: Work = nothing, restore: Work = nothing, warm_up: int = 3) -> Work:
    """A replay of `run`. `prepare` runs before it each time while it is captured, and stays outside of the graph.

    Everything happens on one side stream, because autograd runs a backward pass on the stream of its forward pass.
    `restore` undoes what the warm-up did, before the last `prepare`.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            prepare()
            run()
        restore()
        prepare()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    return _Replay(graph, run, prepare)


class _Replay:
    """Keeps alive all that the graph reads and writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, *closures: Work) -> None:
        self.graph = graph
        self.closures = closures

    def __call__(self) -> None:
        self.graph.replay()
