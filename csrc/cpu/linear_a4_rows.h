// Few tokens: a vector of a weight row is decoded in registers and met by every token. Included
// once for each x86 instruction set, by a file that defines W2A4_FN and
//
//     dot           products of a vector of weights, added together in lanes of 32 or 16 bits
//     add_products  sums of two such results, lane by lane
//     widen         the lanes of 32 bits of one

constexpr int64_t kAhead = 2048;  // bytes of weight that are fetched ahead: rows follow each other
constexpr int kRowsTile = 8;      // outputs whose sums are scaled and added together
constexpr int kChunkBlocks = 64;  // blocks between two such additions, at most

#include "linear_a4_decode.h"

// Lanes of 32 bits, of x and y by turns of two: the even ones and the odd ones.
W2A4_FN __m256i even_lanes(__m256i x, __m256i y) {
  return _mm256_castps_si256(
      _mm256_shuffle_ps(_mm256_castsi256_ps(x), _mm256_castsi256_ps(y), 0x88));
}
W2A4_FN __m256i odd_lanes(__m256i x, __m256i y) {
  return _mm256_castps_si256(
      _mm256_shuffle_ps(_mm256_castsi256_ps(x), _mm256_castsi256_ps(y), 0xdd));
}
// Sums of neighbours: what _mm256_hadd_epi32 gives, slowly.
W2A4_FN __m256i add_lanes(__m256i x, __m256i y) {
  return _mm256_add_epi32(even_lanes(x, y), odd_lanes(x, y));
}

// sums = block sums of eight cells; twos[i] has sums of two lanes of the cells 2i and 2i + 1, by
// turns of two.
template <int kCellBlocks>
W2A4_FN void add_cells(const __m256i* twos, __m256i* sums) {
  if constexpr (kCellBlocks == 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] = _mm256_permute4x64_epi64(twos[i], 0xd8);
    return;
  }
  const __m256i low = add_lanes(twos[0], twos[1]);  // halves of cells 0, 1, 2, 3
  const __m256i high = add_lanes(twos[2], twos[3]);
  if constexpr (kCellBlocks == 2) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    sums[0] = _mm256_permutevar8x32_epi32(low, order);
    sums[1] = _mm256_permutevar8x32_epi32(high, order);
    return;
  }
  sums[0] = _mm256_add_epi32(_mm256_blend_epi32(low, high, 0xf0),
                             _mm256_permute2x128_si256(low, high, 0x21));
}

// A piece of one weight row, readable beyond its end by a vector.
struct RowPiece {
  const uint8_t* codes;
  const uint8_t* high;  // bits of 3-bit codes
  const int8_t* levels;
  const uint16_t* scale;
};

// sum[token] = products of one cell: as `dot` leaves them if it is one whole vector, else in eight
// lanes.
template <int kBits, int kSpread, int kTokens, bool kWhole>
W2A4_FN void sum_cell(const RowsTask& task, const uint8_t* codes, const uint8_t* high,
                      const int8_t* levels, const int8_t* a, int64_t token_size, __m256i* sum) {
  constexpr int64_t kSize = kPlanes<kBits> * kVectorBytes;
  Tables tables{};
  if constexpr (kBits != 4) tables = load_tables<kBits, kSpread>(levels);
  __m256i w[kPlanes<kBits>];
  if constexpr (kWhole) {
    decode_vector<kBits, kSpread>(codes, high, tables, w);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sum[t] = dot<kPlanes<kBits>>(w, a + t * token_size);
    return;
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) sum[t] = _mm256_setzero_si256();
  for (int64_t v = 0; v < task.cell_vectors; ++v) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + v * kVectorBytes + kAhead), _MM_HINT_T0);
    decode_vector<kBits, kSpread>(codes + v * kVectorBytes,
                                  kBits == 3 ? high + v * kVectorBytes / 2 : nullptr, tables, w);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
      sum[t] =
          _mm256_add_epi32(sum[t], widen(dot<kPlanes<kBits>>(w, a + v * kSize + t * token_size)));
  }
}

// scale[i] = weight scale of block i of a piece that begins with group 0, for groups of blocks.
W2A4_FN void load_scales(const LinearA4Params& p, const uint16_t* from, int64_t blocks,
                         float* scale) {
  const int64_t blocks_in_group = p.group_size / p.block;
  for (int64_t i = 0, left = blocks_in_group; i < blocks; ++i, --left) {
    if (left == 0) ++from, left = blocks_in_group;
    scale[i] = _cvtsh_ss(*from);
  }
}

W2A4_FN void transpose8(__m256i* x) {
  __m256i y[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = _mm256_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm256_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
  __m256i z[8];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    z[4 * i] = _mm256_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
    z[4 * i + 1] = _mm256_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
    z[4 * i + 2] = _mm256_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
    z[4 * i + 3] = _mm256_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2x128_si256(z[i], z[i + 4], 0x20);
    x[i + 4] = _mm256_permute2x128_si256(z[i], z[i + 4], 0x31);
  }
}

// acc + the columns of addends [kRowsTile, kChunkBlocks], one after the other.
W2A4_FN __m256 add_blocks(__m256 acc, const float (*addends)[kChunkBlocks], int64_t blocks) {
  for (int64_t i = 0; i < blocks; i += 8) {
    __m256i x[8];
#pragma GCC unroll 8
    for (int r = 0; r < kRowsTile; ++r) x[r] = load_bytes(addends[r] + i);
    transpose8(x);
    if (blocks - i >= 8) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) acc = _mm256_add_ps(acc, _mm256_castsi256_ps(x[j]));
    } else {
      for (int j = 0; j < blocks - i; ++j) acc = _mm256_add_ps(acc, _mm256_castsi256_ps(x[j]));
    }
  }
  return acc;
}

// The first cell of a chunk, its length, and what is read of a row for it.
struct Chunk {
  int64_t cell, cells, blocks;
  int64_t codes_at, high_at, levels_at, scale_at;          // in bytes and groups of a row
  int64_t codes_size, high_size, levels_size, scale_size;  // bytes read
  int64_t codes_here, high_here, levels_here, scale_here;  // bytes of them in the row
};

W2A4_FN Chunk chunk_of(const RowsTask& task, int64_t cell) {
  const LinearA4Params& p = *task.p;
  Chunk c;
  c.cell = cell;
  c.cells = std::min<int64_t>(kChunkBlocks / task.cell_blocks, task.cells - cell);
  c.blocks = std::min(c.cells * task.cell_blocks, task.blocks - cell * task.cell_blocks);
  c.codes_at = cell * task.cell_bytes;
  c.levels_at = c.scale_at = task.cell_group[cell];
  const int64_t groups = task.groups - c.levels_at, count = levels_of_group(p);
  c.codes_size = (c.cells - 1) * task.cell_bytes + task.cell_vectors * kVectorBytes;
  c.codes_here = std::min(c.codes_size, low_bytes(p) - c.codes_at);
  c.high_at = c.codes_at / 2;
  c.high_size = c.codes_size / 2;
  c.high_here = std::min(c.high_size, row_bytes(p) - low_bytes(p) - c.high_at);
  const int64_t last = task.cell_group[cell + c.cells - 1] - c.levels_at;
  c.levels_size = count * (last + (task.spread ? 4 : 1));
  c.levels_here = std::min(c.levels_size, count * groups);
  c.scale_size = p.group_size == p.block ? ceil_div(c.blocks, 8) * 16 : 2 * (last + 1);
  c.scale_here = std::min(c.scale_size, 2 * groups);
  return c;
}

// Where a vector at a row's end would reach beyond the tensor, its bytes are copied here.
struct RowEnds {
  Aligned<uint8_t> codes, high;
  alignas(16) int8_t levels[8 * kChunkBlocks + 32];
  alignas(16) uint16_t scale[kChunkBlocks + 8];
};

// from .. from + here, readable for `most` bytes.
W2A4_FN const uint8_t* copy_end(const uint8_t* from, int64_t here, int64_t most,
                                Aligned<uint8_t>& to) {
  if (!to) to = aligned<uint8_t>(most);
  std::memcpy(to.get(), from, here);
  return to.get();
}

W2A4_FN RowPiece row_piece(const RowsTask& task, const Chunk& c, int64_t out) {
  const LinearA4Params& p = *task.p;
  const int64_t group = out * task.groups + c.levels_at, row = out * row_bytes(p);
  return {p.weight + row + c.codes_at,
          p.weight_bits == 3 ? p.weight + row + low_bytes(p) + c.high_at : nullptr,
          p.levels ? p.levels + levels_of_group(p) * group : nullptr, p.scale + group};
}

// What vectors of a piece of a row would read behind the ends of the tensors, in bytes; not
// positive where they end inside, as they then do in all rows before it.
struct Beyond {
  int64_t codes, high, levels, scale;
  bool any() const { return codes > 0 || high > 0 || levels > 0 || scale > 0; }
};

W2A4_FN Beyond beyond(const RowsTask& task, const Chunk& c, int64_t out) {
  const LinearA4Params& p = *task.p;
  const int64_t left = (p.out_features - out) * task.groups - c.levels_at;  // groups
  const int64_t bytes = row_bytes(p) * (p.out_features - out);
  return {c.codes_at + c.codes_size - bytes,
          p.weight_bits == 3 ? low_bytes(p) + c.high_at + c.high_size - bytes : 0,
          c.levels_size - levels_of_group(p) * left, c.scale_size - 2 * left};
}

// A piece with copies of what would be read behind the ends.
W2A4_FN RowPiece copy_piece(const RowsTask& task, const Chunk& c, const Beyond& over, RowPiece row,
                            RowEnds& ends) {
  const int64_t most =
      std::min<int64_t>(kChunkBlocks, task.cells) * task.cell_vectors * kVectorBytes;
  if (over.codes > 0) row.codes = copy_end(row.codes, c.codes_here, most, ends.codes);
  if (over.high > 0) row.high = copy_end(row.high, c.high_here, most, ends.high);
  if (over.levels > 0) {
    std::memcpy(ends.levels, row.levels, c.levels_here);
    row.levels = ends.levels;
  }
  if (over.scale > 0) {
    std::memcpy(ends.scale, row.scale, c.scale_here);
    row.scale = ends.scale;
  }
  return row;
}

// addends[token][r][i] = block sums of a row times their scales. kCellBlocks: task.cell_blocks if
// cells are whole vectors, else 0.
template <int kBits, int kSpread, int kTokens, int kCellBlocks>
W2A4_FN void row_addends(const RowsTask& task, const Chunk& c, const RowPiece& row, int64_t r,
                         float (*addends)[kRowsTile][kChunkBlocks]) {
  constexpr bool kWhole = kCellBlocks > 0;
  constexpr int kBlocks = kWhole ? kCellBlocks : 1;
  const bool own_scales = task.p->group_size == task.p->block;
  alignas(32) float scales[kChunkBlocks];
  if (!own_scales) load_scales(*task.p, row.scale, c.blocks, scales);
  const int64_t size = (kWhole ? 1 : task.cell_vectors) * kPlanes<kBits> * kVectorBytes;
  const int64_t bytes = kWhole ? kVectorBytes : task.cell_bytes, token_size = task.cells * size;
  const int8_t* a = task.a + c.cell * size;
  const int64_t* group = task.cell_group + c.cell;
  constexpr int64_t kCount = kLevels<kBits>;
  const int8_t* levels = kBits == 4 ? nullptr : row.levels - kCount * c.levels_at;
  const uint8_t *codes = row.codes, *high = row.high;
  for (int64_t i = 0; i < c.cells; i += 8, a += 8 * size, codes += 8 * bytes, group += 8) {
    if (kBits != 4)
      _mm_prefetch(reinterpret_cast<const char*>(levels + kCount * group[0] + kAhead / 4),
                   _MM_HINT_T0);
    __m256i twos[kTokens][4];
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      if (2 * pair >= c.cells - i) {
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) twos[t][pair] = _mm256_setzero_si256();
        continue;
      }
      if (kWhole)
        _mm_prefetch(reinterpret_cast<const char*>(codes + 64 * pair + kAhead), _MM_HINT_T0);
      __m256i sum[2][kTokens];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const int cell = 2 * pair + j;
        if (cell < c.cells - i) {
          sum_cell<kBits, kSpread, kTokens, kWhole>(
              task, codes + cell * bytes, kBits == 3 ? high + cell * bytes / 2 : nullptr,
              levels + kCount * group[cell], a + cell * size, token_size, sum[j]);
        } else {
#pragma GCC unroll 4
          for (int t = 0; t < kTokens; ++t) sum[j][t] = _mm256_setzero_si256();
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t)
        twos[t][pair] = kWhole ? widen(add_products(even_lanes(sum[0][t], sum[1][t]),
                                                    odd_lanes(sum[0][t], sum[1][t])))
                               : add_lanes(sum[0][t], sum[1][t]);
    }
    if (kBits == 3) high += 4 * bytes;
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      __m256i sums[kBlocks];
      add_cells<kBlocks>(twos[t], sums);
      const int64_t first = t * task.padded_blocks + c.cell * kBlocks;
#pragma GCC unroll 4
      for (int v = 0; v < kBlocks; ++v) {
        const int64_t at = i * kBlocks + 8 * v;
        if (at >= c.blocks) break;
        const __m128i* half = reinterpret_cast<const __m128i*>(row.scale + at);
        const __m256 scale =
            own_scales ? _mm256_cvtph_ps(_mm_loadu_si128(half)) : _mm256_load_ps(scales + at);
        const __m256 factor = _mm256_mul_ps(scale, _mm256_loadu_ps(task.a_scale + first + at));
        const __m256i sum = _mm256_sub_epi32(sums[v], load_bytes(task.bias + first + at));
        _mm256_store_ps(addends[t][r] + at, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), factor));
      }
    }
  }
}

template <int kBits, int kSpread, int kTokens, int kCellBlocks>
W2A4_TARGET void rows_tile(const RowsTask& task, int64_t first, RowEnds& ends) {
  const LinearA4Params& p = *task.p;
  const int64_t outs = std::min<int64_t>(kRowsTile, p.out_features - first);
  alignas(32) float addends[kTokens][kRowsTile][kChunkBlocks];
  if (outs < kRowsTile) std::memset(addends, 0, sizeof(addends));
  __m256 acc[kTokens];
  for (int t = 0; t < kTokens; ++t) acc[t] = _mm256_setzero_ps();
  for (Chunk c{}; c.cell + c.cells < task.cells;) {
    c = chunk_of(task, c.cell + c.cells);
    const bool at_end = beyond(task, c, first + outs - 1).any();
    for (int64_t r = 0; r < outs; ++r) {
      RowPiece row = row_piece(task, c, first + r);
      if (at_end) row = copy_piece(task, c, beyond(task, c, first + r), row, ends);
      row_addends<kBits, kSpread, kTokens, kCellBlocks>(task, c, row, r, addends);
    }
    for (int t = 0; t < kTokens; ++t) acc[t] = add_blocks(acc[t], addends[t], c.blocks);
  }
  alignas(32) float y[kRowsTile], bias[kRowsTile] = {};
  if (p.bias) load(p.bias, p.bias_dtype, first, outs, bias);
  for (int t = 0; t < kTokens; ++t) {
    _mm256_store_ps(y, acc[t]);
    if (p.bias)
      for (int r = 0; r < kRowsTile; ++r) y[r] += bias[r];
    store(y, p.y, p.out_dtype, t * p.out_features + first, outs);
  }
}

using RowsTile = void (*)(const RowsTask&, int64_t, RowEnds&);

template <int kBits, int kSpread, int kTokens>
W2A4_FN RowsTile rows_tile_of(const RowsTask& task) {
  if (task.cell_bytes != kVectorBytes) return rows_tile<kBits, 0, kTokens, 0>;
  if (kSpread == 0 && task.cell_blocks == 1) return rows_tile<kBits, 0, kTokens, 1>;
  if (kSpread < 2 && task.cell_blocks == 2) return rows_tile<kBits, kSpread % 2, kTokens, 2>;
  return rows_tile<kBits, kSpread, kTokens, 4>;
}

template <int kBits, int kTokens>
W2A4_FN RowsTile rows_tile_by_spread(const RowsTask& task) {
  return task.spread == 0   ? rows_tile_of<kBits, 0, kTokens>(task)
         : task.spread == 1 ? rows_tile_of<kBits, 1, kTokens>(task)
                            : rows_tile_of<kBits, 2, kTokens>(task);
}

template <int kTokens>
W2A4_FN RowsTile rows_tile_of(const RowsTask& task) {
  switch (task.p->weight_bits) {
    case 2:
      return rows_tile_by_spread<2, kTokens>(task);
    case 3:
      return rows_tile_by_spread<3, kTokens>(task);
    default:
      return rows_tile_of<4, 0, kTokens>(task);
  }
}

W2A4_TARGET void linear_rows(const RowsTask& task, int64_t begin, int64_t end) {
  const int64_t tokens = task.p->tokens;
  const RowsTile tile = tokens == 1   ? rows_tile_of<1>(task)
                        : tokens == 2 ? rows_tile_of<2>(task)
                        : tokens == 3 ? rows_tile_of<3>(task)
                                      : rows_tile_of<4>(task);
  RowEnds ends;
  for (int64_t i = begin; i < end; ++i) tile(task, i * kRowsTile, ends);
}

// a = activations of one vector by planes, from nibbles in natural order.
template <int kBits>
W2A4_FN void unpack_vector(const uint8_t* codes, int8_t* a) {
  if constexpr (kBits == 4) {
    for (int j = 0; j < 32; ++j) a[j] = static_cast<int8_t>(signed_nibble(codes[j] & 15));
    for (int j = 0; j < 32; ++j) a[32 + j] = static_cast<int8_t>(signed_nibble(codes[j] >> 4));
  } else {
    for (int half = 0; half < 2; ++half) {
      int8_t* to = a + 64 * half;
      for (int j = 0; j < 32; ++j)
        to[j] = static_cast<int8_t>(signed_nibble(codes[2 * j + half] & 15));
      for (int j = 0; j < 32; ++j)
        to[32 + j] = static_cast<int8_t>(signed_nibble(codes[2 * j + half] >> 4));
    }
  }
}

// The nibbles first .. first + n of a token, the rest of `size` bytes 0.
W2A4_FN void pick_nibbles(const uint8_t* token, int64_t first, int64_t n, int64_t size,
                          uint8_t* to) {
  std::memset(to, 0, size);
  for (int64_t j = 0; j < n; ++j) {
    const int nibble = token[(first + j) / 2] >> ((first + j) % 2 * 4) & 15;
    to[j / 2] |= static_cast<uint8_t>(nibble << (j % 2 * 4));
  }
}

template <int kBits>
W2A4_FN void prepare_token(const RowsTask& task, int64_t token) {
  const LinearA4Params& p = *task.p;
  constexpr int kCodes = kPlanes<kBits> * kVectorBytes;
  const uint8_t* codes = p.a_codes + token * ceil_div(p.in_features, 2);
  const int64_t cell_codes = task.cell_blocks * p.block;
  int8_t* a = task.a + token * task.cells * task.cell_vectors * kCodes;
  __m256i ones[kPlanes<kBits>];
  for (__m256i& one : ones) one = _mm256_set1_epi8(1);
  int32_t* sums = task.bias + token * task.padded_blocks;
  for (int64_t cell = 0; cell < task.cells; ++cell) {
    const int64_t start = cell * cell_codes, stop = std::min(start + cell_codes, p.in_features);
    __m256i total = _mm256_setzero_si256();
    for (int64_t v = 0; v < task.cell_vectors; ++v, a += kCodes) {
      alignas(32) uint8_t piece[kCodes / 2];
      const int64_t first = start + v * kCodes, n = std::min<int64_t>(kCodes, stop - first);
      if (n < kCodes) pick_nibbles(codes, first, n, sizeof(piece), piece);
      unpack_vector<kBits>(n < kCodes ? piece : codes + first / 2, a);
      total = _mm256_add_epi32(total, widen(dot<kPlanes<kBits>>(ones, a)));
    }
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), total);
    for (int64_t i = 0; i < task.cell_blocks; ++i) {
      int32_t sum = 0;
      for (int64_t j = 0; j < 8 / task.cell_blocks; ++j)
        sum += lanes[i * (8 / task.cell_blocks) + j];
      sums[cell * task.cell_blocks + i] = kBias<kBits> * sum;
    }
  }
}

W2A4_TARGET void prepare_rows(const RowsTask& task, int64_t begin, int64_t end) {
  const LinearA4Params& p = *task.p;
  const int64_t act_groups = p.in_features / p.act_group, in_group = p.act_group / p.block;
  for (int64_t token = begin; token < end; ++token) {
    p.weight_bits == 4 ? prepare_token<4>(task, token) : prepare_token<2>(task, token);
    float* scale = task.a_scale + token * task.padded_blocks;
    // Vectors reach beyond the last block. What lies there is not used, but denormals are slow.
    std::fill(scale + task.blocks, scale + task.padded_blocks, 0.0f);
    std::fill(task.bias + token * task.padded_blocks + task.blocks,
              task.bias + (token + 1) * task.padded_blocks, 0);
    for (int64_t group = 0; group < act_groups; ++group)
      for (int64_t i = 0; i < in_group; ++i)
        scale[group * in_group + i] = p.a_scale[token * act_groups + group];
  }
}
