// Pieces of attention_kv4.cuh: what a thread block works on, its shared memory, integers of 30 bits
// in four digits, copies of the cache, and the merge of chunks.
#pragma once

#include "formats.cuh"
#include "quantizer.cuh"

namespace w2a4::cuda {

constexpr int kChunkKeys = 256;
constexpr int kAttentionThreads = kChunkKeys;  // thread t has key t of the chunk in the softmax
constexpr int kGroupChunks = 16;               // merged with one another first
constexpr int kScoreRow = kChunkKeys + 16;     // floats; spreads two rows over all banks
constexpr int kDigitRow = kChunkKeys + 16;     // bytes; spreads eight rows over all banks
constexpr float kHidden = -__builtin_inff();   // the score of a key that is not seen

// How codes come into shared memory: in asynchronous pieces of 16 or 8 bytes, or byte by byte.
enum class Copy { kPieces16, kPieces8, kBytes };

struct AttentionArgs {
  AttentionKV4Params p;
  int repeat;     // query heads of a KV head
  int rows;       // of a KV head: q_tokens * repeat, heads next to each other
  int row_tiles;  // thread blocks that share them
  int chunks;     // of `length`
  int blocks;     // of 32 elements, in a head; a block is 16 bytes of codes
  int pitch;      // bytes of a key in shared memory: an odd number of 16, so that rows next to each
                  // other lie in different banks
  int log_width;  // of a head's elements, rounded up to a power of two, at least 32
  int splits;     // of a chunk's keys among warps that add up the same elements
  Copy k_copy, v_copy;
  float* partial;  // [batch, kv_heads, rows, chunks, head_dim + 2] results of chunks, or null: a
                   // block does all chunks
};

// ---- what a thread block works on

struct AttentionTask {
  int batch, head;  // of the cache
  int first_row;
  int limit;   // keys that its rows may see
  int chunk;   // the first one, and
  int chunks;  // the end of those that have a key in them
};

W2A4_DEVICE int token_of(const AttentionArgs& args, const AttentionTask& task, int row) {
  return (task.first_row + row) / args.repeat;
}
W2A4_DEVICE int head_of(const AttentionArgs& args, const AttentionTask& task, int row) {
  return task.head * args.repeat + (task.first_row + row) % args.repeat;
}

// Keys below this may be seen by a row, before any mask. starts lie on the device, and nothing has
// checked them.
W2A4_DEVICE int seen_end(const AttentionArgs& args, const AttentionTask& task, int row) {
  const AttentionKV4Params& p = args.p;
  int64_t start = p.starts ? p.starts[task.batch] : p.length - p.q_tokens;
  start = start < -p.q_tokens ? -p.q_tokens : start > p.length ? p.length : start;
  const int64_t end = start + (p.causal ? token_of(args, task, row) + 1 : p.q_tokens);
  return static_cast<int>(end < 0 ? 0 : end > p.length ? p.length : end);
}

// blockIdx.x counts batch, KV heads and tiles of `rows` rows, blockIdx.y chunks.
W2A4_DEVICE AttentionTask task_of_block(const AttentionArgs& args, int rows) {
  const unsigned tiles = rows == 1 ? args.rows : args.row_tiles;
  const int pair = static_cast<int>(blockIdx.x / tiles),
            kv_heads = static_cast<int>(args.p.kv_heads);
  AttentionTask task{};
  task.batch = pair / kv_heads, task.head = pair % kv_heads;
  task.first_row = static_cast<int>(blockIdx.x % tiles) * rows;
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
  int64_t first;     // key
  int count, sinks;  // keys that are there, and how many of the first are floats
};

W2A4_DEVICE Place place_of_chunk(const AttentionKV4Params& p, const AttentionTask& task,
                                 int chunk) {
  const int64_t first = int64_t{chunk} * kChunkKeys, left = p.sinks - first;
  const int count = keys_in_chunk(task, chunk);
  return {first, count, left < 0 ? 0 : left < count ? static_cast<int>(left) : count};
}

// ---- shared memory

// Results of some chunks for one element of one row.
struct Part {
  float top;     // score, kHidden if no key is seen
  float weight;  // sum of weights, each exp(score - top)
  float output;  // weighted sum of values
};

struct QueryRow {
  float down;  // undoes the scaling of the digits
  float sum;   // of the query's elements
  int seen;    // seen_end
};

struct RowResult {
  float top;     // score
  float down;    // undoes the scaling of the weights' digits
  float weight;  // sum of weights
  float zero;    // sum of weights times zero-points
};

// At offsets that are known when it is compiled, but for the values'.
template <int kRows>
struct AttentionShared {
  static constexpr int kDigits = 4 * kRows * kScoreRow;
  static constexpr int kOutputs = kDigits + 4 * kRows * kDigitRow;
  static constexpr int kTops = kOutputs + 4 * kRows * kScoreRow;
  static constexpr int kSums = kTops + 2 * 4 * 8 * kRows;
  static constexpr int kResults = kSums + 2 * 4 * 8 * kRows;
  static constexpr int kQueries = kResults + kRows * sizeof(RowResult);
  static constexpr int kKeys = (kQueries + kRows * sizeof(QueryRow) + 15) / 16 * 16;

  template <class T>
  static W2A4_DEVICE T* at(int offset) {
    return reinterpret_cast<T*>(shared_memory() + offset);
  }
  // [kRows, kScoreRow]; those of sinks become weights.
  W2A4_DEVICE float* score(int r) const { return at<float>(4 * r * kScoreRow); }
  // [kRows, 4, kDigitRow]: digit i of row r is line 4r + i.
  W2A4_DEVICE unsigned char* weight_digits(int line) const {
    return at<unsigned char>(kDigits + line * kDigitRow);
  }
  // [kRows, 4, 32 * blocks], there before the weights'.
  W2A4_DEVICE unsigned char* query_digits(const AttentionArgs& args, int line) const {
    return at<unsigned char>(kDigits + line * 32 * args.blocks);
  }
  // [splits, kRows, 32 * blocks + 2]: at most 256 + 16 floats a row.
  W2A4_DEVICE float* output(const AttentionArgs& args, int split, int r) const {
    return at<float>(kOutputs) + (split * kRows + r) * (32 * args.blocks + 2);
  }
  // Of each warp [8]: largest score and largest scale.
  W2A4_DEVICE uint32_t* top_score(int r) const { return at<uint32_t>(kTops + 32 * r); }
  W2A4_DEVICE uint32_t* top_scale(int r) const { return at<uint32_t>(kTops + 32 * (kRows + r)); }
  // Of each warp [8]: sums of weights of the rows, then of weights times zero-points.
  W2A4_DEVICE float* sums(int i) const { return at<float>(kSums + 32 * i); }
  W2A4_DEVICE RowResult& result(int r) const { return at<RowResult>(kResults)[r]; }
  W2A4_DEVICE QueryRow& row(int r) const { return at<QueryRow>(kQueries)[r]; }
  // [kChunkKeys, pitch]
  W2A4_DEVICE unsigned char* keys() const { return at<unsigned char>(kKeys); }
  W2A4_DEVICE unsigned char* values(const AttentionArgs& args) const {
    return keys() + kChunkKeys * args.pitch;
  }
  // Of this thread, if it does all chunks.
  W2A4_DEVICE Part& part(const AttentionArgs& args, int n) const {
    auto* parts = reinterpret_cast<Part*>(values(args) + kChunkKeys * args.pitch);
    return parts[n * kAttentionThreads + threadIdx.x];
  }
};

// Bytes of it, with so many parts a thread.
template <int kRows>
constexpr size_t attention_shared(int pitch, int parts) {
  return AttentionShared<kRows>::kKeys + 2 * kChunkKeys * pitch +
         parts * kAttentionThreads * sizeof(Part);
}

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

// Where an element's digit stands among 32: lane 4g + j of ldmatrix_x4 has elements 8j .. 8j + 7 in
// a word, of which the even ones are the first half of the product's 32.
W2A4_DEVICE int element_place(int element) {
  return element % 2 * 16 + element / 8 * 4 + element % 8 / 2;
}
// Where a key's digit stands among 32: lane 4g + j of ldmatrix_x4_trans has keys 2j and 2j + 1 of
// each 8 in a word, and two words make four bytes of a half.
W2A4_DEVICE int key_place(int key) {
  return key / 16 * 16 + key % 8 / 2 * 4 + key / 8 % 2 * 2 + key % 2;
}
// The key, of the warp's 32, whose score join_digits leaves in this lane.
W2A4_DEVICE int score_key(int lane, int half) {
  return 16 * half + lane / 4 + lane % 2 * 8;
}

W2A4_DEVICE uint32_t block_max(const uint32_t* of_warps) {
  const U32x4 a = read_u32x4(of_warps), b = read_u32x4(of_warps + 4);
  return larger(larger(larger(a.x, a.y), larger(a.z, a.w)),
                larger(larger(b.x, b.y), larger(b.z, b.w)));
}

// kCount sums over the warp at once: v[0] becomes the one whose number is returned. Each is added
// up by halves, in the same order whatever kCount is.
template <int kCount, int kMask = 1, int kSize>
W2A4_DEVICE int warp_sums(float (&v)[kSize] W2A4_SITE) {
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
    return (upper ? kCount / 2 : 0) + warp_sums<kCount / 2, 2 * kMask>(v W2A4_SAME_SITE);
  }
}

// ---- the cache

// Scale and zero-point of key `key` of the chunk that starts at `first`, as two float16; 0 beyond.
W2A4_DEVICE uint32_t load_params(const Strided4& params, const AttentionTask& task, int64_t first,
                                 int key, int count) {
  if (key >= count) return 0;
  const auto* at = static_cast<const uint16_t*>(params.data) +
                   offset_of(params, task.batch, task.head, first + key);
  if (reinterpret_cast<uintptr_t>(at) % 4 == 0) return load_u32(at);
  return load_u16(at) | static_cast<uint32_t>(load_u16(at + 1)) << 16;
}

template <int kBlocks>
W2A4_DEVICE void copy_codes(const AttentionArgs& args, Copy how, const Strided4& codes,
                            const uint8_t* from, int count, unsigned char* to) {
  const int thread = static_cast<int>(threadIdx.x);
  if (how == Copy::kPieces16) {
    // Threads next to each other take a key's pieces, and go on with the key so many later.
    const int step = kAttentionThreads / args.blocks, key = thread / args.blocks;
    const int piece = thread - key * args.blocks;
    if (key >= step) return;
    W2A4_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      const int k = key + i * step;
      if (k < count)
        cp_async_16(to + k * args.pitch + 16 * piece, from + k * codes.token + 16 * piece, 16);
    }
    return;
  }
  const int bytes = how == Copy::kPieces8 ? 8 : 1;
  const int pieces = static_cast<int>(args.p.head_dim) / 2 / bytes;
  W2A4_NO_UNROLL
  for (int i = thread; i < count * pieces; i += kAttentionThreads) {
    const int key = i / pieces, at = (i - key * pieces) * bytes;
    unsigned char* target = to + key * args.pitch + at;
    const uint8_t* source = from + key * codes.token + at;
    if (how == Copy::kPieces8)
      cp_async_8(target, source);
    else
      *target = *source;
  }
}

// Codes of a chunk's keys go to `to`, asynchronously where they can, as one group of copies.
template <int kBlocks>
W2A4_DEVICE void copy_chunk(const AttentionArgs& args, Copy how, const Strided4& codes,
                            const AttentionTask& task, int chunk, unsigned char* to) {
  const int64_t first = offset_of(codes, task.batch, task.head, int64_t{chunk} * kChunkKeys);
  copy_codes<kBlocks>(args, how, codes, static_cast<const uint8_t*>(codes.data) + first,
                      keys_in_chunk(task, chunk), to);
  cp_async_commit();
}

// ---- merging

W2A4_DEVICE void merge(Part& a, const Part& b) {
  if (b.top == kHidden) return;
  const float top = b.top <= a.top ? a.top : b.top;  // NaN if b's is
  const float keep = exp_f32(add_rn(a.top, -top)), take = exp_f32(add_rn(b.top, -top));
  a.weight = add_rn(mul_rn(a.weight, keep), mul_rn(b.weight, take));
  a.output = add_rn(mul_rn(a.output, keep), mul_rn(b.output, take));
  a.top = top;
}

W2A4_DEVICE float* partial_at(const AttentionArgs& args, const AttentionTask& task, int row,
                              int chunk) {
  const int64_t line =
      int64_t{task.batch * static_cast<int>(args.p.kv_heads) + task.head} * args.rows +
      task.first_row + row;
  return args.partial + (line * args.chunks + chunk) * (args.p.head_dim + 2);
}

W2A4_DEVICE void store_partial(const AttentionArgs& args, const AttentionTask& task, int row,
                               int chunk, int element, const Part& part) {
  float* to = partial_at(args, task, row, chunk);
  to[element] = part.output;
  if (element == 0) to[args.p.head_dim] = part.top, to[args.p.head_dim + 1] = part.weight;
}

W2A4_DEVICE Part load_partial(const AttentionArgs& args, const AttentionTask& task, int chunk,
                              int element) {
  const float* from = partial_at(args, task, 0, chunk);
  return {from[args.p.head_dim], from[args.p.head_dim + 1], from[element]};
}

W2A4_DEVICE void store_output(const AttentionArgs& args, int64_t batch, int64_t head, int64_t token,
                              int element, const Part& part) {
  const AttentionKV4Params& p = args.p;
  const int64_t at = ((batch * p.q_tokens + token) * p.q_heads + head) * p.head_dim + element;
  const float y = part.weight == 0.0f ? 0.0f : div_approx(part.output, part.weight);
  store_number(p.y, p.dtype, at, y);
}

}  // namespace w2a4::cuda
