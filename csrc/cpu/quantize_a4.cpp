// quantize_a4: symmetric 4-bit activations, bit-exact to the reference.
#include <vector>

#include "kernels.h"
#include "numbers.h"

namespace w2a4::cpu {
namespace {

// max |x|. The bits of non-negative floats are ordered as the floats are, NaN above infinity, so a
// NaN is found too and makes the scale NaN.
W2A4_INLINE float absmax(const float* x, int64_t n) {
  int32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t magnitude = bits<int32_t>(x[i]) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  return bits<float>(most);
}

W2A4_INLINE float quantize_group(const float* x, int64_t n, float clip, int8_t* codes) {
  float scale = clip * absmax(x, n) / 7.0f;
  if (scale == 0.0f) scale = 1.0f;
  // A group with NaN or infinity has a scale that is one, so its dequantised values show it; the
  // codes are 0, as the quotients of finite values by infinity are.
  if (!(scale - scale == 0.0f)) {
    for (int64_t i = 0; i < n; ++i) codes[i] = 0;
    return scale;
  }
  for (int64_t i = 0; i < n; ++i) {
    float code = x[i] / scale;
    code = code > -8.0f ? code : -8.0f;
    code = code < 7.0f ? code : 7.0f;
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(round_even(code)));
  }
  return scale;
}

template <class Arch>
W2A4_INLINE void quantize_tokens(const QuantizeA4Params& p, int64_t begin, int64_t end) {
  std::vector<float> x(p.features);
  std::vector<int8_t> codes(p.features + 1, 0);  // one more: the padding of an odd row
  const int64_t groups = p.features / p.group_size, bytes = (p.features + 1) / 2;
  for (int64_t token = begin; token < end; ++token) {
    load(p.x, p.dtype, token * p.features, p.features, x.data());
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * p.group_size;
      p.scale[token * groups + g] =
          quantize_group(x.data() + first, p.group_size, *p.clip, codes.data() + first);
    }
    uint8_t* out = p.codes + token * bytes;
    for (int64_t j = 0; j < bytes; ++j)
      out[j] = static_cast<uint8_t>((codes[2 * j] & 15) | (codes[2 * j + 1] & 15) << 4);
  }
}
W2A4_DISPATCH(quantize_tokens, QuantizeA4Params)

}  // namespace

void quantize_a4(const QuantizeA4Params& p) {
  parallel(p.tokens, 1 + 16384 / p.features, p, quantize_tokens_dispatch);
}

}  // namespace w2a4::cpu
