// A tile on its way: from a matrix in memory into registers, and from there into shared memory when there is room.
#pragma once

#include "memory.h"

namespace dfa {

template <class T>
constexpr int PER_PIECE = sizeof(Piece) / sizeof(T);

// What is left out behind every row of a tile in shared memory, in pieces, so that what a warp reads at once is in
// different banks: one piece of each of eight rows (LDSM), or on sm_70, which has no such instruction, 8 bytes in two
// places 16 bytes apart of each of four rows. The host, which does not know, makes room for either.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
constexpr int GAP = 1;
#else
constexpr int GAP = 2;
#endif

template <class T>
DFA_HD constexpr int pitch_of(int width) {
  return width + (sizeof(T) == 2 ? GAP : 1) * PER_PIECE<T>;
}

// The i-th number of a piece that was 0.
DFA_DEVICE void put(Piece& piece, int i, float x) { piece.words[i] = bits_of(x); }
template <class T>
DFA_DEVICE void put(Piece& piece, int i, T x) {
  piece.words[i / 2] |= static_cast<uint32>(x.bits) << i % 2 * 16;
}

// A thread's share of the tiles [DEPTH, WIDTH] of a matrix in memory, one below the other.
template <class T, int DEPTH, int WIDTH, int THREADS>
struct Staging {
  static constexpr int ACROSS = WIDTH / PER_PIECE<T>, APART = THREADS / ACROSS, PIECES = DEPTH / APART;
  static constexpr int WHOLE = 1 << 30;
  static_assert(APART * ACROSS == THREADS && PIECES * APART == DEPTH, "every thread has the same number of pieces");
  const T* next;
  int columns_left;
  Piece pieces[PIECES];

  // The matrix has `width` columns and no gaps between its rows; the first tile begins in its first row, at `column`.
  DFA_DEVICE void begin(const void* matrix, int width, int column) {
    column += thread() % ACROSS * PER_PIECE<T>;
    columns_left = width - column;
    next = static_cast<const T*>(matrix) + int64{thread() / ACROSS} * width + column;
    // One access reaches every piece.
    bool aligned = width % PER_PIECE<T> == 0 && reinterpret_cast<uint64>(matrix) % sizeof(Piece) == 0;
    if (aligned && columns_left > 0) columns_left = WHOLE;
  }

  // The next tile, with which the matrix has `rows` rows left, sets out; 0 beyond the matrix.
  DFA_DEVICE void load(int width, int rows) {
    DFA_UNROLL
    for (int i = 0; i < PIECES; ++i) {
      pieces[i] = Piece{};
      if (columns_left > 0 && thread() / ACROSS + i * APART < rows) read(next + int64{i * APART} * width, pieces[i]);
    }
    next += int64{DEPTH} * width;
  }

  DFA_DEVICE void read(const T* from, Piece& piece) const {
    if (columns_left == WHOLE) {
      piece = *reinterpret_cast<const Piece*>(from);
      return;
    }
    DFA_UNROLL
    for (int i = 0; i < PER_PIECE<T>; ++i) {
      if (i < columns_left) put(piece, i, from[i]);
    }
  }

  DFA_DEVICE void store(T* shared) const {
    T* to = shared + thread() / ACROSS * pitch_of<T>(WIDTH) + thread() % ACROSS * PER_PIECE<T>;
    DFA_UNROLL
    for (int i = 0; i < PIECES; ++i) *reinterpret_cast<Piece*>(to + i * APART * pitch_of<T>(WIDTH)) = pieces[i];
  }
};

}  // namespace dfa
