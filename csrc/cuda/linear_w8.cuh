// linear_w8: y = x @ W.T * scale + bias for a few tokens, bound by the reading of W. A warp takes
// two rows of W at a time and all its lanes a run of 16 inputs of both; x lies in shared memory as
// float32, so that a load of it serves both rows.
#pragma once

#include "../params.h"
#include "formats.cuh"
#include "ptx_numbers.cuh"

namespace w2a4::cuda {

constexpr int kW8Warps = 8;                  // of a thread block
constexpr int kW8Rows = 2;                   // of a warp at a time
constexpr int kW8Step = 512;                 // inputs that a warp's loads of one row cover
constexpr int kW8Ahead = 2;                  // steps whose loads are under way together
constexpr int kW8Span = kW8Step * kW8Ahead;  // x is padded to a multiple of it

struct LinearW8Args {
  LinearW8Params p;
  int span;  // in_features, padded to kW8Span
};

// Where input i of a token lies: lanes read four inputs each, and those lie side by side then.
W2A4_DEVICE int w8_place(int i) {
  const int within = i % kW8Step;
  return i - within + within % 16 / 4 * 128 + within / 16 * 4 + within % 4;
}

// 16 weights of a row from input i on, as bytes without sign (128 more); any beyond the end, where
// x is 0: a load without a condition can start before the one above is used. kVector: rows are
// aligned to 16 bytes.
template <bool kVector>
W2A4_DEVICE U32x4 load_w8(const int8_t* row, int i, int in) {
  uint32_t words[4] = {};
  if constexpr (kVector) {
    const U32x4 w = load_u32x4(row + (i < in ? i : 0));
    words[0] = w.x, words[1] = w.y, words[2] = w.z, words[3] = w.w;
  } else {
    W2A4_UNROLL
    for (int word = 0; word < 4; ++word) W2A4_ROLLED
    for (int j = 0; j < 4 && i + 4 * word + j < in; ++j)
      words[word] |= static_cast<uint32_t>(static_cast<uint8_t>(row[i + 4 * word + j])) << 8 * j;
  }
  constexpr uint32_t kSigns = 0x80808080;
  return {words[0] ^ kSigns, words[1] ^ kSigns, words[2] ^ kSigns, words[3] ^ kSigns};
}

// Byte j of a word without sign as a float, 128 less: exact, and no conversion.
W2A4_DEVICE float w8_weight(uint32_t word, int j) {
  return add_rn(as_float(prmt(word, 0x4b000000u, 0x7440u + static_cast<uint32_t>(j))), -8388736.0f);
}

template <class T, int kTokens>
W2A4_DEVICE void stage_x(const LinearW8Args& args, int64_t first, float* x) {
  const LinearW8Params& p = args.p;
  for (int token = 0; token < kTokens; ++token)
    for (int i = static_cast<int>(threadIdx.x); i < args.span; i += static_cast<int>(blockDim.x)) {
      const bool there = i < p.in_features && first + token < p.tokens;
      x[token * args.span + w8_place(i)] =
          there ? load_one<T>(p.x, (first + token) * p.in_features + i) : 0.0f;
    }
}

// Blocks of grid.y share the tokens, kTokens each; blocks of grid.x go through the rows together.
template <class T, int kTokens, bool kVector>
__global__ void __launch_bounds__(kW8Warps * 32)
    linear_w8_kernel(const __grid_constant__ LinearW8Args args) {
  wait_for_previous_kernel();
  const LinearW8Params& p = args.p;
  float* x = reinterpret_cast<float*>(shared_memory());
  const int64_t first_token = int64_t{kTokens} * blockIdx.y;
  stage_x<T, kTokens>(args, first_token, x);
  sync_block();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int in = static_cast<int>(p.in_features);
  // Rows that are not aligned have no loads to start early, and need the registers.
  constexpr int kAhead = kVector ? kW8Ahead : 1;
  const int64_t stride = int64_t{kW8Rows} * kW8Warps * gridDim.x;
  int64_t row = kW8Rows * (int64_t{kW8Warps} * blockIdx.x + threadIdx.x / 32);
  for (; row < p.out_features; row += stride) {
    const int64_t last = p.out_features - 1;
    const int8_t* rows[kW8Rows] = {p.weight + row * p.in_features,
                                   p.weight + (row < last ? row + 1 : last) * p.in_features};
    float sums[kW8Rows][kTokens] = {};
    for (int start = 0; start < args.span; start += kAhead * kW8Step) {
      U32x4 w[kAhead][kW8Rows];
      W2A4_UNROLL
      for (int s = 0; s < kAhead; ++s) W2A4_UNROLL
      for (int r = 0; r < kW8Rows; ++r)
        w[s][r] = load_w8<kVector>(rows[r], start + s * kW8Step + 16 * lane, in);
      W2A4_UNROLL
      for (int s = 0; s < kAhead; ++s) W2A4_UNROLL
      for (int j = 0; j < 4; ++j) {
        float weight[kW8Rows][4];
        W2A4_UNROLL
        for (int r = 0; r < kW8Rows; ++r) {
          const U32x4& q = w[s][r];
          const uint32_t word = j == 0 ? q.x : j == 1 ? q.y : j == 2 ? q.z : q.w;
          W2A4_UNROLL
          for (int i = 0; i < 4; ++i) weight[r][i] = w8_weight(word, i);
        }
        W2A4_UNROLL
        for (int token = 0; token < kTokens; ++token) {
          const U32x4 bits =
              read_u32x4(x + token * args.span + start + s * kW8Step + 128 * j + 4 * lane);
          const float v[4] = {as_float(bits.x), as_float(bits.y), as_float(bits.z),
                              as_float(bits.w)};
          W2A4_UNROLL
          for (int r = 0; r < kW8Rows; ++r) W2A4_UNROLL
          for (int i = 0; i < 4; ++i) sums[r][token] = fma_rn(v[i], weight[r][i], sums[r][token]);
        }
      }
    }
    W2A4_UNROLL
    for (int r = 0; r < kW8Rows; ++r) W2A4_UNROLL
    for (int token = 0; token < kTokens; ++token) {
      float sum = sums[r][token];
      W2A4_UNROLL
      for (int mask = 1; mask < 32; mask *= 2) sum = add_rn(sum, shfl_xor(sum, mask));
      if (lane == 0 && row + r < p.out_features && first_token + token < p.tokens) {
        float y = mul_rn(sum, float_from_half(load_u16(p.scale + row + r)));
        if (p.bias) y = add_rn(y, load_number(p.bias, p.bias_dtype, row + r));
        store_one<T>(p.y, (first_token + token) * p.out_features + row + r, y);
      }
    }
  }
}

}  // namespace w2a4::cuda
