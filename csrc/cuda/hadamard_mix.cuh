// The first half of a Hadamard transform: inputs, where they lie, and R by tensor cores. The names
// are those of hadamard_plan.h, the layout of y that of hadamard.cuh.
#pragma once

#include "formats.cuh"
#include "hadamard_plan.h"
#include "ptx_mma.cuh"

namespace w2a4::cuda {

// ---- inputs

// x * sigmoid(x). The exponential is of a number that is not positive, so it cannot overflow.
W2A4_DEVICE float silu(float x) {
  const float e = exp_f32(x > 0.0f ? -x : x);
  return x * div_approx(x > 0.0f ? 1.0f : e, 1.0f + e);
}

// What is transformed: x, or silu(x) * up, both of format T; up may be null if all goes through
// one().
template <class T, bool kSilu>
struct Input {
  using Format = T;
  // float32 values go to the tensor core as three bfloat16 that add up to them exactly.
  static constexpr bool kPlain = !kSilu;  // nothing to prepare
  static constexpr int kTerms = kSilu || T::kBytes == 4 ? 3 : 1;
  const void* x;
  const void* up;

  W2A4_DEVICE float one(int64_t at) const {
    const float v = load_one<T>(x, at);
    return kSilu && up ? silu(v) * load_one<T>(up, at) : v;
  }
  template <int kCount>
  W2A4_DEVICE void run(int64_t at, float (&v)[kCount]) const {
    load_run<T>(x, at, v);
    if constexpr (kSilu) {
      float factor[kCount];
      load_run<T>(up, at, factor);
      W2A4_UNROLL
      for (int i = 0; i < kCount; ++i) v[i] = silu(v[i]) * factor[i];
    }
  }
};

// ---- where things lie

struct Unit {
  int64_t first;  // element of the call
  int elements;   // of the unit, fewer in the last one
};

// What this thread block works on in its `round`.
W2A4_DEVICE Unit unit_of_round(const Transform& t, int round) {
  const int64_t first = (blockIdx.x + static_cast<int64_t>(round) * gridDim.x) * t.unit;
  const int64_t left = t.total - first;
  return {first, left >= t.unit ? t.unit : left > 0 ? static_cast<int>(left) : 0};
}

// What this warp transforms: rows from `row` on, columns from `column` on.
struct Task {
  int row, column;
};

W2A4_DEVICE Task task_of_warp(const Transform& t, int slice) {
  const int task = slice * t.warps + static_cast<int>(threadIdx.x) / 32;
  return {task / t.chunks * 16 * t.tiles, task % t.chunks * kChunk};
}

// First of the eight columns whose inputs this lane supplies.
W2A4_DEVICE int lane_column(const Task& task) {
  return task.column + threadIdx.x % 32 / 4 * 8;
}

// Element of the unit at (row, column); columns of one block follow those of the one before it.
W2A4_DEVICE int element_at(const Transform& t, int row, int column) {
  return (column >> t.log_m) * t.size + (row << t.log_m) + (column & ((1 << t.log_m) - 1));
}

W2A4_DEVICE bool inside(const Transform& t, const Unit& unit, int row, int element) {
  return row < t.rows && element < unit.elements;
}

// Slow paths are loops that are not unrolled, to keep kernels small; what they load goes through
// memory or is shifted into place, since registers cannot be indexed.

template <class In>
W2A4_DEVICE float load_number(const Transform& t, const Unit& unit, const In& in, int row,
                              int column) {
  const int element = element_at(t, row, column);
  return inside(t, unit, row, element) ? in.one(unit.first + element) : 0.0f;
}

// A column of the unit.
struct Column {
  int64_t first;  // element of the call in row 0
  int rows;       // that are there: none beyond the end of the unit
};

W2A4_DEVICE Column column_at(const Transform& t, const Unit& unit, int column) {
  const int element = element_at(t, 0, column);
  return {unit.first + element, element < unit.elements ? t.rows : 0};
}

// kCount columns from `column` on, zeros outside, if t.vector.
template <class In, int kCount>
W2A4_DEVICE void load_columns(const Transform& t, const Column& column, const In& in, int row,
                              float (&v)[kCount]) {
  W2A4_UNROLL
  for (int i = 0; i < kCount; ++i) v[i] = 0.0f;
  if (row < column.rows) in.run(column.first + (row << t.log_m), v);
}

// Eight columns of a 2-byte format, as they are.
W2A4_DEVICE U32x4 load_bits(const Transform& t, const Column& column, const void* x, int row) {
  const auto* from = static_cast<const uint16_t*>(x) + column.first + (row << t.log_m);
  return row < column.rows ? load_u32x4(from) : U32x4{};
}

// The same if not t.vector.
W2A4_DEVICE U32x4 load_bits_slowly(const Transform& t, const Unit& unit, const void* x, int row,
                                   int column) {
  U32x4 v{};
  W2A4_ROLLED
  for (int n = 0; n < 8; ++n) {
    const int element = element_at(t, row, column + n);
    const auto* from = static_cast<const uint16_t*>(x) + unit.first + element;
    const uint32_t bits = inside(t, unit, row, element) ? load_u16(from) : 0;
    v.x = v.x >> 16 | v.y << 16, v.y = v.y >> 16 | v.z << 16;
    v.z = v.z >> 16 | v.w << 16, v.w = v.w >> 16 | bits << 16;
  }
  return v;
}

// ---- signs of R, in shared memory: byte [in / 4][out], bit in % 4 is set where R[in][out] = -1.
// Rows and columns beyond R count as +1.

// Bit 7 of byte i: had_k x Sylvester at [row][column + i] is -1.
W2A4_DEVICE uint32_t sign_word(const Transform& t, int row, int column) {
  if (t.word_signs && t.log_copies == 0 && t.had_k)
    return row < t.rows && column < t.rows ? load_u32(t.had_k + row * t.k + column) : 0;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    const int c = column + i;
    if (row >= t.rows || c >= t.rows) continue;
    bool negative = popc(row & c & ((1 << t.log_copies) - 1)) & 1;
    if (t.had_k) negative ^= t.had_k[(row >> t.log_copies) * t.k + (c >> t.log_copies)] < 0;
    word |= negative ? 0x80u << 8 * i : 0u;
  }
  return word;
}

W2A4_DEVICE int row_tiles(const Transform& t) {
  return (t.rows + 15) / 16;
}

W2A4_DEVICE void fill_signs(const Transform& t, unsigned char* signs) {
  const int quads = 4 * row_tiles(t);
  for (int i = threadIdx.x; i < quads * quads; i += blockDim.x) {
    const int in = i / quads * 4, out = i % quads * 4;
    uint32_t word = 0;
    for (int b = 0; b < 4; ++b) {
      if (t.transpose) {  // four bits of one byte, gathered by a multiplication
        const uint32_t bits = sign_word(t, out + b, in) >> 7 & 0x01010101;
        word |= (bits * 0x01020408u >> 24 & 15) << 8 * b;
      } else {
        word |= (sign_word(t, in + b, out) >> (7 - b)) & 0x01010101u << b;
      }
    }
    store_u32(signs + (in / 4) * (4 * quads) + out, word);
  }
}

// The mma operand of 16 rows of the result from `row` on and inputs 16 * step .. + 15. Lane 4g + j
// supplies inputs 4j .. 4j + 3, at what the layout calls k = 2j, 2j + 1, 2j + 8, 2j + 9.
template <class T>
W2A4_DEVICE void load_signs(const Transform& t, const unsigned char* signs, int row, int step,
                            uint32_t (&a)[4]) {
  const int lane = threadIdx.x % 32;
  const unsigned char* p = signs + (4 * step + lane % 4) * 16 * row_tiles(t) + row + lane / 4;
  const uint32_t above = p[0], below = p[8];
  // Bit 2i goes to bit 15, bit 2i + 1 to bit 31.
  a[0] = (above * 0x40008000u & 0x80008000u) | T::kOnes;
  a[1] = (below * 0x40008000u & 0x80008000u) | T::kOnes;
  a[2] = (above * 0x10002000u & 0x80008000u) | T::kOnes;
  a[3] = (below * 0x10002000u & 0x80008000u) | T::kOnes;
}

// ---- stages

using Values = float[2][8][4];

W2A4_DEVICE void clear(Values& y) {
  W2A4_UNROLL
  for (int i = 0; i < 64; ++i) y[i / 32][i / 4 % 8][i % 4] = 0.0f;
}

// y += R x for inputs that are sums of kTerms numbers of a 2-byte format: fetch(row, term) has the
// lane's eight columns. Terms are added in the order of mix_values, so both give the same bits.
template <class T, int kTerms, class Fetch>
W2A4_DEVICE void mix_bits(const Transform& t, const unsigned char* signs, const Task& task,
                          const Fetch& fetch, Values& y) {
  const int steps = row_tiles(t) * kTerms;
  for (int i = 0; i < steps; ++i) {
    const int step = i / kTerms, term = i % kTerms;
    const int row = 16 * step + 4 * (threadIdx.x % 4);
    uint32_t b[8][2];
    W2A4_UNROLL
    for (int pair = 0; pair < 2; ++pair) {  // two rows make a register for each column
      const U32x4 low = fetch(row + 2 * pair, term), high = fetch(row + 2 * pair + 1, term);
      b[0][pair] = prmt(low.x, high.x, 0x5410), b[1][pair] = prmt(low.x, high.x, 0x7632);
      b[2][pair] = prmt(low.y, high.y, 0x5410), b[3][pair] = prmt(low.y, high.y, 0x7632);
      b[4][pair] = prmt(low.z, high.z, 0x5410), b[5][pair] = prmt(low.z, high.z, 0x7632);
      b[6][pair] = prmt(low.w, high.w, 0x5410), b[7][pair] = prmt(low.w, high.w, 0x7632);
    }
    W2A4_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
      if (tile >= t.tiles || task.row + 16 * tile >= t.rows) break;
      uint32_t a[4];
      load_signs<T>(t, signs, task.row + 16 * tile, step, a);
      W2A4_UNROLL
      for (int s = 0; s < 8; ++s) T::mma(y[tile][s], a, b[s]);
    }
  }
}

// The upper 8 bits of a's and b's significands, as bfloat16; a and b become the rest, exactly.
W2A4_DEVICE uint32_t take_term(float& a, float& b) {
  const uint32_t term = prmt(as_bits(a), as_bits(b), 0x7632);
  const float high_a = as_float(as_bits(a) & 0xffff0000u),
              high_b = as_float(as_bits(b) & 0xffff0000u);
  a = a == high_a ? 0.0f : add_rn(a, -high_a);  // not infinity - infinity
  b = b == high_b ? 0.0f : add_rn(b, -high_b);
  return term;
}

// y += R x for float32 values, prepared here from global memory; if not t.vector by way of `mine`.
template <class In>
W2A4_DEVICE void mix_values(const Transform& t, const unsigned char* signs, const Unit& unit,
                            const Task& task, const In& in, float* mine, Values& y) {
  const int first_column = lane_column(task);
  const Column column = column_at(t, unit, first_column);
  for (int step = 0; step < row_tiles(t); ++step) {
    const int row = 16 * step + 4 * (threadIdx.x % 4);
    if (!t.vector) {
      W2A4_ROLLED
      for (int i = 0; i < 32; ++i)
        mine[32 * i] = load_number(t, unit, in, row + i / 8, first_column + i % 8);
    }
    W2A4_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int first_row = fence_loads(row);  // or both halves' loads take registers
      float x[4][4];
      W2A4_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (t.vector) {
          load_columns(t, {column.first + 4 * half, column.rows}, in, first_row + i, x[i]);
        } else {
          W2A4_UNROLL
          for (int c = 0; c < 4; ++c) x[i][c] = mine[32 * (8 * i + 4 * half + c)];
        }
      }
      uint32_t a[2][4];
      const int sign_row = fence_loads(task.row);
      W2A4_UNROLL
      for (int tile = 0; tile < 2; ++tile)
        if (tile < t.tiles && sign_row + 16 * tile < t.rows)
          load_signs<BFloat16>(t, signs, sign_row + 16 * tile, step, a[tile]);
      W2A4_UNROLL
      for (int c = 0; c < 4; ++c) W2A4_UNROLL
      for (int term = 0; term < 3; ++term) {
        const uint32_t b[2] = {take_term(x[0][c], x[1][c]), take_term(x[2][c], x[3][c])};
        W2A4_UNROLL
        for (int tile = 0; tile < 2; ++tile)
          if (tile < t.tiles && sign_row + 16 * tile < t.rows)
            BFloat16::mma(y[tile][4 * half + c], a[tile], b);
      }
    }
  }
}

// Place of an element in a staged term: pieces of 8 are permuted so that the lanes of one load,
// which read two pieces in each of four rows, meet different banks.
W2A4_DEVICE int staged_at(const Transform& t, int element) {
  return t.swizzle ? element ^ (element >> t.log_m >> 2 & 3) << 4 : element;
}

// Prepares the unit: three bfloat16 terms [3, unit] in shared memory.
template <class In>
W2A4_DEVICE void stage_terms(const Transform& t, const Unit& unit, const In& in, uint16_t* staged) {
  for (int e = 8 * threadIdx.x; e < unit.elements; e += 8 * blockDim.x) {
    float v[8];
    in.run(unit.first + e, v);
    W2A4_UNROLL
    for (int term = 0; term < 3; ++term) {
      uint32_t words[4];
      W2A4_UNROLL
      for (int i = 0; i < 4; ++i) words[i] = take_term(v[2 * i], v[2 * i + 1]);
      store_u32x4(staged + term * t.unit + staged_at(t, e),
                  {words[0], words[1], words[2], words[3]});
    }
  }
}

// y = x for blocks that are all columns; a task is one tile. What has to be prepared goes by way of
// `mine`.
template <class In>
W2A4_DEVICE void load_rows(const Transform& t, const Unit& unit, const Task& task, const In& in,
                           float* mine, float (&y)[8][4]) {
  const int row = task.row + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 16;
  if (In::kPlain && t.vector) {
    W2A4_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int element = (row + 8 * (r / 2)) * kChunk + column + 8 * (r % 2);
      float v[8] = {};
      if (element < unit.elements) in.run(unit.first + element, v);
      W2A4_UNROLL
      for (int s = 0; s < 8; ++s) y[s][r] = v[s];
    }
    return;
  }
  W2A4_ROLLED
  for (int i = 0; i < 32; ++i)
    mine[32 * i] = load_number(t, unit, in, row + 8 * (i / 16), column + i % 16);
  W2A4_UNROLL
  for (int i = 0; i < 32; ++i) y[i % 8][i / 8] = mine[32 * i];
}

}  // namespace w2a4::cuda
