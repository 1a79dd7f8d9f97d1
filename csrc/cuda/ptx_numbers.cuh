// Named instructions on bits and numbers, see ptx.cuh.
#pragma once

#include "ptx.cuh"

namespace w2a4::cuda {

W2A4_DEVICE float as_float(uint32_t x) {
#ifdef __CUDACC__
  return __uint_as_float(x);
#else
  float f;
  std::memcpy(&f, &x, sizeof(f));
  return f;
#endif
}

W2A4_DEVICE uint32_t as_bits(float x) {
#ifdef __CUDACC__
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, sizeof(u));
  return u;
#endif
}

W2A4_DEVICE float shfl_xor(float value, int mask W2A4_SITE) {
  return as_float(shfl_xor(as_bits(value), mask W2A4_SAME_SITE));
}

// a * b + c, rounded once.
W2A4_DEVICE float fma_rn(float a, float b, float c) {
#ifdef __CUDACC__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// Rounded products and sums that the compiler does not contract.
W2A4_DEVICE float mul_rn(float a, float b) {
#ifdef __CUDACC__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
W2A4_DEVICE float add_rn(float a, float b) {
#ifdef __CUDACC__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

W2A4_DEVICE float float_from_half(uint16_t bits) {
#ifdef __CUDACC__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#else
  _Float16 h;
  std::memcpy(&h, &bits, sizeof(h));
  return static_cast<float>(h);
#endif
}

W2A4_DEVICE uint16_t half_from_float(float x) {
#ifdef __CUDACC__
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const auto h = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &h, sizeof(bits));
  return bits;
#endif
}

W2A4_DEVICE float float_from_bfloat16(uint16_t bits) {
  return as_float(static_cast<uint32_t>(bits) << 16);
}

W2A4_DEVICE uint16_t bfloat16_from_float(float x) {
#ifdef __CUDACC__
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const uint32_t u = as_bits(x);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
#endif
}

// Bits of a where the mask is set, of b elsewhere: one LOP3.
W2A4_DEVICE uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
#else
  return (a & mask) | (b & ~mask);
#endif
}

// Bytes 0..3 are a's, 4..7 are b's; byte i of the result is the one that bits 4i..4i+2 of the
// selector name. Bit 4i+3 must be 0.
W2A4_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDACC__
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
#else
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (nibble & 7)) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;  // the sign, replicated
    d |= byte << 8 * i;
  }
  return d;
#endif
}

// c + the dot product of four signed bytes and four unsigned ones.
W2A4_DEVICE int32_t dp4a_s8_u8(uint32_t s8, uint32_t u8, int32_t c) {
#ifdef __CUDACC__
  int32_t d;
  asm("dp4a.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(s8), "r"(u8), "r"(c));
  return d;
#else
  for (int i = 0; i < 4; ++i)
    c += static_cast<int8_t>(s8 >> 8 * i) * static_cast<int>(u8 >> 8 * i & 255);
  return c;
#endif
}

W2A4_DEVICE int popc(uint32_t x) {
#ifdef __CUDACC__
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}

// Two float16 in a word, `low` in its low half.
W2A4_DEVICE uint32_t halves_from_floats(float low, float high) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return half_from_float(low) | static_cast<uint32_t>(half_from_float(high)) << 16;
#endif
}
W2A4_DEVICE uint32_t bfloat16s_from_floats(float low, float high) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return bfloat16_from_float(low) | static_cast<uint32_t>(bfloat16_from_float(high)) << 16;
#endif
}

// The larger or smaller of two; a NaN loses.
W2A4_DEVICE float max_f32(float a, float b) {
  return fmaxf(a, b);
}
W2A4_DEVICE float min_f32(float a, float b) {
  return fminf(a, b);
}

// The larger or smaller of two, of which one may be NaN: a NaN then. -0 is below 0.
W2A4_DEVICE float max_nan_f32(float a, float b) {
#ifdef __CUDACC__
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
#else
  if (a != a || b != b) return a + b;
  return a > b || (a == b && !std::signbit(a)) ? a : b;
#endif
}
W2A4_DEVICE float min_nan_f32(float a, float b) {
#ifdef __CUDACC__
  float d;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
#else
  return -max_nan_f32(-a, -b);
#endif
}

// The upper 32 bits of the product.
W2A4_DEVICE uint32_t mul_high(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
#endif
}

// The nearest integer, ties to even, saturated; 0 for NaN.
W2A4_DEVICE int32_t int_from_float(float x) {
#ifdef __CUDACC__
  return __float2int_rn(x);
#else
  if (x != x) return 0;
  if (x >= 0x1p31f) return INT32_MAX;
  return x <= -0x1p31f ? INT32_MIN : static_cast<int32_t>(std::nearbyint(x));
#endif
}

// Reciprocal, correctly rounded; x is positive and in [2**-120, 2**120].
W2A4_DEVICE float rcp_rn_mid(float x) {
#ifdef __CUDACC__
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return __fmaf_rn(__fmaf_rn(-x, r, 1.0f), r, r);
#else
  return 1.0f / x;
#endif
}

// x / kDivisor, a small odd number, correctly rounded (subnormal results may be off by one). The
// product's error, 2**-52 of it, is far less than the distance of any float32 divided by kDivisor
// from the middle between two float32.
template <int kDivisor>
W2A4_DEVICE float quotient_rn(float x) {
  static_assert(kDivisor % 2 == 1 && kDivisor < 64);
  return static_cast<float>(static_cast<double>(x) * (1.0 / kDivisor));
}

// 1 / sqrt(x), within 2 units in the last place.
W2A4_DEVICE float rsqrt_approx(float x) {
#ifdef __CUDACC__
  return rsqrtf(x);
#else
  return 1.0f / std::sqrt(x);
#endif
}

// Within 2 units in the last place; |b| in [2**-126, 2**126].
W2A4_DEVICE float div_approx(float a, float b) {
#ifdef __CUDACC__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
W2A4_DEVICE float exp_f32(float x) {
#ifdef __CUDACC__
  return expf(x);
#else
  return std::exp(x);
#endif
}
// 2**x within 2 units in the last place; exact for 0 and -infinity. What is below 2**-126 is 0.
W2A4_DEVICE float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
#endif
}

}  // namespace w2a4::cuda
