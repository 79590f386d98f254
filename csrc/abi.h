// The library's interface: plain C, so that one build serves every version of Python and of torch.
//
// dfa_kernels/backends/csrc/arguments.py has the same structs; both sides compare DFA_ABI_VERSION and their sizes.
#pragma once

#include "platform.h"

#define DFA_ABI_VERSION 1

namespace dfa {

enum DType { FLOAT32, FLOAT16, BFLOAT16 };
enum Task { STRIP, WIDE, TAPS };
// Where U comes from: memory, its seed by kind, or P = e Uᵀ itself lies in memory, [rows, widest].
enum Source { MATRIX, GAUSSIAN_SEED, UNIFORM_SEED, SIGNS, NONZEROS, PROJECTION };
enum Activation { IDENTITY, TANH, RELU, LEAKY_RELU, ABS, SIGMOID, GELU, SILU, ELU, SOFTPLUS, HARDTANH };
enum Rule { STORE, SGD, MOMENTUM, ADAMW };

constexpr int MOST_LAYERS = 28;  // of which the arguments fit into the 4 KB that a kernel may be given
constexpr int MOST_NUMBERS = 512;

// Of a layer: x [R·T, width_in]; saved, mask and delta [R·T, width_out] (R rows of the error, T positions). A null
// pointer says that there is none, or that the gradient is not wanted.
struct Tensors {
  const void* x;
  const void* saved;
  const void* mask;
  void* delta;
  void* weight;
  void* bias;
  void* weight_state[2];
  void* bias_state[2];
};

struct Layer {
  int width_in, width_out, positions, channels;
  int activation;
  float scale, p, q;
  int weight_set, bias_set;  // where its numbers begin in `hyper`
  int first_program, chunks;
  int first_sum;
  int channels_last;
};

struct Arguments {
  const void* error;
  const void* stored;
  float* sums;  // of δ over rows of a tile: [tiles of rows, units] from tiles of rows · first_sum on, for each layer
  const float* hyper;
  Tensors tensors[MOST_LAYERS];
  int64 stride_row, stride_column;
  int task, rule, source;
  int dtype, error_dtype, stored_dtype, parameter_dtype;
  int rows, error_size, widest, nonzeros;
  uint32 key0, key1;
  int layers, hidden, programs;
  Layer layer[MOST_LAYERS];
};
static_assert(sizeof(Arguments) <= 4096, "a kernel's arguments are at most 4 KB");

struct Numbers {
  float values[MOST_NUMBERS];
};

}  // namespace dfa
