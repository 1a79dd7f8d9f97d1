// The Hadamard transform of one block, for the kernels that need it: a fast butterfly over the
// power of two, a K x K step over the rest.
#pragma once

#include <cmath>
#include <type_traits>
#include <vector>

#include "numbers.h"

namespace w2a4::cpu {

// y = scale * x @ S for Sylvester's matrix S of size n: pairs h apart become their sum and
// difference, for h = 1, 2, 4, ... This order is that of every instruction set; what differs is how
// many stages are done while numbers are in registers. y may be x.
template <class Real>
W2A4_INLINE void butterfly_plain(const Real* x, Real* y, int64_t n, Real scale) {
  if (x != y) std::memcpy(y, x, n * sizeof(Real));
  for (int64_t h = 1; h < n; h *= 2)
    for (int64_t i = 0; i < n; i += 2 * h)
      for (int64_t j = i; j < i + h; ++j) {
        const Real a = y[j], b = y[j + h];
        y[j] = a + b;
        y[j + h] = a - b;
      }
  for (int64_t i = 0; i < n; ++i) y[i] *= scale;
}

template <int kLanes>
struct Lanes;  // Vec: kLanes floats; swap<h>(v)[i] = v[i ^ h]
#ifdef W2A4_BYTE_SHUFFLE
#define W2A4_PERMUTE(v, ...) __builtin_shuffle(v, Ints{__VA_ARGS__})
#else
#define W2A4_PERMUTE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#endif
#define W2A4_LANES(lanes, ...)                                                        \
  template <>                                                                         \
  struct Lanes<lanes> {                                                               \
    typedef float Vec __attribute__((vector_size(4 * lanes), aligned(4), may_alias)); \
    typedef int32_t Ints __attribute__((vector_size(4 * lanes)));                     \
    template <int h>                                                                  \
    static W2A4_INLINE Vec swap(Vec v) {                                              \
      return W2A4_PERMUTE(v, __VA_ARGS__);                                            \
    }                                                                                 \
  }
#define W2A4_FROM(i) (i) ^ h, (i + 1) ^ h, (i + 2) ^ h, (i + 3) ^ h
W2A4_LANES(4, W2A4_FROM(0));
W2A4_LANES(8, W2A4_FROM(0), W2A4_FROM(4));
W2A4_LANES(16, W2A4_FROM(0), W2A4_FROM(4), W2A4_FROM(8), W2A4_FROM(12));
#undef W2A4_FROM
#undef W2A4_LANES
#undef W2A4_PERMUTE

// The stages h = 1 .. kLanes / 2 of one vector. The product with +-1 is exact.
template <int kLanes, int h = 1>
W2A4_INLINE typename Lanes<kLanes>::Vec butterfly_lanes(typename Lanes<kLanes>::Vec v) {
  if constexpr (h < kLanes) {
    typename Lanes<kLanes>::Vec sign;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sign[i] = i & h ? -1.0f : 1.0f;
    return butterfly_lanes<kLanes, 2 * h>(Lanes<kLanes>::template swap<h>(v) + v * sign);
  } else {
    return v;
  }
}

// log2(kRadix) stages over kRadix vectors in registers.
template <int kRadix, class Vec>
W2A4_INLINE void butterfly_vectors(Vec* v) {
#pragma GCC unroll 4
  for (int h = 1; h < kRadix; h *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < kRadix; ++i)
      if (!(i & h)) {
        const Vec a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
}

// y = scale * (the stages within kRadix vectors that lie side by side, of all of x).
template <class Arch, int kRadix>
W2A4_INLINE void first_stages(const float* x, float* y, int64_t n, float scale) {
  constexpr int kLanes = Arch::kLanes;
  typedef typename Lanes<kLanes>::Vec Vec;
  for (int64_t i = 0; i < n; i += kRadix * kLanes) {
    Vec v[kRadix];
#pragma GCC unroll 16
    for (int r = 0; r < kRadix; ++r)
      v[r] = butterfly_lanes<kLanes>(*reinterpret_cast<const Vec*>(x + i + r * kLanes));
    butterfly_vectors<kRadix>(v);
#pragma GCC unroll 16
    for (int r = 0; r < kRadix; ++r) *reinterpret_cast<Vec*>(y + i + r * kLanes) = v[r] * scale;
  }
}

// y = scale * (the stages h, 2 h, ..., kRadix / 2 * h of y).
template <class Arch, int kRadix>
W2A4_INLINE void next_stages(float* y, int64_t n, int64_t h, float scale) {
  typedef typename Lanes<Arch::kLanes>::Vec Vec;
  for (int64_t i = 0; i < n; i += kRadix * h)
    for (int64_t j = i; j < i + h; j += Arch::kLanes) {
      Vec v[kRadix];
#pragma GCC unroll 16
      for (int r = 0; r < kRadix; ++r) v[r] = *reinterpret_cast<Vec*>(y + j + r * h);
      butterfly_vectors<kRadix>(v);
#pragma GCC unroll 16
      for (int r = 0; r < kRadix; ++r) *reinterpret_cast<Vec*>(y + j + r * h) = v[r] * scale;
    }
}

// Stages are done a few at a time; the last ones multiply by scale, those before by 1, which is
// exact.
template <class Arch>
W2A4_INLINE void butterfly(const float* x, float* y, int64_t n, float scale) {
  constexpr int64_t kLanes = Arch::kLanes, kRadix = kLanes == 16 ? 16 : 8;  // of 32 or 16 registers
  if (n < kLanes) return butterfly_plain(x, y, n, scale);
  int64_t h = n >= kRadix * kLanes ? kRadix * kLanes : n >= 4 * kLanes ? 4 * kLanes : kLanes;
  const float first = h == n ? scale : 1.0f;
  if (h == kRadix * kLanes)
    first_stages<Arch, kRadix>(x, y, n, first);
  else if (h == 4 * kLanes)
    first_stages<Arch, 4>(x, y, n, first);
  else
    first_stages<Arch, 1>(x, y, n, first);
  for (; h * kRadix <= n; h *= kRadix)
    next_stages<Arch, kRadix>(y, n, h, h * kRadix == n ? scale : 1.0f);
  for (; h * 4 <= n; h *= 4) next_stages<Arch, 4>(y, n, h, h * 4 == n ? scale : 1.0f);
  if (h < n) next_stages<Arch, 2>(y, n, h, scale);
}

template <class Arch>
W2A4_INLINE void butterfly(const double* x, double* y, int64_t n, double scale) {
  butterfly_plain(x, y, n, scale);
}

// How a step of the K part reads signs [k, k]: factor of input `in` for output `out` is
// signs[out * out_stride + in * in_stride].
template <class Real>
struct Signs {
  const Real* data;
  int64_t out_stride, in_stride;
};

// y[out] = sum over in, in order, of sign * x[in] for kOuts rows out and kVectors vectors of
// columns; x and y are rows of m values.
template <int kLanes, int kOuts, int kVectors>
W2A4_INLINE void mix_tile(const float* x, Signs<float> signs, int64_t k, int64_t m, float scale,
                          float* y) {
  typedef typename Lanes<kLanes>::Vec Vec;
  Vec sums[kOuts][kVectors] = {};
  for (int64_t in = 0; in < k; ++in) {
    Vec row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      row[v] = *reinterpret_cast<const Vec*>(x + in * m + v * kLanes);
#pragma GCC unroll 8
    for (int o = 0; o < kOuts; ++o) {
      const float sign = signs.data[o * signs.out_stride + in * signs.in_stride];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[o][v] += sign * row[v];
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kOuts; ++o)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      *reinterpret_cast<Vec*>(y + o * m + v * kLanes) = sums[o][v] * scale;
}

template <int kLanes, int kVectors>
W2A4_INLINE void mix_columns(const float* x, Signs<float> signs, int64_t k, int64_t m, float scale,
                             float* y) {
  constexpr int kOuts = 4;
  int64_t out = 0;
  for (; out + kOuts <= k; out += kOuts) {
    mix_tile<kLanes, kOuts, kVectors>(x, signs, k, m, scale, y + out * m);
    signs.data += kOuts * signs.out_stride;
  }
  for (; out < k; ++out) {
    mix_tile<kLanes, 1, kVectors>(x, signs, k, m, scale, y + out * m);
    signs.data += signs.out_stride;
  }
}

// y[out] = scale * sum over in, in order, of sign * x[in]; x and y are k rows of m values.
template <class Arch, class Real>
W2A4_INLINE void mix_rows(const Real* x, Signs<Real> signs, int64_t k, int64_t m, Real scale,
                          Real* y) {
  int64_t j = 0;
  if constexpr (std::is_same_v<Real, float>) {
    // Four rows of so many vectors are the sums that registers hold beside signs and inputs.
    constexpr int64_t kLanes = Arch::kLanes, kVectors = kLanes == 16 ? 4 : 2;
    for (; j + kVectors * kLanes <= m; j += kVectors * kLanes)
      mix_columns<kLanes, kVectors>(x + j, signs, k, m, scale, y + j);
    for (; j + 4 <= m; j += 4) mix_columns<4, 1>(x + j, signs, k, m, scale, y + j);
  }
  for (; j < m; ++j)
    for (int64_t out = 0; out < k; ++out) {
      Real sum = 0;
      for (int64_t in = 0; in < k; ++in)
        sum += signs.data[out * signs.out_stride + in * signs.in_stride] * x[in * m + j];
      y[out * m + j] = sum * scale;
    }
}

// What all blocks of a call share, and the room to transform one.
template <class Real>
struct HadamardBlock {
  int64_t size, k, m;  // size = k * m, m a power of two
  bool transpose;
  Real scale;
  std::vector<Real> signs, parts;  // had_k [k, k]; [size] between the two steps

  HadamardBlock(const int8_t* had_k, int64_t k, int64_t size, bool transpose)
      : size(size),
        k(k),
        m(size / k),
        transpose(transpose),
        scale(Real(1) / std::sqrt(static_cast<Real>(size))),
        signs(had_k, had_k ? had_k + k * k : had_k),
        parts(had_k ? size : 0) {}
};

// y [size] = x @ H; y may be x.
template <class Arch, class Real>
W2A4_INLINE void transform_block(HadamardBlock<Real>& h, const Real* x, Real* y) {
  if (h.signs.empty()) return butterfly<Arch>(x, y, h.size, h.scale);
  Real* parts = h.parts.data();
  for (int64_t i = 0; i < h.k; ++i) butterfly<Arch>(x + i * h.m, parts + i * h.m, h.m, Real(1));
  // x @ kron(had_k, S): output `out` of the K part takes input `in` times had_k[in][out].
  const Signs<Real> signs{h.signs.data(), h.transpose ? h.k : 1, h.transpose ? 1 : h.k};
  mix_rows<Arch>(parts, signs, h.k, h.m, h.scale, y);
}

}  // namespace w2a4::cpu
