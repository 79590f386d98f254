// What strips and grouped products share: the shape of a tile, and where its sums go.
#pragma once

#include "schedule.h"
#include "tensor_product.cuh"
#include "updates.h"

namespace dfa {

template <class T, int SIDE, int WARP_N, int DEPTH_BYTES>
struct Tile {
  static constexpr int M = SIDE, N = SIDE, WARP_M = 32, DEPTH = DEPTH_BYTES / sizeof(T);
  static constexpr int THREADS = M / WARP_M * (N / WARP_N) * WARP;
  static constexpr int PITCH = pitch_of<T>(SIDE), BUFFER = DEPTH * PITCH;  // numbers of a staged tile
  typedef typename ProductOf<T, M, N, WARP_M, WARP_N>::type Product;
  typedef Staging<T, DEPTH, SIDE, THREADS> Stage;
};

DFA_DEVICE Destination weight_of(const Arguments& a, int layer) {
  const Tensors& t = a.tensors[layer];
  return destination_of(a, t.weight, t.weight_state, a.layer[layer].weight_set, a.layer[layer].width_in);
}

DFA_DEVICE Destination bias_of(const Arguments& a, int layer) {
  const Tensors& t = a.tensors[layer];
  return destination_of(a, t.bias, t.bias_state, a.layer[layer].bias_set, 0);
}

// A tile of the parameter and its state comes nearer while the product is made that will change it.
template <class Shape>
DFA_DEVICE void prefetch_tile(const Arguments& a, int layer, int row, int column) {
  Destination to = weight_of(a, layer);
  int width_in = a.layer[layer].width_in, width_out = a.layer[layer].width_out;
  constexpr int LINE = 128;
  int size = to.dtype == FLOAT32 ? 4 : 2, across = Shape::N * size / LINE;
  for (int i = thread(); to.rule != STORE && i < Shape::M * across; i += Shape::THREADS) {
    int r = row + i / across, c = column + i % across * (LINE / size);
    if (r >= width_out || c >= width_in) continue;
    int64 at = (int64{r} * width_in + c) * size;
    prefetch(static_cast<const char*>(to.parameter) + at);
    if (to.rule != SGD) prefetch(static_cast<const char*>(to.state0) + at);
    if (to.rule == ADAMW) prefetch(static_cast<const char*>(to.state1) + at);
  }
}

// The sums of the tile at (row, column) of the gradient go where they belong.
template <class Shape>
DFA_DEVICE void spend_tile(
    const typename Shape::Product& product, float* scratch, const Arguments& a, int layer, int row, int column) {
  Destination to = weight_of(a, layer);
  int width_in = a.layer[layer].width_in, width_out = a.layer[layer].width_out;
  for_each_quad(product, scratch, [&](int i, int j, const float(&gradient)[QUAD]) {
    int out = row + i, in = column + j, count = minimum(QUAD, width_in - in);
    if (out < width_out && count > 0) spend(to, {int64{out} * width_in + in, count, false}, gradient);
  });
}

}  // namespace dfa
