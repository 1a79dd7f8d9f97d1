// What the two GEMV kernels share: how a matrix is divided among warps, the epilogue, and which
// kernel serves which call.
//
// A block of kWarps warps owns some rows of the weight and all inputs of up to kTokens tokens.
// Inputs are divided into units of 128, chunks of four units, and chunk c belongs to warp
// c % kWarps, so that a block reads contiguous memory. A unit's integer sum is exact; a warp adds
// scale * sum over its even units and over its odd units, in order, and the block adds the warps'
// results in order. Both kernels do exactly this, so a token's bits depend neither on the kernel
// nor on the other tokens, and repeated runs agree.
#pragma once

#include "formats.cuh"

namespace w2a4::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kUnit = 128;        // inputs of an exact integer sum
constexpr int kUnitsInChunk = 4;  // so a 2-bit row gives a warp 128 contiguous bytes

// input >> input_shift is the group, for groups of a power of two; a whole row is group 0.
W2A4_DEVICE int input_shift(const LinearA4Params& p) {
  return p.group_size >= p.in_features
             ? 31
             : static_cast<int>(popc(static_cast<uint32_t>(p.group_size) - 1));
}
// The same for the activations' groups.
W2A4_DEVICE int act_input_shift(const LinearA4Params& p) {
  return p.act_group >= p.in_features
             ? 31
             : static_cast<int>(popc(static_cast<uint32_t>(p.act_group) - 1));
}
// unit >> unit_shift is the group, for groups of at least a unit.
W2A4_DEVICE int unit_shift(const LinearA4Params& p) {
  const int shift = input_shift(p);
  return shift == 31 ? 31 : shift - 7;
}

// Adds the warps' sums and writes the result: sums of warp w are floats [tokens, rows] at
// shared + w * stride. kScale: the token's only activation scale is applied here. `thread` of
// `threads` does its share.
template <int kRows, int kTokens, bool kScale>
W2A4_DEVICE void finish_rows(const LinearA4Params& p, const unsigned char* shared, int stride,
                             int64_t first_row, int64_t first_token, int thread, int threads) {
  for (int i = thread; i < kRows * kTokens; i += threads) {
    const int64_t row = first_row + i % kRows, token = first_token + i / kRows;
    if (row >= p.out_features || token >= p.tokens) continue;
    float sum = reinterpret_cast<const float*>(shared)[i];
    for (int w = 1; w < kWarps; ++w)
      sum = add_rn(sum, reinterpret_cast<const float*>(shared + w * stride)[i]);
    if (kScale) sum = mul_rn(sum, p.a_scale[token]);
    if (p.bias) sum = add_rn(sum, load_number(p.bias, p.bias_dtype, row));
    const int64_t at = token * p.out_features + row;
    if (p.residual)
      sum = add_rn(round_number(p.out_dtype, sum), load_number(p.residual, p.out_dtype, at));
    store_number(p.y, p.out_dtype, at, sum);
  }
}

}  // namespace w2a4::cuda
