// hadamard: a fast butterfly over the power of two, a K x K step over the rest.
#include <cmath>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "tile.h"

namespace w2a4::cpu {
namespace {

// x @ S for Sylvester's matrix S of size n, in place, from stage h on: pairs h apart become their
// sum and difference.
template <class Real>
W2A4_INLINE void butterfly_from(int64_t h, Real* x, int64_t n) {
  for (; h < n; h *= 2)
    for (int64_t i = 0; i < n; i += 2 * h)
      for (int64_t j = i; j < i + h; ++j) {
        const Real a = x[j], b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
}

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t FourInts __attribute__((vector_size(16)));

#ifdef W2A4_BYTE_SHUFFLE
#define W2A4_PERMUTE(x, ...) __builtin_shuffle(x, FourInts{__VA_ARGS__})
#else
#define W2A4_PERMUTE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#endif

// The first four stages, whose pairs lie within 16 values.
W2A4_INLINE void butterfly16(float* x) {
  Four v[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = *reinterpret_cast<Four*>(x + 4 * i);
    v[i] = W2A4_PERMUTE(v[i], 0, 0, 2, 2) + W2A4_PERMUTE(v[i], 1, 1, 3, 3) * Four{1, -1, 1, -1};
    v[i] = W2A4_PERMUTE(v[i], 0, 1, 0, 1) + W2A4_PERMUTE(v[i], 2, 3, 2, 3) * Four{1, 1, -1, -1};
  }
  const Four a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
  *reinterpret_cast<Four*>(x) = a + c;
  *reinterpret_cast<Four*>(x + 4) = b + d;
  *reinterpret_cast<Four*>(x + 8) = a - c;
  *reinterpret_cast<Four*>(x + 12) = b - d;
}

W2A4_INLINE void butterfly(double* x, int64_t n) {
  butterfly_from<double>(1, x, n);
}
W2A4_INLINE void butterfly(float* x, int64_t n) {
  if (n < 16) return butterfly_from<float>(1, x, n);
  for (int64_t i = 0; i < n; i += 16) butterfly16(x + i);
  butterfly_from<float>(16, x, n);
}

// y[out] = sum over in of signs[out][in] * x[in]; x and y are k rows of m values, signs [k, k].
template <class Arch, class Real>
W2A4_INLINE void mix_rows(const Real* x, const Real* signs, int64_t k, int64_t m, Real* y) {
  int64_t out = 0;
  if constexpr (std::is_same_v<Real, float>) {
    for (; m % kColumns == 0 && out + kRows <= k; out += kRows)
      for (int64_t j = 0; j < m; j += kColumns)
        multiply_tile<Arch, true>(signs + out * k, k, x + j, m, k, y + out * m + j, m);
  }
  for (; out < k; ++out) {
    Real* row = y + out * m;
    for (int64_t j = 0; j < m; ++j) row[j] = 0;
    for (int64_t in = 0; in < k; ++in)
      for (int64_t j = 0; j < m; ++j) row[j] += signs[out * k + in] * x[in * m + j];
  }
}

W2A4_INLINE void load_block(const HadamardParams& p, int64_t first, float* x) {
  load(p.x, p.dtype, first, p.block_size, x);
}
W2A4_INLINE void load_block(const HadamardParams& p, int64_t first, double* x) {
  std::memcpy(x, static_cast<const double*>(p.x) + first, p.block_size * sizeof(double));
}
W2A4_INLINE void store_block(const HadamardParams& p, int64_t first, const float* y) {
  store(y, p.y, p.dtype, first, p.block_size);
}
W2A4_INLINE void store_block(const HadamardParams& p, int64_t first, const double* y) {
  std::memcpy(static_cast<double*>(p.y) + first, y, p.block_size * sizeof(double));
}

template <class Arch, class Real>
W2A4_INLINE void transform_as(const HadamardParams& p, int64_t begin, int64_t end) {
  const int64_t size = p.block_size, m = size / p.k;
  std::vector<Real> x(size), y(p.had_k ? size : 0), signs(p.had_k ? p.k * p.k : 0);
  for (int64_t i = 0; p.had_k && i < p.k * p.k; ++i)
    signs[i] = p.had_k[p.transpose ? i : i % p.k * p.k + i / p.k];
  const Real scale = Real(1) / std::sqrt(static_cast<Real>(size));
  for (int64_t block = begin; block < end; ++block) {
    load_block(p, block * size, x.data());
    for (int64_t i = 0; i < p.k; ++i) butterfly(x.data() + i * m, m);
    if (p.had_k) {
      mix_rows<Arch>(x.data(), signs.data(), p.k, m, y.data());
      x.swap(y);
    }
    for (int64_t i = 0; i < size; ++i) x[i] *= scale;
    store_block(p, block * size, x.data());
  }
}

template <class Arch>
W2A4_INLINE void transform_blocks(const HadamardParams& p, int64_t begin, int64_t end) {
  if (p.dtype == ScalarType::Double)
    transform_as<Arch, double>(p, begin, end);
  else
    transform_as<Arch, float>(p, begin, end);
}
W2A4_DISPATCH(transform_blocks, HadamardParams)

}  // namespace

void hadamard(const HadamardParams& p) {
  parallel(p.rows * (p.n / p.block_size), 1 + 16384 / p.block_size, p, transform_blocks_dispatch);
}

}  // namespace w2a4::cpu
