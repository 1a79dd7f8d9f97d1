// linear_w2a4 and linear_w4a4, bit-exact to the reference: integer sums over blocks, scaled and
// added in block order in float. Few tokens: a weight row is decoded a block at a time and met by
// every token (linear_rows). Many: weights become panels of float, whose sums are exact
// (linear_panels).
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "tile.h"

namespace w2a4::cpu {
namespace {

constexpr int64_t kFewTokens = 6;      // up to here rows, above panels
constexpr int64_t kPanelTokens = 512;  // tokens that share a decoded panel
constexpr int64_t kPanelDepth = 1024;  // inputs of a panel, about
constexpr int64_t kScratch = 8 << 20;  // floats of unpacked activations at a time
// Sums of so many products of at most 128 * 8 are exact in float: they stay within 2**24.
constexpr int64_t kExactDepth = (1 << 24) / (128 * 8);

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// ---- few tokens

// A unit is kUnit bytes of a weight row. Its codes lie by planes, as they come out of the bytes:
// first those in the lowest bits of every byte, then the next. Activations are put in the same
// order once. Lanes of 16-bit sums: kUnitsInLane units add at most 7 * 4 products of at most 128 *
// 8 to a lane.
constexpr int64_t kUnitsInLane = 7;

struct RowsTask {
  const LinearA4Params* p;
  const int16_t* a;  // [tokens, in], by units
  int64_t unit;      // bytes: 16, 8, or 0 if blocks are not made of units (natural order then)
};

void unpack_units(const LinearA4Params& p, int64_t unit, const uint8_t* codes, int16_t* a) {
  const int64_t planes = unit ? 8 / p.weight_bits : 1, width = unit ? unit : p.in_features;
  for (int64_t start = 0; start < p.in_features; start += planes * width)
    for (int64_t plane = 0; plane < planes; ++plane)
      for (int64_t j = 0; j < width; ++j) {
        const int64_t k = start + j * planes + plane;
        a[start + plane * width + j] =
            static_cast<int16_t>(signed_nibble(codes[k / 2] >> (k % 2 * 4) & 15));
      }
}

// One register of bytes, of 16-bit sums, and of 32-bit sums. Vector types rather than loops, since
// compilers unroll loops this short into scalars.
template <int kUnit>
struct Unit;
template <>
struct Unit<16> {
  typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));
  typedef int16_t Lanes __attribute__((vector_size(32), aligned(2), may_alias));
  typedef int32_t Wide __attribute__((vector_size(64)));
};
template <>
struct Unit<8> {
  typedef uint8_t Bytes __attribute__((vector_size(8), aligned(1), may_alias));
  typedef int16_t Lanes __attribute__((vector_size(16), aligned(2), may_alias));
  typedef int32_t Wide __attribute__((vector_size(32)));
};

// w = level of the two bits of x from `shift` on, x one byte a lane. With the bits as masks it is
// l0 ^ (low & (l0^l1)) ^ (high & (l0^l2)) ^ (low & high & (l0^l1^l2^l3)).
template <class Lanes>
W2A4_INLINE void choose_level(const Lanes& x, int shift, const int8_t* levels, Lanes& w) {
  const int16_t l0 = levels[0], d1 = l0 ^ levels[1], d2 = l0 ^ levels[2],
                d3 = d1 ^ levels[2] ^ levels[3];
  const Lanes low = (x << (15 - shift)) >> 15, high = (x << (14 - shift)) >> 15;
  w = l0 ^ (low & d1) ^ (high & d2) ^ (low & high & d3);
}

// Values of the codes of one unit by planes.
template <class Arch, int kUnit, int kPlanes, class Lanes = typename Unit<kUnit>::Lanes>
W2A4_INLINE void decode_unit(const uint8_t* row, const int8_t* levels, Lanes* w) {
  using Bytes = typename Unit<kUnit>::Bytes;
  const Lanes x = __builtin_convertvector(*reinterpret_cast<const Bytes*>(row), Lanes);
  if constexpr (kPlanes == 2) {
    w[0] = ((x & 15) ^ 8) - 8;
    w[1] = ((x >> 4) ^ 8) - 8;
    return;
  }
#ifdef W2A4_BYTE_SHUFFLE
  if constexpr (Arch::kByteShuffle && kUnit == 16) {
    // Bytes are looked up in a register of levels, in pairs of bytes for want of shifts of bytes.
    typedef int8_t Table __attribute__((vector_size(16)));
    typedef uint16_t Pairs __attribute__((vector_size(16), aligned(1), may_alias));
    int32_t four;
    std::memcpy(&four, levels, sizeof(four));
    typedef int32_t Four __attribute__((vector_size(16)));
    const Table table = (Table)(Four{four, four, four, four});
    const Pairs pairs = *reinterpret_cast<const Pairs*>(row);
#pragma GCC unroll 4
    for (int plane = 0; plane < 4; ++plane)
      w[plane] = __builtin_convertvector(
          __builtin_shuffle(table, (Table)((pairs >> (2 * plane)) & static_cast<uint16_t>(0x0303))),
          Lanes);
    return;
  }
#endif
#pragma GCC unroll 4
  for (int plane = 0; plane < 4; ++plane) choose_level(x, 2 * plane, levels, w[plane]);
}

template <int kUnit>
W2A4_INLINE int32_t sum_lanes(typename Unit<kUnit>::Lanes lanes) {
  using Wide = typename Unit<kUnit>::Wide;
  const Wide wide = __builtin_convertvector(lanes, Wide);
  int32_t sums[kUnit];
  std::memcpy(sums, &wide, sizeof(sums));
#pragma GCC unroll 4
  for (int width = kUnit / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  return sums[0];
}

// sums[token] = integer sum of one block. bytes: of the block in this weight row.
template <class Arch, int kUnit, int kPlanes, int kTokens>
W2A4_INLINE void block_of_units(const RowsTask& task, const uint8_t* bytes, const int8_t* levels,
                                int64_t start, int32_t* sums) {
  const int64_t tokens = kTokens ? kTokens : task.p->tokens;
  const LinearA4Params& p = *task.p;
  using Lanes = typename Unit<kUnit>::Lanes;
  constexpr int kCodes = kUnit * kPlanes;
  for (int64_t token = 0; token < tokens; ++token) sums[token] = 0;
  for (int64_t first = 0; first < p.block; first += kUnitsInLane * kCodes) {
    const int64_t stop = std::min(p.block, first + kUnitsInLane * kCodes);
    Lanes lanes[kTokens ? kTokens : kFewTokens] = {};
    for (int64_t k = first; k < stop; k += kCodes) {
      Lanes w[kPlanes];
      decode_unit<Arch, kUnit, kPlanes>(bytes + k / kPlanes, levels, w);
      for (int64_t token = 0; token < tokens; ++token) {
        const int16_t* a = task.a + token * p.in_features + start + k;
#pragma GCC unroll 4
        for (int plane = 0; plane < kPlanes; ++plane)
          lanes[token] += w[plane] * *reinterpret_cast<const Lanes*>(a + plane * kUnit);
      }
    }
    for (int64_t token = 0; token < tokens; ++token) sums[token] += sum_lanes<kUnit>(lanes[token]);
  }
}

// The same for a block that is not made of units.
W2A4_INLINE void block_of_codes(const RowsTask& task, const uint8_t* row, const int8_t* levels,
                                int64_t start, int32_t* sums) {
  const LinearA4Params& p = *task.p;
  for (int64_t token = 0; token < p.tokens; ++token) sums[token] = 0;
  for (int64_t k = start; k < start + p.block; ++k) {
    const int w = levels ? levels[row[k / 4] >> (k % 4 * 2) & 3]
                         : signed_nibble(row[k / 2] >> (k % 2 * 4) & 15);
    for (int64_t token = 0; token < p.tokens; ++token)
      sums[token] += w * task.a[token * p.in_features + k];
  }
}

// One output of every token. kUnit: bytes, or 0.
template <class Arch, int kUnit, int kPlanes>
W2A4_INLINE void linear_row(const RowsTask& task, int64_t out, float* acc) {
  const LinearA4Params& p = *task.p;
  const int64_t groups = p.in_features / p.group_size, act_groups = p.in_features / p.act_group;
  const int64_t blocks_in_group = p.group_size / p.block, blocks_in_act = p.act_group / p.block;
  const uint8_t* row = p.weight + out * ceil_div(p.in_features * p.weight_bits, 8);
  int64_t group = out * groups, act = 0, group_end = blocks_in_group, act_end = blocks_in_act;
  for (int64_t block = 0, start = 0; start < p.in_features; ++block, start += p.block) {
    if (block == group_end) ++group, group_end += blocks_in_group;
    if (block == act_end) ++act, act_end += blocks_in_act;
    const int8_t* levels = kPlanes == 4 ? p.levels + 4 * group : nullptr;
    int32_t sums[kFewTokens];
    if constexpr (kUnit > 0)
      p.tokens == 1 ? block_of_units<Arch, kUnit, kPlanes, 1>(task, row + start / kPlanes, levels,
                                                              start, sums)
                    : block_of_units<Arch, kUnit, kPlanes, 0>(task, row + start / kPlanes, levels,
                                                              start, sums);
    else
      block_of_codes(task, row, levels, start, sums);
    const float scale = to_float(F16{p.scale[group]});
    for (int64_t token = 0; token < p.tokens; ++token)
      acc[token] += static_cast<float>(sums[token]) * (scale * p.a_scale[token * act_groups + act]);
  }
}

template <class Arch>
W2A4_INLINE void linear_rows(const RowsTask& task, int64_t begin, int64_t end) {
  const LinearA4Params& p = *task.p;
  for (int64_t out = begin; out < end; ++out) {
    float acc[kFewTokens] = {};
    switch (task.unit * 8 + p.weight_bits) {
      case 16 * 8 + 2:
        linear_row<Arch, 16, 4>(task, out, acc);
        break;
      case 8 * 8 + 2:
        linear_row<Arch, 8, 4>(task, out, acc);
        break;
      case 16 * 8 + 4:
        linear_row<Arch, 16, 2>(task, out, acc);
        break;
      case 8 * 8 + 4:
        linear_row<Arch, 8, 2>(task, out, acc);
        break;
      case 2:
        linear_row<Arch, 0, 4>(task, out, acc);
        break;
      default:
        linear_row<Arch, 0, 2>(task, out, acc);
    }
    float bias = 0.0f;
    if (p.bias) load(p.bias, p.bias_dtype, out, 1, &bias);
    for (int64_t token = 0; token < p.tokens; ++token) {
      if (p.bias) acc[token] += bias;
      store(&acc[token], p.y, p.out_dtype, token * p.out_features + out, 1);
    }
  }
}
W2A4_DISPATCH(linear_rows, RowsTask)

// ---- many tokens

struct PanelsTask {
  const LinearA4Params* p;
  float* a;  // [tokens + kRows, in], from first_token on; the rows after the tokens are 0
  int64_t first_token;
  int64_t tokens;
};

template <class Arch>
W2A4_INLINE void unpack_tokens(const PanelsTask& task, int64_t begin, int64_t end) {
  const int64_t in = task.p->in_features, bytes = (in + 1) / 2;
  for (int64_t token = begin; token < end; ++token) {
    const uint8_t* codes = task.p->a_codes + (task.first_token + token) * bytes;
    float* a = task.a + token * in;
    for (int64_t j = 0; j < in / 2; ++j) {
      a[2 * j] = static_cast<float>(signed_nibble(codes[j] & 15));
      a[2 * j + 1] = static_cast<float>(signed_nibble(codes[j] >> 4));
    }
    if (in % 2) a[in - 1] = static_cast<float>(signed_nibble(codes[bytes - 1] & 15));
  }
}
W2A4_DISPATCH(unpack_tokens, PanelsTask)

// Decodes weights of 64 outputs into panels, and keeps what is needed for that.
struct PanelDecoder {
  const LinearA4Params& p;
  int64_t first, outs;         // outputs of the panel, outs <= kColumns
  std::vector<uint8_t> bytes;  // [bytes of a panel's depth, kColumns]
  std::vector<float> scale;    // [groups, kColumns]

  PanelDecoder(const LinearA4Params& p, int64_t first, int64_t outs)
      : p(p), first(first), outs(outs), scale(p.in_features / p.group_size * kColumns, 0.0f) {
    const int64_t groups = p.in_features / p.group_size;
    for (int64_t n = 0; n < outs; ++n)
      for (int64_t g = 0; g < groups; ++g)
        scale[g * kColumns + n] = to_float(F16{p.scale[(first + n) * groups + g]});
  }
};

// levels [4, kColumns] of one group as floats; outputs that are not there have 0.
W2A4_INLINE void load_levels(const PanelDecoder& d, int64_t group, float* levels) {
  const int64_t groups = d.p.in_features / d.p.group_size;
  std::memset(levels, 0, 4 * kColumns * sizeof(float));
  for (int64_t n = 0; n < d.outs; ++n)
    for (int c = 0; c < 4; ++c)
      levels[c * kColumns + n] = d.p.levels[((d.first + n) * groups + group) * 4 + c];
}

// panel [depth, kColumns]: inputs start .. start + depth of the decoder's outputs.
W2A4_INLINE void decode_panel(PanelDecoder& d, int64_t start, int64_t depth, float* panel) {
  const int64_t per_byte = 8 / d.p.weight_bits, row_bytes = ceil_div(d.p.in_features, per_byte);
  const int64_t first_byte = start / per_byte,
                width = (start + depth - 1) / per_byte - first_byte + 1;
  d.bytes.resize(width * kColumns);
  transpose_bytes(d.p.weight + d.first * row_bytes + first_byte, row_bytes, d.outs, width,
                  d.bytes.data());
  alignas(64) float levels[4 * kColumns];
  for (int64_t k = start; k < start + depth; ++k) {
    const uint8_t* codes = d.bytes.data() + (k / per_byte - first_byte) * kColumns;
    float* row = panel + (k - start) * kColumns;
    const int shift = static_cast<int>(k % per_byte) * d.p.weight_bits;
    if (!d.p.levels) {
      for (int n = 0; n < kColumns; ++n)
        row[n] = static_cast<float>(signed_nibble(codes[n] >> shift & 15));
      continue;
    }
    if (k == start || k % d.p.group_size == 0) load_levels(d, k / d.p.group_size, levels);
    for (int n = 0; n < kColumns; ++n) {
      const int code = codes[n] >> shift;
      const float even = code & 2 ? levels[2 * kColumns + n] : levels[n];
      const float odd = code & 2 ? levels[3 * kColumns + n] : levels[kColumns + n];
      row[n] = code & 1 ? odd : even;
    }
  }
}

// sums [kRows, kColumns] of one block: exact integers, as floats rounded once.
template <class Arch>
W2A4_INLINE void block_sums(const float* a, int64_t lda, const float* panel, int64_t block,
                            float* sums) {
  if (block <= kExactDepth) {
    multiply_tile<Arch, true>(a, lda, panel, kColumns, block, sums, kColumns);
    return;
  }
  int32_t total[kRows * kColumns] = {};
  for (int64_t k = 0; k < block; k += kExactDepth) {
    multiply_tile<Arch, true>(a + k, lda, panel + k * kColumns, kColumns,
                              std::min(kExactDepth, block - k), sums, kColumns);
    for (int i = 0; i < kRows * kColumns; ++i) total[i] += static_cast<int32_t>(sums[i]);
  }
  for (int i = 0; i < kRows * kColumns; ++i) sums[i] = static_cast<float>(total[i]);
}

// acc [kRows, kColumns] += the panel's blocks. a: [kRows, in] at the panel's first input `start`.
template <class Arch>
W2A4_INLINE void add_blocks(const PanelsTask& task, const PanelDecoder& d, int64_t token,
                            int64_t start, int64_t depth, const float* panel, float* acc) {
  const LinearA4Params& p = *task.p;
  const int64_t act_groups = p.in_features / p.act_group;
  const int64_t rows = std::min<int64_t>(kRows, task.tokens - token);
  alignas(64) float sums[kRows * kColumns];
  for (int64_t k = start; k < start + depth; k += p.block) {
    block_sums<Arch>(task.a + token * p.in_features + k, p.in_features,
                     panel + (k - start) * kColumns, p.block, sums);
    const float* scale = d.scale.data() + k / p.group_size * kColumns;
    for (int64_t r = 0; r < rows; ++r) {
      const float a_scale =
          p.a_scale[(task.first_token + token + r) * act_groups + k / p.act_group];
      for (int n = 0; n < kColumns; ++n)
        acc[r * kColumns + n] += sums[r * kColumns + n] * (scale[n] * a_scale);
    }
  }
}

W2A4_INLINE void store_panel(const LinearA4Params& p, const PanelDecoder& d, int64_t first_token,
                             int64_t tokens, float* acc) {
  float bias[kColumns] = {};
  if (p.bias) load(p.bias, p.bias_dtype, d.first, d.outs, bias);
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = acc + t * kColumns;
    if (p.bias)
      for (int n = 0; n < kColumns; ++n) row[n] += bias[n];
    store(row, p.y, p.out_dtype, (first_token + t) * p.out_features + d.first, d.outs);
  }
}

// A task is 64 outputs of up to kPanelTokens tokens.
template <class Arch>
W2A4_INLINE void linear_panels(const PanelsTask& task, int64_t begin, int64_t end) {
  const LinearA4Params& p = *task.p;
  const int64_t panels = ceil_div(p.out_features, kColumns);
  const int64_t most_depth = std::max(p.block, kPanelDepth / p.block * p.block);
  std::vector<float> panel(std::min(most_depth, p.in_features) * kColumns);
  std::vector<float> acc((kPanelTokens + kRows) * kColumns);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first_token = i / panels * kPanelTokens, first = i % panels * kColumns;
    const int64_t tokens = std::min(kPanelTokens, task.tokens - first_token);
    PanelDecoder decoder(p, first, std::min<int64_t>(kColumns, p.out_features - first));
    std::fill(acc.begin(), acc.end(), 0.0f);
    for (int64_t start = 0; start < p.in_features; start += most_depth) {
      const int64_t depth = std::min(most_depth, p.in_features - start);
      decode_panel(decoder, start, depth, panel.data());
      for (int64_t t = 0; t < tokens; t += kRows)
        add_blocks<Arch>(task, decoder, first_token + t, start, depth, panel.data(),
                         acc.data() + t * kColumns);
    }
    store_panel(p, decoder, task.first_token + first_token, tokens, acc.data());
  }
}
W2A4_DISPATCH(linear_panels, PanelsTask)

void run_rows(const LinearA4Params& p) {
  const int64_t codes_in_byte = 8 / p.weight_bits;
  const int64_t unit = p.block % (16 * codes_in_byte) == 0  ? 16
                       : p.block % (8 * codes_in_byte) == 0 ? 8
                                                            : 0;
  std::vector<int16_t> a(p.tokens * p.in_features);
  for (int64_t token = 0; token < p.tokens; ++token)
    unpack_units(p, unit, p.a_codes + token * ceil_div(p.in_features, 2),
                 a.data() + token * p.in_features);
  parallel(p.out_features, 1 + 32768 / p.in_features, RowsTask{&p, a.data(), unit},
           linear_rows_dispatch);
}

void run_panels(const LinearA4Params& p) {
  const int64_t most =
      std::max(kPanelTokens, kScratch / p.in_features / kPanelTokens * kPanelTokens);
  std::vector<float> a((std::min(most, p.tokens) + kRows) * p.in_features);
  for (int64_t first = 0; first < p.tokens; first += most) {
    const PanelsTask task{&p, a.data(), first, std::min(most, p.tokens - first)};
    parallel(task.tokens, 16, task, unpack_tokens_dispatch);
    std::fill_n(a.begin() + task.tokens * p.in_features, kRows * p.in_features, 0.0f);
    parallel_dynamic(ceil_div(p.out_features, kColumns) * ceil_div(task.tokens, kPanelTokens), task,
                     linear_panels_dispatch);
  }
}

}  // namespace

void linear_a4(const LinearA4Params& p) {
  p.tokens <= kFewTokens ? run_rows(p) : run_panels(p);
}

}  // namespace w2a4::cpu
