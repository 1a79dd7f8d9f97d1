// Pieces of attention_kv4.cuh: what a thread block works on, its shared memory, integers of 30 bits
// in four digits, copies of the cache, and the merge of chunks.
#pragma once

#include "formats.cuh"
#include "ptx_mma.cuh"
#include "quantizer.cuh"

namespace w2a4::cuda {

constexpr int kChunkKeys = 256;
constexpr int kAttentionThreads = 256;        // a warp has 32 keys of a chunk
constexpr int kGroupChunks = 16;              // merged with one another first
constexpr int kScoreRow = kChunkKeys + 16;    // floats
constexpr int kDigitRow = kChunkKeys + 32;    // bytes; pairs of words of four rows fill all banks
constexpr float kHidden = -__builtin_inff();  // the score of a key that is not seen

// How codes come into shared memory: in asynchronous pieces of 16 or 8 bytes, or byte by byte.
enum class Copy { kPieces16, kPieces8, kBytes };

struct AttentionArgs {
  AttentionKV4Params p;
  int repeat;     // query heads of a KV head
  int rows;       // of a KV head: q_tokens * repeat, heads next to each other
  int row_tiles;  // thread blocks that share them
  int tokens;     // q_tokens, and
  int length;     // as in the params
  int chunks;     // of `length`
  float scaling;  // of scores, to the base of 2
  Copy copy;
  bool k_fours, v_fours;  // scales and zero-points of four keys can be read at once
  int block_shift;  // of a paged cache: the logarithm of a block's tokens, or -1: no power of 2
  float* partial;   // results of chunks, see partial_line; or null: a block does all chunks
};

// ---- what a thread block works on

struct AttentionTask {
  int batch, head;  // of the cache
  int first_row;
  int limit;   // keys that its rows may see
  int chunk;   // the first one of the block, and
  int chunks;  // the end of those that have a key in them
};

// Decoding is spared the divisions here and below.
W2A4_DEVICE int token_of(const AttentionArgs& args, const AttentionTask& task, int row) {
  return args.tokens == 1 ? 0 : (task.first_row + row) / args.repeat;
}
W2A4_DEVICE int head_of(const AttentionArgs& args, const AttentionTask& task, int row) {
  const int r = task.first_row + row;
  return task.head * args.repeat + (args.tokens == 1 ? r : r % args.repeat);
}

// Keys below this may be seen by a row, before any mask. starts lie on the device, and nothing has
// checked them.
W2A4_DEVICE int seen_end(const AttentionArgs& args, const AttentionTask& task, int row) {
  int start = args.length - args.tokens;
  if (args.p.starts) {
    const int64_t asked = args.p.starts[task.batch];
    start = asked < -args.tokens  ? -args.tokens
            : asked > args.length ? args.length
                                  : static_cast<int>(asked);
  }
  const int end = start + (args.p.causal ? token_of(args, task, row) + 1 : args.tokens);
  return end < 0 ? 0 : end > args.length ? args.length : end;
}

// blockIdx.x counts batch, KV heads and tiles of `rows` rows, blockIdx.y the first chunk.
W2A4_DEVICE AttentionTask task_of_block(const AttentionArgs& args, int rows) {
  const unsigned tiles = rows == 1 ? args.rows : args.row_tiles;
  const unsigned pair = tiles == 1 ? blockIdx.x : blockIdx.x / tiles;
  const auto kv_heads = static_cast<unsigned>(args.p.kv_heads);
  AttentionTask task{};
  task.batch = args.p.batch == 1 ? 0 : static_cast<int>(pair / kv_heads);
  task.head = static_cast<int>(pair - task.batch * kv_heads);
  task.first_row = static_cast<int>(blockIdx.x - pair * tiles) * rows;
  const int last = (task.first_row + rows < args.rows ? task.first_row + rows : args.rows) - 1;
  task.limit = seen_end(args, task, last - task.first_row);
  task.chunk = args.partial ? static_cast<int>(blockIdx.y) : 0;
  task.chunks = task.limit / kChunkKeys + (task.limit % kChunkKeys > 0);
  return task;
}

W2A4_DEVICE int keys_in_chunk(const AttentionTask& task, int chunk) {
  const int left = task.limit - chunk * kChunkKeys;
  return left < 0 ? 0 : left < kChunkKeys ? left : kChunkKeys;
}

struct Place {
  int first;         // key
  int count, sinks;  // keys that are there, and how many of the first are floats
};

W2A4_DEVICE Place place_of_chunk(const AttentionKV4Params& p, const AttentionTask& task,
                                 int chunk) {
  const int first = chunk * kChunkKeys, left = static_cast<int>(p.sinks) - first;
  const int count = keys_in_chunk(task, chunk);
  return {first, count, left < 0 ? 0 : left < count ? left : count};
}

// ---- shared memory

// Results of some chunks for two elements, next to each other, of one row.
struct Part {
  float top;        // score, kHidden if no key is seen
  float weight;     // sum of weights, each 2**(score - top); NaN if any score is
  float output[2];  // weighted sums of values
};

// A score, to the base of 2, is k_scale * product * down + k_zero * sum.
struct QueryRow {
  float down;
  float sum;  // of the query's elements
  int seen;   // seen_end
};

struct RowResult {
  float top;     // score
  float down;    // undoes the scaling of the weights' digits
  float weight;  // sum of weights
  float zero;    // sum of weights times zero-points
};

// What lies where, for rows of 32 * kBlocks elements.
template <int kRows, int kBlocks>
struct AttentionShared {
  static constexpr int kPitch = 16 * (kBlocks | 1);  // bytes of a key: an odd number of 16, so that
                                                     // keys next to each other lie in other banks
  static constexpr int kOutputRow = 32 * kBlocks + 8;  // floats: four rows fill all banks
  static constexpr int kSplits = 8 / kBlocks;  // of keys among warps that add up the same elements
  static constexpr int kDigits = 4 * kRows * kScoreRow;
  static constexpr int kOutputs = kDigits + 4 * kRows * kDigitRow;
  static constexpr int kTops = kOutputs + 4 * kSplits * kRows * kOutputRow;
  static constexpr int kSums = kTops + 2 * 4 * 8 * kRows;
  static constexpr int kResults = kSums + 2 * 4 * 8 * kRows;
  static constexpr int kQueries = kResults + kRows * sizeof(RowResult);
  static constexpr int kParams = (kQueries + kRows * sizeof(QueryRow) + 15) / 16 * 16;
  static constexpr int kKeys = kParams + 2 * 4 * kChunkKeys;
  static constexpr int kValues = kKeys + kChunkKeys * kPitch;
  static constexpr int kParts = kValues + kChunkKeys * kPitch;
  static_assert(8 * kBlocks * kRows <= kChunkKeys && kBlocks % 2 == 0, "see query_digits");

  template <class T>
  static W2A4_DEVICE T* at(int offset) {
    return reinterpret_cast<T*>(shared_memory() + offset);
  }
  // [kRows, kScoreRow], of sinks only; they become weights.
  W2A4_DEVICE float* sink_score(int r) const { return at<float>(4 * r * kScoreRow); }
  // [kRows, 4, kDigitRow], see digit_line.
  W2A4_DEVICE unsigned char* weight_digits(int line) const {
    return at<unsigned char>(kDigits + line * kDigitRow);
  }
  // [4 * kRows, 2 * kBlocks] pieces of 16 bytes, in the gaps between keys.
  W2A4_DEVICE unsigned char* query_digits(int line, int piece) const {
    return keys() + (piece * 4 * kRows + (line ^ piece % 2 * 4)) * kPitch + 16 * kBlocks;
  }
  // [kSplits, kRows, kOutputRow]
  W2A4_DEVICE float* output(int split, int r) const {
    return at<float>(kOutputs) + (split * kRows + r) * kOutputRow;
  }
  // Of each warp [8]: largest score and largest scale.
  W2A4_DEVICE float* top_score(int r) const { return at<float>(kTops + 32 * r); }
  W2A4_DEVICE uint32_t* top_scale(int r) const { return at<uint32_t>(kTops + 32 * (kRows + r)); }
  // Of each warp [8]: sums of weights of the rows, then of weights times zero-points.
  W2A4_DEVICE float* sums(int i) const { return at<float>(kSums + 32 * i); }
  W2A4_DEVICE RowResult& result(int r) const { return at<RowResult>(kResults)[r]; }
  W2A4_DEVICE QueryRow& row(int r) const { return at<QueryRow>(kQueries)[r]; }
  // [kChunkKeys]: scale and zero-point, two float16.
  W2A4_DEVICE uint32_t* k_params() const { return at<uint32_t>(kParams); }
  W2A4_DEVICE uint32_t* v_params() const { return at<uint32_t>(kParams) + kChunkKeys; }
  // [kChunkKeys, kPitch], in the order of slot_of_key.
  W2A4_DEVICE unsigned char* keys() const { return at<unsigned char>(kKeys); }
  W2A4_DEVICE unsigned char* values() const { return at<unsigned char>(kValues); }
  // Of this thread, if it does all chunks.
  W2A4_DEVICE Part& part(int n) const {
    return at<Part>(kParts)[n * kAttentionThreads + threadIdx.x];
  }
};

// ---- integers in four digits

// Powers of two: times `up`, a number is below 2**30; `down` undoes it. NaN where the largest is
// not finite.
struct Fixed {
  float up, down;
};

W2A4_DEVICE Fixed fixed_of(uint32_t largest_magnitude_bits) {
  const uint32_t exponent = largest_magnitude_bits >> 23;
  if (exponent == 255) return {as_float(0x7fc00000), as_float(0x7fc00000)};
  const uint32_t bounded = larger(exponent, 37);  // so that `up` is finite: others round to 0
  return {as_float((283 - bounded) << 23), as_float((bounded - 29) << 23)};
}

// The nearest integer as four signed bytes, to the base of 256.
W2A4_DEVICE uint32_t digits_of(float x) {
  return (static_cast<uint32_t>(int_from_float(x)) + 0x00808080) ^ 0x00808080;
}

// Rows come in fours. Lane 4g + j has columns 2j and 2j + 1 of a product, so two products of eight
// columns, the first with digits 0 and 1 of four rows and the second with digits 2 and 3, leave all
// four digits of row j in one lane. This is the column of a digit, counted over all products.
W2A4_DEVICE int digit_line(int row, int digit) {
  return row / 4 * 16 + digit / 2 * 8 + row % 4 * 2 + digit % 2;
}

// What the digits of a sum, counted from kMagic, add up to.
W2A4_DEVICE float join_digits(int32_t c0, int32_t c1, int32_t c2, int32_t c3) {
  const float low = fma_rn(exact_float(c1), 256.0f, exact_float(c0));
  const float high = fma_rn(exact_float(c3), 256.0f, exact_float(c2));
  return fma_rn(high, 65536.0f, low);
}

// Byte b of words w[0 .. 3] becomes word b.
W2A4_DEVICE void transpose_bytes(uint32_t (&w)[4]) {
  const uint32_t a = prmt(w[0], w[1], 0x5140), b = prmt(w[2], w[3], 0x5140);
  const uint32_t c = prmt(w[0], w[1], 0x7362), d = prmt(w[2], w[3], 0x7362);
  w[0] = prmt(a, b, 0x5410), w[1] = prmt(a, b, 0x7632);
  w[2] = prmt(c, d, 0x5410), w[3] = prmt(c, d, 0x7632);
}

// Where an element's digit stands among 32: lane 4g + j of ldmatrix_x4 has elements 8j .. 8j + 7 in
// a word, of which the even ones are in the first half of the product's 32, the odd ones in the
// second; the lane's words of both halves lie next to each other.
W2A4_DEVICE int element_place(int element) {
  return element / 8 * 8 + element % 2 * 4 + element % 8 / 2;
}

// Where a key of 32 lies among them. Lane 4g + j has the scores of keys 4g .. 4g + 3, so key 4g + i
// is row g of matrix i for ldmatrix_x4 (keys), and row 2 * (g % 4) + i % 2 of matrix
// 2 * (g / 4) + i / 2 for ldmatrix_x4_trans (values): in this order, rows of a matrix lie in
// different banks both ways.
W2A4_DEVICE int slot_of_key(int key) {
  return key % 4 * 8 + (key / 4 ^ key % 2 * 4);
}
// The slots that the lane names a row of.
W2A4_DEVICE int key_slot_of_lane(int lane) {
  return slot_of_key(lane % 8 * 4 + lane / 8);
}
W2A4_DEVICE int value_slot_of_lane(int lane) {
  return slot_of_key(lane / 16 * 16 + lane % 8 / 2 * 4 + lane / 8 % 2 * 2 + lane % 2);
}
// Where the digits of keys 4g .. 4g + 3 stand, in words: both halves of a lane next to each other.
W2A4_DEVICE int word_of_keys(int g) {
  return g % 4 * 2 + g / 4;
}

// The largest over the lanes that share a row, 4g + j for all g.
W2A4_DEVICE float row_max(float x W2A4_SITE) {
  W2A4_UNROLL
  for (int mask = 4; mask < 32; mask *= 2) x = max_f32(x, shfl_xor(x, mask W2A4_SAME_SITE));
  return x;
}
W2A4_DEVICE uint32_t row_max(uint32_t x W2A4_SITE) {
  W2A4_UNROLL
  for (int mask = 4; mask < 32; mask *= 2) x = larger(x, shfl_xor(x, mask W2A4_SAME_SITE));
  return x;
}

W2A4_DEVICE float block_max(const float* of_warps) {
  const U32x4 a = read_u32x4(of_warps), b = read_u32x4(of_warps + 4);
  return max_f32(
      max_f32(max_f32(as_float(a.x), as_float(a.y)), max_f32(as_float(a.z), as_float(a.w))),
      max_f32(max_f32(as_float(b.x), as_float(b.y)), max_f32(as_float(b.z), as_float(b.w))));
}
W2A4_DEVICE uint32_t block_max(const uint32_t* of_warps) {
  const U32x4 a = read_u32x4(of_warps), b = read_u32x4(of_warps + 4);
  return larger(larger(larger(a.x, a.y), larger(a.z, a.w)),
                larger(larger(b.x, b.y), larger(b.z, b.w)));
}

// kCount sums over the lanes that share a row at once: v[0] becomes the one whose number is
// returned. Each is added up by halves, in the same order whatever kCount is.
template <int kCount, int kMask = 4, int kSize>
W2A4_DEVICE int row_sums(float (&v)[kSize] W2A4_SITE) {
  if constexpr (kCount == 1) {
    W2A4_UNROLL
    for (int mask = kMask; mask < 32; mask *= 2)
      v[0] = add_rn(v[0], shfl_xor(v[0], mask W2A4_SAME_SITE));
    return 0;
  } else {
    const bool upper = threadIdx.x & kMask;
    W2A4_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      const float a = v[i], b = v[i + kCount / 2];
      v[i] = add_rn(upper ? b : a, shfl_xor(upper ? a : b, kMask W2A4_SAME_SITE));
    }
    return (upper ? kCount / 2 : 0) + row_sums<kCount / 2, 2 * kMask>(v W2A4_SAME_SITE);
  }
}

// ---- the cache and the queries

// The token's first byte; numbers of kBytes. Strides are below 2**32 bytes, see check_attention.
// Null where the block table, which lies on the device and which nothing has checked, names no
// block, and for a sink before a paged cache.
template <int kBytes, bool kPaged>
W2A4_DEVICE const uint8_t* token_at(const AttentionArgs& args, const Strided4& t,
                                    const AttentionTask& task, int token) {
  auto row = static_cast<uint32_t>(task.batch), position = static_cast<uint32_t>(token);
  if constexpr (kPaged) {
    const BlockTable& table = args.p.table;
    const auto sinks = static_cast<uint32_t>(args.p.sinks);
    if (position < sinks) return nullptr;
    position -= sinks;
    const auto size = static_cast<uint32_t>(table.block_tokens);
    const uint32_t column = args.block_shift < 0 ? position / size : position >> args.block_shift;
    row = static_cast<uint32_t>(table.at[task.batch * table.row + column]);
    if (row >= table.blocks) return nullptr;
    position -= column * size;
  }
  const auto* at = static_cast<const uint8_t*>(t.data);
  at = row_of(at, row, kBytes * static_cast<uint32_t>(t.batch));
  at = row_of(at, task.head, kBytes * static_cast<uint32_t>(t.head));
  return row_of(at, position, kBytes * static_cast<uint32_t>(t.token));
}

// A warp copies scales and zero-points of its own 32 keys, a word each; there is nothing in those
// behind the last key, and NaN in those that lie in no block. `fours`: see AttentionArgs.
template <bool kPaged>
W2A4_DEVICE void copy_params(const AttentionArgs& args, const Strided4& params, bool fours,
                             const AttentionTask& task, int chunk, uint32_t* to) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int key = static_cast<int>(threadIdx.x) - lane + 4 * lane;
  const int first = chunk * kChunkKeys, count = keys_in_chunk(task, chunk);
  if (lane >= 8 || key >= count) return;
  if (fours && key + 4 <= count) {
    const uint8_t* at = token_at<2, kPaged>(args, params, task, first + key);
    if (!kPaged || at) {
      cp_async_16(to + key, at, 16);
      return;
    }
  }
  W2A4_NO_UNROLL
  for (int i = key; i < key + 4 && i < count; ++i) {
    const uint8_t* at = token_at<2, kPaged>(args, params, task, first + i);
    to[i] =
        kPaged && !at ? 0x7e007e00 : load_u16(at) | static_cast<uint32_t>(load_u16(at + 2)) << 16;
  }
}

// A warp copies the codes of its own 32 keys; any codes will do for those that lie in no block.
template <int kBlocks, int kPitch, bool kPaged>
W2A4_DEVICE void copy_codes(const AttentionArgs& args, const Strided4& codes,
                            const AttentionTask& task, int chunk, unsigned char* to) {
  const int lane = static_cast<int>(threadIdx.x % 32), mine = static_cast<int>(threadIdx.x) - lane;
  const int half = static_cast<int>(args.p.head_dim) / 2;
  const int first = chunk * kChunkKeys + mine, count = keys_in_chunk(task, chunk) - mine;
  to += mine * kPitch;
  if (args.copy == Copy::kPieces16) {
    // Lanes next to each other take a key's pieces, and go on with the key so many later. What is
    // behind the last key becomes 0, which spares a branch for each.
    constexpr int kStep = 32 / kBlocks;
    const int key = lane / kBlocks, at = lane % kBlocks * 16;
    if (at >= half) return;
    if constexpr (kPaged) {
      W2A4_UNROLL
      for (int i = 0; i < kBlocks; ++i) {
        const int mine_too = key + i * kStep;
        const uint8_t* from = nullptr;
        if (mine_too < count) from = token_at<1, true>(args, codes, task, first + mine_too);
        cp_async_16(to + slot_of_key(mine_too) * kPitch + at,
                    from ? from + at : static_cast<const uint8_t*>(codes.data), from ? 16 : 0);
      }
    } else {
      const uint8_t* from = token_at<1, false>(args, codes, task, first + key) + at;
      W2A4_UNROLL
      for (int i = 0; i < kBlocks; ++i)
        cp_async_16(to + slot_of_key(key + i * kStep) * kPitch + at,
                    row_of(from, i * kStep, static_cast<uint32_t>(codes.token)),
                    key + i * kStep < count ? 16 : 0);
    }
  } else {
    const int bytes = args.copy == Copy::kPieces8 ? 8 : 1, pieces = half / bytes;
    W2A4_NO_UNROLL
    for (int i = lane; i < (count < 32 ? count : 32) * pieces; i += 32) {
      const int key = i / pieces, at = (i - key * pieces) * bytes;
      unsigned char* target = to + slot_of_key(key) * kPitch + at;
      const uint8_t* source = token_at<1, kPaged>(args, codes, task, first + key);
      if (kPaged && !source) continue;
      source += at;
      if (args.copy == Copy::kPieces8)
        cp_async_8(target, source);
      else
        *target = *source;
    }
  }
}

// Elements lane, lane + 32, ... of a query; 0 behind its end.
template <ScalarType kDtype, int kCount>
W2A4_DEVICE void load_query_of(const void* data, int64_t at, int elements, float (&v)[kCount]) {
  W2A4_UNROLL
  for (int b = 0; b < kCount; ++b) {
    const int element = 32 * b + static_cast<int>(threadIdx.x % 32);
    v[b] = element < elements ? load_number(data, kDtype, at + element) : 0.0f;
  }
}
template <int kCount>
W2A4_DEVICE void load_query(const void* data, ScalarType dtype, int64_t at, int elements,
                            float (&v)[kCount]) {
  switch (dtype) {
    case ScalarType::Half:
      return load_query_of<ScalarType::Half>(data, at, elements, v);
    case ScalarType::BFloat16:
      return load_query_of<ScalarType::BFloat16>(data, at, elements, v);
    case ScalarType::Double:
      return load_query_of<ScalarType::Double>(data, at, elements, v);
    default:
      return load_query_of<ScalarType::Float>(data, at, elements, v);
  }
}

// ---- merging

// What is subtracted from scores: they are all kHidden where the largest is.
W2A4_DEVICE float finite_top(float top) {
  return top == kHidden ? 0.0f : top;
}

// Nothing changes, not a bit, if b has seen no key; a becomes b if a has not.
W2A4_DEVICE void merge(Part& a, const Part& b) {
  const float top = max_f32(a.top, b.top), shift = -finite_top(top);
  const float keep = exp2_approx(add_rn(a.top, shift)), take = exp2_approx(add_rn(b.top, shift));
  a.weight = fma_rn(b.weight, take, mul_rn(a.weight, keep));
  W2A4_UNROLL
  for (int i = 0; i < 2; ++i) a.output[i] = fma_rn(b.output[i], take, mul_rn(a.output[i], keep));
  a.top = top;
}

// partial is [batch, kv_heads, rows, chunks, head_dim + 2]: outputs, then top and weight.
W2A4_DEVICE float* partial_line(const AttentionArgs& args, const AttentionTask& task, int row) {
  const int line = (task.batch * static_cast<int>(args.p.kv_heads) + task.head) * args.rows +
                   task.first_row + row;
  return args.partial + int64_t{line} * args.chunks * (args.p.head_dim + 2);
}

W2A4_DEVICE void store_partial(const AttentionArgs& args, const AttentionTask& task, int row,
                               int chunk, int element, const Part& part) {
  const int head_dim = static_cast<int>(args.p.head_dim);
  float* to = partial_line(args, task, row) + chunk * (head_dim + 2);
  store_u32x2(to + element, {as_bits(part.output[0]), as_bits(part.output[1])});
  if (element == 0) store_u32x2(to + head_dim, {as_bits(part.top), as_bits(part.weight)});
}

// `from`: of the chunk.
W2A4_DEVICE Part load_partial(const float* from, int head_dim, int element) {
  const U32x2 output = load_u32x2(from + element), both = load_u32x2(from + head_dim);
  return {as_float(both.x), as_float(both.y), {as_float(output.x), as_float(output.y)}};
}

W2A4_DEVICE void store_output(const AttentionArgs& args, const AttentionTask& task, int row,
                              int element, const Part& part) {
  const AttentionKV4Params& p = args.p;
  const int64_t head = head_of(args, task, row), token = token_of(args, task, row);
  const int64_t at = ((task.batch * p.q_tokens + token) * p.q_heads + head) * p.head_dim + element;
  W2A4_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float y = part.weight == 0.0f ? 0.0f : div_approx(part.output[i], part.weight);
    store_number(p.y, p.dtype, at + i, y);
  }
}

}  // namespace w2a4::cuda
