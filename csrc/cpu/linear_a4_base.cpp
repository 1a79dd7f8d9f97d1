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

// to = values of `units` units of one weight group.
template <int kWords>
void decode_units(const uint8_t* codes, int64_t units, const int8_t* levels, int16_t* to) {
  using Bits = typename Unit<kWords>::Bits;
  using Values = typename Unit<kWords>::Values;
  // With the two bits of a code as masks, a level is
  // l0 ^ (low & (l0 ^ l1)) ^ (high & (l0 ^ l2)) ^ (low & high & (l0 ^ l1 ^ l2 ^ l3)).
  const int16_t l0 = levels ? levels[0] : 0, d1 = levels ? l0 ^ levels[1] : 0;
  const int16_t d2 = levels ? l0 ^ levels[2] : 0, d3 = levels ? d1 ^ levels[2] ^ levels[3] : 0;
  for (int64_t unit = 0; unit < units; ++unit) {
    const Bits x = reinterpret_cast<const Bits*>(codes)[unit];
    if (!levels) {
#pragma GCC unroll 4
      for (int plane = 0; plane < 4; ++plane, to += kWords)
        *reinterpret_cast<Values*>(to) = (Values)(x << (12 - 4 * plane)) >> 12;
      continue;
    }
#pragma GCC unroll 8
    for (int plane = 0; plane < 8; ++plane, to += kWords) {
      const Values low = (Values)(x << (15 - 2 * plane)) >> 15;
      const Values high = (Values)(x << (14 - 2 * plane)) >> 15;
      *reinterpret_cast<Values*>(to) = l0 ^ (low & (d1 ^ (high & d3))) ^ (high & d2);
    }
  }
}

// The same of a row, in natural order, for blocks that are not made of units.
void decode_codes(const LinearA4Params& p, int64_t out, int16_t* to) {
  const int64_t in_byte = 8 / p.weight_bits, groups = p.in_features / p.group_size;
  const uint8_t* row = p.weight + out * ceil_div(p.in_features, in_byte);
  for (int64_t k = 0; k < p.in_features; ++k) {
    const int code = row[k / in_byte] >> (k % in_byte * p.weight_bits) & ((1 << p.weight_bits) - 1);
    to[k] = static_cast<int16_t>(p.levels ? p.levels[4 * (out * groups + k / p.group_size) + code]
                                          : signed_nibble(code));
  }
}

void decode_row(const BaseTask& task, int64_t out, int16_t* to) {
  const LinearA4Params& p = *task.p;
  if (!task.unit_words) return decode_codes(p, out, to);
  const int64_t row_bytes = p.in_features * p.weight_bits / 8;
  const int64_t block_bytes = p.block * p.weight_bits / 8;
  const int64_t groups = p.in_features / p.group_size, blocks = p.in_features / p.block;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t group = out * groups + b * p.block / p.group_size;
    const int8_t* levels = p.levels ? p.levels + 4 * group : nullptr;
    const uint8_t* codes = p.weight + out * row_bytes + b * block_bytes;
    task.unit_words == 8 ? decode_units<8>(codes, block_bytes / 16, levels, to + b * p.block)
                         : decode_units<4>(codes, block_bytes / 8, levels, to + b * p.block);
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
  const int64_t planes = task.unit_words ? 16 / p.weight_bits : 1;
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

}  // namespace

void linear_a4_base(const LinearA4Params& p) {
  const int64_t in_word = 16 / p.weight_bits;
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
