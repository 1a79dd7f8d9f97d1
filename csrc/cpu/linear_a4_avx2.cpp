// AVX2: pairs of products are summed in 16 bits, which they fit since one side has 4 bits.
#include "linear_a4_x86.h"

#ifdef W2A4_X86
#define W2A4_TARGET __attribute__((target("avx2,fma,bmi,bmi2,f16c")))
#define W2A4_FN W2A4_TARGET W2A4_INLINE

namespace w2a4::cpu {
namespace {

// Products of w and the activations at a, in lanes of 16 bits: 8 products of at most 255 * 8, so
// that two of these can be added.
template <int kPlanes>
W2A4_FN __m256i dot(const __m256i* w, const int8_t* a) {
  const __m256i* from = reinterpret_cast<const __m256i*>(a);
  __m256i twos[kPlanes / 2];
#pragma GCC unroll 2
  for (int i = 0; i < kPlanes; i += 2)
    twos[i / 2] =
        _mm256_add_epi16(_mm256_maddubs_epi16(w[i], _mm256_loadu_si256(from + i)),
                         _mm256_maddubs_epi16(w[i + 1], _mm256_loadu_si256(from + i + 1)));
  return kPlanes == 2 ? twos[0] : _mm256_add_epi16(twos[0], twos[kPlanes / 2 - 1]);
}
W2A4_FN __m256i add_products(__m256i x, __m256i y) {
  return _mm256_add_epi16(x, y);
}
W2A4_FN __m256i widen(__m256i products) {
  return _mm256_madd_epi16(products, _mm256_set1_epi16(1));
}

using Sums = __m256i;
constexpr int kLanes = 8, kPanelOuts = 16, kTileTokens = 4;
constexpr int64_t kPartialQuads = 8;  // 8 * 2 * 255 * 8 fits 16 bits

W2A4_FN __m256i multiply_add(__m256i pairs, __m256i w, __m256i a) {
  return _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w, a));
}
W2A4_FN __m256i add_partial(__m256i sums, __m256i pairs) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#include "linear_a4_rows.h"
//
#include "linear_a4_panels.h"

}  // namespace

const LinearA4Kernels kLinearA4Avx2{prepare_rows, linear_rows, prepare_panels, linear_panels,
                                    kPanelOuts};

}  // namespace w2a4::cpu
#endif
