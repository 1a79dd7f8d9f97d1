// linear_w8: 8-bit weights, full-precision activations. A result is the sum of 16 lanes, lane l of
// the inputs l, l + 16, ...: one order of operations for any number of tokens.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "numbers.h"

namespace w2a4::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kTokens = 4;  // tokens and outputs of a tile: 16 vectors of sums
constexpr int kOuts = 4;

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

struct Task {
  const LinearW8Params* p;
  const float* x;  // [tokens rounded up to kTokens, padded]
  int64_t padded;  // in_features rounded up to kLanes, filled with zeros
};

W2A4_INLINE float sum_lanes(const Vec& v) {
  float s[kLanes];
  std::memcpy(s, &v, sizeof(s));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  return s[0];
}

template <int kT>
W2A4_INLINE void dot_tile(const float* x, const float* w, int64_t padded, float* out) {
  Vec sums[kT][kOuts] = {};
  for (int64_t k = 0; k < padded; k += kLanes) {
    Vec wv[kOuts];
    for (int o = 0; o < kOuts; ++o) wv[o] = *reinterpret_cast<const Vec*>(w + o * padded + k);
    for (int t = 0; t < kT; ++t) {
      const Vec xv = *reinterpret_cast<const Vec*>(x + t * padded + k);
      for (int o = 0; o < kOuts; ++o) sums[t][o] += xv * wv[o];
    }
  }
  for (int t = 0; t < kT; ++t)
    for (int o = 0; o < kOuts; ++o) out[t * kOuts + o] = sum_lanes(sums[t][o]);
}

template <class Arch>
W2A4_INLINE void out_tiles(const Task& task, int64_t begin, int64_t end) {
  const LinearW8Params& p = *task.p;
  std::vector<float> w(kOuts * task.padded, 0.0f);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kOuts, outs = std::min<int64_t>(kOuts, p.out_features - first);
    float scale[kOuts], bias[kOuts] = {};
    for (int64_t o = 0; o < outs; ++o) {
      const int8_t* row = p.weight + (first + o) * p.in_features;
      float* to = w.data() + o * task.padded;
      for (int64_t k = 0; k < p.in_features; ++k) to[k] = row[k];
      scale[o] = to_float(F16{p.scale[first + o]});
    }
    if (p.bias) load(p.bias, p.bias_dtype, first, outs, bias);
    for (int64_t t = 0; t < p.tokens; t += kTokens) {
      const int64_t tokens = std::min<int64_t>(kTokens, p.tokens - t);
      float out[kTokens * kOuts];
      if (tokens == 1)
        dot_tile<1>(task.x + t * task.padded, w.data(), task.padded, out);
      else
        dot_tile<kTokens>(task.x + t * task.padded, w.data(), task.padded, out);
      for (int64_t i = 0; i < tokens; ++i) {
        for (int64_t o = 0; o < outs; ++o) out[i * kOuts + o] *= scale[o];
        if (p.bias)
          for (int64_t o = 0; o < outs; ++o) out[i * kOuts + o] += bias[o];
        store(out + i * kOuts, p.y, p.dtype, (t + i) * p.out_features + first, outs);
      }
    }
  }
}
W2A4_DISPATCH(out_tiles, Task)

}  // namespace

void linear_w8(const LinearW8Params& p) {
  const int64_t padded = (p.in_features + kLanes - 1) / kLanes * kLanes;
  std::vector<float> x((p.tokens + kTokens) * padded, 0.0f);
  for (int64_t t = 0; t < p.tokens; ++t)
    load(p.x, p.dtype, t * p.in_features, p.in_features, x.data() + t * padded);
  const Task task{&p, x.data(), padded};
  parallel((p.out_features + kOuts - 1) / kOuts, 16, task, out_tiles_dispatch);
}

}  // namespace w2a4::cpu
