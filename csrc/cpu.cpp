// `layer_grads` and `layer_update_` on a CPU, for networks so small that calling an operator for each product would take
// longer than the products: all of them in one function, in float32, by one thread.
//
// U, f' and the updates are those of the kernels. Every sum has a fixed order, whatever the processor: vectors lie across
// sums, never along one.
#define DFA_WITHOUT_BLOCKS
#include "activations.h"
#include "feedback.h"
#include "updates.h"

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>

#define DFA_EXPORT extern "C" __attribute__((visibility("default")))
#ifdef DFA_FOR_ANY_PROCESSOR
#define DFA_BY_PROCESSOR
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define DFA_BY_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#define DFA_BY_PROCESSOR
#endif

#define DFA_UNROLLED _Pragma("GCC unroll 8")

namespace dfa {
namespace {

constexpr int STRIP = 4;  // outputs whose products are made together

// A matrix of float32 in memory.
struct Matrix {
  const float* entries;
  int64 stride_row, stride_column;

  float at(int64 row, int64 column) const { return entries[row * stride_row + column * stride_column]; }
};

// A product's operands and where it goes:
// sums[m · pitch + n] = Σ over k < depth of left[k · left_pitch + m] · right[k · right_pitch + n].
struct Product {
  int64 depth;
  const float *left, *right;
  int64 left_pitch, right_pitch;
  float* sums;
  int64 pitch;
};

// Eight sums side by side; those of one processor are two of four.
typedef float Vector __attribute__((vector_size(32)));
typedef float VectorInMemory __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int LANES = 8;

// A tile of it, whose sums wait in registers.
template <int ROWS, int VECTORS>
inline __attribute__((always_inline)) void add_up(const Product& p, int64 row, int64 column) {
  Vector own[ROWS][VECTORS] = {};
  for (int64 k = 0; k < p.depth; ++k) {
    const float *left = p.left + k * p.left_pitch + row, *right = p.right + k * p.right_pitch + column;
    DFA_UNROLLED
    for (int n = 0; n < VECTORS; ++n) {
      Vector factor = *reinterpret_cast<const VectorInMemory*>(right + n * LANES);
      DFA_UNROLLED
      for (int m = 0; m < ROWS; ++m) own[m][n] += left[m] * factor;
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    for (int n = 0; n < VECTORS; ++n) {
      *reinterpret_cast<VectorInMemory*>(p.sums + (row + m) * p.pitch + column + n * LANES) = own[m][n];
    }
  }
}

template <int ROWS>
inline __attribute__((always_inline)) void add_up_rows(const Product& p, int64 row, int64 columns) {
  int64 column = 0;
  for (; column + 2 * LANES <= columns; column += 2 * LANES) add_up<ROWS, 2>(p, row, column);
  for (; column + LANES <= columns; column += LANES) add_up<ROWS, 1>(p, row, column);
  for (; column < columns; ++column) {
    for (int m = 0; m < ROWS; ++m) {
      float sum = 0.0f;
      for (int64 k = 0; k < p.depth; ++k) {
        sum += p.left[k * p.left_pitch + row + m] * p.right[k * p.right_pitch + column];
      }
      p.sums[(row + m) * p.pitch + column] = sum;
    }
  }
}

DFA_BY_PROCESSOR void multiply(const Product& p, int64 rows, int64 columns) {
  int64 row = 0;
  for (; row + STRIP <= rows; row += STRIP) add_up_rows<STRIP>(p, row, columns);
  for (; row < rows; ++row) add_up_rows<1>(p, row, columns);
}

constexpr int UNITS = 32;  // of which U is transposed at once

// Memory for as long as a call lasts.
struct Buffer {
  std::unique_ptr<float[]> memory;
  int64 size = 0;

  // At least so many numbers, none of them those of before.
  float* with(int64 wanted) {
    if (size < wanted) memory.reset(new float[size = wanted]);
    return memory.get();
  }
};

struct Workspace {
  Buffer projection, delta, error, entries, sums;
};

// P = e Uᵀ [rows, widest], not scaled.
const float* projected(const Arguments& a, const Matrix& error, Workspace& work) {
  if (a.source == PROJECTION) return static_cast<const float*>(a.stored);
  float* columns = work.error.with(int64(a.rows) * a.error_size);
  for (int64 row = 0; row < a.rows; ++row) {
    for (int64 column = 0; column < a.error_size; ++column) columns[column * a.rows + row] = error.at(row, column);
  }
  float* P = work.projection.with(int64(a.rows) * a.widest);
  float* U = work.entries.with((int64(a.error_size) + QUAD) * UNITS);
  for (int first = 0; first < a.widest; first += UNITS) {
    int units = minimum(UNITS, a.widest - first);
    for (int unit = 0; unit < units; ++unit) {
      for (int column = 0; column < a.error_size; column += QUAD) {
        float own[QUAD];
        entries(a, first + unit, column, own);
        for (int i = 0; i < QUAD; ++i) U[(column + i) * UNITS + unit] = own[i];
      }
    }
    multiply({a.error_size, columns, U, a.rows, UNITS, P + first, a.widest}, a.rows, units);
  }
  return P;
}

// δ of the output layer, the error [rows, error_size], without gaps.
const float* output_delta(const Arguments& a, const Matrix& error, Workspace& work) {
  if (error.stride_column == 1 && error.stride_row == a.error_size) return error.entries;
  float* delta = work.delta.with(int64(a.rows) * a.error_size);
  for (int64 row = 0; row < a.rows; ++row) {
    for (int64 column = 0; column < a.error_size; ++column) delta[row * a.error_size + column] = error.at(row, column);
  }
  return delta;
}

// δ of a hidden layer [rows · positions, width_out].
const float* delta_of(const Arguments& a, int layer, const float* P, Workspace& work) {
  const Layer& own = a.layer[layer];
  const float* saved = static_cast<const float*>(a.tensors[layer].saved);
  const float* mask = static_cast<const float*>(a.tensors[layer].mask);
  int64 size = int64(own.positions) * own.width_out;
  float* delta = work.delta.with(a.rows * size);
  for (int64 row = 0; row < a.rows; ++row) {
    for (int64 unit = 0; unit < size; ++unit) {
      int64 at = row * size + unit;
      float value = slope_product(own.activation, P[row * a.widest + unit] * own.scale, saved[at], own.p, own.q);
      delta[at] = mask ? value * mask[at] : value;
    }
  }
  return delta;
}

// Σ over the rows, in double precision: it costs nothing here, and in single it would lose what torch's own sum keeps.
void add_rows(int64 rows, const float* delta, int width, float* sums) {
  for (int unit = 0; unit < width; unit += LANES) {
    int units = minimum(LANES, width - unit);
    double own[LANES] = {};
    for (int64 row = 0; row < rows; ++row) {
      for (int i = 0; i < units; ++i) own[i] += delta[row * width + unit + i];
    }
    for (int i = 0; i < units; ++i) sums[unit + i] = static_cast<float>(own[i]);
  }
}

// As `spend`, for a row of gradients by a rule that the compiler knows.
template <int RULE>
__attribute__((flatten)) void spend_row(Destination to, int64 first, int width, const float* gradient) {
  to.rule = RULE;
  to.dtype = FLOAT32;
  to.reaches_quads = false;
  float own[QUAD];
  int j = 0;
  for (; j + QUAD <= width; j += QUAD) {
    for (int i = 0; i < QUAD; ++i) own[i] = gradient[j + i];
    spend(to, {first + j, QUAD, false}, own);
  }
  for (int i = 0; i < width - j; ++i) own[i] = gradient[j + i];
  spend(to, {first + j, width - j, false}, own);
}

void spend_row(const Destination& to, int64 first, int width, const float* gradient) {
  switch (to.rule) {
    case STORE:
      return spend_row<STORE>(to, first, width, gradient);
    case SGD:
      return spend_row<SGD>(to, first, width, gradient);
    case MOMENTUM:
      return spend_row<MOMENTUM>(to, first, width, gradient);
    default:
      return spend_row<ADAMW>(to, first, width, gradient);
  }
}

// δᵀ x and Σ δ to where they are wanted.
void finish(const Arguments& a, int layer, const float* delta, Workspace& work) {
  const Layer& own = a.layer[layer];
  const Tensors& tensors = a.tensors[layer];
  int64 depth = int64(a.rows) * own.positions;
  int in = own.width_in, out = own.width_out;
  float* sums = work.sums.with(int64(STRIP) * (in > out ? in : out));
  if (tensors.weight) {
    Destination to = destination_of(a, tensors.weight, tensors.weight_state, own.weight_set, in);
    for (int unit = 0; unit < out; unit += STRIP) {
      int units = minimum(STRIP, out - unit);
      multiply({depth, delta + unit, static_cast<const float*>(tensors.x), out, in, sums, in}, units, in);
      for (int i = 0; i < units; ++i) spend_row(to, int64(unit + i) * in, in, sums + int64(i) * in);
    }
  }
  if (tensors.bias) {
    add_rows(depth, delta, out, sums);
    spend_row(destination_of(a, tensors.bias, tensors.bias_state, own.bias_set, out), 0, out, sums);
  }
}

void run(const Arguments& a) {
  Workspace work;
  Matrix error = {static_cast<const float*>(a.error), a.stride_row, a.stride_column};
  const float* P = a.hidden ? projected(a, error, work) : nullptr;
  for (int layer = 0; layer < a.layers; ++layer) {
    finish(a, layer, layer < a.hidden ? delta_of(a, layer, P, work) : output_delta(a, error, work), work);
  }
}

thread_local char message[128];

int refused(const char* what, long long got) {
  std::snprintf(message, sizeof message, "%s: got %lld", what, got);
  return 1;
}

}  // namespace
}  // namespace dfa

DFA_EXPORT int dfa_abi_version() { return DFA_ABI_VERSION; }
DFA_EXPORT long long dfa_arguments_bytes() { return sizeof(dfa::Arguments); }

// Why the last call on this thread that did not return 0 failed.
DFA_EXPORT const char* dfa_message() { return dfa::message; }

// The arguments `given`, whose pointer number places[i] is addresses[i].
DFA_EXPORT int dfa_run_small(const dfa::Arguments* given, const dfa::uint64* addresses, const int* places, int count) {
  constexpr int POINTERS = offsetof(dfa::Arguments, stride_row) / sizeof(void*);
  dfa::Arguments a = *given;
  for (int i = 0; i < count; ++i) {
    if (places[i] < 0 || places[i] >= POINTERS) return dfa::refused("places", places[i]);
    std::memcpy(reinterpret_cast<char*>(&a) + places[i] * sizeof(void*), &addresses[i], sizeof(void*));
  }
  if (a.layers < 0 || a.layers > dfa::MOST_LAYERS) return dfa::refused("layers", a.layers);
  if (a.source < 0 || a.source > dfa::PROJECTION) return dfa::refused("source", a.source);
  if (a.rule < 0 || a.rule > dfa::ADAMW) return dfa::refused("rule", a.rule);
  for (int i = 0; i < a.layers; ++i) {
    int activation = a.layer[i].activation;
    if (activation < 0 || activation > dfa::HARDTANH) return dfa::refused("activation", activation);
  }
  int dtypes[] = {a.dtype, a.error_dtype, a.parameter_dtype};
  for (int dtype : dtypes) {
    if (dtype != dfa::FLOAT32) return dfa::refused("dtype", dtype);
  }
  try {
    dfa::run(a);
  } catch (const std::bad_alloc&) {
    return dfa::refused("memory for so many layers", a.layers);
  }
  return 0;
}
