// Portable loops, which compilers turn into 16-bit multiply-adds: weights of a few rows are decoded
// to 16 bits once and met by every token.
#include <algorithm>
#include <cstring>

#include "linear_a4.h"
#include "numbers.h"

namespace w2a4::cpu {
namespace {

constexpr int kTile = 4;  // rows that share a load of activations

// A unit is kWords 16-bit words of a weight row; its codes are decoded by planes, those in the
// lowest bits of the words first. Vector types rather than loops, since compilers widen 16-bit
// shifts in loops.
template <int kWords>
struct Unit;
template <>
struct Unit<8> {
  typedef uint16_t Bits __attribute__((vector_size(16), aligned(1), may_alias));
  typedef int16_t Values __attribute__((vector_size(16), aligned(2), may_alias));
};
template <>
struct Unit<4> {
  typedef uint16_t Bits __attribute__((vector_size(8), aligned(1), may_alias));
  typedef int16_t Values __attribute__((vector_size(8), aligned(2), may_alias));
};

// With the two low bits of a code as masks, one of four levels is
// l0 ^ (low & (l0 ^ l1)) ^ (high & (l0 ^ l2)) ^ (low & high & (l0 ^ l1 ^ l2 ^ l3)).
struct FourLevels {
  int16_t l0 = 0, d1 = 0, d2 = 0, d3 = 0;

  FourLevels() = default;
  explicit FourLevels(const int8_t* levels)
      : l0(levels[0]), d1(l0 ^ levels[1]), d2(l0 ^ levels[2]), d3(d1 ^ levels[2] ^ levels[3]) {}
  // The bits in which the levels picked from two fours differ are picked alike.
  FourLevels operator^(const FourLevels& other) const {
    FourLevels out;
    out.l0 = l0 ^ other.l0, out.d1 = d1 ^ other.d1, out.d2 = d2 ^ other.d2, out.d3 = d3 ^ other.d3;
    return out;
  }
  template <class Values>
  W2A4_INLINE Values pick(Values low, Values high) const {
    return l0 ^ (low & (d1 ^ (high & d3))) ^ (high & d2);
  }
};

// to = values of `units` units of one weight group. high: the third bits of the codes, a byte a
// word, or null.
template <int kWords>
void decode_units(const uint8_t* codes, const uint8_t* high_bits, int64_t units,
                  const int8_t* levels, int16_t* to) {
  using Bits = typename Unit<kWords>::Bits;
  using Values = typename Unit<kWords>::Values;
  const FourLevels lower = levels ? FourLevels(levels) : FourLevels();
  const FourLevels change = high_bits ? lower ^ FourLevels(levels + 4) : FourLevels();
  for (int64_t unit = 0; unit < units; ++unit) {
    const Bits x = reinterpret_cast<const Bits*>(codes)[unit];
    if (!levels) {
#pragma GCC unroll 4
      for (int plane = 0; plane < 4; ++plane, to += kWords)
        *reinterpret_cast<Values*>(to) = (Values)(x << (12 - 4 * plane)) >> 12;
      continue;
    }
    Bits top{};
    if (high_bits)
      for (int word = 0; word < kWords; ++word) top[word] = high_bits[unit * kWords + word];
#pragma GCC unroll 8
    for (int plane = 0; plane < 8; ++plane, to += kWords) {
      const Values low = (Values)(x << (15 - 2 * plane)) >> 15;
      const Values high = (Values)(x << (14 - 2 * plane)) >> 15;
      Values level = lower.pick(low, high);
      if (high_bits) level ^= ((Values)(top << (15 - plane)) >> 15) & change.pick(low, high);
      *reinterpret_cast<Values*>(to) = level;
    }
  }
}

// The same of a row, in natural order, for blocks that are not made of units.
void decode_codes(const LinearA4Params& p, int64_t out, int16_t* to) {
  const int64_t count = levels_of_group(p), groups = p.in_features / p.group_size;
  const uint8_t* row = p.weight + out * row_bytes(p);
  for (int64_t k = 0; k < p.in_features; ++k) {
    const int code = code_at(p, row, k);
    to[k] =
        static_cast<int16_t>(p.levels ? p.levels[count * (out * groups + k / p.group_size) + code]
                                      : signed_nibble(code));
  }
}

void decode_row(const BaseTask& task, int64_t out, int16_t* to) {
  const LinearA4Params& p = *task.p;
  if (!task.unit_words) return decode_codes(p, out, to);
  const uint8_t* row = p.weight + out * row_bytes(p);
  const int64_t block_bytes = p.block / codes_in_byte(p);
  const int64_t groups = p.in_features / p.group_size, blocks = p.in_features / p.block;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t group = out * groups + b * p.block / p.group_size;
    const int8_t* levels = p.levels ? p.levels + levels_of_group(p) * group : nullptr;
    const uint8_t* codes = row + b * block_bytes;
    const uint8_t* high = p.weight_bits == 3 ? row + low_bytes(p) + b * p.block / 8 : nullptr;
    task.unit_words == 8 ? decode_units<8>(codes, high, block_bytes / 16, levels, to + b * p.block)
                         : decode_units<4>(codes, high, block_bytes / 8, levels, to + b * p.block);
  }
}

// sums[r] = sum of products of n activations and of row r of w [kTile, ldw].
void dot_rows(const int16_t* a, const int16_t* w, int64_t ldw, int64_t n, int32_t* sums) {
  constexpr int64_t kStep = 32;
  for (int r = 0; r < kTile; ++r, w += ldw) {
    int32_t sum = 0;
    int64_t j = 0;
    for (; j + kStep <= n; j += kStep)
      for (int64_t i = j; i < j + kStep; ++i) sum += a[i] * w[i];
    for (; j < n; ++j) sum += a[j] * w[j];
    sums[r] = sum;
  }
}

// acc[r] = result of token `token` for each row of w [kTile, depth], scale [kTile, groups].
void rows_of_token(const BaseTask& task, int64_t token, const int16_t* w, const float* scale,
                   float* acc) {
  const LinearA4Params& p = *task.p;
  const int64_t groups = p.in_features / p.group_size, act_groups = p.in_features / p.act_group;
  const int64_t blocks = p.in_features / p.block;
  const int64_t in_group = p.group_size / p.block, in_act = p.act_group / p.block;
  const float* a_scale = p.a_scale + (task.first_token + token) * act_groups;
  const int16_t* a = task.a + token * p.in_features;
  int64_t group = 0, group_left = in_group, act_left = in_act;
  for (int r = 0; r < kTile; ++r) acc[r] = 0.0f;
  for (int64_t b = 0; b < blocks; ++b, --group_left, --act_left) {
    if (group_left == 0) ++group, group_left = in_group;
    if (act_left == 0) ++a_scale, act_left = in_act;
    int32_t sums[kTile];
    dot_rows(a + b * p.block, w + b * p.block, p.in_features, p.block, sums);
    for (int r = 0; r < kTile; ++r)
      acc[r] += static_cast<float>(sums[r]) * (scale[r * groups + group] * *a_scale);
  }
}

// Over tiles of outputs.
void linear_tiles(const BaseTask& task, int64_t begin, int64_t end) {
  const LinearA4Params& p = *task.p;
  const int64_t groups = p.in_features / p.group_size;
  const auto w = aligned<int16_t>(kTile * p.in_features);
  const auto scale = aligned<float>(kTile * groups);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * kTile, outs = std::min<int64_t>(kTile, p.out_features - first);
    for (int64_t r = 0; r < kTile; ++r) {
      const int64_t out = first + std::min(r, outs - 1);  // rows that are not there repeat the last
      decode_row(task, out, w.get() + r * p.in_features);
      for (int64_t g = 0; g < groups; ++g)
        scale[r * groups + g] = to_float(F16{p.scale[out * groups + g]});
    }
    float bias[kTile] = {};
    if (p.bias) load(p.bias, p.bias_dtype, first, outs, bias);
    for (int64_t token = 0; token < task.tokens; ++token) {
      float acc[kTile];
      rows_of_token(task, token, w.get(), scale.get(), acc);
      if (p.bias)
        for (int r = 0; r < kTile; ++r) acc[r] += bias[r];
      store(acc, p.y, p.out_dtype, (task.first_token + token) * p.out_features + first, outs);
    }
  }
}

// a = activations of the task's tokens, in the order of decoded weights.
void unpack_tokens(const BaseTask& task, int64_t begin, int64_t end) {
  const LinearA4Params& p = *task.p;
  const int64_t planes = task.unit_words ? 2 * codes_in_byte(p) : 1;
  const int64_t words = task.unit_words ? task.unit_words : p.block;
  for (int64_t token = begin; token < end; ++token) {
    const uint8_t* codes = p.a_codes + (task.first_token + token) * ceil_div(p.in_features, 2);
    int16_t* a = task.a + token * p.in_features;
    for (int64_t start = 0; start < p.in_features; start += planes * words)
      for (int64_t plane = 0; plane < planes; ++plane)
        for (int64_t j = 0; j < words; ++j) {
          const int64_t k = start + j * planes + plane;
          *a++ = static_cast<int16_t>(signed_nibble(codes[k / 2] >> (k % 2 * 4) & 15));
        }
  }
}

// One token with 2-bit weights, whose blocks are made of units of 16 bytes: no weight is decoded.
// With sum[c] the sum of the activations that meet code c, a block's sum is that of sum[c] *
// level[c], or level[0] times the sum of all plus sum[c] * (level[c] - level[0]) for the others.
struct TokenTask {
  const LinearA4Params* p;
  const int8_t* a;       // [in], units by planes
  const int32_t* a_sum;  // [blocks]
};

constexpr int64_t kUnitSize = 16, kUnitCodes = 64;
constexpr int64_t kByteUnits = 4;  // units whose sums fit a byte: each adds four times -8 .. 7

typedef uint8_t Codes __attribute__((vector_size(16), aligned(1), may_alias));
typedef int8_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));
typedef int16_t Shorts __attribute__((vector_size(16), may_alias));

// sums [3, 8] = eight parts of the sums of the activations that meet the codes 1, 2 and 3.
W2A4_INLINE void sum_by_code(const uint8_t* codes, const int8_t* a, int64_t units, int16_t* sums) {
  Bytes bytes[3] = {};
  for (int64_t unit = 0; unit < units; ++unit) {
    const Codes x = reinterpret_cast<const Codes*>(codes)[unit];
#pragma GCC unroll 4
    for (int plane = 0; plane < 4; ++plane) {
      const Bytes values = reinterpret_cast<const Bytes*>(a)[4 * unit + plane];
      const Codes code = x & static_cast<uint8_t>(3 << 2 * plane);
#pragma GCC unroll 3
      for (int c = 1; c <= 3; ++c)
        bytes[c - 1] += values & (Bytes)(code == static_cast<uint8_t>(c << 2 * plane));
    }
  }
#pragma GCC unroll 3
  for (int c = 0; c < 3; ++c) {
    const Shorts both = (Shorts)bytes[c];
    reinterpret_cast<Shorts*>(sums)[c] = ((both << 8) >> 8) + (both >> 8);
  }
}

// Over outputs.
void linear_token(const TokenTask& task, int64_t begin, int64_t end) {
  const LinearA4Params& p = *task.p;
  const int64_t groups = p.in_features / p.group_size, blocks = p.in_features / p.block;
  const int64_t in_group = p.group_size / p.block, in_act = p.act_group / p.block;
  const int64_t units = p.block / kUnitCodes;
  for (int64_t out = begin; out < end; ++out) {
    const uint8_t* codes = p.weight + out * p.in_features / 4;
    const int8_t *a = task.a, *levels = p.levels + out * groups * 4;
    const uint16_t* scale = p.scale + out * groups;
    const float* a_scale = p.a_scale;
    int64_t group_left = in_group, act_left = in_act;
    float acc = 0.0f;
    for (int64_t b = 0; b < blocks; ++b, --group_left, --act_left) {
      if (group_left == 0) levels += 4, ++scale, group_left = in_group;
      if (act_left == 0) ++a_scale, act_left = in_act;
      alignas(16) int16_t sums[24], above[24];
      for (int c = 0; c < 3; ++c)
        reinterpret_cast<Shorts*>(above)[c] =
            Shorts{} + static_cast<int16_t>(levels[c + 1] - levels[0]);
      int32_t sum = levels[0] * task.a_sum[b];
      for (int64_t left = units; left > 0; left -= kByteUnits) {
        const int64_t n = std::min(left, kByteUnits);
        sum_by_code(codes, a, n, sums);
        for (int i = 0; i < 24; ++i) sum += sums[i] * above[i];
        codes += n * kUnitSize, a += n * kUnitCodes;
      }
      acc += static_cast<float>(sum) * (to_float(F16{*scale}) * *a_scale);
    }
    if (p.bias) {
      float bias;
      load(p.bias, p.bias_dtype, out, 1, &bias);
      acc += bias;
    }
    store(&acc, p.y, p.out_dtype, out, 1);
  }
}

void one_token(const LinearA4Params& p) {
  const int64_t blocks = p.in_features / p.block;
  const auto a = aligned<int8_t>(p.in_features);
  const auto a_sum = aligned<int32_t>(blocks);
  for (int64_t b = 0, k = 0; b < blocks; ++b) {
    int32_t sum = 0;
    for (const int64_t end = k + p.block; k < end; ++k) {
      const int value = signed_nibble(p.a_codes[k / 2] >> (k % 2 * 4) & 15);
      const int64_t unit = k / kUnitCodes, byte = k % kUnitCodes / 4, plane = k % 4;
      a[unit * kUnitCodes + plane * kUnitSize + byte] = static_cast<int8_t>(value);
      sum += value;
    }
    a_sum[b] = sum;
  }
  const TokenTask task{&p, a.get(), a_sum.get()};
  parallel(p.out_features, 1 + (1 << 17) / p.in_features, task, linear_token);
}

}  // namespace

void linear_a4_base(const LinearA4Params& p) {
  if (p.tokens == 1 && p.weight_bits == 2 && p.block % kUnitCodes == 0) return one_token(p);
  const int64_t in_word = 2 * codes_in_byte(p);
  const int64_t unit_words = p.block % (8 * in_word) == 0   ? 8
                             : p.block % (4 * in_word) == 0 ? 4
                                                            : 0;
  const int64_t most = std::min(
      p.tokens, std::max<int64_t>(1, kScratch / (p.in_features * int64_t{sizeof(int16_t)})));
  const auto a = aligned<int16_t>(most * p.in_features);
  BaseTask task{&p, 0, 0, unit_words, a.get()};
  for (; task.first_token < p.tokens; task.first_token += most) {
    task.tokens = std::min(most, p.tokens - task.first_token);
    parallel(task.tokens, 1 + (1 << 16) / p.in_features, task, unpack_tokens);
    parallel(ceil_div(p.out_features, kTile), 1 + (1 << 13) / p.in_features, task, linear_tiles);
  }
}

}  // namespace w2a4::cpu
