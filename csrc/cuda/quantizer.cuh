// Quantisation, number by number, and reductions over a warp: what quantize_a4.cuh and the kernels
// of the 4-bit KV cache share.
#pragma once

#include "ptx_numbers.cuh"

namespace w2a4::cuda {

// How a group's values become codes; 16 bytes of shared memory. While the number furthest from 0 is
// looked for, the first word holds the largest of their `distance_bits`.
struct Quantizer {
  float factor;      // a power of two that keeps the numbers below in the range of normal floats
  float scale;       // times factor
  float reciprocal;  // of the line above, rounded
  uint32_t mask;     // 0 where the scale is not finite: codes are 0 then
};

W2A4_DEVICE uint32_t magnitude_bits(float x) {
  return as_bits(x) & 0x7fffffff;
}

// Bits that are ordered as the magnitudes are, of two opposite numbers the negative above; NaN
// above infinity, so a NaN is found too and makes the scale NaN.
W2A4_DEVICE uint32_t distance_bits(float x) {
  return as_bits(x) << 1 | as_bits(x) >> 31;
}
W2A4_DEVICE float from_distance_bits(uint32_t u) {
  return as_float(u >> 1 | u << 31);
}

W2A4_DEVICE bool is_finite(float x) {
  return (as_bits(x) & 0x7f800000) != 0x7f800000;
}

W2A4_DEVICE Quantizer quantizer_of(float scale) {
  if (!is_finite(scale)) return {0.0f, 1.0f, 1.0f, 0};
  const float magnitude = as_float(magnitude_bits(scale));
  const float factor = magnitude < 0x1p-64f ? 0x1p64f : magnitude > 0x1p64f ? 0x1p-64f : 1.0f;
  const float scaled = mul_rn(scale, factor);
  const float reciprocal = rcp_rn_mid(as_float(magnitude_bits(scaled)));
  return {factor, scaled, scaled < 0.0f ? -reciprocal : reciprocal, 15};
}

// x / scale, correctly rounded where it is within -16..16 (one step of Markstein's from the rounded
// reciprocal), else beyond them.
W2A4_DEVICE float quotient_of(const Quantizer& q, float x) {
  const float wide = mul_rn(x, q.factor);
  const float first = max_f32(min_f32(mul_rn(wide, q.reciprocal), 16.0f), -16.0f);
  return fma_rn(fma_rn(-first, q.scale, wide), q.reciprocal, first);
}

// The nearest integer, ties to even, as the last bits of a word; |x| < 2**22.
W2A4_DEVICE uint32_t rounded_bits(float x) {
  return as_bits(add_rn(x, 12582912.0f));  // 1.5 * 2**23
}

// Of a group of activations, from the largest of their `distance_bits`.
W2A4_DEVICE float scale_of(float clip, uint32_t most) {
  const float x = from_distance_bits(most);
  const float scale = clip < 0.0f ? mul_rn(mul_rn(clip, x), 0.125f)
                                  : quotient_rn<7>(mul_rn(clip, as_float(magnitude_bits(x))));
  return scale == 0.0f ? 1.0f : scale;
}

// x / scale rounded to the nearest integer, ties to even, within -8..7, as a nibble.
W2A4_DEVICE uint32_t code_of(const Quantizer& q, float x) {
  const float bounded = max_f32(min_f32(quotient_of(q, x), 7.0f), -8.0f);
  return rounded_bits(bounded) & q.mask;
}

W2A4_DEVICE uint32_t larger(uint32_t a, uint32_t b) {
  return a > b ? a : b;
}

// Bits that are ordered as the floats are: -NaN, -infinity, ..., -0, 0, ..., infinity, NaN.
W2A4_DEVICE uint32_t ordered_bits(float x) {
  const uint32_t u = as_bits(x);
  return u & 0x80000000 ? ~u : u | 0x80000000;
}
W2A4_DEVICE float from_ordered_bits(uint32_t u) {
  return as_float(u & 0x80000000 ? u & 0x7fffffff : ~u);
}

// The sum over the warp, by halves, the same bits in every lane.
W2A4_DEVICE float warp_sum(float value W2A4_SITE) {
  for (int mask = 1; mask < 32; mask *= 2)
    value = add_rn(value, shfl_xor(value, mask W2A4_SAME_SITE));
  return value;
}

}  // namespace w2a4::cuda
