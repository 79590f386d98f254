// The kernels' library made by a host compiler, with what tests ask of single headers.
#include "../csrc/library.cu"

DFA_EXPORT void test_order(int backwards) { dfa::Emulator::instance().backwards = backwards; }

// Layer, tile of outputs, chunk, first and end of its tiles of inputs: of every program.
DFA_EXPORT void test_places(const dfa::Arguments* a, int tile_m, int tile_n, int* found) {
  for (int program = 0; program < a->programs; ++program) {
    dfa::Place place = dfa::place_of(*a, program, tile_m, tile_n);
    int values[] = {place.layer, place.m, place.chunk, place.first, place.end};
    for (int value : values) *found++ = value;
  }
}

DFA_EXPORT void test_philox(const dfa::uint32* counter, const dfa::uint32* key, dfa::uint32* found) {
  dfa::Words w = dfa::philox(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  for (int i = 0; i < 4; ++i) found[i] = w.word[i];
}

DFA_EXPORT void test_normals(const dfa::uint32* word0, const dfa::uint32* word1, int n, float* cosine, float* sine) {
  for (int i = 0; i < n; ++i) dfa::box_muller(word0[i], word1[i], cosine[i], sine[i]);
}

// U[unit … unit + units - 1, 0 … 4 quads - 1].
DFA_EXPORT void test_entries(const dfa::Arguments* a, dfa::int64 unit, int units, int quads, float* found) {
  for (int i = 0; i < units * quads; ++i) {
    float u[dfa::QUAD];
    dfa::entries(*a, unit + i / quads, i % quads * dfa::QUAD, u);
    for (float entry : u) *found++ = entry;
  }
}

DFA_EXPORT void test_slopes(int activation, const float* g, const float* kept, float p, float q, int n, float* found) {
  for (int i = 0; i < n; ++i) found[i] = dfa::slope_product(activation, g[i], kept[i], p, q);
}

// Rounded to a dtype and back, one number by itself and four together.
DFA_EXPORT void test_rounded(const float* x, int dtype, int n, float* one_by_one, float* by_four) {
  for (int i = 0; i < n; ++i) one_by_one[i] = dfa::rounded(x[i], dtype);
  for (int i = 0; i + dfa::QUAD <= n; i += dfa::QUAD) {
    dfa::Piece memory;
    float values[] = {x[i], x[i + 1], x[i + 2], x[i + 3]}, again[dfa::QUAD];
    dfa::write_run(&memory, dtype, {0, dfa::QUAD, true}, values);
    dfa::read_run(&memory, dtype, {0, dfa::QUAD, true}, again);
    for (int j = 0; j < dfa::QUAD; ++j) by_four[i + j] = again[j];
  }
}
