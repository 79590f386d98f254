"""Memory for a call's gradients: few pieces, so that the allocator is seldom asked, each cut into some of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import ALIGNMENT

# Bytes. Memory stays until the last gradient in it goes, so large ones have their own.
LARGEST_BLOCK = 2**24


class GradientMemory:
    """Makes tensors of these shapes, each contiguous and aligned."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = shapes
        self._made: dict[tuple[torch.device, torch.dtype], tuple[list[tuple[Tensor, list[int]]], list[int]]] = {}

    def allocate(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """The tensors, in the order of the shapes. They share memory with each other, but no count of versions."""
        made = self._made.get((device, dtype))
        if made is None:
            made = self._made[device, dtype] = self._templates(device, dtype)
        templates, places = made
        pieces: list[Tensor] = []
        for template, sizes in templates:
            block = torch.empty_like(template)
            if len(sizes) > 1:
                pieces += block.unsafe_split_with_sizes(sizes)
            else:
                pieces.append(block)
        return [pieces[place] for place in places]

    def _templates(self, device: torch.device, dtype: torch.dtype) -> tuple[list[tuple[Tensor, list[int]]], list[int]]:
        """What each block is like, and the rows of its pieces; and where each of the tensors stands among the pieces.

        One number that seems to be as many: what a new tensor is to be like takes less time to say by it.
        """
        # Nothing is written to it: a kernel of torch's could not run where the CUDA library's come from PTX.
        number, blocks = torch.empty((), dtype=dtype, device=device), self.blocks(dtype)
        templates, order = [], [slot for slots in blocks for slot in slots]
        for slots in blocks:
            sizes = [self.shapes[slot][0] for slot in slots]
            templates.append((number.expand(sum(sizes), *self.shapes[slots[0]][1:]), sizes))
        return templates, [order.index(slot) for slot in range(len(order))]

    def blocks(self, dtype: torch.dtype) -> list[list[int]]:
        """Which tensors have a block together: those that differ in their rows alone."""
        sizes = [math.prod(shape) * dtype.itemsize for shape in self.shapes]
        ends_aligned = [size % ALIGNMENT == 0 for size in sizes]
        blocks: list[list[int]] = []
        filled = 0
        for slot in sorted(range(len(sizes)), key=lambda slot: (self.shapes[slot][1:], not ends_aligned[slot])):
            last = blocks[-1][-1] if blocks else slot
            alike = self.shapes[slot][1:] == self.shapes[last][1:] and ends_aligned[last]
            if not blocks or not alike or filled + sizes[slot] > LARGEST_BLOCK:
                blocks.append([])
                filled = 0
            blocks[-1].append(slot)
            filled += sizes[slot]
        return blocks
