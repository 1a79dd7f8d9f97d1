// Conversions between storage types and float, and rounding, as loops the compiler vectorises.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "../params.h"
#include "arch.h"

namespace w2a4::cpu {

template <class To, class From>
W2A4_INLINE To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof(out));
  return out;
}

// Storage types: two-byte floats as distinct types of their bits.
struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

W2A4_INLINE float to_float(float x) {
  return x;
}
W2A4_INLINE float to_float(double x) {
  return static_cast<float>(x);
}
W2A4_INLINE float to_float(BF16 x) {
  return bits<float>(static_cast<uint32_t>(x.bits) << 16);
}
W2A4_INLINE float to_float(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  // The exponent field, read as a float's, is 112 too small; a subnormal becomes one of float.
  const float scaled = bits<float>(static_cast<uint32_t>(x.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return bits<float>(bits<uint32_t>(scaled) | special | sign);
}

// Round to nearest even, as torch does.
W2A4_INLINE void from_float(float x, float& out) {
  out = x;
}
W2A4_INLINE void from_float(float x, double& out) {
  out = x;
}
W2A4_INLINE void from_float(float x, BF16& out) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
W2A4_INLINE void from_float(float x, F16& out) {
  const uint32_t u = bits<uint32_t>(x), magnitude = u & 0x7fffffff;
  // Normal: shift the exponent's bias and round at bit 13; a carry goes into the exponent.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal: the last place of 0.5 is float16's smallest step, so an addition rounds.
  const uint32_t tiny = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000 ? tiny : normal;
  half = magnitude >= 0x47800000 ? 0x7c00 : half;
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  out.bits = static_cast<uint16_t>(half | (u >> 16 & 0x8000));
}

template <class T>
W2A4_INLINE void load_as(const void* src, int64_t first, int64_t n, float* dst) {
  const T* from = static_cast<const T*>(src) + first;
  for (int64_t i = 0; i < n; ++i) dst[i] = to_float(from[i]);
}

template <class T>
W2A4_INLINE void store_as(const float* src, void* dst, int64_t first, int64_t n) {
  T* to = static_cast<T*>(dst) + first;
  for (int64_t i = 0; i < n; ++i) from_float(src[i], to[i]);
}

// dst[i] = float(src[first + i]) for i < n, src of a floating dtype.
W2A4_INLINE void load(const void* src, ScalarType dtype, int64_t first, int64_t n, float* dst) {
  switch (dtype) {
    case ScalarType::Float:
      return load_as<float>(src, first, n, dst);
    case ScalarType::Half:
      return load_as<F16>(src, first, n, dst);
    case ScalarType::BFloat16:
      return load_as<BF16>(src, first, n, dst);
    default:
      return load_as<double>(src, first, n, dst);
  }
}

// dst[first + i] = src[i] for i < n, rounded to dst's floating dtype.
W2A4_INLINE void store(const float* src, void* dst, ScalarType dtype, int64_t first, int64_t n) {
  switch (dtype) {
    case ScalarType::Float:
      return store_as<float>(src, dst, first, n);
    case ScalarType::Half:
      return store_as<F16>(src, dst, first, n);
    case ScalarType::BFloat16:
      return store_as<BF16>(src, dst, first, n);
    default:
      return store_as<double>(src, dst, first, n);
  }
}

// Half to even, for |x| < 2**22. Adding 1.5 * 2**23 leaves no fraction bits.
W2A4_INLINE float round_even(float x) {
  return (x + 12582912.0f) - 12582912.0f;
}

// Smallest and largest of x; both NaN if one of x is, as torch's amin and amax.
W2A4_INLINE void range(const float* x, int64_t n, float& low, float& high) {
  low = high = x[0];
  int32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    const int32_t magnitude = bits<int32_t>(x[i]) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  if (most > 0x7f800000) low = high = std::numeric_limits<float>::quiet_NaN();
}

// The number of largest magnitude, of two opposite ones the negative; NaN if one of x is. Bits with
// the sign turned to the end are ordered as magnitudes are, NaN above infinity.
W2A4_INLINE float furthest_from_zero(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = bits<uint32_t>(x[i]), turned = u << 1 | u >> 31;
    most = turned > most ? turned : most;
  }
  return bits<float>(most >> 1 | most << 31);
}

// The scale of 4-bit activations before 0 becomes 1: its size is shared by all codes of either
// sign where clip is positive, and where it is negative the furthest number has code -8.
W2A4_INLINE float a4_scale(float clip, float furthest) {
  return clip < 0.0f ? clip * furthest / 8.0f : clip * std::fabs(furthest) / 7.0f;
}

// Value of a signed nibble, 0..15 -> -8..7.
W2A4_INLINE int signed_nibble(int nibble) {
  return (nibble ^ 8) - 8;
}

}  // namespace w2a4::cpu
