// AVX-512 with VNNI. Rows keep to vectors of 32 bytes, 128 inputs of 2 bits: most groups are no
// longer, and one token waits for memory anyway. Panels take 64.
#include "linear_a4_x86.h"

#ifdef W2A4_X86
#define W2A4_TARGET \
  __attribute__((target("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,f16c")))
#define W2A4_FN W2A4_TARGET W2A4_INLINE

namespace w2a4::cpu {
namespace {

W2A4_FN __m256i multiply_add(__m256i sum, __m256i w, __m256i a) {
  return _mm256_dpbusd_epi32(sum, w, a);
}
W2A4_FN __m512i multiply_add(__m512i sum, __m512i w, __m512i a) {
  return _mm512_dpbusd_epi32(sum, w, a);
}

using Sums = __m512i;
constexpr int kLanes = 16, kPanelOuts = 32, kTileTokens = 8;

W2A4_FN void set_lanes(__m512i& sums, int32_t value) {
  sums = _mm512_set1_epi32(value);
}
W2A4_FN void load_lanes(__m512i& x, const uint8_t* from) {
  x = _mm512_loadu_si512(from);
}
W2A4_FN __m512i add_partial(__m512i sums, __m512i partial) {
  return _mm512_add_epi32(sums, partial);
}
W2A4_FN void add_scaled(__m512i sums, const float* scale, float a_scale, float* acc) {
  const __m512 factor = _mm512_mul_ps(_mm512_loadu_ps(scale), _mm512_set1_ps(a_scale));
  // With a mask, for gcc 12 warns of the plain one's undefined operand.
  const __m512 addend = _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(0xffff, sums), factor);
  _mm512_storeu_ps(acc, _mm512_add_ps(_mm512_loadu_ps(acc), addend));
}

#include "linear_a4_vnni.h"
//
#include "linear_a4_rows.h"
//
#include "linear_a4_panels.h"

}  // namespace

const LinearA4Kernels kLinearA4Avx512Vnni{prepare_rows, linear_rows, prepare_panels, linear_panels,
                                          kPanelOuts};

}  // namespace w2a4::cpu
#endif
