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

// Four inputs of the K part come to an output in one of 16 ways. Their sums are tabulated for a
// vector of columns, so that an output takes one addition for four inputs.
constexpr int64_t kInputs = 4;
constexpr int64_t kOutputs = 4;  // two times as many sums are kept in registers
constexpr int kTableLanes = 8;   // at most, so that the table of K = 172 stays in the first cache

struct alignas(64) TableLine {
  float values[16];
};

// table [k / kInputs, 16]: entry i has minus input j where bit j of i is set; x is k rows of m.
template <int kLanes>
W2A4_INLINE void fill_table(const float* x, int64_t k, int64_t m, float* table) {
  typedef typename Lanes<kLanes>::Vec Vec;
  Vec* to = reinterpret_cast<Vec*>(table);
  for (int64_t first = 0; first < k; first += kInputs, to += 16) {
    Vec in[kInputs] = {};
#pragma GCC unroll 4
    for (int64_t i = 0; i < kInputs; ++i)
      if (first + i < k) in[i] = *reinterpret_cast<const Vec*>(x + (first + i) * m);
    const Vec low[4] = {in[0] + in[1], in[1] - in[0], in[0] - in[1], -in[0] - in[1]};
    const Vec high[4] = {in[2] + in[3], in[3] - in[2], in[2] - in[3], -in[2] - in[3]};
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) to[i] = low[i % 4] + high[i / 4];
  }
}

// y[out] = scale * sum, in order, of the entries that ways [k / kOutputs, groups, kOutputs] names,
// for kTiles times kOutputs outputs of which `outs` are there.
template <int kLanes, int kTiles>
W2A4_INLINE void add_entries(const float* table, const uint8_t* ways, int64_t groups, int64_t outs,
                             int64_t m, float scale, float* y) {
  typedef typename Lanes<kLanes>::Vec Vec;
  const char* entries = reinterpret_cast<const char*>(table);
  Vec sums[kTiles * kOutputs] = {};
  for (int64_t g = 0; g < groups; ++g, entries += 16 * sizeof(Vec), ways += kOutputs)
#pragma GCC unroll 8
    for (int64_t o = 0; o < kTiles * kOutputs; ++o) {
      const int64_t way = ways[o / kOutputs * groups * kOutputs + o % kOutputs];
      sums[o] += *reinterpret_cast<const Vec*>(entries + way * (sizeof(Vec) / 16));
    }
#pragma GCC unroll 8
  for (int64_t o = 0; o < kTiles * kOutputs; ++o)
    if (o < outs) *reinterpret_cast<Vec*>(y + o * m) = sums[o] * scale;
}

template <int kLanes>
W2A4_INLINE void mix_columns(const float* x, const uint8_t* ways, int64_t k, int64_t m, float scale,
                             float* table, float* y) {
  fill_table<kLanes>(x, k, m, table);
  const int64_t groups = (k + kInputs - 1) / kInputs;
  int64_t out = 0;
  for (; out + 2 * kOutputs <= k; out += 2 * kOutputs)
    add_entries<kLanes, 2>(table, ways + out * groups, groups, k - out, m, scale, y + out * m);
  for (; out < k; out += kOutputs)
    add_entries<kLanes, 1>(table, ways + out * groups, groups, k - out, m, scale, y + out * m);
}

// What all blocks of a call share, and the room to transform one.
template <class Real>
struct HadamardBlock {
  int64_t size, k, m;  // size = k * m, m a power of two
  Real scale;
  std::vector<Real> signs, parts;  // [k outputs, k inputs]; [2, size] after the two steps
  std::vector<uint8_t> ways;       // see add_entries: 16 times a number of an entry
  std::vector<TableLine> table;

  HadamardBlock(const int8_t* had_k, int64_t k, int64_t size, bool transpose)
      : size(size), k(k), m(size / k), scale(Real(1) / std::sqrt(static_cast<Real>(size))) {
    if (!had_k) return;
    parts.resize(2 * size);
    signs.resize(k * k);
    // x @ kron(had_k, S): output `out` of the K part takes input `in` times had_k[in][out].
    for (int64_t out = 0; out < k; ++out)
      for (int64_t in = 0; in < k; ++in)
        signs[out * k + in] = had_k[transpose ? out * k + in : in * k + out];
    if (!std::is_same_v<Real, float> || m < 4) return;
    const int64_t groups = (k + kInputs - 1) / kInputs;
    table.resize(groups * 16 * kTableLanes / 16);
    ways.resize((k + kOutputs - 1) / kOutputs * groups * kOutputs);
    for (int64_t out = 0; out < k; ++out)
      for (int64_t in = 0; in < k; ++in)
        if (signs[out * k + in] < 0)
          ways[(out / kOutputs * groups + in / kInputs) * kOutputs + out % kOutputs] |=
              16 << in % kInputs;
  }
};

// y[out] = scale * sum over in of sign * x[in]; x and y are k rows of m values.
template <class Arch, class Real>
W2A4_INLINE void mix_rows(HadamardBlock<Real>& h, const Real* x, Real* y) {
  const int64_t k = h.k, m = h.m;
  if constexpr (std::is_same_v<Real, float>) {
    constexpr int kLanes = Arch::kLanes < kTableLanes ? Arch::kLanes : kTableLanes;
    float* table = reinterpret_cast<float*>(h.table.data());
    int64_t j = 0;
    for (; j + kLanes <= m; j += kLanes)
      mix_columns<kLanes>(x + j, h.ways.data(), k, m, h.scale, table, y + j);
    for (; j + 4 <= m; j += 4) mix_columns<4>(x + j, h.ways.data(), k, m, h.scale, table, y + j);
    if (j > 0) return;
  }
  for (int64_t j = 0; j < m; ++j)
    for (int64_t out = 0; out < k; ++out) {
      Real sum = 0;
      for (int64_t in = 0; in < k; ++in) sum += h.signs[out * k + in] * x[in * m + j];
      y[out * m + j] = sum * h.scale;
    }
}

// y [size] = x @ H; y may be x.
template <class Arch, class Real>
W2A4_INLINE void transform_block(HadamardBlock<Real>& h, const Real* x, Real* y) {
  if (h.signs.empty()) return butterfly<Arch>(x, y, h.size, h.scale);
  Real* parts = h.parts.data();
  for (int64_t i = 0; i < h.k; ++i) butterfly<Arch>(x + i * h.m, parts + i * h.m, h.m, Real(1));
  // Not into y: where that misses the caches, stores to the table would wait behind those to it.
  mix_rows<Arch>(h, parts, parts + h.size);
  std::memcpy(y, parts + h.size, h.size * sizeof(Real));
}

}  // namespace w2a4::cpu
