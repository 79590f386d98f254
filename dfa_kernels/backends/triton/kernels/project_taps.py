"""δ of every tap in one launch: a program has one tile of the projection and serves all taps from it."""

from __future__ import annotations

import triton
import triton.language as tl

from .delta import write_deltas


@triton.jit(
    do_not_specialize=[
        "error_size", "stride_row", "key0", "key1", "nonzeros", "widest", "rows",
    ]
)  # fmt: skip
def project_taps_kernel(
    error, stored, saved, dropout_mask, deltas, error_size, stride_row, stride_column, key0, key1, nonzeros, widest,
    rows, sizes, channels, scales, p, q,
    SOURCE: tl.constexpr, DERIVATIVES: tl.constexpr, WHICH: tl.constexpr, SAVED: tl.constexpr, DROPOUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ENTRY: tl.constexpr, DOT: tl.constexpr, DELTA_PRECISION: tl.constexpr,
    ROUND: tl.constexpr, ALIGN: tl.constexpr, ALIGN_ERROR: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """δ = (e Bᵀ) ⊙ f' of every tap (paper, eq. 3); arguments as for `write_deltas`."""
    write_deltas(
        tl.program_id(0).to(INDEX), error, stored, saved, dropout_mask, deltas, error, error_size, stride_row,
        stride_column, key0, key1, nonzeros, widest, rows, sizes, sizes, sizes, channels, scales, p, q,
        SOURCE, DERIVATIVES, WHICH, SAVED, DROPOUT, 0, CHANNELS_LAST, ENTRY, DOT, DELTA_PRECISION, ROUND, ALIGN,
        ALIGN_ERROR, INDEX, BLOCK_U, BLOCK_R, BLOCK_E, BITS,
    )  # fmt: skip
