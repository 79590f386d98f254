// Tiles of P = e Uᵀ, and δ = P · scale ⊙ f' ⊙ mask from them (paper, eq. 3).
#pragma once

#include "activations.h"
#include "feedback.h"
#include "simt_product.cuh"

namespace dfa {

constexpr int UNITS = 64;  // columns of a tile of P
constexpr int DELTA_THREADS = 128;
constexpr int QUADS_ACROSS = UNITS / QUAD, ROWS_AT_ONCE = DELTA_THREADS / QUADS_ACROSS;

DFA_DEVICE float error_at(const Arguments& a, int64 row, int column) {
  if (row >= a.rows || column >= a.error_size) return 0.0f;
  return read(a.error, a.error_dtype, row * a.stride_row + column * a.stride_column);
}

template <int ROWS>
struct ProjectionTile {
  static constexpr int DEPTH = 16, PITCH = pitch_of<float>(UNITS);
  static constexpr int OPERANDS = DEPTH * (pitch_of<float>(ROWS) + PITCH), RESULT = ROWS * PITCH;
  static constexpr int BYTES = 4 * (OPERANDS > RESULT ? OPERANDS : RESULT);

  // Not scaled; 0 for rows beyond the batch. Every thread may use `scratch` before and after.
  DFA_DEVICE static void make(const Arguments& a, int64 row, int64 unit, int64 end, float* scratch) {
    SimtProduct<ROWS, UNITS, DELTA_THREADS> tile;
    tile.clear();
    if (a.source == PROJECTION) {
      read_given(a, row, unit, end, tile);
    } else {
      float *e = scratch, *U = scratch + DEPTH * pitch_of<float>(ROWS);
      for (int first = 0; first < a.error_size; first += DEPTH) {
        sync();
        stage(a, row, unit, end, first, e, U);
        sync();
        tile.template add<DEPTH>(e, U, a.error_size - first);
      }
    }
    sync();
    tile.write(scratch, PITCH);
    sync();
  }

  DFA_DEVICE static void stage(const Arguments& a, int64 row, int64 unit, int64 end, int first, float* e, float* U) {
    DFA_ROLLED
    for (int i = thread(); i < ROWS * DEPTH; i += DELTA_THREADS) {
      e[i % DEPTH * pitch_of<float>(ROWS) + i / DEPTH] = error_at(a, row + i / DEPTH, first + i % DEPTH);
    }
    DFA_ROLLED
    for (int i = thread(); i < UNITS * DEPTH / QUAD; i += DELTA_THREADS) {
      int own = i / (DEPTH / QUAD), column = i % (DEPTH / QUAD) * QUAD;
      float u[QUAD] = {};
      if (unit + own < end && first + column < a.error_size) entries(a, unit + own, first + column, u);
      DFA_UNROLL
      for (int j = 0; j < QUAD; ++j) U[(column + j) * PITCH + own] = u[j];
    }
  }

  DFA_DEVICE static void read_given(
      const Arguments& a, int64 row, int64 unit, int64 end, SimtProduct<ROWS, UNITS, DELTA_THREADS>& tile) {
    const float* P = static_cast<const float*>(a.stored);
    DFA_UNROLL
    for (int i = 0; i < tile.ROWS; ++i) {
      DFA_UNROLL
      for (int j = 0; j < QUAD; ++j) {
        int64 r = row + tile.row() + i, u = unit + tile.column() + j;
        if (r < a.rows && u < end) tile.sums[i][j] = P[r * a.widest + u];
      }
    }
  }
};

// What δ of a layer is made from beside P.
struct Kept {
  const void *saved, *mask;
  int dtype, activation;
  float scale, p, q;
  bool quads;

  DFA_DEVICE Kept(const Arguments& a, int layer)
      : saved(a.tensors[layer].saved),
        mask(a.tensors[layer].mask),
        dtype(a.dtype),
        activation(a.layer[layer].activation),
        scale(a.layer[layer].scale),
        p(a.layer[layer].p),
        q(a.layer[layer].q),
        quads(reaches_quads(saved, a.dtype, a.layer[layer].width_out) &&
              reaches_quads(mask, a.dtype, a.layer[layer].width_out)) {}

  // Four numbers of P become δ.
  DFA_DEVICE void apply(Run run, float (&values)[QUAD]) const {
    run.whole = run.count == QUAD && quads;
    float kept[QUAD] = {}, noise[QUAD];
    if (saved) read_run(saved, dtype, run, kept);
    if (mask) read_run(mask, dtype, run, noise);
    DFA_UNROLL
    for (int i = 0; i < QUAD; ++i) {
      values[i] = slope_product(activation, values[i] * scale, kept[i], p, q);
      if (mask) values[i] *= noise[i];
    }
  }
};

// Σ over a block's threads of the totals for each column of a tile, for the first threads: four columns each.
DFA_DEVICE void add_over_rows(float (&totals)[QUAD], float* scratch) {
  int column = thread() % QUADS_ACROSS * QUAD;
  sync();
  DFA_UNROLL
  for (int j = 0; j < QUAD; ++j) scratch[thread() / QUADS_ACROSS * UNITS + column + j] = totals[j];
  sync();
  if (thread() >= QUADS_ACROSS) return;
  DFA_UNROLL
  for (int j = 0; j < QUAD; ++j) {
    totals[j] = 0.0f;
    for (int i = 0; i < ROWS_AT_ONCE; ++i) totals[j] += scratch[i * UNITS + column + j];
  }
}

}  // namespace dfa
