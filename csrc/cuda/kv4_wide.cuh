// rope_append_kv4 for many tokens, with the bits of kv4.cuh: there a warp takes one head, which
// fills a GPU with the heads of one token, but takes most of its time for addresses, reductions and
// what a head needs once. Here a lane holds 16 elements of a head, so that a warp has four heads of
// 128 elements at a time: 8 l + i and, as [8 + i], 8 l + i + head_dim / 2, l its number among the
// kLanes lanes of the head. RoPE and four of the seven stages of R3 then need no other lane, and
// loads have 16 bytes. A warp stays with its token, whose cos and sin it keeps.
#pragma once

#include "kv4.cuh"

namespace w2a4::cuda {

constexpr int kHalfRun = 8;  // elements of either half of a head that a lane holds

using LaneHead = float[2 * kHalfRun];

// Both runs of a lane as they lie in memory, on their way while other heads are worked on.
template <class T>
struct LaneWords {
  static constexpr int kWords = kHalfRun * T::kBytes / 16;
  U32x4 words[2][kWords];
};

template <class T>
W2A4_DEVICE void load_words(const void* x, int64_t at, int middle, LaneWords<T>& to) {
  W2A4_UNROLL
  for (int half = 0; half < 2; ++half) {
    const char* from = static_cast<const char*>(x) + (at + half * middle) * T::kBytes;
    W2A4_UNROLL
    for (int i = 0; i < LaneWords<T>::kWords; ++i) to.words[half][i] = load_u32x4(from + 16 * i);
  }
}

template <class T>
W2A4_DEVICE void widen_words(const LaneWords<T>& from, LaneHead& x) {
  W2A4_UNROLL
  for (int i = 0; i < 2 * kHalfRun; ++i) {
    const int byte = i % kHalfRun * T::kBytes;
    const U32x4& w = from.words[i / kHalfRun][byte / 16];
    const int place = byte / 4 % 4;
    const uint32_t word = place == 0 ? w.x : place == 1 ? w.y : place == 2 ? w.z : w.w;
    if constexpr (T::kBytes == 4)
      x[i] = as_float(word);
    else
      x[i] = T::widen(static_cast<uint16_t>(word >> 8 * (byte % 4)));
  }
}

template <class Rope>
W2A4_DEVICE void load_angles(const void* x, int64_t at, int middle, LaneHead& to) {
  LaneWords<Rope> words;
  load_words<Rope>(x, at, middle, words);
  widen_words<Rope>(words, to);
}

W2A4_DEVICE void load_angles(const void* x, ScalarType dtype, int64_t at, int middle,
                             LaneHead& to) {
  if (dtype == ScalarType::Half)
    load_angles<Float16>(x, at, middle, to);
  else if (dtype == ScalarType::BFloat16)
    load_angles<BFloat16>(x, at, middle, to);
  else
    load_angles<Float32>(x, at, middle, to);
}

// As `turn` of kv4.cuh.
W2A4_DEVICE void turn(const LaneHead& cos, const LaneHead& sin, LaneHead& x) {
  W2A4_UNROLL
  for (int i = 0; i < kHalfRun; ++i) {
    const int j = i + kHalfRun;
    const float a = x[i], b = x[j];
    x[i] = add_rn(mul_rn(a, cos[i]), mul_rn(-b, sin[i]));
    x[j] = add_rn(mul_rn(b, cos[j]), mul_rn(a, sin[j]));
  }
}

// Sylvester's transform of blocks of `power` elements, in the order of kv4.cuh: pairs of elements
// whose numbers differ by 1, by 2, by 4, ...
template <int kLanes>
W2A4_DEVICE void butterflies(int power, LaneHead& x) {
  W2A4_UNROLL
  for (int step = 1; step < kHalfRun; step *= 2) {
    if (step >= power) return;
    W2A4_UNROLL
    for (int i = 0; i < 2 * kHalfRun; ++i) {
      if (i & step) continue;
      const float a = x[i], b = x[i + step];
      x[i] = add_rn(a, b);
      x[i + step] = add_rn(a, -b);
    }
  }
  W2A4_UNROLL
  for (int mask = 1; mask < kLanes; mask *= 2) {
    if (kHalfRun * mask >= power) return;
    const float sign = threadIdx.x & mask ? -1.0f : 1.0f;
    W2A4_UNROLL
    for (int i = 0; i < 2 * kHalfRun; ++i) x[i] = fma_rn(x[i], sign, shfl_xor(x[i], mask));
  }
  if (kHalfRun * kLanes >= power) return;
  W2A4_UNROLL
  for (int i = 0; i < kHalfRun; ++i) {
    const float a = x[i], b = x[i + kHalfRun];
    x[i] = add_rn(a, b);
    x[i + kHalfRun] = add_rn(a, -b);
  }
}

// The codes of eight elements, as `quantize_head` of kv4.cuh makes them. Elements are held within
// 0 and 15 scales, which is exact, before they are divided and not after: the quotient is correctly
// rounded, so it lies within 0 and 15 then. The scale is a float16 other than 0, so it needs no
// factor that `quantizer_of` has for others.
W2A4_DEVICE uint32_t codes_of(const float* x, float scale, float reciprocal, float zero) {
  const float most = mul_rn(15.0f, scale);
  uint32_t codes = 0;
  W2A4_UNROLL
  for (int i = kHalfRun - 1; i >= 0; --i) {
    const float wide = min_f32(max_f32(add_rn(x[i], -zero), 0.0f), most);
    const float first = mul_rn(wide, reciprocal);
    const float quotient = fma_rn(fma_rn(-first, scale, wide), reciprocal, first);
    codes = (codes << 4) + rounded_bits(quotient);
  }
  // Every one of them came with the bits of 1.5 * 2**23.
  return codes - 0x4b400000u * 0x11111111u;
}

template <class T, int kLanes>
W2A4_DEVICE void store_head(void* to, bool written, const LaneHead& x) {
  float half[2][kHalfRun];
  W2A4_UNROLL
  for (int i = 0; i < 2 * kHalfRun; ++i) half[i / kHalfRun][i % kHalfRun] = x[i];
  if (!written) return;
  store_run<T>(to, 0, half[0]);
  store_run<T>(to, kHalfRun * kLanes, half[1]);
}

// Codes and params of a head, if it is one that is written; all lanes of the warp call this.
template <int kLanes>
W2A4_DEVICE void quantize_lanes(const LaneHead& x, bool written, float clip, uint8_t* codes,
                                uint16_t* params) {
  float high = x[0], low = x[0];
  W2A4_UNROLL
  for (int i = 1; i < 2 * kHalfRun; ++i) {
    high = max_nan_f32(high, x[i]);
    low = min_nan_f32(low, x[i]);
  }
  W2A4_UNROLL
  for (int mask = 1; mask < kLanes; mask *= 2) {
    high = max_nan_f32(high, shfl_xor(high, mask));
    low = min_nan_f32(low, shfl_xor(low, mask));
  }
  const HeadGrid grid = grid_of(low, high, clip);
  const float scale = float_from_half(grid.scale), zero = float_from_half(grid.zero);
  const bool some = scale != 0.0f && is_finite(scale);
  const float reciprocal = rcp_rn_mid(some ? scale : 1.0f);
  const uint32_t first = codes_of(x, scale, reciprocal, zero);
  const uint32_t second = codes_of(x + kHalfRun, scale, reciprocal, zero);
  if (!written) return;
  const int lane = threadIdx.x % kLanes;
  store_u32(codes + 4 * lane, some ? first : 0);
  store_u32(codes + 4 * (lane + kLanes), some ? second : 0);
  if (lane < 2) params[lane] = lane == 0 ? grid.scale : grid.zero;
}

// Heads of queries, then of keys, then of values are done in groups, as many as a warp holds. The
// last group of each may have fewer; lanes without a head work on the last one and store nothing.
struct HeadGroup {
  int kind;       // 0: queries, 1: keys, 2: values
  uint32_t head;  // of this lane, among those of its kind
};

template <int kLanes>
W2A4_DEVICE HeadGroup head_group(uint32_t group, uint32_t q_heads, uint32_t kv_heads) {
  constexpr uint32_t kHeads = 32 / kLanes;
  const uint32_t q_groups = (q_heads + kHeads - 1) / kHeads;
  const uint32_t kv_groups = (kv_heads + kHeads - 1) / kHeads;
  const int kind = group < q_groups ? 0 : group < q_groups + kv_groups ? 1 : 2;
  if (kind > 0) group -= kind == 1 ? q_groups : q_groups + kv_groups;
  return {kind, group * kHeads + threadIdx.x % 32 / kLanes};
}

// Starts the loads of a lane's run of a head; `token` is that of the token's first head.
template <class T, int kLanes>
W2A4_DEVICE void load_head(const char* token, const HeadGroup& at, uint32_t q_heads,
                           uint32_t kv_heads, LaneWords<T>& words) {
  constexpr int kDim = 2 * kHalfRun * kLanes;
  const uint32_t heads = at.kind == 0 ? q_heads : kv_heads;
  const uint32_t before = at.kind == 0 ? 0 : at.kind == 1 ? q_heads : q_heads + kv_heads;
  const uint32_t head = before + (at.head < heads ? at.head : heads - 1);
  load_words<T>(token + uint64_t{head} * (kDim * T::kBytes), 0, kDim / 2, words);
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kHeadWarps * 32)
    rope_append_kv4_wide_kernel(const __grid_constant__ RopeAppendKV4Args args) {
  wait_for_previous_kernel();
  constexpr int kDim = 2 * kHalfRun * kLanes;
  const RopeAppendKV4Params& p = args.p;
  const auto q_heads = static_cast<uint32_t>(p.q_heads),
             kv_heads = static_cast<uint32_t>(p.kv_heads);
  const auto tokens = static_cast<uint32_t>(p.tokens);
  const uint32_t row = blockIdx.x / args.splits, split = blockIdx.x % args.splits;
  const uint32_t batch = row / tokens, token = row % tokens;
  const int run = static_cast<int>(threadIdx.x % kLanes) * kHalfRun;
  const char* from = static_cast<const char*>(p.qkv) +
                     (int64_t{row} * (q_heads + 2 * kv_heads) * kDim + run) * T::kBytes;
  char* to = static_cast<char*>(p.q) +
             ((int64_t{batch} * q_heads * tokens + token) * kDim + run) * T::kBytes;
  const int64_t angles = batch * p.rope_batch + int64_t{token} * kDim + run;
  uint32_t group = split * kHeadWarps + threadIdx.x / 32;
  if (group >= args.groups) return;
  HeadGroup at = head_group<kLanes>(group, q_heads, kv_heads);
  LaneWords<T> words;
  load_head<T, kLanes>(from, at, q_heads, kv_heads, words);
  LaneHead cos, sin;
  load_angles(p.cos, p.rope_dtype, angles, kDim / 2, cos);
  load_angles(p.sin, p.rope_dtype, angles, kDim / 2, sin);
  const Cell cell = cell_of(p, batch, token);
  W2A4_NO_UNROLL
  for (;;) {
    LaneHead x;
    widen_words<T>(words, x);
    const HeadGroup now = at;
    // The next heads are on their way while these are worked on.
    group += args.splits * kHeadWarps;
    if (group < args.groups) {
      at = head_group<kLanes>(group, q_heads, kv_heads);
      load_head<T, kLanes>(from, at, q_heads, kv_heads, words);
    }
    if (now.kind < 2) {
      turn(cos, sin, x);
      butterflies<kLanes>(1 << args.log_power, x);
      W2A4_UNROLL
      for (int i = 0; i < 2 * kHalfRun; ++i) x[i] = mul_rn(x[i], args.scale);
    }
    if (now.kind == 0) {
      store_head<T, kLanes>(to + uint64_t{now.head * tokens} * (kDim * T::kBytes),
                            now.head < q_heads, x);
    } else {
      const Strided4& codes = now.kind == 1 ? p.k_codes : p.v_codes;
      const Strided4& params = now.kind == 1 ? p.k_params : p.v_params;
      quantize_lanes<kLanes>(
          x, now.head < kv_heads && cell.position >= 0, p.clip,
          static_cast<uint8_t*>(codes.data) + offset_of(codes, cell.row, now.head, cell.position),
          static_cast<uint16_t*>(params.data) +
              offset_of(params, cell.row, now.head, cell.position));
    }
    if (group >= args.groups) return;
  }
}

}  // namespace w2a4::cuda
