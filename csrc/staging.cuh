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

// [rows, width] in memory, row after row.
template <class T>
struct Matrix {
  const T* first;
  int64 rows;
  int width;
  bool whole_pieces;  // whether each begins where one access may

  DFA_DEVICE Matrix(const void* memory, int64 rows, int width)
      : first(static_cast<const T*>(memory)),
        rows(rows),
        width(width),
        whole_pieces(width % PER_PIECE<T> == 0 && reinterpret_cast<uint64>(memory) % sizeof(Piece) == 0) {}

  // From (row, column) on, 0 outside.
  DFA_DEVICE Piece piece(int64 row, int column) const {
    union {
      Piece found;
      T elements[PER_PIECE<T>];
    };
    found = Piece{};
    if (row >= rows) return found;
    const T* from = first + row * width + column;
    if (whole_pieces) {
      if (column < width) found = *reinterpret_cast<const Piece*>(from);
    } else {
      DFA_UNROLL
      for (int i = 0; i < PER_PIECE<T>; ++i) {
        if (column + i < width) elements[i] = from[i];
      }
    }
    return found;
  }
};

template <class T, int DEPTH, int WIDTH, int THREADS>
struct Staging {
  static constexpr int ACROSS = WIDTH / PER_PIECE<T>, PIECES = DEPTH * ACROSS / THREADS;
  static_assert(PIECES * THREADS == DEPTH * ACROSS, "every thread has the same number of pieces");
  Piece pieces[PIECES];

  DFA_DEVICE void load(const Matrix<T>& matrix, int64 row, int column) {
    DFA_UNROLL
    for (int i = 0; i < PIECES; ++i) {
      int n = i * THREADS + thread();
      pieces[i] = matrix.piece(row + n / ACROSS, column + n % ACROSS * PER_PIECE<T>);
    }
  }

  DFA_DEVICE void store(T* shared) const {
    DFA_UNROLL
    for (int i = 0; i < PIECES; ++i) {
      int n = i * THREADS + thread();
      *reinterpret_cast<Piece*>(shared + n / ACROSS * pitch_of<T>(WIDTH) + n % ACROSS * PER_PIECE<T>) = pieces[i];
    }
  }
};

}  // namespace dfa
