"""`grouped_gemm` of sm_90 in half precision, with a warp of its own that loads: written in Gluon, Triton's lower level.

The loading warp runs ahead through the tiles of all its program's turns, so that the first tiles of the next gradient
come while this one's epilogue still writes. What needs no layout is the other kernels' own code.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .epilogue import finish
from .tiles import locate, multiple, pick, pick_flag

# From Triton 3.9 on it has another name.
copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

REGISTERS_TO_LOAD: gl.constexpr = gl.constexpr(40)
"""Of a thread of the loading warp; those that multiply share the rest."""


def shared_layout(rank: int) -> gl.NVMMASharedLayout:
    """Of tiles of 16-bit numbers, for the copy engine and for products."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def descriptor(tensor: Tensor, shape: list[int], strides: list[int], tile: list[int]) -> TensorDescriptor:
    """As triton.tools.tensor_descriptor's, of what this kernel takes."""
    return TensorDescriptor(tensor, shape, strides, tile, shared_layout(len(tile)))


@gluon.jit
def _load(
    delta, output_delta, views, delta_ring, x_ring, full, empty, rows, widths_in, widths_out, total,
    OUTPUT: gl.constexpr, WEIGHTS: gl.constexpr, BIASES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills slots of both rings as they become empty, for all tiles of this program."""
    LAYERS: gl.constexpr = len(widths_in)
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        layer, m, n = locate(tile, widths_in, widths_out, BLOCK_M, BLOCK_N, GROUP_M, WEIGHTS, BIASES)
        for first in range(0, rows, BLOCK_K):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            arrived = full.index(slot)
            mbarrier.expect(arrived, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            for i in gl.static_range(LAYERS):
                if layer == i:
                    if OUTPUT and i == LAYERS - 1:
                        copy_tile(output_delta, [0, first, m * BLOCK_M], arrived, delta_ring.index(slot))
                    else:
                        copy_tile(delta, [i, first, m * BLOCK_M], arrived, delta_ring.index(slot))
                    copy_tile(views[i], [first, n * BLOCK_N], arrived, x_ring.index(slot))
            step += 1


@gluon.jit
def _multiply(
    delta_ring, x_ring, full, empty, sums, weights, biases, weight_state0, weight_state1, bias_state0, bias_state1,
    rows, widths_in, widths_out, positions, first_sums, parts, first_error_sum, total, hyper,
    OUTPUT: gl.constexpr, WEIGHTS: gl.constexpr, BIASES: gl.constexpr, RULE: gl.constexpr, WEIGHT_SETS: gl.constexpr,
    BIAS_SETS: gl.constexpr, ALIGN: gl.constexpr, INDEX: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Products of the slots that are full, and what becomes of them."""
    ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BLOCK_N, 16]
    )
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        layer, m, n = locate(tile, widths_in, widths_out, BLOCK_M, BLOCK_N, GROUP_M, WEIGHTS, BIASES)
        gradient = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, ACCUMULATOR)
        for first in range(0, rows, BLOCK_K):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), (step // STAGES) & 1)
            delta_tile = delta_ring.index(slot).reshape([BLOCK_K, BLOCK_M])
            gradient = warpgroup_mma(delta_tile.permute((1, 0)), x_ring.index(slot), gradient, is_async=True)
            gradient = warpgroup_mma_wait(1, deps=[gradient])
            # The product before this one is done, and its slot is free.
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=first > 0)
            step += 1
        gradient = warpgroup_mma_wait(0, deps=[gradient])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        width_in = multiple(pick(widths_in, layer), ALIGN)
        width_out = pick(widths_out, layer)
        if WEIGHTS:
            _finish_slices(
                gradient, m * BLOCK_M, n * BLOCK_N, width_in, gl.where(pick_flag(WEIGHTS, layer), width_out, 0),
                pick(weights, layer), pick(weight_state0, layer), pick(weight_state1, layer), hyper,
                pick(WEIGHT_SETS, layer), RULE, INDEX,
            )  # fmt: skip
        if BIASES and n == 0:
            GRID: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [gl.num_warps(), 1], [1, 0])
            out = (m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, GRID))).to(INDEX)
            first_sum = pick(first_sums, layer)
            if OUTPUT:
                first_sum = gl.where(layer == len(widths_in) - 1, first_error_sum, first_sum)
            wanted = gl.where(pick_flag(BIASES, layer), width_out, 0)
            bias_gradient = _sum_over_parts(sums, first_sum, out, wanted, pick(positions, layer), parts, GRID)
            finish(
                bias_gradient, out, out < wanted, pick(biases, layer), pick(bias_state0, layer),
                pick(bias_state1, layer), hyper, pick(BIAS_SETS, layer), RULE,
            )  # fmt: skip


@gluon.jit
def _sum_over_parts(sums, first_sum, out, width_out, span, parts, GRID: gl.constexpr):
    """As `sum_over_tiles`: [M] of a layer's `parts` sums at outputs `out`."""
    BLOCK: gl.constexpr = out.shape[0] // 4
    total = gl.zeros((out.shape[0],), gl.float32, gl.SliceLayout(0, GRID))
    for position in range(span):
        at = sums + parts.to(out.dtype) * first_sum + position * width_out
        for first in range(0, parts, BLOCK):
            part = (first + gl.arange(0, BLOCK, gl.SliceLayout(1, GRID))).to(out.dtype)
            inside = (part < parts)[:, None] & (out < width_out)[None, :]
            read = gl.load(at + part[:, None] * (span * width_out) + out[None, :], mask=inside, other=0.0)
            total += gl.sum(read, axis=0)
    return total


@gluon.jit
def _finish_slices(
    gradient, first_out, first_in, width_in, width_out, destination, state0, state1, hyper, first,
    RULE: gl.constexpr, INDEX: gl.constexpr,
):  # fmt: skip
    """A slice of columns at a time, in a layout whose threads have 16 bytes of the destination each."""
    M: gl.constexpr = gradient.shape[0]
    N: gl.constexpr = gradient.shape[1]
    SLICE: gl.constexpr = 16 if RULE == "adamw" else 32
    if N > SLICE:
        left, right = gradient.reshape((M, 2, N // 2)).permute((0, 2, 1)).split()
        _finish_slices(
            left, first_out, first_in, width_in, width_out, destination, state0, state1, hyper, first, RULE, INDEX
        )  # fmt: skip
        _finish_slices(
            right, first_out, first_in + N // 2, width_in, width_out, destination, state0, state1, hyper, first, RULE,
            INDEX,
        )  # fmt: skip
    else:
        EACH: gl.constexpr = 128 // destination.dtype.element_ty.primitive_bitwidth
        ROWS: gl.constexpr = gl.BlockedLayout([1, EACH], [32 * EACH // N, N // EACH], [gl.num_warps(), 1], [1, 0])
        out = (first_out + gl.arange(0, M, gl.SliceLayout(1, ROWS))).to(INDEX)
        column = (first_in + gl.arange(0, N, gl.SliceLayout(0, ROWS))).to(INDEX)
        inside = (out < width_out)[:, None] & (column < width_in)[None, :]
        at = out[:, None] * width_in + column[None, :]
        finish(gl.convert_layout(gradient, ROWS), at, inside, destination, state0, state1, hyper, first, RULE)


@gluon.jit(do_not_specialize=["rows", "delta_width", "delta_stride", "parts", "first_error_sum", "total"])
def grouped_gemm_producer(
    delta, output_delta, inputs, x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15, sums, weights,
    biases, weight_state0, weight_state1, bias_state0, bias_state1, rows, widths_in, widths_out, positions,
    first_sums, delta_width, delta_stride, parts, first_error_sum, total, hyper,
    OUTPUT: gl.constexpr, WEIGHTS: gl.constexpr, BIASES: gl.constexpr, RULE: gl.constexpr, WEIGHT_SETS: gl.constexpr,
    BIAS_SETS: gl.constexpr, ALIGN: gl.constexpr, INDEX: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What `grouped_gemm` does with TMA, from the same tensors; descriptors are Gluon's, made by `descriptor`."""
    delta_ring = gl.allocate_shared_memory(delta.dtype, [STAGES, 1, BLOCK_K, BLOCK_M], delta.layout)
    x_ring = gl.allocate_shared_memory(x0.dtype, [STAGES, BLOCK_K, BLOCK_N], x0.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    views = (x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)
    gl.warp_specialize(
        [
            (_multiply, (
                delta_ring, x_ring, full, empty, sums, weights, biases, weight_state0, weight_state1, bias_state0,
                bias_state1, rows, widths_in, widths_out, positions, first_sums, parts, first_error_sum, total, hyper,
                OUTPUT, WEIGHTS, BIASES, RULE, WEIGHT_SETS, BIAS_SETS, ALIGN, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
                GROUP_M, STAGES,
            )),
            (_load, (
                delta, output_delta, views, delta_ring, x_ring, full, empty, rows, widths_in, widths_out, total,
                OUTPUT, WEIGHTS, BIASES, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES,
            )),
        ],
        [1],
        [REGISTERS_TO_LOAD],
    )  # fmt: skip
