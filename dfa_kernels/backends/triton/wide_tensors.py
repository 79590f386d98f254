"""The tensors of `deltas` and of what reads δ after it: workspace, and descriptors for the copy engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..torch_backend import Layer
from .configs import ProducerConfig
from .launch import Arguments
from .launch_plan import LaunchPlan
from .plan_gemm import MOST_VIEWS


def tensors_of_both(
    plan: LaunchPlan,
    error: Tensor,
    stored: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
    dropout_mask: tuple[Tensor, ...],
) -> tuple[Arguments, Arguments]:
    """What `deltas` takes, and what `grouped_gemm` takes before the tensors that results go to."""
    delta, output, sums = workspace(plan, error, inputs)
    factors: tuple[Any, ...] = (delta, output, inputs, *inputs[:1] * MOST_VIEWS)
    if plan.uses_tma:
        factors = _views(plan, error.shape[0], delta, output, inputs)
    return (error, stored, saved, dropout_mask, delta, output, sums), (*factors, sums)


def workspace(plan: LaunchPlan, error: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """δ of all hidden layers, of the output layer, and the sums of δ over parts of the batch."""
    rows, dtype = error.shape[0], inputs[0].dtype
    delta = torch.empty(rows * plan.delta_row, dtype=dtype, device=error.device)
    # Without an output layer anything of the same type stands in for its δ.
    output = error if len(inputs) > plan.problem.hidden else delta
    if plan.copy_width:
        output = torch.empty((rows, plan.copy_width), dtype=dtype, device=error.device)
    return delta, output, torch.empty(plan.sums, dtype=torch.float32, device=error.device)


def layers_of(
    plan: LaunchPlan, inputs: tuple[Tensor, ...], delta: Tensor, output: Tensor, sums: Tensor
) -> Iterator[Layer]:
    """One layer after the other, from the workspace that `plan_products` has filled."""
    problem, parts, first_sum = plan.problem, plan.arguments["parts"], 0
    rows, hidden = problem.projected.rows, problem.hidden
    deltas = delta.split([rows * size for size in problem.sizes])
    for i, (x, width, positions) in enumerate(zip(inputs, problem.widths_out, problem.positions, strict=True)):
        own = deltas[i].view(rows * positions, width) if i < hidden else output[:, :width]
        n = parts * positions * (problem.biases >> i & 1)
        yield own, x, sums[first_sum : first_sum + n * width].view(n, width)
        first_sum += n * width


def _views(plan: LaunchPlan, rows: int, delta: Tensor, output: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Descriptors of δ of all hidden layers, of the output layer's, and of each layer's input."""
    given, hidden = plan.arguments, plan.problem.hidden
    block_m, block_n, block_k = (given[f"BLOCK_{side}"] for side in "MNK")
    width, stride = plan.delta_row // hidden, given["delta_stride"]
    tile, view = [1, block_k, block_m], _maker_of_views(plan)
    of_hidden = of_output = view(delta, [hidden, rows, width], [rows * width, width, 1], tile)
    if len(inputs) > hidden:
        of_output = view(output, [1, rows, given["delta_width"]], [rows * stride, stride, 1], tile)
    of_inputs = [view(x, [rows, x.shape[1]], [x.shape[1], 1], [block_k, block_n]) for x in inputs]
    return (of_hidden, of_output, inputs[:1], *of_inputs, *of_inputs[:1] * (MOST_VIEWS - len(inputs)))


def _maker_of_views(plan: LaunchPlan) -> Any:
    if not isinstance(plan.config, ProducerConfig):
        return TensorDescriptor
    from .kernels.grouped_gemm_producer import descriptor

    return descriptor
