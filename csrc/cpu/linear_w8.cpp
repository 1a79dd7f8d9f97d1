// linear_w8: 8-bit weights, full-precision activations. A result is the sum of 16 lanes, lane l of
// the inputs l, l + 16, ...: one order of operations for any number of tokens. One token waits for
// memory, so its weights are converted in registers; else rows are converted once for all tokens.
#include <algorithm>

#include "kernels.h"
#include "linear_a4_x86.h"

namespace w2a4::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kTokens = 4;  // tokens and outputs of a tile: 16 vectors of sums
constexpr int kOuts = 4;
constexpr int64_t kAhead = 4096;     // bytes of weight that are fetched ahead
constexpr int64_t kGrain = 1 << 17;  // products of one thread that are worth waking another

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

struct Task {
  const LinearW8Params* p;
  const float* x;  // [tokens rounded up to kTokens, padded], of the rest nothing is used
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
  const auto w = aligned<float>(kOuts * task.padded);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kOuts, outs = std::min<int64_t>(kOuts, p.out_features - first);
    float scale[kOuts], bias[kOuts] = {};
    for (int64_t o = 0; o < outs; ++o) {
      const int8_t* row = p.weight + (first + o) * p.in_features;
      float* to = w.get() + o * task.padded;
      for (int64_t k = 0; k < p.in_features; ++k) to[k] = row[k];
      std::fill(to + p.in_features, to + task.padded, 0.0f);
      scale[o] = to_float(F16{p.scale[first + o]});
    }
    std::fill_n(w.get() + outs * task.padded, (kOuts - outs) * task.padded, 0.0f);
    if (p.bias) load(p.bias, p.bias_dtype, first, outs, bias);
    for (int64_t t = 0; t < p.tokens; t += kTokens) {
      const int64_t tokens = std::min<int64_t>(kTokens, p.tokens - t);
      float out[kTokens * kOuts];
      if (tokens == 1)
        dot_tile<1>(task.x + t * task.padded, w.get(), task.padded, out);
      else
        dot_tile<kTokens>(task.x + t * task.padded, w.get(), task.padded, out);
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

#ifdef W2A4_X86
#define W2A4_TARGET __attribute__((target("avx2")))

// sums[o] += lanes of 16 products.
W2A4_TARGET W2A4_INLINE void add_products(const float* x, const int8_t* w, __m256* sums) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w + 8 * half));
    const __m256 weights = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
    sums[half] = _mm256_add_ps(sums[half], _mm256_mul_ps(_mm256_loadu_ps(x + 8 * half), weights));
  }
}

// Over tiles of outputs, for one token.
W2A4_TARGET void one_token(const Task& task, int64_t begin, int64_t end) {
  const LinearW8Params& p = *task.p;
  const int64_t in = p.in_features, whole = in / kLanes * kLanes;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kOuts, outs = std::min<int64_t>(kOuts, p.out_features - first);
    const int8_t* rows[kOuts];  // those that are not there repeat the last
    for (int o = 0; o < kOuts; ++o)
      rows[o] = p.weight + (first + std::min<int64_t>(o, outs - 1)) * in;
    __m256 sums[kOuts][2];
    for (__m256(&sum)[2] : sums) sum[0] = sum[1] = _mm256_setzero_ps();
    for (int64_t k = 0; k < whole; k += kLanes) {
      // The rows of a tile follow each other, and so do tiles.
      _mm_prefetch(reinterpret_cast<const char*>(rows[0] + kOuts * k + kAhead), _MM_HINT_T0);
#pragma GCC unroll 4
      for (int o = 0; o < kOuts; ++o) add_products(task.x + k, rows[o] + k, sums[o]);
    }
    // Sums that a loop indexes would live in memory: from here on they do, and not above.
    __m256 ends[kOuts][2];
    std::memcpy(ends, sums, sizeof(ends));
    float y[kOuts], bias[kOuts] = {};
    if (p.bias) load(p.bias, p.bias_dtype, first, outs, bias);
    for (int o = 0; o < outs; ++o) {
      if (whole < in) {
        int8_t rest[kLanes] = {};
        std::memcpy(rest, rows[o] + whole, in - whole);
        add_products(task.x + whole, rest, ends[o]);
      }
      Vec lanes;
      std::memcpy(&lanes, ends[o], sizeof(lanes));
      y[o] = sum_lanes(lanes) * to_float(F16{p.scale[first + o]});
      if (p.bias) y[o] += bias[o];
    }
    store(y, p.y, p.dtype, first, outs);
  }
}
#endif

}  // namespace

void linear_w8(const LinearW8Params& p) {
  const int64_t padded = (p.in_features + kLanes - 1) / kLanes * kLanes;
  const auto x = aligned<float>((p.tokens + kTokens) * padded);
  for (int64_t t = 0; t < p.tokens; ++t) {
    load(p.x, p.dtype, t * p.in_features, p.in_features, x.get() + t * padded);
    std::fill(x.get() + t * padded + p.in_features, x.get() + (t + 1) * padded, 0.0f);
  }
  const Task task{&p, x.get(), padded};
  const int64_t tiles = (p.out_features + kOuts - 1) / kOuts;
  const int64_t grain = 1 + kGrain / kOuts / (p.in_features * std::max<int64_t>(1, p.tokens));
#ifdef W2A4_X86
  if (p.tokens == 1 && isa() != Isa::kBase) return parallel(tiles, grain, task, one_token);
#endif
  parallel(tiles, grain, task, out_tiles_dispatch);
}

}  // namespace w2a4::cpu
