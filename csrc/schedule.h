// Which part of which layer's gradient a program makes.
#pragma once

#include "abi.h"

namespace dfa {

constexpr int GROUP = 8;  // tiles of outputs whose programs are neighbours, and so share both factors in the L2 cache

// Tile m of the layer's outputs, and of its inputs the tiles first … end - 1: the chunk-th of `chunks` runs.
struct Place {
  int layer, m, chunk, first, end;
};

DFA_HD Place place_of(const Arguments& a, int program, int tile_m, int tile_n) {
  int layer = a.layers - 1;
  while (layer > 0 && program < a.layer[layer].first_program) --layer;
  const Layer& l = a.layer[layer];
  int within = program - l.first_program, tiles_m = ceil_div(l.width_out, tile_m);
  int tiles_n = a.tensors[layer].weight ? ceil_div(l.width_in, tile_n) : 0;
  int group = within / (GROUP * l.chunks), height = minimum(GROUP, tiles_m - group * GROUP);
  within -= group * GROUP * l.chunks;
  int chunk = within / height;
  return {layer, group * GROUP + within % height, chunk, static_cast<int>(int64{chunk} * tiles_n / l.chunks),
          static_cast<int>(int64{chunk + 1} * tiles_n / l.chunks)};
}

}  // namespace dfa
