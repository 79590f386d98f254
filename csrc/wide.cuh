// The two launches for large batches: δ of every layer into memory, then the products of all layers.
#pragma once

#include "delta.cuh"
#include "tile.cuh"

namespace dfa {

constexpr int DELTA_ROWS = 64;

DFA_HD int row_tiles_of(const Arguments& a) { return ceil_div(a.rows, DELTA_ROWS); }

// Programs of `deltas`: a tile of P each, then tiles of the error, if there is an output layer.
DFA_HD int64 delta_programs(const Arguments& a) {
  int64 hidden = ceil_div<int64>(a.hidden ? a.widest : 0, UNITS), output = ceil_div(a.error_size, UNITS);
  return row_tiles_of(a) * (hidden + (a.layers > a.hidden ? output : 0));
}

// A tile of δ of one layer from a tile of P, or of the output layer's from the error; its sums over the tile's rows.
DFA_DEVICE void write_delta(const Arguments& a, int layer, int row_tile, int64 unit, float* scratch) {
  const Layer& l = a.layer[layer];
  const Tensors& t = a.tensors[layer];
  bool is_output = layer >= a.hidden;
  int64 size = int64{l.positions} * l.width_out;
  Kept kept(a, layer);
  int dtype = kept.saved || a.task == WIDE ? a.dtype : a.error_dtype;
  bool quads = reaches_quads(t.delta, dtype, l.width_out);
  int column = thread() % QUADS_ACROSS * QUAD;
  int count = static_cast<int>(minimum<int64>(QUAD, size - unit - column));
  float totals[QUAD] = {};
  DFA_ROLLED
  for (int i = thread() / QUADS_ACROSS; i < DELTA_ROWS; i += ROWS_AT_ONCE) {
    int64 row = int64{row_tile} * DELTA_ROWS + i;
    // In channels-last order neighbouring units are not neighbours in memory.
    int inner = l.width_out / l.channels, step = l.channels_last ? 1 : QUAD;
    DFA_ROLLED
    for (int first = 0; row < a.rows && first < count; first += step) {
      int64 own = unit + column + first;
      Run run = {row * size + own, count, count == QUAD && quads};
      if (l.channels_last) run = {row * size + own % inner * l.channels + own / inner, 1, false};
      float values[QUAD];
      DFA_UNROLL
      for (int j = 0; j < QUAD; ++j) {
        int at = minimum(column + first + j, UNITS - 1);
        values[j] = is_output ? error_at(a, row, static_cast<int>(own) + j)
                              : scratch[i * ProjectionTile<DELTA_ROWS>::PITCH + at];
      }
      if (!is_output) kept.apply(run, values);
      write_run(t.delta, dtype, run, values);
      DFA_UNROLL
      for (int j = 0; j < QUAD; ++j) totals[j] += values[j];
    }
  }
  if (!t.bias) return;
  // Behind P, which the next layer reads as well.
  add_over_rows(totals, scratch + ProjectionTile<DELTA_ROWS>::BYTES / 4);
  if (thread() >= QUADS_ACROSS) return;
  float* sums = a.sums + int64{row_tiles_of(a)} * l.first_sum + row_tile * size + unit + column;
  DFA_UNROLL
  for (int j = 0; j < QUAD; ++j) {
    if (j < count) sums[j] = totals[j];
  }
}

constexpr int DELTAS_SHARED = ProjectionTile<DELTA_ROWS>::BYTES + ROWS_AT_ONCE * UNITS * 4;

// A tile of P serves all layers that reach it.
DFA_DEVICE void deltas(const Arguments& a) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  int row_tiles = row_tiles_of(a), row_tile = block() % row_tiles;
  int64 unit = int64{block() / row_tiles} * UNITS, hidden_end = a.hidden ? ceil_div<int64>(a.widest, UNITS) * UNITS : 0;
  if (unit >= hidden_end) {
    write_delta(a, a.hidden, row_tile, unit - hidden_end, scratch);
    return;
  }
  ProjectionTile<DELTA_ROWS>::make(a, int64{row_tile} * DELTA_ROWS, unit, a.widest, scratch);
  for (int layer = 0; layer < a.hidden; ++layer) {
    const Layer& l = a.layer[layer];
    if (unit < int64{l.positions} * l.width_out) write_delta(a, layer, row_tile, unit, scratch);
  }
}

template <class T>
struct WideShape : Tile<T, 128, 64, 32> {
  static constexpr int STAGED = 4 * Tile<T, 128, 64, 32>::BUFFER * sizeof(T), SLABS = slab_bytes(WideShape::THREADS);
  static constexpr int SHARED = STAGED > SLABS ? STAGED : SLABS;
};

// Σ of δ over all rows and positions, from its sums over tiles of rows.
template <class Shape>
DFA_DEVICE void spend_bias(const Arguments& a, int layer, int out) {
  const Layer& l = a.layer[layer];
  int row_tiles = row_tiles_of(a), own = out + thread();
  if (thread() >= Shape::M || own >= l.width_out) return;
  const float* sums = a.sums + int64{row_tiles} * l.first_sum + own;
  float total[QUAD] = {};
  for (int64 i = 0; i < int64{row_tiles} * l.positions; ++i) total[0] += sums[i * l.width_out];
  spend(bias_of(a, layer), {own, 1, false}, total);
}

// A tile of one layer's gradient; the plan gives each program one.
template <class T>
DFA_DEVICE void product(const Arguments& a) {
  typedef WideShape<T> Shape;
  Place place = place_of(a, block(), Shape::M, Shape::N);
  const Layer& layer = a.layer[place.layer];
  const Tensors& tensors = a.tensors[place.layer];
  int length = a.rows * layer.positions, out = place.m * Shape::M, in = place.first * Shape::N;
  if (place.chunk == 0 && tensors.bias) spend_bias<Shape>(a, place.layer, out);
  if (place.first == place.end) return;

  T* buffers = reinterpret_cast<T*>(shared_memory());
  typename Shape::Product product;
  typename Shape::Stage next_delta, next_x;
  // What is on its way goes into a buffer, and what follows it sets out: a step's product is the time that a load has.
  auto advance = [&](T* buffer, int rows) {
    next_delta.store(buffer);
    next_x.store(buffer + Shape::BUFFER);
    next_delta.load(layer.width_out, rows);
    next_x.load(layer.width_in, rows);
  };
  next_delta.begin(tensors.delta, layer.width_out, out);
  next_x.begin(tensors.x, layer.width_in, in);
  next_delta.load(layer.width_out, length);
  next_x.load(layer.width_in, length);
  advance(buffers, length - Shape::DEPTH);
  sync();
  prefetch_tile<Shape>(a, place.layer, out, in);
  product.clear();
  for (int left = length, turn = 0; left > 0; left -= Shape::DEPTH, turn ^= 1) {
    const T* own = buffers + turn * 2 * Shape::BUFFER;
    advance(buffers + (turn ^ 1) * 2 * Shape::BUFFER, left - 2 * Shape::DEPTH);
    product.template add<Shape::DEPTH>(own, own + Shape::BUFFER);
    sync();
  }
  // Found anew: the product needs every register.
  place = place_of(a, block(), Shape::M, Shape::N);
  float* scratch = reinterpret_cast<float*>(shared_memory());
  spend_tile<Shape>(product, scratch, a, place.layer, place.m * Shape::M, place.first * Shape::N);
}

}  // namespace dfa
