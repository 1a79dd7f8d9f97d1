// quantize_a4: 4-bit activations, bit-exact to the reference, and the stages that may
// come before: silu(gate) * up, RMSNorm, Hadamard. A token stays in cache from its load to its
// codes.
#include <vector>

#include "exponential.h"
#include "hadamard.h"
#include "kernels.h"

namespace w2a4::cpu {
namespace {

W2A4_INLINE float quantize_group(const float* x, int64_t n, float clip, int8_t* codes) {
  float scale = a4_scale(clip, furthest_from_zero(x, n));
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

// x = silu(x) * up. The exponential is of a number that is not positive, so it cannot overflow.
W2A4_INLINE void silu_mul(float* x, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float e = exp_negative(x[i] > 0.0f ? -x[i] : x[i]);
    x[i] = x[i] * ((x[i] > 0.0f ? 1.0f : e) / (1.0f + e)) * up[i];
  }
}

// Sum of squares in 16 lanes, lane l of x[l], x[l + 16], ..., then of the lanes: the same order for
// every instruction set.
W2A4_INLINE float sum_of_squares(const float* x, int64_t n) {
  constexpr int kLanes = 16;
  typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
  Vec sums = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = *reinterpret_cast<const Vec*>(x + i);
    sums += v * v;
  }
  float lanes[kLanes];
  std::memcpy(lanes, &sums, sizeof(lanes));
  for (int lane = 0; i < n; ++i, ++lane) lanes[lane] += x[i] * x[i];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

// x = weight * x / sqrt(mean(x * x) + eps)
W2A4_INLINE void rmsnorm(float* x, const float* weight, int64_t n, float eps) {
  const float factor = 1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) x[i] = weight[i] * (x[i] * factor);
}

// Buffers of one thread.
struct Scratch {
  std::vector<float> x;            // [features]
  std::vector<float> up;           // [features], or empty
  std::vector<float> norm_weight;  // [features], or empty
  HadamardBlock<float> hadamard;
  std::vector<int8_t> codes;  // [features] and one more: the padding of an odd row

  explicit Scratch(const QuantizeA4Params& p)
      : x(p.features),
        up(p.up ? p.features : 0),
        norm_weight(p.rmsnorm ? p.features : 0, 1.0f),
        hadamard(p.had_k, p.k, p.block_size, false),
        codes(p.features + 1, 0) {}
};

// A token up to its quantisation, in scratch.x.
template <class Arch>
W2A4_INLINE void prepare_token(const QuantizeA4Params& p, int64_t token, Scratch& s) {
  float* x = s.x.data();
  load(p.x, p.dtype, token * p.stride, p.features, x);
  if (p.up) {
    load(p.up, p.dtype, token * p.stride, p.features, s.up.data());
    silu_mul(x, s.up.data(), p.features);
  }
  if (p.rmsnorm) rmsnorm(x, s.norm_weight.data(), p.features, p.eps);
  if (p.block_size > 1)
    for (int64_t first = 0; first < p.features; first += p.block_size)
      transform_block<Arch>(s.hadamard, x + first, x + first);
}

template <class Arch>
W2A4_INLINE void quantize_tokens(const QuantizeA4Params& p, int64_t begin, int64_t end) {
  Scratch s(p);
  if (p.norm_weight) load(p.norm_weight, p.norm_dtype, 0, p.features, s.norm_weight.data());
  const int64_t groups = p.features / p.group_size, bytes = (p.features + 1) / 2;
  for (int64_t token = begin; token < end; ++token) {
    prepare_token<Arch>(p, token, s);
    int8_t* codes = s.codes.data();
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * p.group_size;
      p.scale[token * groups + g] =
          quantize_group(s.x.data() + first, p.group_size, *p.clip, codes + first);
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
