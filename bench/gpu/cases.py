"""The networks that are timed, how much arithmetic they are, and the tensors to time them on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfa_kernels as dfa
from bench.cpu.compare import network


@dataclass(frozen=True)
class Case:
    """Fully connected tanh layers and a batch for them. ``tf32``: float32 products may use tensor cores."""

    name: str
    inputs: int
    hidden: int
    depth: int
    classes: int
    batch: int
    dtype: str = "bfloat16"
    tf32: bool = False
    storage: str = "dense"

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.inputs, *[self.hidden] * self.depth, self.classes)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def weight_flops(self) -> int:
        """Of all weight gradients, and of a forward pass as well."""
        return sum(2 * self.batch * a * b for a, b in itertools.pairwise(self.widths))

    @property
    def chain_flops(self) -> int:
        """Of ∂L/∂h of every hidden layer, which backpropagation needs and DFA does not."""
        return sum(2 * self.batch * a * b for a, b in itertools.pairwise(self.widths[1:]))

    @property
    def projection_flops(self) -> int:
        """Of e Uᵀ."""
        return 2 * self.batch * self.classes * self.hidden

    @property
    def backward_bytes(self) -> int:
        """The fewest that a DFA backward pass moves: error, U and activations once, gradients once."""
        size = self.torch_dtype.itemsize
        activations = self.batch * (sum(self.widths[:-1]) + self.classes) * size
        parameters = sum((a + 1) * b for a, b in itertools.pairwise(self.widths)) * size
        return activations + parameters + (self.hidden * self.classes * 4 if self.storage == "dense" else 0)

    def limits(self) -> dict[str, float]:
        """How much faster than backpropagation DFA can be where only its products count."""
        weight, chain, projection = self.weight_flops, self.chain_flops, self.projection_flops
        return {
            "backward": (weight + chain) / (weight + projection),
            "step": (2 * weight + chain) / (2 * weight + projection),
        }


SMALL = Case("3072-800x3-10 b=128 tf32", 3072, 800, 3, 10, 128, "float32", tf32=True)
SMALL_IEEE = replace(SMALL, name="3072-800x3-10 b=128 fp32", tf32=False)
SMALL_HALF = replace(SMALL, name="3072-800x3-10 b=128 bf16", dtype="bfloat16", tf32=False)
DEEP = Case("784-512x20-10 b=256 tf32", 784, 512, 20, 10, 256, "float32", tf32=True)
MIDDLE = Case("784-2048x4-10 b=512 bf16", 784, 2048, 4, 10, 512)
WIDE = Case("784-4096x4-10 b=1024 bf16", 784, 4096, 4, 10, 1024)
WIDE_ERROR = Case("784-4096x4-1000 b=1024 bf16", 784, 4096, 4, 1000, 1024)
LARGE = Case("784-8192x4-10 b=4096 bf16", 784, 8192, 4, 10, 4096)
CASES = (
    SMALL,
    LARGE,
    SMALL_IEEE,
    SMALL_HALF,
    DEEP,
    WIDE,
    MIDDLE,
    WIDE_ERROR,
    Case("784-4096x4-32000 b=1024 bf16", 784, 4096, 4, 32000, 1024),
    Case("784-4096x4-32000 b=1024 bf16 procedural", 784, 4096, 4, 32000, 1024, storage="procedural"),
    Case("784-8192x4-1000 b=4096 bf16", 784, 8192, 4, 1000, 4096),
)
"""In the order of what they decide, so that what is left out for lack of time matters least."""

QUICK = (
    Case("24-16x3-10 b=8", 24, 16, 3, 10, 8, "float32"),
    Case("24-16x2-70 b=8 procedural", 24, 16, 2, 70, 8, "float32", storage="procedural"),
)


@dataclass
class Problem:
    """A case's tensors on a device. Variants work on copies of ``net``."""

    case: Case
    device: torch.device
    backend: str
    """That `dfa.DFA` is given for this project's own variants."""
    net: nn.Sequential
    x: Tensor
    y: Tensor
    error: Tensor
    """∂(mean cross-entropy)/∂output [batch, classes] at ``net``."""
    U: Tensor
    """[hidden, classes], float32, without any scale."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What a variant makes once and needs again."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def feedback(self) -> dfa.Feedback:
        """The same entries as ``U``."""
        return dfa.Feedback(storage=self.case.storage)

    def restore(self, net: nn.Module) -> None:
        """Gives a copy of ``net`` the weights it began with."""
        with torch.no_grad():
            for mine, initial in zip(net.parameters(), self.net.parameters(), strict=True):
                mine.copy_(initial)


def make_problem(case: Case, device: torch.device, backend: str) -> Problem:
    """Random data, never zeros, from a fixed seed."""
    torch.manual_seed(0)
    dtype = case.torch_dtype
    with torch.device(device):
        net = network(case.widths).to(dtype)
        x, y = torch.randn(case.batch, case.inputs, dtype=dtype), torch.randint(case.classes, (case.batch,))
    output = net(x).detach().requires_grad_()
    (error,) = torch.autograd.grad(F.cross_entropy(output, y), output)
    U = dfa.Feedback().stored(case.hidden, case.classes, device)[0][: case.hidden]
    return Problem(case, device, backend, net, x, y, error, U)
