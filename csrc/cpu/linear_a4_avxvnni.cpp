// AVX-VNNI: four products are added to a 32-bit sum at once, without saturation.
#include "linear_a4_x86.h"

#ifdef W2A4_AVXVNNI
#define W2A4_TARGET __attribute__((target("avxvnni,avx2,fma,bmi,bmi2,f16c")))
#define W2A4_FN W2A4_TARGET W2A4_INLINE

namespace w2a4::cpu {
namespace {

W2A4_FN __m256i multiply_add(__m256i sum, __m256i w, __m256i a) {
  return _mm256_dpbusd_avx_epi32(sum, w, a);
}

using Sums = __m256i;
constexpr int kLanes = 8, kPanelOuts = 16, kTileTokens = 4;

#include "linear_a4_vnni.h"
//
#include "linear_a4_rows.h"
//
#include "linear_a4_panels.h"

}  // namespace

const LinearA4Kernels kLinearA4AvxVnni{prepare_rows, linear_rows, prepare_panels, linear_panels,
                                       kPanelOuts};

}  // namespace w2a4::cpu
#endif
