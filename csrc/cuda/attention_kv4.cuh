// attention_kv4, see AttentionKV4Params. Keys are divided into chunks of 256 at fixed places of the
// cache. A thread block takes some chunks, or all of them, one after another, for up to 8 query
// rows (tokens and heads) that share a KV head; a chunk's result is (largest score, sum of weights,
// weighted sum of values), and results are merged in a fixed order: 16 chunks to a group, then the
// groups. So a row's bits depend on the keys it sees and on nothing else.
//
// Both products run on int8 tensor cores, whose sums are exact. Codes are bytes as they are; what
// they are multiplied with, a query or a weight times its value's scale, becomes an integer of 30
// bits relative to the largest of its row, in four signed bytes, four columns of the product:
//     score   scaling * (k_scale * sum q code + k_zero * sum q), to the base of 2
//     output  sum (weight v_scale) code + sum weight v_zero
// Each of those integers is off by at most half a unit, 2**-30 of the row's largest.
//
// A warp has 32 keys of the chunk: it copies their codes, and lane 4g + j has the scores of keys
// 4g .. 4g + 3 for row j of every four, in registers until they have become digits of weights.
// Shared memory holds codes packed, in the order of slot_of_key.
#pragma once

#include "attention_kv4_parts.cuh"

namespace w2a4::cuda {

// kQuads: fours of query rows. kBlocks: of 32 elements, 16 bytes of codes, in a head; those behind
// head_dim are multiplied with digits that are 0, or not stored. kPaged: by a block table.
template <int kQuads, int kBlocks, bool kSplit, bool kPaged>
struct Attention {
  static constexpr int kRows = 4 * kQuads;             // query rows of a block
  static constexpr int kTiles = 2 * kQuads;            // products of eight columns
  static constexpr int kPairs = kRows * kBlocks * 16;  // of elements
  static constexpr int kResults = (kPairs + kAttentionThreads - 1) / kAttentionThreads;
  // run_all's, where registers are scarcer than shared memory.
  static constexpr bool kGroupInShared = kBlocks <= 4;
  static constexpr int kSharedParts = kSplit ? 0 : kGroupInShared ? 2 * kResults : kResults;
  using Shared = AttentionShared<kRows, kBlocks>;
  static constexpr int kPitch = Shared::kPitch;

  const AttentionArgs& args;
  const AttentionKV4Params& p;
  const AttentionTask task;
  const Shared shared{};
  const int lane, warp, g, j;

  W2A4_DEVICE explicit Attention(const AttentionArgs& args)
      : args(args),
        p(args.p),
        task(task_of_block(args, kRows)),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        g(lane / 4),
        j(lane % 4) {}

  W2A4_DEVICE int64_t query_at(int row) const {
    return offset_of(p.q, task.batch, head_of(args, task, row), token_of(args, task, row));
  }
  W2A4_DEVICE int first_key() const { return 32 * warp + 4 * g; }  // of the lane, in its chunk

  // What is known of a chunk's keys, or its values' codes, on the way to shared memory, as a group
  // of copies each; an empty one if there is no such chunk.
  template <bool kKeys, bool kValues>
  W2A4_DEVICE void copy(int chunk) const {
    const bool there = chunk < task.chunks;
    if constexpr (kKeys) {
      if (there) {
        copy_params<kPaged>(args, p.k_params, args.k_fours, task, chunk, shared.k_params());
        copy_params<kPaged>(args, p.v_params, args.v_fours, task, chunk, shared.v_params());
        copy_codes<kBlocks, kPitch, kPaged>(args, p.k_codes, task, chunk, shared.keys());
      }
      cp_async_commit();
    }
    if constexpr (kValues) {
      if (there) copy_codes<kBlocks, kPitch, kPaged>(args, p.v_codes, task, chunk, shared.values());
      cp_async_commit();
    }
  }

  // Of the lane's four keys.
  W2A4_DEVICE void read_params(const uint32_t* of_chunk, uint32_t (&w)[4]) const {
    const U32x4 four = read_u32x4(of_chunk + first_key());
    w[0] = four.x, w[1] = four.y, w[2] = four.z, w[3] = four.w;
  }

  // Warp w prepares row w: its digits and what undoes their scaling.
  W2A4_DEVICE void prepare_queries() const {
    if (warp < kRows) {
      const bool there = task.first_row + warp < args.rows;
      const int elements = there ? static_cast<int>(p.head_dim) : 0;
      float v[kBlocks], sum = 0.0f;
      uint32_t most = 0;
      load_query(p.q.data, p.dtype, query_at(warp), elements, v);
      W2A4_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        sum = add_rn(sum, v[b]);
        most = larger(most, magnitude_bits(v[b]));
      }
      const Fixed fixed = fixed_of(warp_max(most));
      sum = warp_sum(sum);
      const int place = element_place(lane);
      W2A4_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        const uint32_t digits = digits_of(mul_rn(v[b], fixed.up));
        W2A4_UNROLL
        for (int i = 0; i < 4; ++i)
          shared.query_digits(digit_line(warp, i), 2 * b + place / 16)[place % 16] =
              static_cast<unsigned char>(digits >> 8 * i);
      }
      if (lane == 0)
        shared.row(warp) = {mul_rn(fixed.down, args.scaling), mul_rn(sum, args.scaling),
                            there ? seen_end(args, task, warp) : 0};
    }
    sync_block();
  }

  // Scores of the first keys, whose values are floats: a warp takes a key and a row.
  W2A4_DEVICE void score_sinks(int64_t first, int sinks) const {
    for (int i = warp; i < sinks * kRows; i += kAttentionThreads / 32) {
      const int key = i / kRows, row = i % kRows;
      if (task.first_row + row >= args.rows) continue;
      const int64_t at = query_at(row);
      const int64_t k_at = offset_of(p.k_sink, task.batch, task.head, first + key);
      float sum = 0.0f;
      for (int element = lane; element < p.head_dim; element += 32)
        sum = fma_rn(load_number(p.q.data, p.dtype, at + element),
                     load_number(p.k_sink.data, p.k_sink_dtype, k_at + element), sum);
      sum = warp_sum(sum);
      if (lane == 0) shared.sink_score(row)[key] = mul_rn(sum, args.scaling);
    }
    sync_block();
  }

  // Scores of the warp's keys, of packed codes.
  W2A4_DEVICE void score_keys(float (&score)[kQuads][4]) const {
    int32_t sums[2][kTiles][4];
    W2A4_UNROLL
    for (int i = 0; i < 8 * kTiles; ++i) sums[i / 4 / kTiles][i / 4 % kTiles][i % 4] = kMagic;
    const unsigned char* keys = shared.keys() + (32 * warp + key_slot_of_lane(lane)) * kPitch;
    W2A4_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      uint32_t w[4], odd[4];
      ldmatrix_x4(w, keys + 16 * b);
      W2A4_UNROLL
      for (int i = 0; i < 4; ++i) odd[i] = w[i] >> 4 & 0x0f0f0f0f, w[i] &= 0x0f0f0f0f;
      W2A4_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        const U32x2 both = read_u32x2(shared.query_digits(8 * t + g, 2 * b + j / 2) + j % 2 * 8);
        const uint32_t q[2] = {both.x, both.y};
        W2A4_UNROLL
        for (int m = 0; m < 2; ++m) {
          const uint32_t a[4] = {w[2 * m], w[2 * m + 1], odd[2 * m], odd[2 * m + 1]};
          mma_s8_16x8x32(sums[m][t], a, q, sums[m][t]);
        }
      }
    }
    uint32_t params[4];
    read_params(shared.k_params(), params);
    W2A4_UNROLL
    for (int quad = 0; quad < kQuads; ++quad) {
      const QueryRow& query = shared.row(4 * quad + j);
      W2A4_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float scale = float_from_half(static_cast<uint16_t>(params[i]));
        const float zero = float_from_half(static_cast<uint16_t>(params[i] >> 16));
        const int32_t (&low)[4] = sums[i / 2][2 * quad], (&high)[4] = sums[i / 2][2 * quad + 1];
        const int c = i % 2 * 2;
        const float product = join_digits(low[c], low[c + 1], high[c], high[c + 1]);
        score[quad][i] = fma_rn(scale, mul_rn(product, query.down), mul_rn(zero, query.sum));
      }
    }
  }

  // Scores of sinks come from shared memory; keys that a row does not see get kHidden.
  W2A4_DEVICE void hide_keys(int first, int sinks, float (&score)[kQuads][4]) const {
    W2A4_UNROLL
    for (int quad = 0; quad < kQuads; ++quad) {
      const int row = 4 * quad + j, seen = shared.row(row).seen;
      W2A4_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int key = first_key() + i;
        if (key < sinks) score[quad][i] = shared.sink_score(row)[key];
        bool sees = first + key < seen;
        if (sees && p.mask)
          sees = p.mask[task.batch * p.mask_batch + head_of(args, task, row) * p.mask_head +
                        token_of(args, task, row) * p.mask_q + (first + key) * p.mask_key];
        if (!sees) score[quad][i] = kHidden;
      }
    }
  }

  // The warp's largest scores, and largest scales of values, of each row.
  W2A4_DEVICE void note_maxima(const float (&score)[kQuads][4], const uint32_t (&params)[4]) const {
    W2A4_UNROLL
    for (int quad = 0; quad < kQuads; ++quad) {
      const float (&s)[4] = score[quad];
      const float top = row_max(max_f32(max_f32(s[0], s[1]), max_f32(s[2], s[3])));
      uint32_t scale = 0;
      W2A4_UNROLL
      for (int i = 0; i < 4; ++i) scale = larger(scale, s[i] == kHidden ? 0 : params[i] & 0x7fff);
      scale = row_max(scale);
      if (g == 0) {
        shared.top_score(4 * quad + j)[warp] = top;
        shared.top_scale(4 * quad + j)[warp] = scale;
      }
    }
  }

  // Scores become weights, and weights times scales digits.
  W2A4_DEVICE void weigh(const float (&score)[kQuads][4], const uint32_t (&params)[4],
                         int sinks) const {
    float sums[2 * kQuads];
    W2A4_UNROLL
    for (int quad = 0; quad < kQuads; ++quad) {
      const int row = 4 * quad + j;
      const float top = block_max(shared.top_score(row)), shift = -finite_top(top);
      const auto largest = static_cast<uint16_t>(block_max(shared.top_scale(row)));
      const Fixed fixed = fixed_of(as_bits(float_from_half(largest)));
      float &weights = sums[quad], &zeros = sums[kQuads + quad];
      weights = zeros = 0.0f;
      uint32_t word[4];
      W2A4_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float weight = exp2_approx(add_rn(score[quad][i], shift));
        const float scale = float_from_half(static_cast<uint16_t>(params[i]));
        const float zero = float_from_half(static_cast<uint16_t>(params[i] >> 16));
        if (first_key() + i < sinks) shared.sink_score(row)[first_key() + i] = weight;
        weights = add_rn(weights, weight);
        if (score[quad][i] != kHidden) zeros = fma_rn(weight, zero, zeros);
        // 0 for a key that is not seen, also where its scale is not a number.
        word[i] = digits_of(mul_rn(weight, mul_rn(scale, fixed.up)));
      }
      transpose_bytes(word);
      W2A4_UNROLL
      for (int i = 0; i < 4; ++i)
        store_u32(shared.weight_digits(digit_line(row, i)) + 32 * warp + 4 * word_of_keys(g),
                  word[i]);
      if (warp == 0 && g == 0) shared.result(row) = {top, fixed.down, 0.0f, 0.0f};
    }
    const int which = row_sums<2 * kQuads>(sums);
    if (g < 2 * kQuads)
      shared.sums(which / kQuads * kRows + which % kQuads * 4 + j)[warp] = sums[0];
  }

  // Sums over keys of weights times codes: a warp takes 32 elements and some of the keys. Those
  // that no row sees have digits that are 0, whatever their codes.
  W2A4_DEVICE void add_values() const {
    constexpr int kGroups = 8 / Shared::kSplits;  // of 32 keys
    const int split = warp / kBlocks, b = warp % kBlocks;
    int32_t sums[2][kTiles][4];
    W2A4_UNROLL
    for (int i = 0; i < 8 * kTiles; ++i) sums[i / 4 / kTiles][i / 4 % kTiles][i % 4] = kMagic;
    const unsigned char* values =
        shared.values() + (32 * kGroups * split + value_slot_of_lane(lane)) * kPitch + 16 * b;
    const unsigned char* digits = shared.weight_digits(g) + 32 * kGroups * split + 8 * j;
    W2A4_NO_UNROLL
    for (int pair = 0; pair < kGroups; pair += 2) {
      W2A4_UNROLL
      for (int u = pair; u < pair + 2; ++u) {
        uint32_t w[4], a[2][4];
        ldmatrix_x4_trans(w, values + 32 * u * kPitch);
        W2A4_UNROLL
        for (int half = 0; half < 2; ++half) W2A4_UNROLL
        for (int side = 0; side < 2; ++side) {  // the first or the second byte of each pair
          const uint32_t bytes = prmt(w[2 * half], w[2 * half + 1], side ? 0x7531 : 0x6420);
          a[side][2 * half] = bytes & 0x0f0f0f0f, a[side][2 * half + 1] = bytes >> 4 & 0x0f0f0f0f;
        }
        W2A4_UNROLL
        for (int t = 0; t < kTiles; ++t) {
          const U32x2 both = read_u32x2(digits + 8 * t * kDigitRow + 32 * u);
          const uint32_t weights[2] = {both.x, both.y};
          W2A4_UNROLL
          for (int side = 0; side < 2; ++side)
            mma_s8_16x8x32(sums[side][t], a[side], weights, sums[side][t]);
        }
      }
    }
    W2A4_UNROLL
    for (int quad = 0; quad < kQuads; ++quad) {
      uint32_t out[4];  // elements 4g .. 4g + 3
      W2A4_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int32_t (&low)[4] = sums[i / 2][2 * quad], (&high)[4] = sums[i / 2][2 * quad + 1];
        const int c = i % 2 * 2;
        out[i] = as_bits(join_digits(low[c], low[c + 1], high[c], high[c + 1]));
      }
      store_u32x4(shared.output(split, 4 * quad + j) + 32 * b + 4 * g,
                  {out[0], out[1], out[2], out[3]});
    }
  }

  // Sums of the warps, in order, become those of the rows.
  W2A4_DEVICE void finish_sums() const {
    const int i = threadIdx.x;
    if (i >= 2 * kRows) return;
    const U32x4 a = read_u32x4(shared.sums(i)), b = read_u32x4(shared.sums(i) + 4);
    const uint32_t of_warps[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    float sum = as_float(of_warps[0]);
    W2A4_UNROLL
    for (int w = 1; w < 8; ++w) sum = add_rn(sum, as_float(of_warps[w]));
    if (i < kRows)
      shared.result(i).weight = sum;
    else
      shared.result(i - kRows).zero = sum;
  }

  // The chunk's result for two elements of one row.
  W2A4_DEVICE Part part_of(int row, int element, const Place& place) const {
    const RowResult& result = shared.result(row);
    Part part = {result.top, result.weight, {0.0f, 0.0f}};
    W2A4_UNROLL
    for (int split = 0; split < Shared::kSplits; ++split) {
      const U32x2 sums = read_u32x2(shared.output(split, row) + element);
      part.output[0] = add_rn(part.output[0], as_float(sums.x));
      part.output[1] = add_rn(part.output[1], as_float(sums.y));
    }
    W2A4_UNROLL
    for (int i = 0; i < 2; ++i) part.output[i] = fma_rn(part.output[i], result.down, result.zero);
    for (int key = 0; key < place.sinks; ++key) {
      const float weight = shared.sink_score(row)[key];
      const int64_t at = offset_of(p.v_sink, task.batch, task.head, place.first + key) + element;
      if (weight == 0.0f) continue;
      W2A4_UNROLL
      for (int i = 0; i < 2; ++i)
        part.output[i] =
            fma_rn(weight, load_number(p.v_sink.data, p.v_sink_dtype, at + i), part.output[i]);
    }
    return part;
  }

  // Calls f(n, row, element) for the results that this thread merges.
  template <class F>
  W2A4_DEVICE void for_each_result(const F& f) const {
    W2A4_UNROLL
    for (int n = 0; n < kResults; ++n) {
      const int pair = static_cast<int>(threadIdx.x) + n * kAttentionThreads;
      const int row = pair / (16 * kBlocks), element = pair % (16 * kBlocks) * 2;
      if (pair < kPairs && element < p.head_dim && task.first_row + row < args.rows)
        f(n, row, element);
    }
  }

  // All stages of a chunk; codes of the next one are on their way as soon as there is room.
  W2A4_DEVICE void run_chunk(const Place& place, int next) const {
    const int first = place.first, sinks = place.sinks;
    if (sinks) score_sinks(first, sinks);
    cp_async_wait<1>();
    sync_warp();
    float score[kQuads][4];
    score_keys(score);
    hide_keys(first, sinks, score);
    uint32_t v_params[4];
    read_params(shared.v_params(), v_params);
    W2A4_UNROLL
    for (int i = 0; i < 4; ++i) v_params[i] = first_key() + i < sinks ? 0 : v_params[i];
    note_maxima(score, v_params);
    sync_block();
    copy<true, false>(next);
    weigh(score, v_params, sinks);
    cp_async_wait<1>();
    sync_block();
    add_values();
    finish_sums();
    sync_block();
    copy<false, true>(next);
  }

  // Does every step-th chunk and calls use(chunk, n, row, element, part) for its results.
  template <class Use>
  W2A4_DEVICE void run_chunks(int step, const Use& use) const {
    copy<true, true>(task.chunk);
    prepare_queries();
    W2A4_NO_UNROLL
    for (int chunk = task.chunk; chunk < task.chunks; chunk += step) {
      const Place place = place_of_chunk(p, task, chunk);
      run_chunk(place, chunk + step);
      for_each_result([&](int n, int row, int element) {
        use(chunk, n, row, element, part_of(row, element, place));
      });
      if (place.sinks) sync_block();  // weights of sinks have been read
    }
    cp_async_wait<0>();  // for copies of the chunk behind the last, which has no keys
  }

  // Some chunks, whose results merge_kv4_kernel merges with the others'.
  W2A4_DEVICE void run_some() const {
    if (task.chunk >= task.chunks) return;
    run_chunks(static_cast<int>(gridDim.y),
               [&](int chunk, int, int row, int element, const Part& part) {
                 store_partial(args, task, row, chunk, element, part);
               });
  }

  // All chunks, one after another.
  W2A4_DEVICE void run_all() const {
    // Results of all chunks, and of the group of chunks that is not complete.
    const auto total = [&](int n) -> Part& { return shared.part(n); };
    [[maybe_unused]] Part in_registers[kResults];
    const auto group = [&](int n) -> Part& {
      if constexpr (kGroupInShared)
        return shared.part(kResults + n);
      else
        return in_registers[n];
    };
    W2A4_UNROLL
    for (int n = 0; n < kResults; ++n) group(n) = total(n) = {kHidden, 0.0f, {0.0f, 0.0f}};
    run_chunks(1, [&](int chunk, int n, int, int, const Part& part) {
      merge(group(n), part);
      if (chunk % kGroupChunks < kGroupChunks - 1 && chunk + 1 < task.chunks) return;
      merge(total(n), group(n));
      group(n) = {kHidden, 0.0f, {0.0f, 0.0f}};
    });
    for_each_result(
        [&](int n, int row, int element) { store_output(args, task, row, element, total(n)); });
  }
};

// Blocks that registers should leave room for on a multiprocessor, and grids are made for.
template <int kQuads, int kBlocks, bool kSplit>
constexpr int kResidentBlocks = kSplit && kQuads == 1 && kBlocks <= 4 ? 4 : 2;

// kSplit: a block does some chunks, else all of them.
template <int kQuads, int kBlocks, bool kSplit, bool kPaged>
W2A4_DEVICE void attend(const AttentionArgs& args) {
  wait_for_previous_kernel();
  const Attention<kQuads, kBlocks, kSplit, kPaged> attention(args);
  if constexpr (kSplit)
    attention.run_some();
  else
    attention.run_all();
}

template <int kQuads, int kBlocks, bool kSplit>
__global__ void __launch_bounds__(kAttentionThreads, kResidentBlocks<kQuads, kBlocks, kSplit>)
    attention_kv4_kernel(const __grid_constant__ AttentionArgs args) {
  attend<kQuads, kBlocks, kSplit, false>(args);
}

// The same of a paged cache. A kernel of its own, so that the other has no registers for it.
template <int kQuads, int kBlocks, bool kSplit>
__global__ void __launch_bounds__(kAttentionThreads, kResidentBlocks<kQuads, kBlocks, kSplit>)
    attention_kv4_paged_kernel(const __grid_constant__ AttentionArgs args) {
  attend<kQuads, kBlocks, kSplit, true>(args);
}

// Merges the chunks of a row, 64 elements a block: a warp takes a group of chunks at a time.
__global__ void __launch_bounds__(kAttentionThreads)
    merge_kv4_kernel(const __grid_constant__ AttentionArgs args) {
  wait_for_previous_kernel();
  const int head_dim = static_cast<int>(args.p.head_dim);
  auto* parts = reinterpret_cast<Part*>(shared_memory());  // [8, 32]
  const AttentionTask task = task_of_block(args, 1);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int element = static_cast<int>(blockIdx.y) * 64 + 2 * lane;
  const float* line = partial_line(args, task, 0);
  Part total = {kHidden, 0.0f, {0.0f, 0.0f}};
  for (int first = 0; first < task.chunks; first += 8 * kGroupChunks) {
    Part loaded[kGroupChunks], group = {kHidden, 0.0f, {0.0f, 0.0f}};
    const int begin = first + kGroupChunks * warp;
    W2A4_UNROLL
    for (int i = 0; i < kGroupChunks; ++i) {
      loaded[i] = {kHidden, 0.0f, {0.0f, 0.0f}};
      if (begin + i < task.chunks && element < head_dim)
        loaded[i] = load_partial(line + (begin + i) * (head_dim + 2), head_dim, element);
    }
    W2A4_UNROLL
    for (int i = 0; i < kGroupChunks; ++i) merge(group, loaded[i]);
    parts[threadIdx.x] = group;
    sync_block();
    for (int w = 0; w < 8 && warp == 0 && first + kGroupChunks * w < task.chunks; ++w)
      merge(total, parts[32 * w + lane]);
    sync_block();
  }
  if (warp == 0 && element < head_dim) store_output(args, task, 0, element, total);
}

}  // namespace w2a4::cuda
