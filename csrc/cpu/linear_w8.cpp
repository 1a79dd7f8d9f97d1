// linear_w8: 8-bit weights, full-precision activations. A result is the sum of 16 lanes, lane l of
// the inputs l, l + 16, ...: one order of operations for any number of tokens. For few of them
// weights are converted in registers, else rows are converted once for all tokens.
#include <algorithm>

#include "kernels.h"
#include "linear_a4_x86.h"

namespace w2a4::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kOuts = 4;              // outputs of a task
constexpr int kMostTokens = 4;        // tokens of a tile
constexpr int64_t kMostOuts = 64;     // rows of weights that stay in the cache for all tokens,
constexpr int64_t kFloats = 1 << 16;  // and what they may take of it
constexpr int64_t kAhead = 4096;      // bytes of weight that are fetched ahead
constexpr int64_t kGrain = 1 << 17;   // products of one thread that are worth waking another

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

struct Task {
  const LinearW8Params* p;
  const float* x;  // [tokens + kMostTokens, padded], of the rest nothing is used
  int64_t padded;  // in_features rounded up to kLanes, filled with zeros
};

// Lane i + 8 to lane i, of these i + 4 to i, and so on.
W2A4_INLINE float sum_lanes(const Vec& v) {
  typedef float Half __attribute__((vector_size(kLanes / 2 * sizeof(float))));
  typedef float Quarter __attribute__((vector_size(kLanes / 4 * sizeof(float))));
  Half halves[2];
  std::memcpy(halves, &v, sizeof(halves));
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof(quarters));
  const Quarter s = quarters[0] + quarters[1];
  return (s[0] + s[2]) + (s[1] + s[3]);
}

// Tokens and outputs whose sums fill the vector registers, beside the weights of one vector.
template <class Arch>
constexpr int kTileTokens = Arch::kLanes == 16  ? 4
                            : Arch::kLanes == 8 ? 3
                                                : 2;
template <class Arch>
constexpr int kTileOuts = Arch::kLanes == 16  ? 4
                          : Arch::kLanes == 8 ? 2
                                              : 1;

// out[t][o] = row t of x times row o of w; out is [kTileTokens, ldout].
template <class Arch>
W2A4_INLINE void dot_tile(const float* x, const float* w, int64_t padded, float* out,
                          int64_t ldout) {
  constexpr int kT = kTileTokens<Arch>, kO = kTileOuts<Arch>, kParts = kLanes / Arch::kLanes;
  typedef float Part
      __attribute__((vector_size(Arch::kLanes * sizeof(float)), aligned(4), may_alias));
  Part sums[kT][kO][kParts] = {};
  for (int64_t k = 0; k < padded; k += kLanes)
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      const int64_t at = k + part * Arch::kLanes;
      Part weights[kO];
#pragma GCC unroll 4
      for (int o = 0; o < kO; ++o) weights[o] = *reinterpret_cast<const Part*>(w + o * padded + at);
#pragma GCC unroll 4
      for (int t = 0; t < kT; ++t) {
        const Part inputs = *reinterpret_cast<const Part*>(x + t * padded + at);
#pragma GCC unroll 4
        for (int o = 0; o < kO; ++o) sums[t][o][part] += inputs * weights[o];
      }
    }
  // Sums that a loop indexes would live in memory: from here on they do, and not above.
  Part ends[kT][kO][kParts];
  std::memcpy(ends, sums, sizeof(ends));
  for (int t = 0; t < kT; ++t)
    for (int o = 0; o < kO; ++o) {
      Vec lanes;
      std::memcpy(&lanes, ends[t][o], sizeof(lanes));
      out[t * ldout + o] = sum_lanes(lanes);
    }
}

// Outputs first .. first + outs, of all tokens.
template <class Arch>
W2A4_INLINE void out_block(const Task& task, int64_t first, int64_t outs, float* w) {
  constexpr int kT = kTileTokens<Arch>, kO = kTileOuts<Arch>;
  const LinearW8Params& p = *task.p;
  float scale[kMostOuts], bias[kMostOuts] = {}, y[kT * kMostOuts];
  for (int64_t o = 0; o < outs; ++o) {
    const int8_t* row = p.weight + (first + o) * p.in_features;
    float* to = w + o * task.padded;
    for (int64_t k = 0; k < p.in_features; ++k) to[k] = row[k];
    std::fill(to + p.in_features, to + task.padded, 0.0f);
    scale[o] = to_float(F16{p.scale[first + o]});
  }
  const int64_t whole = (outs + kO - 1) / kO * kO;
  std::fill_n(w + outs * task.padded, (whole - outs) * task.padded, 0.0f);
  if (p.bias) load(p.bias, p.bias_dtype, first, outs, bias);
  for (int64_t t = 0; t < p.tokens; t += kT) {
    for (int64_t o = 0; o < whole; o += kO)
      dot_tile<Arch>(task.x + t * task.padded, w + o * task.padded, task.padded, y + o, kMostOuts);
    for (int64_t i = 0; i < std::min<int64_t>(kT, p.tokens - t); ++i) {
      float* row = y + i * kMostOuts;
      for (int64_t o = 0; o < outs; ++o) row[o] *= scale[o];
      if (p.bias)
        for (int64_t o = 0; o < outs; ++o) row[o] += bias[o];
      store(row, p.y, p.dtype, (t + i) * p.out_features + first, outs);
    }
  }
}

template <class Arch>
W2A4_INLINE void out_tiles(const Task& task, int64_t begin, int64_t end) {
  const int64_t fit = std::max<int64_t>(kOuts, kFloats / task.padded / kOuts * kOuts);
  const int64_t block = std::min(kMostOuts, fit),
                last = std::min(end * kOuts, task.p->out_features);
  const auto w = aligned<float>(block * task.padded);
  for (int64_t first = begin * kOuts; first < last; first += block)
    out_block<Arch>(task, first, std::min(block, last - first), w.get());
}
W2A4_DISPATCH(out_tiles, Task)

#ifdef W2A4_X86
#define W2A4_TARGET __attribute__((target("avx2")))

// `row_tiles` up to here: with AVX2 it is twice as fast as `out_tiles` at 4 tokens, at 64 a tenth
// slower.
constexpr int64_t kRegisterTokens = 16;
constexpr int kRowTokens = 6;    // tokens that meet a vector of converted weights, at most
constexpr int kBlockTiles = 16;  // tiles that all tokens pass before the next ones are read

// sums[r][t] += lanes of 16 products of row r and token t.
template <int kTokens, int kRows>
W2A4_TARGET W2A4_INLINE void add_products(const float* x, int64_t ldx, const int8_t* const* w,
                                          int64_t k, __m256 (*sums)[kTokens][2]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m128i* from = reinterpret_cast<const __m128i*>(w[r] + k + 8 * half);
      const __m256 weights = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from)));
#pragma GCC unroll 6
      for (int t = 0; t < kTokens; ++t)
        sums[r][t][half] = _mm256_add_ps(
            sums[r][t][half], _mm256_mul_ps(_mm256_loadu_ps(x + t * ldx + k + 8 * half), weights));
    }
}

// y[t][r] = row t of x times w[r]; y is [kTokens, kOuts].
template <int kTokens, int kRows>
W2A4_TARGET W2A4_INLINE void dot_rows(const Task& task, const float* x, const int8_t* const* w,
                                      float* y) {
  const int64_t in = task.p->in_features, whole = in / kLanes * kLanes;
  __m256 sums[kRows][kTokens][2];
  for (__m256(&row)[kTokens][2] : sums)
    for (__m256(&sum)[2] : row) sum[0] = sum[1] = _mm256_setzero_ps();
  for (int64_t k = 0; k < whole; k += kLanes) {
    // Rows follow each other, and so do tiles.
    _mm_prefetch(reinterpret_cast<const char*>(w[0] + kRows * k + kAhead), _MM_HINT_T0);
    add_products<kTokens, kRows>(x, task.padded, w, k, sums);
  }
  // Sums that a loop indexes would live in memory: from here on they do, and not above.
  __m256 ends[kRows][kTokens][2];
  std::memcpy(ends, sums, sizeof(ends));
  if (whole < in) {
    int8_t rest[kRows][kLanes] = {};
    const int8_t* rests[kRows];
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(rest[r], w[r] + whole, in - whole);
      rests[r] = rest[r];
    }
    add_products<kTokens, kRows>(x + whole, task.padded, rests, 0, ends);
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) {
      Vec lanes;
      std::memcpy(&lanes, ends[r][t], sizeof(lanes));
      y[t * kOuts + r] = sum_lanes(lanes);
    }
}

// A tile of outputs, of kTokens tokens.
template <int kTokens>
W2A4_TARGET W2A4_INLINE void row_tile(const Task& task, int64_t tile, int64_t token) {
  constexpr int kRows = kTokens == 1 ? 4 : kTokens < 4 ? 2 : 1;
  const LinearW8Params& p = *task.p;
  const int64_t first = tile * kOuts, outs = std::min<int64_t>(kOuts, p.out_features - first);
  const int8_t* rows[kOuts];  // those that are not there repeat the last
  for (int o = 0; o < kOuts; ++o)
    rows[o] = p.weight + (first + std::min<int64_t>(o, outs - 1)) * p.in_features;
  float y[kTokens * kOuts], scale[kOuts], bias[kOuts] = {};
  for (int o = 0; o < kOuts; o += kRows)
    dot_rows<kTokens, kRows>(task, task.x + token * task.padded, rows + o, y + o);
  for (int o = 0; o < outs; ++o) scale[o] = to_float(F16{p.scale[first + o]});
  if (p.bias) load(p.bias, p.bias_dtype, first, outs, bias);
  for (int t = 0; t < kTokens; ++t) {
    float* row = y + t * kOuts;
    for (int o = 0; o < outs; ++o) {
      row[o] *= scale[o];
      if (p.bias) row[o] += bias[o];
    }
    store(row, p.y, p.dtype, (token + t) * p.out_features + first, outs);
  }
}

// Over tiles of outputs: weights are converted in registers, where `kRowTokens` tokens meet them.
W2A4_TARGET void row_tiles(const Task& task, int64_t begin, int64_t end) {
  using Tile = void (*)(const Task&, int64_t, int64_t);
  constexpr Tile kTiles[kRowTokens] = {row_tile<1>, row_tile<2>, row_tile<3>,
                                       row_tile<4>, row_tile<5>, row_tile<6>};
  const int64_t tokens = task.p->tokens, passes = (tokens + kRowTokens - 1) / kRowTokens;
  for (int64_t block = begin; block < end; block += kBlockTiles)
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t token = pass * tokens / passes, stop = (pass + 1) * tokens / passes;
      for (int64_t i = block; i < std::min(end, block + kBlockTiles); ++i)
        kTiles[stop - token - 1](task, i, token);
    }
}
#endif

}  // namespace

void linear_w8(const LinearW8Params& p) {
  // Without inputs a row is one of zeros.
  const int64_t in = std::max<int64_t>(1, p.in_features);
  const int64_t padded = (in + kLanes - 1) / kLanes * kLanes;
  const auto x = aligned<float>((p.tokens + kMostTokens) * padded);
  for (int64_t t = 0; t < p.tokens; ++t) {
    load(p.x, p.dtype, t * p.in_features, p.in_features, x.get() + t * padded);
    std::fill(x.get() + t * padded + p.in_features, x.get() + (t + 1) * padded, 0.0f);
  }
  const Task task{&p, x.get(), padded};
  const int64_t tiles = (p.out_features + kOuts - 1) / kOuts;
  const int64_t grain = 1 + kGrain / kOuts / (in * std::max<int64_t>(1, p.tokens));
#ifdef W2A4_X86
  // With AVX-512 `out_tiles` has twice the lanes, and nobody has measured it to be slower.
  const bool avx512 = isa() == Isa::kAvx512 || isa() == Isa::kAvx512Vnni;
  if (isa() != Isa::kBase && p.tokens <= (avx512 ? 1 : kRegisterTokens))
    return parallel(tiles, grain, task, row_tiles);
#endif
  parallel(tiles, grain, task, out_tiles_dispatch);
}

}  // namespace w2a4::cpu
