// The launch for small batches: a program makes δ of its outputs for the whole batch once, and goes along the inputs.
//
// δ stays in shared memory, and each tile of the gradient is one product as deep as the batch: no program waits for
// another, and δ never travels through memory.
#pragma once

#include "delta.cuh"
#include "tile.cuh"

namespace dfa {

template <class T>
struct StripShape : Tile<T, 64, 32, 64> {
  static constexpr int ROWS = 32;  // of a tile of P
  static constexpr int STAGED = 2 * Tile<T, 64, 32, 64>::BUFFER * sizeof(T);
  static constexpr int SLABS = slab_bytes(DELTA_THREADS), PROJECTION_BYTES = ProjectionTile<ROWS>::BYTES;
  static constexpr int LARGER = STAGED > SLABS ? STAGED : SLABS;
  static constexpr int SCRATCH = LARGER > PROJECTION_BYTES ? LARGER : PROJECTION_BYTES;

  // Rows of δ in shared memory, the last ones 0.
  DFA_HD static int depth(int length) {
    return length > 0 ? ceil_div(length, StripShape::DEPTH) * StripShape::DEPTH : StripShape::DEPTH;
  }
};

// δ [length, 64] of the outputs from `out` on, in shared memory; of the bias, what is summed for each thread.
template <class T>
DFA_DEVICE void make_strip(const Arguments& a, int layer, int out, T* delta, float* scratch, float (&totals)[QUAD]) {
  typedef StripShape<T> Shape;
  const Layer& l = a.layer[layer];
  bool is_output = layer >= a.hidden;
  Kept kept(a, layer);
  int column = thread() % QUADS_ACROSS * QUAD, count = minimum(QUAD, l.width_out - out - column);
  for (int position = 0; position < l.positions; ++position) {
    // Units of a position follow those of the one before.
    int64 first = int64{position} * l.width_out, unit = first + out;
    for (int row = 0; row < a.rows; row += Shape::ROWS) {
      if (!is_output) ProjectionTile<Shape::ROWS>::make(a, row, unit, first + l.width_out, scratch);
      DFA_ROLLED
      for (int i = thread() / QUADS_ACROSS; i < Shape::ROWS && row + i < a.rows; i += ROWS_AT_ONCE) {
        int64 at = int64{row + i} * l.positions + position;
        float values[QUAD];
        DFA_UNROLL
        for (int j = 0; j < QUAD; ++j) {
          values[j] = is_output ? error_at(a, row + i, out + column + j)
                                : scratch[i * ProjectionTile<Shape::ROWS>::PITCH + column + j];
        }
        if (!is_output) kept.apply({at * l.width_out + out + column, count, false}, values);
        DFA_UNROLL
        for (int j = 0; j < QUAD; ++j) {
          if (j >= count) values[j] = 0.0f;
          totals[j] += values[j];
        }
        write_run(delta, DTYPE_OF<T>, {at * Shape::PITCH + column, QUAD, true}, values);
      }
    }
  }
}

// x in the order in which a program reads it: one tile of inputs after the other, each in steps of rows. One step is
// always on its way: a step's product is the time that a load has, and a tile's end the time of the next one's first.
template <class T>
struct Steps {
  typedef StripShape<T> Shape;
  const void* x;
  int length, width, column, end, left;
  typename Shape::Stage next;

  DFA_DEVICE Steps(const void* x, int length, int width, int first, int end)
      : x(x), length(length), width(width), column(first), end(end), left(length) {
    next.begin(x, width, column);
    next.load(width, left);
  }

  // The step that is on its way goes into the buffer, and the one after it sets out.
  DFA_DEVICE void advance(T* buffer, bool last) {
    next.store(buffer);
    left -= Shape::DEPTH;
    if (last) {
      column += Shape::N;
      if (column >= end) return;
      next.begin(x, width, column);
      left = length;
    }
    next.load(width, left);
  }
};

template <class T>
DFA_DEVICE void strip(const Arguments& a) {
  typedef StripShape<T> Shape;
  Place place = place_of(a, block(), Shape::M, Shape::N);
  const Layer& layer = a.layer[place.layer];
  const Tensors& tensors = a.tensors[place.layer];
  int length = a.rows * layer.positions, depth = Shape::depth(length), out = place.m * Shape::M;
  T* delta = reinterpret_cast<T*>(shared_memory());
  T* buffers = delta + depth * Shape::PITCH;
  float* scratch = reinterpret_cast<float*>(buffers);

  float totals[QUAD] = {};
  make_strip<T>(a, place.layer, out, delta, scratch, totals);
  for (int i = length * Shape::PITCH + thread(); i < depth * Shape::PITCH; i += Shape::THREADS) convert(0.0f, delta[i]);
  if (place.chunk == 0 && tensors.bias) {
    add_over_rows(totals, scratch);
    int own = out + thread() * QUAD, count = minimum(QUAD, layer.width_out - own);
    if (thread() < QUADS_ACROSS && count > 0) spend(bias_of(a, place.layer), {own, count, false}, totals);
  }
  if (place.first == place.end) return;

  Steps<T> steps(tensors.x, length, layer.width_in, place.first * Shape::N, place.end * Shape::N);
  for (int tile = place.first; tile < place.end; ++tile) {
    typename Shape::Product product;
    product.clear();
    sync();
    steps.advance(buffers, depth == Shape::DEPTH);
    sync();
    prefetch_tile<Shape>(a, place.layer, out, tile * Shape::N);
    for (int first = 0, turn = 0; first < depth; first += Shape::DEPTH, turn ^= 1) {
      int left = depth - first - Shape::DEPTH;
      if (left > 0) steps.advance(buffers + (turn ^ 1) * Shape::BUFFER, left == Shape::DEPTH);
      product.template add<Shape::DEPTH>(delta + first * Shape::PITCH, buffers + turn * Shape::BUFFER);
      sync();
    }
    spend_tile<Shape>(product, scratch, a, place.layer, out, tile * Shape::N);
  }
}

}  // namespace dfa
