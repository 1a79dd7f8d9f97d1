// The inner loop of attention: up to six rows times a panel of 64 columns, in float.
#pragma once

#include "numbers.h"

namespace w2a4::cpu {

constexpr int kRows = 6;      // rows of a tile, at most
constexpr int kColumns = 64;  // columns of a panel

// acc[r][c] (+)= sum over k, in order, of a[r][k] * b[k][c], for r < kTileRows, c < kColumns.
// A product is rounded before it is added, so that every instruction set gives the same bits.
//   a [kTileRows, lda], b [depth, ldb], acc [kTileRows, ldacc]; kFresh: acc is overwritten, from 0.
template <class Arch, bool kFresh, int kTileRows>
W2A4_INLINE void multiply_tile(const float* a, int64_t lda, const float* b, int64_t ldb,
                               int64_t depth, float* acc, int64_t ldacc) {
  constexpr int kLanes = Arch::kLanes;
  // Few rows take more columns at a time, so that as many sums are under way.
  constexpr int kWanted = kTileRows == 1 ? 8 : kTileRows <= 3 ? 4 : Arch::kVectors;
  constexpr int kVectors = kWanted < kColumns / kLanes ? kWanted : kColumns / kLanes;
  typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
  for (int column = 0; column < kColumns; column += kLanes * kVectors) {
    Vec sums[kTileRows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] =
            kFresh ? Vec{} : *reinterpret_cast<Vec*>(acc + r * ldacc + column + v * kLanes);
    for (int64_t k = 0; k < depth; ++k) {
      Vec row[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        row[v] = *reinterpret_cast<const Vec*>(b + k * ldb + column + v * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) {
        const float left = a[r * lda + k];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] += left * row[v];
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        *reinterpret_cast<Vec*>(acc + r * ldacc + column + v * kLanes) = sums[r][v];
  }
}

// Rows of tiles that `rows` are cut into: kRows each, the last of 1, 2, 3, 4 or kRows.
inline int64_t padded_rows(int64_t rows) {
  return rows % kRows == 5 ? rows + 1 : rows;
}

// The tile of so many rows, as `padded_rows` leaves them; more are the first kRows.
template <class Arch, bool kFresh>
W2A4_INLINE void multiply_rows(int64_t rows, const float* a, int64_t lda, const float* b,
                               int64_t ldb, int64_t depth, float* acc, int64_t ldacc) {
  switch (rows) {
    case 1:
      return multiply_tile<Arch, kFresh, 1>(a, lda, b, ldb, depth, acc, ldacc);
    case 2:
      return multiply_tile<Arch, kFresh, 2>(a, lda, b, ldb, depth, acc, ldacc);
    case 3:
      return multiply_tile<Arch, kFresh, 3>(a, lda, b, ldb, depth, acc, ldacc);
    case 4:
      return multiply_tile<Arch, kFresh, 4>(a, lda, b, ldb, depth, acc, ldacc);
    default:
      return multiply_tile<Arch, kFresh, kRows>(a, lda, b, ldb, depth, acc, ldacc);
  }
}

typedef uint8_t Bytes16 __attribute__((vector_size(16), aligned(1), may_alias));

#ifdef W2A4_BYTE_SHUFFLE  // gcc; its older versions have no __builtin_shufflevector
#define W2A4_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bytes16{__VA_ARGS__})
#else
#define W2A4_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif

W2A4_INLINE Bytes16 interleave_low(Bytes16 a, Bytes16 b) {
  return W2A4_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
W2A4_INLINE Bytes16 interleave_high(Bytes16 a, Bytes16 b) {
  return W2A4_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// dst[j][i] = src[i][j], 16 x 16 bytes. Interleaving rows i and i + 8 four times transposes.
W2A4_INLINE void transpose16(const uint8_t* src, int64_t ldsrc, uint8_t* dst, int64_t lddst) {
  Bytes16 x[16], y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = *reinterpret_cast<const Bytes16*>(src + i * ldsrc);
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = interleave_low(x[i], x[i + 8]);
      y[2 * i + 1] = interleave_high(x[i], x[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) *reinterpret_cast<Bytes16*>(dst + j * lddst) = x[j];
}

// dst[j][i] = src[i][j] for i < rows, j < width; dst is [width, kColumns], columns from rows on are
// 0.
W2A4_INLINE void transpose_bytes(const uint8_t* src, int64_t ldsrc, int64_t rows, int64_t width,
                                 uint8_t* dst) {
  if (rows < kColumns) std::memset(dst, 0, width * kColumns);
  for (int64_t i = 0; i < rows; i += 16) {
    for (int64_t j = 0; j < width; j += 16) {
      if (i + 16 <= rows && j + 16 <= width) {
        transpose16(src + i * ldsrc + j, ldsrc, dst + j * kColumns + i, kColumns);
        continue;
      }
      for (int64_t row = i; row < i + 16 && row < rows; ++row)
        for (int64_t at = j; at < j + 16 && at < width; ++at)
          dst[at * kColumns + row] = src[row * ldsrc + at];
    }
  }
}

}  // namespace w2a4::cpu
