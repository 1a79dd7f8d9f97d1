// Many tokens: the weights of kPanelOuts outputs are decoded into a panel, once for up to
// kPanelTokens tokens. Included after linear_a4_rows.h, by files that define also
//
//     Sums, kLanes      a register of int32 and their number; set_lanes, add_lanes, add_scaled if
//     it
//                       is not one of 32 bytes
//     kPanelOuts        outputs of a panel
//     kTileTokens       tokens whose sums are kept in registers, 4 or 8
//     kPartialQuads     how many times `multiply_add` may add to 0
//     multiply_add      sums of products of the bytes of a register with four activations
//     add_partial       adds these to Sums

// Eight rows of a weight, its scales and levels: row r is r strides behind. Readable beyond the
// last code, scale and level by kColumn bytes.
struct Eight {
  const uint8_t *codes, *high;  // high: bits of 3-bit codes
  int64_t bytes;                // stride of both
  const uint16_t* scale;
  const int8_t* levels;
  int64_t groups;  // stride of scales, and of levels in groups
};

constexpr int64_t kColumn = 16;  // bytes of codes that are read of each row together
constexpr int kColumnUnits = 4;

// Copies of rows that end too near to the ends of the tensors.
struct EightEnds {
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scale;
  std::vector<int8_t> levels;
};

// The rows from `first` on. What stands in those that are not there is any.
W2A4_FN Eight rows_at(const LinearA4Params& p, int64_t first, EightEnds& ends) {
  const int64_t bytes = row_bytes(p), groups = p.in_features / p.group_size;
  const int64_t count = levels_of_group(p), left = p.out_features - first;
  Eight rows{p.weight + first * bytes,
             nullptr,
             bytes,
             p.scale + first * groups,
             p.levels ? p.levels + first * groups * count : nullptr,
             groups};
  // Eight groups of scales are read together, and of levels no more.
  if (left * bytes < 8 * bytes + kColumn || left * groups < 8 * groups + 8) {
    const int64_t there = std::min<int64_t>(8, left);
    ends.codes.resize(8 * bytes + kColumn);
    ends.scale.resize(8 * groups + 8);
    std::copy_n(rows.codes, there * bytes, ends.codes.data());
    std::copy_n(rows.scale, there * groups, ends.scale.data());
    rows.codes = ends.codes.data(), rows.scale = ends.scale.data();
    if (p.levels) {
      ends.levels.resize((8 * groups + 8) * count);
      std::copy_n(rows.levels, there * groups * count, ends.levels.data());
      rows.levels = ends.levels.data();
    }
  }
  rows.high = rows.codes + low_bytes(p);
  return rows;
}

W2A4_FN __m128i load_column(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}

// x[u] = unit u of eight rows; x[r] was four units of row r and, behind them, of row r + 4.
W2A4_FN void transpose4(__m256i* x) {
  const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
  const __m256i c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm256_unpacklo_epi64(a, c);
  x[1] = _mm256_unpackhi_epi64(a, c);
  x[2] = _mm256_unpacklo_epi64(b, d);
  x[3] = _mm256_unpackhi_epi64(b, d);
}

// x[u] = unit u of the column that begins at byte `at`.
W2A4_FN void load_units(const Eight& rows, int64_t at, __m256i* x) {
  const uint8_t* from = rows.codes + at;
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
    x[r] = _mm256_set_m128i(load_column(from + (r + 4) * rows.bytes),
                            load_column(from + r * rows.bytes));
  transpose4(x);
}

// 8 bytes of high bits as 16 of a nibble each: byte j has those of the codes 4j .. 4j + 3, as byte
// j of the low bits.
W2A4_FN __m128i spread_high_column(const uint8_t* from) {
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m128i nibble = _mm_set1_epi8(15);
  return _mm_unpacklo_epi8(_mm_and_si128(x, nibble), _mm_and_si128(_mm_srli_epi16(x, 4), nibble));
}

// The same of the high bits of that column.
W2A4_FN void load_high_units(const Eight& rows, int64_t at, __m256i* x) {
  const uint8_t* from = rows.high + at / 2;
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
    x[r] = _mm256_set_m128i(spread_high_column(from + (r + 4) * rows.bytes),
                            spread_high_column(from + r * rows.bytes));
  transpose4(x);
}

// scale[i] = that of group `group` + i of the eight rows, for eight groups.
W2A4_FN void load_scales(const Eight& rows, int64_t group, __m256* scale) {
  __m256i x[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r)
    x[r] = _mm256_castps_si256(_mm256_cvtph_ps(load_column(rows.scale + r * rows.groups + group)));
  transpose8(x);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) scale[i] = _mm256_castsi256_ps(x[i]);
}

// Biased levels of one group of eight rows. A lane of 16 bytes looks up those of its four rows:
// four levels of each, or eight of two rows and, in `second`, of the other two.
struct Levels {
  __m256i first, second;
};

// Those of eight groups from `group` on.
template <int kBits>
W2A4_FN void load_levels(const Eight& rows, int64_t group, Levels* levels) {
  if constexpr (kBits == 4) return;
  constexpr int kCount = kBits == 3 ? 8 : 4, kColumns = kCount / 2, kGroups = 8 / kColumns;
  const __m256i sign = _mm256_set1_epi8(-128);
  for (int column = 0; column < kColumns; ++column) {
    const int8_t* from = rows.levels + group * kCount + column * kColumn;
    __m256i x[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
      x[r] = _mm256_xor_si256(sign,
                              _mm256_set_m128i(load_column(from + (r + 4) * rows.groups * kCount),
                                               load_column(from + r * rows.groups * kCount)));
    transpose4(x);
#pragma GCC unroll 4
    for (int i = 0; i < kGroups; ++i)
      levels[column * kGroups + i] =
          kBits == 2 ? Levels{x[i], x[i]}
                     : Levels{_mm256_unpacklo_epi32(x[2 * i % 4], x[2 * i % 4 + 1]),
                              _mm256_unpackhi_epi32(x[2 * i % 4], x[2 * i % 4 + 1])};
  }
}

// w[plane] = biased weights of a unit of eight rows. high: its high bits, of 3 bits only.
template <int kBits>
W2A4_FN void decode_unit(__m256i x, __m256i high, const Levels& levels, __m256i* w) {
  constexpr int kNone = int(0x80808080);  // looks up 0
  const __m256i four = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404,
                                         0x08080808, 0x0c0c0c0c);
  const __m256i first = _mm256_setr_epi32(0, 0x08080808, kNone, kNone, 0, 0x08080808, kNone, kNone);
  const __m256i second =
      _mm256_setr_epi32(kNone, kNone, 0, 0x08080808, kNone, kNone, 0, 0x08080808);
  if constexpr (kBits == 4) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i biased = _mm256_xor_si256(x, _mm256_set1_epi8(char(0x88)));
    w[0] = _mm256_and_si256(biased, nibble);
    w[1] = _mm256_and_si256(_mm256_srli_epi16(biased, 4), nibble);
    return;
  }
#pragma GCC unroll 4
  for (int plane = 0; plane < kPlanes<kBits>; ++plane) {
    const __m256i code = code_of_plane<kBits>(x, high, plane);
    w[plane] = kBits == 2 ? _mm256_shuffle_epi8(levels.first, _mm256_or_si256(code, four))
                          : _mm256_or_si256(
                                _mm256_shuffle_epi8(levels.first, _mm256_or_si256(code, first)),
                                _mm256_shuffle_epi8(levels.second, _mm256_or_si256(code, second)));
  }
}

constexpr int64_t kPanelDepth = 1024;  // inputs decoded at a time, about

struct Panel {
  const LinearA4Params& p;
  int64_t first, outs;   // outputs of the panel, outs <= kPanelOuts
  int64_t block_units;   // units of a block
  int64_t chunk_blocks;  // blocks decoded at a time
  Aligned<uint8_t> w;    // [chunk_blocks, block_units, planes, kPanelOuts, 4]
  Aligned<float> scale;  // [chunk_blocks, kPanelOuts]
  Eight rows[kPanelOuts / 8];
  EightEnds ends[kPanelOuts / 8];
};

W2A4_FN void set_lanes(__m256i& sums, int32_t value) {
  sums = _mm256_set1_epi32(value);
}
W2A4_FN void load_lanes(__m256i& x, const uint8_t* from) {
  x = load_bytes(from);
}
// acc += float(sums) * (scale * a_scale)
W2A4_FN void add_scaled(__m256i sums, const float* scale, float a_scale, float* acc) {
  const __m256 factor = _mm256_mul_ps(_mm256_loadu_ps(scale), _mm256_set1_ps(a_scale));
  const __m256 addend = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), factor);
  _mm256_storeu_ps(acc, _mm256_add_ps(_mm256_loadu_ps(acc), addend));
}

// Row r of the panel; those that are not there repeat the last.
W2A4_FN int64_t panel_row(const Panel& panel, int64_t r) {
  return panel.first + std::min(r, panel.outs - 1);
}

// Biased weight of input k of output `out`.
template <int kBits>
W2A4_FN uint8_t biased_weight(const LinearA4Params& p, int64_t out, int64_t k) {
  const int code = code_at(p, p.weight + out * row_bytes(p), k);
  if constexpr (kBits == 4) return code ^ 8;
  const int64_t group = out * (p.in_features / p.group_size) + k / p.group_size;
  return p.levels[kLevels<kBits> * group + code] + 128;
}

// The inputs start .. start + n, n at most a block, one by one, into the units from w on.
template <int kBits>
W2A4_FN void decode_codes(const Panel& panel, int64_t start, int64_t n, uint8_t* w) {
  constexpr int64_t kCodes = kUnitBytes * kPlanes<kBits>;
  for (int64_t j = 0; j < ceil_div(n, kCodes) * kCodes; ++j) {
    const int64_t plane = j % kPlanes<kBits>, byte = j / kPlanes<kBits> % kUnitBytes;
    uint8_t* to = w + (j / kCodes * kPlanes<kBits> + plane) * kPanelOuts * 4 + byte;
    for (int64_t r = 0; r < kPanelOuts; ++r)
      to[4 * r] = j < n ? biased_weight<kBits>(panel.p, panel_row(panel, r), start + j) : 0;
  }
}

// `units` whole units from input `start` on. A group is made of whole units, or is the whole row.
template <int kBits>
W2A4_FN void decode_units(const Panel& panel, int64_t start, int64_t units, uint8_t* w) {
  const LinearA4Params& p = panel.p;
  const int64_t at = start / kPlanes<kBits>;
  const int64_t group_units = ceil_div(p.group_size, kUnitBytes * kPlanes<kBits>);
  for (int64_t row = 0; row < kPanelOuts; row += 8) {
    const Eight& rows = panel.rows[row / 8];
    uint8_t* to = w + row * 4;
    Levels levels[8];
    int64_t groups = 8, left = 0;  // of the eight groups those that are read, and units of the last
    for (int64_t first = 0; first < units; first += kColumnUnits) {
      __m256i x[kColumnUnits], high[kColumnUnits];
      load_units(rows, at + first * kUnitBytes, x);
      if (kBits == 3) load_high_units(rows, at + first * kUnitBytes, high);
      for (int64_t u = 0; u < std::min<int64_t>(kColumnUnits, units - first); ++u) {
        if (kBits != 4 && left == 0) {
          const int64_t k = start + (first + u) * kUnitBytes * kPlanes<kBits>;
          if (++groups >= 8) load_levels<kBits>(rows, k / p.group_size, levels), groups = 0;
          left = group_units - k % p.group_size / (kUnitBytes * kPlanes<kBits>);
        }
        --left;
        __m256i biased[kPlanes<kBits>];
        decode_unit<kBits>(x[u], high[u], levels[groups % 8], biased);
        for (const __m256i& plane : biased) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(to), plane);
          to += kPanelOuts * 4;
        }
      }
    }
  }
}

// The blocks first .. first + blocks.
template <int kBits>
W2A4_FN void decode_blocks(const Panel& panel, int64_t first, int64_t blocks) {
  const LinearA4Params& p = panel.p;
  constexpr int64_t kCodes = kUnitBytes * kPlanes<kBits>, kUnit = kCodes * kPanelOuts;
  if (p.block % kCodes == 0)
    return decode_units<kBits>(panel, first * p.block, blocks * panel.block_units, panel.w.get());
  // Units must not reach into another group.
  const int64_t whole = by_bytes(p) ? p.block / kCodes : 0;
  for (int64_t b = 0; b < blocks; ++b) {
    uint8_t* w = panel.w.get() + b * panel.block_units * kUnit;
    const int64_t start = (first + b) * p.block;
    decode_units<kBits>(panel, start, whole, w);
    decode_codes<kBits>(panel, start + whole * kCodes, p.block - whole * kCodes, w + whole * kUnit);
  }
}

W2A4_FN void load_panel_scales(const Panel& panel, int64_t first, int64_t blocks) {
  const int64_t blocks_in_group = panel.p.group_size / panel.p.block;
  for (int64_t row = 0; row < kPanelOuts; row += 8) {
    const Eight& rows = panel.rows[row / 8];
    __m256 scale[8];
    int64_t group = first / blocks_in_group, used = first % blocks_in_group, loaded = 8;
    for (int64_t b = 0; b < blocks; ++b) {
      if (loaded == 8) load_scales(rows, group, scale), loaded = 0;
      _mm256_store_ps(panel.scale.get() + b * kPanelOuts + row, scale[loaded]);
      if (++used == blocks_in_group) ++group, ++loaded, used = 0;
    }
  }
}

constexpr int kTileVectors = kPanelOuts / kLanes;

// sums[t] += products of quads of a panel and of token t's activations, a + t * lda.
template <int kTokens>
W2A4_FN void add_products(const uint8_t* w, const int8_t* a, int64_t lda, int64_t quads,
                          Sums (*sums)[kTileVectors]) {
  for (int64_t first = 0; first < quads; first += kPartialQuads) {
    Sums partial[kTokens][kTileVectors];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) set_lanes(partial[t][v], 0);
    const int64_t stop = std::min(quads, first + kPartialQuads);
    for (int64_t q = first; q < stop; ++q) {
      Sums wide[kTileVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v)
        load_lanes(wide[v], w + q * kPanelOuts * 4 + v * kLanes * 4);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        int32_t four;
        std::memcpy(&four, a + t * lda + q * 4, sizeof(four));
        Sums same;
        set_lanes(same, four);
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v)
          partial[t][v] = multiply_add(partial[t][v], wide[v], same);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) sums[t][v] = add_partial(sums[t][v], partial[t][v]);
  }
}

// acc [kTokens, kPanelOuts] += the panel's blocks first .. first + blocks, for kTokens tokens.
template <int kTokens>
W2A4_TARGET void tile_blocks(const PanelsTask& task, const Panel& panel, int64_t token,
                             int64_t first, int64_t blocks, float* acc) {
  const LinearA4Params& p = panel.p;
  const int64_t quads = panel.block_units * codes_in_byte(p);
  const int64_t all_blocks = p.in_features / p.block, depth = all_blocks * quads * 4;
  const int8_t* a = task.a + token * depth + first * quads * 4;
  const int32_t* bias = task.bias + token * all_blocks + first;
  const float* a_scale = task.a_scale + token * all_blocks + first;
  for (int64_t b = 0; b < blocks; ++b) {
    Sums sums[kTokens][kTileVectors];
    for (int t = 0; t < kTokens; ++t)
      for (int v = 0; v < kTileVectors; ++v) set_lanes(sums[t][v], bias[t * all_blocks + b]);
    add_products<kTokens>(panel.w.get() + b * quads * kPanelOuts * 4, a + b * quads * 4, depth,
                          quads, sums);
    const float* scale = panel.scale.get() + b * kPanelOuts;
    for (int t = 0; t < kTokens; ++t)
      for (int v = 0; v < kTileVectors; ++v)
        add_scaled(sums[t][v], scale + v * kLanes, a_scale[t * all_blocks + b],
                   acc + t * kPanelOuts + v * kLanes);
  }
}

W2A4_FN void panel_tokens(const PanelsTask& task, const Panel& panel, int64_t token, int64_t tokens,
                          int64_t first, int64_t blocks, float* acc) {
  int64_t t = 0;
  if constexpr (kTileTokens >= 8)
    for (; t + 8 <= tokens; t += 8)
      tile_blocks<8>(task, panel, token + t, first, blocks, acc + t * kPanelOuts);
  for (; t + 4 <= tokens; t += 4)
    tile_blocks<4>(task, panel, token + t, first, blocks, acc + t * kPanelOuts);
  for (; t + 2 <= tokens; t += 2)
    tile_blocks<2>(task, panel, token + t, first, blocks, acc + t * kPanelOuts);
  if (t < tokens) tile_blocks<1>(task, panel, token + t, first, blocks, acc + t * kPanelOuts);
}

W2A4_FN void store_panel(const PanelsTask& task, const Panel& panel, int64_t token, int64_t tokens,
                         float* acc) {
  const LinearA4Params& p = panel.p;
  float bias[kPanelOuts] = {};
  if (p.bias) load(p.bias, p.bias_dtype, panel.first, panel.outs, bias);
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = acc + t * kPanelOuts;
    if (p.bias)
      for (int64_t r = 0; r < kPanelOuts; ++r) row[r] += bias[r];
    store(row, p.y, p.out_dtype, (task.first_token + token + t) * p.out_features + panel.first,
          panel.outs);
  }
}

// Work item i is kPanelOuts outputs of up to kPanelTokens tokens.
W2A4_TARGET void linear_panels(const PanelsTask& task, int64_t begin, int64_t end) {
  const LinearA4Params& p = *task.p;
  const int64_t panels = ceil_div(p.out_features, kPanelOuts), blocks = p.in_features / p.block;
  const int64_t chunk = std::min(blocks, std::max<int64_t>(1, kPanelDepth / p.block));
  const int64_t unit = kUnitBytes * codes_in_byte(p) * kPanelOuts;
  Panel panel{p,
              0,
              0,
              task.block_units,
              chunk,
              aligned<uint8_t>(chunk * task.block_units * unit),
              aligned<float>(chunk * kPanelOuts),
              {},
              {}};
  const auto acc = aligned<float>(std::min(kPanelTokens, task.tokens) * kPanelOuts);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = i / panels * kPanelTokens;
    const int64_t tokens = std::min(kPanelTokens, task.tokens - token);
    panel.first = i % panels * kPanelOuts;
    panel.outs = std::min<int64_t>(kPanelOuts, p.out_features - panel.first);
    for (int64_t r = 0; r < kPanelOuts / 8; ++r)  // eights that are not there repeat the first
      panel.rows[r] = rows_at(p, panel.first + (8 * r < panel.outs ? 8 * r : 0), panel.ends[r]);
    std::fill_n(acc.get(), tokens * kPanelOuts, 0.0f);
    for (int64_t first = 0; first < blocks; first += chunk) {
      const int64_t n = std::min(chunk, blocks - first);
      p.weight_bits == 2   ? decode_blocks<2>(panel, first, n)
      : p.weight_bits == 3 ? decode_blocks<3>(panel, first, n)
                           : decode_blocks<4>(panel, first, n);
      load_panel_scales(panel, first, n);
      panel_tokens(task, panel, token, tokens, first, n, acc.get());
    }
    store_panel(task, panel, token, tokens, acc.get());
  }
}

// Activations of one unit by planes, from nibbles in natural order.
template <int kBits>
W2A4_FN void unpack_unit(const uint8_t* codes, int8_t* a) {
  const __m128i nibble = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
  int64_t from = 0;
  std::memcpy(&from, codes, kBits == 2 ? 8 : 4);
  // The bytes of the planes in turn; every other plane is the high nibbles.
  const __m128i order = kBits == 2 ? _mm_setr_epi32(0x06040200, 0x06040200, 0x07050301, 0x07050301)
                                   : _mm_setr_epi32(0x03020100, 0x03020100, 0, 0);
  const __m128i low = _mm_shuffle_epi8(_mm_cvtsi64_si128(from), order);
  const __m128i both = _mm_blend_epi32(low, _mm_srli_epi16(low, 4), 0xa);
  const __m128i value = _mm_sub_epi8(_mm_xor_si128(_mm_and_si128(both, nibble), eight), eight);
  if (kBits == 2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(a), value);
  else
    _mm_storel_epi64(reinterpret_cast<__m128i*>(a), value);
}

template <int kBits>
W2A4_FN void unpack_token(const PanelsTask& task, int64_t token) {
  const LinearA4Params& p = *task.p;
  constexpr int64_t kCodes = kUnitBytes * kPlanes<kBits>;
  const uint8_t* codes = p.a_codes + (task.first_token + token) * ceil_div(p.in_features, 2);
  const int64_t blocks = p.in_features / p.block, size = task.block_units * kCodes;
  for (int64_t b = 0; b < blocks; ++b) {
    int8_t* a = task.a + (token * blocks + b) * size;
    for (int64_t j = 0; j < p.block; j += kCodes) {
      const int64_t k = b * p.block + j;
      uint8_t piece[kCodes / 2];
      const bool whole = k % 2 == 0 && j + kCodes <= p.block;
      if (!whole) pick_nibbles(codes, k, std::min(kCodes, p.block - j), sizeof(piece), piece);
      unpack_unit<kBits>(whole ? codes + k / 2 : piece, a + j);
    }
    int32_t sum = 0;
    for (int64_t j = 0; j < size; ++j) sum += a[j];
    task.bias[token * blocks + b] = -kBias<kBits> * sum;
    task.a_scale[token * blocks + b] =
        p.a_scale[(task.first_token + token) * (p.in_features / p.act_group) +
                  b * p.block / p.act_group];
  }
}

W2A4_TARGET void prepare_panels(const PanelsTask& task, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token)
    task.p->weight_bits == 4 ? unpack_token<4>(task, token) : unpack_token<2>(task, token);
}
