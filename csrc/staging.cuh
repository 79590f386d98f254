// A tile on its way: from a matrix in memory into registers, and from there into shared memory when there is room.
#pragma once

#include "memory.h"

namespace dfa {

template <class T>
constexpr int PER_PIECE = sizeof(Piece) / sizeof(T);

// Behind every row of a tile in shared memory one piece is left out, so that pieces of neighbouring rows are in
// different banks.
template <class T>
DFA_HD constexpr int pitch_of(int width) {
  return width + PER_PIECE<T>;
}

// A thread's share of the tiles [DEPTH, WIDTH] of a matrix in memory, one below the other.
template <class T, int DEPTH, int WIDTH, int THREADS>
struct Staging {
  static constexpr int ACROSS = WIDTH / PER_PIECE<T>, APART = THREADS / ACROSS, PIECES = DEPTH / APART;
  static constexpr int WHOLE = 1 << 30;
  static_assert(APART * ACROSS == THREADS && PIECES * APART == DEPTH, "every thread has the same number of pieces");
  const T* next;
  int rows_left, columns_left;
  Piece pieces[PIECES];

  // The matrix is [rows, width], its rows without gaps; the first tile begins in its first row, at `column`.
  DFA_DEVICE void begin(const void* matrix, int rows, int width, int column) {
    column += thread() % ACROSS * PER_PIECE<T>;
    columns_left = width - column;
    rows_left = columns_left > 0 ? rows - thread() / ACROSS : 0;
    next = static_cast<const T*>(matrix) + int64{thread() / ACROSS} * width + column;
    // One access reaches every piece.
    if (width % PER_PIECE<T> == 0 && reinterpret_cast<uint64>(matrix) % sizeof(Piece) == 0) columns_left = WHOLE;
  }

  // The next tile sets out; 0 beyond the matrix.
  DFA_DEVICE void load(int width) {
    DFA_UNROLL
    for (int i = 0; i < PIECES; ++i) {
      pieces[i] = Piece{};
      if (i * APART < rows_left) read(next + int64{i * APART} * width, pieces[i]);
    }
    next += int64{DEPTH} * width;
    rows_left -= DEPTH;
  }

  DFA_DEVICE void read(const T* from, Piece& piece) const {
    if (columns_left == WHOLE) {
      piece = *reinterpret_cast<const Piece*>(from);
      return;
    }
    union {
      Piece all;
      T elements[PER_PIECE<T>];
    };
    all = piece;
    DFA_UNROLL
    for (int i = 0; i < PER_PIECE<T>; ++i) {
      if (i < columns_left) elements[i] = from[i];
    }
    piece = all;
  }

  DFA_DEVICE void store(T* shared) const {
    T* to = shared + thread() / ACROSS * pitch_of<T>(WIDTH) + thread() % ACROSS * PER_PIECE<T>;
    DFA_UNROLL
    for (int i = 0; i < PIECES; ++i) *reinterpret_cast<Piece*>(to + i * APART * pitch_of<T>(WIDTH)) = pieces[i];
  }
};

}  // namespace dfa
