// The product of two tiles in shared memory by float32 multiply-adds: Σ_k a[k, m] b[k, n].
#pragma once

#include "staging.cuh"

namespace dfa {

constexpr int WARP = 32;
// Sums leave the registers in slabs, each warp's through memory of its own.
constexpr int SLAB_ROWS = 16, SLAB_COLUMNS = 32, SLAB_PITCH = SLAB_COLUMNS + 4;
DFA_HD constexpr int slab_bytes(int threads) { return threads / WARP * SLAB_ROWS * SLAB_PITCH * 4; }

// Calls f(row, column, four sums) for every four neighbours of a product [M, N].
//
// Through shared memory, so that a warp's accesses to a row of the parameter lie side by side, and so that what f
// becomes is in the program once, not for each of a thread's sums.
template <class Product, class F>
DFA_DEVICE void for_each_quad(const Product& product, float* scratch, F f) {
  float* slab = scratch + thread() / WARP * SLAB_ROWS * SLAB_PITCH;
  int lane = thread() % WARP;
  DFA_ROLLED
  for (int s = 0; s < Product::SLABS; ++s) {
    // Sums are in registers, which have no index.
    DFA_UNROLL
    for (int n = 0; n < Product::SLABS; ++n) {
      if (n == s) product.put(n, slab);
    }
    sync_warp();
    DFA_ROLLED
    for (int i = lane; i < SLAB_ROWS * SLAB_COLUMNS / QUAD; i += WARP) {
      int row = i / (SLAB_COLUMNS / QUAD), column = i % (SLAB_COLUMNS / QUAD) * QUAD;
      Piece piece = *reinterpret_cast<const Piece*>(slab + row * SLAB_PITCH + column);
      float values[QUAD];
      DFA_UNROLL
      for (int j = 0; j < QUAD; ++j) values[j] = float_of_bits(piece.words[j]);
      f(Product::slab_row(s) + row, Product::slab_column(s) + column, values);
    }
    sync_warp();
  }
}

// A thread has M / (THREADS / 16) rows, and four columns of every 64.
template <int M, int N, int THREADS>
struct SimtProduct {
  static constexpr int LANES = 16, ROWS = M / (THREADS / LANES), QUADS = N / (LANES * QUAD);
  static constexpr int SLABS = N / SLAB_COLUMNS;
  float sums[ROWS][QUADS * QUAD];

  DFA_DEVICE static int row() { return thread() / LANES * ROWS; }
  DFA_DEVICE static int column() { return thread() % LANES * QUAD; }

  DFA_DEVICE void clear() {
    DFA_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      DFA_UNROLL
      for (int j = 0; j < QUADS * QUAD; ++j) sums[i][j] = 0.0f;
    }
  }

  // Of DEPTH rows at most, `depth` of them.
  template <int DEPTH>
  DFA_DEVICE void add(const float* a, const float* b, int depth = DEPTH) {
    DFA_UNROLL
    for (int k = 0; k < DEPTH; ++k) {
      if (k >= depth) break;
      Piece left[ROWS / QUAD], right[QUADS];
      DFA_UNROLL
      for (int i = 0; i < ROWS / QUAD; ++i) {
        left[i] = *reinterpret_cast<const Piece*>(a + k * pitch_of<float>(M) + row() + i * QUAD);
      }
      DFA_UNROLL
      for (int j = 0; j < QUADS; ++j) {
        right[j] = *reinterpret_cast<const Piece*>(b + k * pitch_of<float>(N) + column() + j * LANES * QUAD);
      }
      DFA_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        DFA_UNROLL
        for (int j = 0; j < QUADS * QUAD; ++j) {
          float x = float_of_bits(left[i / QUAD].words[i % QUAD]), y = float_of_bits(right[j / QUAD].words[j % QUAD]);
          sums[i][j] += x * y;
        }
      }
    }
  }

  // All sums, to [M, N] in rows of `pitch`.
  DFA_DEVICE void write(float* to, int pitch) const {
    static_assert(QUADS == 1, "for narrow tiles");
    DFA_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      DFA_UNROLL
      for (int j = 0; j < QUAD; ++j) to[(row() + i) * pitch + column() + j] = sums[i][j];
    }
  }

  DFA_DEVICE static int slab_row(int) { return thread() / WARP * 2 * ROWS; }
  DFA_DEVICE static int slab_column(int s) { return s * SLAB_COLUMNS; }

  // Those of a warp's threads that have columns of the slab write them.
  DFA_DEVICE void put(int s, float* slab) const {
    static_assert(2 * ROWS == SLAB_ROWS, "a warp has the rows of a slab");
    int within = column() - s % 2 * SLAB_COLUMNS;
    if (within < 0 || within >= SLAB_COLUMNS) return;
    float* to = slab + thread() % WARP / LANES * ROWS * SLAB_PITCH + within;
    DFA_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      DFA_UNROLL
      for (int j = 0; j < QUAD; ++j) to[i * SLAB_PITCH + j] = sums[i][s / 2 * QUAD + j];
    }
  }
};

}  // namespace dfa
