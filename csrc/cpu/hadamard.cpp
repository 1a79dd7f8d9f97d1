// hadamard: a fast butterfly over the power of two, a K x K step over the rest.
#include <cmath>
#include <vector>

#include "kernels.h"
#include "numbers.h"

namespace w2a4::cpu {
namespace {

// x @ S for Sylvester's matrix S of size n, in place.
template <class Real>
W2A4_INLINE void butterfly(Real* x, int64_t n) {
  for (int64_t h = 1; h < n; h *= 2)
    for (int64_t i = 0; i < n; i += 2 * h)
      for (int64_t j = i; j < i + h; ++j) {
        const Real a = x[j], b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
}

// y[i'] = sum over i of had[i][i'] * x[i] (had[i'][i] if transposed), rows of m values.
template <class Real>
W2A4_INLINE void mix_rows(const Real* x, const int8_t* had, int64_t k, int64_t m, bool transpose,
                          Real* y) {
  for (int64_t out = 0; out < k; ++out) {
    Real* row = y + out * m;
    for (int64_t j = 0; j < m; ++j) row[j] = 0;
    for (int64_t in = 0; in < k; ++in) {
      const Real sign = transpose ? had[out * k + in] : had[in * k + out];
      for (int64_t j = 0; j < m; ++j) row[j] += sign * x[in * m + j];
    }
  }
}

// x: block_size values in, the result out; scratch: block_size values.
template <class Real>
W2A4_INLINE void transform(const HadamardParams& p, Real* x, Real* scratch) {
  const int64_t m = p.block_size / p.k;
  for (int64_t i = 0; i < p.k; ++i) butterfly(x + i * m, m);
  if (p.had_k) {
    mix_rows(x, p.had_k, p.k, m, p.transpose, scratch);
    std::swap(x, scratch);
  }
  const Real scale = Real(1) / std::sqrt(static_cast<Real>(p.block_size));
  Real* out = p.had_k ? scratch : x;  // always the caller's x
  for (int64_t i = 0; i < p.block_size; ++i) out[i] = x[i] * scale;
}

template <class Arch>
W2A4_INLINE void transform_blocks(const HadamardParams& p, int64_t begin, int64_t end) {
  const int64_t size = p.block_size;
  if (p.dtype == ScalarType::Double) {
    std::vector<double> x(size), scratch(size);
    for (int64_t block = begin; block < end; ++block) {
      std::memcpy(x.data(), static_cast<const double*>(p.x) + block * size, size * sizeof(double));
      transform(p, x.data(), scratch.data());
      std::memcpy(static_cast<double*>(p.y) + block * size, x.data(), size * sizeof(double));
    }
    return;
  }
  std::vector<float> x(size), scratch(size);
  for (int64_t block = begin; block < end; ++block) {
    load(p.x, p.dtype, block * size, size, x.data());
    transform(p, x.data(), scratch.data());
    store(x.data(), p.y, p.dtype, block * size, size);
  }
}
W2A4_DISPATCH(transform_blocks, HadamardParams)

}  // namespace

void hadamard(const HadamardParams& p) {
  parallel(p.rows * (p.n / p.block_size), 1 + 16384 / p.block_size, p, transform_blocks_dispatch);
}

}  // namespace w2a4::cpu
