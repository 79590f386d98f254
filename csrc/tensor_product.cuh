// The product of two tiles in shared memory by tensor cores, float32 sums: Σ_k a[k, m] b[k, n].
//
// In PTX's wmma m16n16k16, the one shape that every architecture from sm_70 on has. No compiler's header is needed.
// Tiles begin at multiples of 32 bytes and rows are multiples of 16 bytes long, as CUDA C++ asks of its own wmma.
#pragma once

#include "simt_product.cuh"

namespace dfa {

constexpr int EDGE = 16;

#ifdef __CUDACC__
struct Sums {
  float values[8];

  DFA_DEVICE void put(float* shared, int pitch) const {
    asm volatile("wmma.store.d.sync.aligned.row.m16n16k16.shared.f32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8}, %9;" ::"r"(
                     static_cast<uint32>(__cvta_generic_to_shared(shared))),
                 "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "f"(values[4]), "f"(values[5]),
                 "f"(values[6]), "f"(values[7]), "r"(pitch)
                 : "memory");
  }
};

template <class T>
struct Factor;

template <>
struct Factor<Half> {
  uint32 words[8];
#define DFA_LOAD(name, operand, layout)                                                                              \
  DFA_DEVICE void name(const Half* shared, int pitch) {                                                              \
    asm volatile("wmma.load." operand ".sync.aligned." layout                                                        \
                 ".m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"                                 \
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]), "=r"(words[4]), "=r"(words[5]),   \
                   "=r"(words[6]), "=r"(words[7])                                                                    \
                 : "r"(static_cast<uint32>(__cvta_generic_to_shared(shared))), "r"(pitch)                            \
                 : "memory");                                                                                        \
  }
  DFA_LOAD(load_left, "a", "col")
  DFA_LOAD(load_right, "b", "row")
#undef DFA_LOAD
};

DFA_DEVICE void multiply(Sums& sums, const Factor<Half>& a, const Factor<Half>& b) {
  float* d = sums.values;
  asm volatile(
      "wmma.mma.sync.aligned.col.row.m16n16k16.f32.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, "
      "{%8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19, %20, %21, %22, %23}, "
      "{%0, %1, %2, %3, %4, %5, %6, %7};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(a.words[4]), "r"(a.words[5]),
        "r"(a.words[6]), "r"(a.words[7]), "r"(b.words[0]), "r"(b.words[1]), "r"(b.words[2]), "r"(b.words[3]),
        "r"(b.words[4]), "r"(b.words[5]), "r"(b.words[6]), "r"(b.words[7]));
}

template <>
struct Factor<BFloat16> {
  uint32 words[4];
#define DFA_LOAD(name, operand, layout)                                                                              \
  DFA_DEVICE void name(const BFloat16* shared, int pitch) {                                                          \
    asm volatile("wmma.load." operand ".sync.aligned." layout                                                        \
                 ".m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;"                                                \
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])                                    \
                 : "r"(static_cast<uint32>(__cvta_generic_to_shared(shared))), "r"(pitch)                            \
                 : "memory");                                                                                        \
  }
  DFA_LOAD(load_left, "a", "col")
  DFA_LOAD(load_right, "b", "row")
#undef DFA_LOAD
};

DFA_DEVICE void multiply(Sums& sums, const Factor<BFloat16>& a, const Factor<BFloat16>& b) {
  float* d = sums.values;
  asm volatile(
      "wmma.mma.sync.aligned.col.row.m16n16k16.f32.bf16.bf16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%12, %13, %14, %15}, {%0, %1, %2, %3, %4, %5, %6, %7};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b.words[0]), "r"(b.words[1]),
        "r"(b.words[2]), "r"(b.words[3]));
}
#else
// The first of a warp's emulated threads has all numbers, and does all the work.
inline bool leads() { return thread() % WARP == 0; }

struct Sums {
  float values[EDGE * EDGE];

  void put(float* shared, int pitch) const {
    for (int i = 0; leads() && i < EDGE * EDGE; ++i) shared[i / EDGE * pitch + i % EDGE] = values[i];
  }
};

template <class T>
struct Factor {
  float values[EDGE * EDGE];  // [k, m] or [k, n]

  void load_left(const T* shared, int pitch) {
    for (int i = 0; leads() && i < EDGE * EDGE; ++i) values[i] = to_float(shared[i / EDGE * pitch + i % EDGE]);
  }
  void load_right(const T* shared, int pitch) { load_left(shared, pitch); }
};

template <class T>
void multiply(Sums& sums, const Factor<T>& a, const Factor<T>& b) {
  if (!leads()) return;
  for (int k = 0; k < EDGE; ++k) {
    for (int i = 0; i < EDGE * EDGE; ++i) {
      sums.values[i] += a.values[k * EDGE + i / EDGE] * b.values[k * EDGE + i % EDGE];
    }
  }
}
#endif

// Each warp has a part [WARP_M, WARP_N] of the product.
template <class T, int M, int N, int WARP_M, int WARP_N>
struct TensorProduct {
  static constexpr int DOWN = WARP_M / EDGE, ACROSS = WARP_N / EDGE;
  static constexpr int SLABS = DOWN * ACROSS / 2;
  Sums sums[DOWN][ACROSS];

  DFA_DEVICE static int row() { return thread() / WARP / (N / WARP_N) * WARP_M; }
  DFA_DEVICE static int column() { return thread() / WARP % (N / WARP_N) * WARP_N; }

  DFA_DEVICE void clear() {
    DFA_UNROLL
    for (int i = 0; i < DOWN; ++i) {
      DFA_UNROLL
      for (int j = 0; j < ACROSS; ++j) sums[i][j] = Sums{};
    }
  }

  template <int DEPTH>
  DFA_DEVICE void add(const T* a, const T* b) {
    DFA_UNROLL
    for (int k = 0; k < DEPTH; k += EDGE) {
      Factor<T> left[DOWN];
      DFA_UNROLL
      for (int i = 0; i < DOWN; ++i) {
        left[i].load_left(a + k * pitch_of<T>(M) + row() + i * EDGE, pitch_of<T>(M));
      }
      DFA_UNROLL
      for (int j = 0; j < ACROSS; ++j) {
        Factor<T> right;
        right.load_right(b + k * pitch_of<T>(N) + column() + j * EDGE, pitch_of<T>(N));
        DFA_UNROLL
        for (int i = 0; i < DOWN; ++i) multiply(sums[i][j], left[i], right);
      }
    }
  }

  DFA_DEVICE static int slab_row(int s) { return row() + s / (ACROSS / 2) * EDGE; }
  DFA_DEVICE static int slab_column(int s) { return column() + s % (ACROSS / 2) * SLAB_COLUMNS; }

  DFA_DEVICE void put(int s, float* slab) const {
    int i = s / (ACROSS / 2), j = s % (ACROSS / 2) * 2;
    sums[i][j].put(slab, SLAB_PITCH);
    sums[i][j + 1].put(slab + EDGE, SLAB_PITCH);
  }
};

// What multiplies tiles of T.
template <class T, int M, int N, int WARP_M, int WARP_N>
struct ProductOf {
  typedef TensorProduct<T, M, N, WARP_M, WARP_N> type;
};
template <int M, int N, int WARP_M, int WARP_N>
struct ProductOf<float, M, N, WARP_M, WARP_N> {
  typedef SimtProduct<M, N, M * N / (WARP_M * WARP_N) * WARP> type;
};

}  // namespace dfa
