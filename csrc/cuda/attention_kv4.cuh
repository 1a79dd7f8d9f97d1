// attention_kv4, see AttentionKV4Params. Keys are divided into chunks of 256 at fixed places of the
// cache. A thread block takes one chunk, or all of them one after another, for up to 8 query rows
// (tokens and heads) that share a KV head; a chunk's result is (largest score, sum of weights,
// weighted sum of values), and results are merged in a fixed order: 16 chunks to a group, then the
// groups. So a row's bits depend on the keys it sees and on nothing else.
//
// Both products run on int8 tensor cores, whose sums are exact. Codes are bytes as they are; what
// they are multiplied with, a query or a weight times its value's scale, becomes an integer of 30
// bits relative to the largest of its row, in four signed bytes, four columns of the product:
//     score   scaling * (k_scale * sum q code + k_zero * sum q)
//     output  sum (weight v_scale) code + sum weight v_zero
// Each of those integers is off by at most half a unit, 2**-30 of the row's largest.
//
// Shared memory holds keys and values as packed codes, `pitch` bytes a key. The order of elements
// within 32, and of keys within 32, is that in which ldmatrix brings codes, see element_place
// and key_place.
#pragma once

#include "attention_kv4_parts.cuh"

namespace w2a4::cuda {

// Columns 2j, 2j + 1 of two rows of a product, exact: lane 4g + j gets what all four digits of row
// g + 8 * (j % 2) add up to; of the tile's two query rows it is row j / 2.
W2A4_DEVICE float join_digits(const int32_t (&c)[4] W2A4_SITE) {
  const bool odd = threadIdx.x & 1;
  const float above = fma_rn(exact_float(c[1]), 256.0f, exact_float(c[0]));
  const float below = fma_rn(exact_float(c[3]), 256.0f, exact_float(c[2]));
  const float mine = odd ? below : above, other = shfl_xor(odd ? above : below, 1 W2A4_SAME_SITE);
  return fma_rn(odd ? mine : other, 65536.0f, odd ? other : mine);
}

template <int kTiles, int kBlocks, bool kSplit>
struct Attention {
  static constexpr int kRows = 2 * kTiles;                                  // query rows of a block
  static constexpr int kValues = kRows * kBlocks * 32 / kAttentionThreads;  // that a thread merges

  const AttentionArgs& args;
  const AttentionKV4Params& p;
  const AttentionTask task;
  const AttentionShared<kRows> shared{};
  const int lane, warp, g, j;
  uint32_t q[kBlocks][kTiles][2];  // fragments of the queries' digits

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

  // Codes of a chunk on their way to shared memory; none if there is no such chunk.
  W2A4_DEVICE void copy_keys(int chunk) const {
    copy_chunk<kBlocks>(args, args.k_copy, p.k_codes, task, chunk, shared.keys());
  }
  W2A4_DEVICE void copy_values(int chunk) const {
    copy_chunk<kBlocks>(args, args.v_copy, p.v_codes, task, chunk, shared.values(args));
  }

  // Warp w prepares row w: its digits and what undoes their scaling.
  W2A4_DEVICE void prepare_queries() const {
    if (warp < kRows) {
      const bool there = task.first_row + warp < args.rows;
      const int64_t at = there ? query_at(warp) : 0;
      float v[kBlocks], sum = 0.0f;
      uint32_t most = 0;
      W2A4_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        const int element = 32 * b + lane;
        v[b] = there && element < p.head_dim ? load_number(p.q.data, p.dtype, at + element) : 0.0f;
        sum = add_rn(sum, v[b]);
        most = larger(most, magnitude_bits(v[b]));
      }
      const Fixed fixed = fixed_of(warp_max(most));
      sum = warp_sum(sum);
      W2A4_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        if (b >= args.blocks) break;
        unsigned char* to = shared.query_digits(args, 4 * warp) + 32 * b + element_place(lane);
        const uint32_t digits = digits_of(mul_rn(v[b], fixed.up));
        W2A4_UNROLL
        for (int i = 0; i < 4; ++i)
          to[i * 32 * args.blocks] = static_cast<unsigned char>(digits >> 8 * i);
      }
      if (lane == 0) shared.row(warp) = {fixed.down, sum, there ? seen_end(args, task, warp) : 0};
    }
    sync_block();
  }

  W2A4_DEVICE void load_queries() {
    W2A4_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      W2A4_UNROLL
      for (int t = 0; t < kTiles; ++t) W2A4_UNROLL
      for (int half = 0; half < 2; ++half)
        q[b][t][half] =
            b < args.blocks
                ? read_u32(shared.query_digits(args, 8 * t + g) + 32 * b + 16 * half + 4 * j)
                : 0;
    }
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
      if (lane == 0) shared.score(row)[key] = mul_rn(sum, p.scaling);
    }
  }

  // Scores of the warp's 32 keys; of those below `sinks` they are there already.
  W2A4_DEVICE void score_keys(const uint32_t (&k_params)[2], int sinks) const {
    int32_t sums[2][kTiles][4];
    W2A4_UNROLL
    for (int i = 0; i < 8 * kTiles; ++i) sums[i / 4 / kTiles][i / 4 % kTiles][i % 4] = kMagic;
    const unsigned char* keys = shared.keys() + threadIdx.x * args.pitch;
    W2A4_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      if (b >= args.blocks) break;
      uint32_t w[4], odd[4];
      ldmatrix_x4(w, keys + 16 * b);
      W2A4_UNROLL
      for (int i = 0; i < 4; ++i) odd[i] = w[i] >> 4 & 0x0f0f0f0f, w[i] &= 0x0f0f0f0f;
      W2A4_UNROLL
      for (int m = 0; m < 2; ++m) {
        const uint32_t a[4] = {w[2 * m], w[2 * m + 1], odd[2 * m], odd[2 * m + 1]};
        W2A4_UNROLL
        for (int t = 0; t < kTiles; ++t) mma_s8_16x8x32(sums[m][t], a, q[b][t], sums[m][t]);
      }
    }
    W2A4_UNROLL
    for (int m = 0; m < 2; ++m) {
      const int key = 32 * warp + score_key(lane, m);
      const float scale = float_from_half(static_cast<uint16_t>(k_params[m]));
      const float zero = float_from_half(static_cast<uint16_t>(k_params[m] >> 16));
      W2A4_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        const int row = 2 * t + j / 2;
        const QueryRow& query = shared.row(row);
        const float product = mul_rn(join_digits(sums[m][t]), query.down);
        const float score = fma_rn(scale, product, mul_rn(zero, query.sum));
        if (key >= sinks) shared.score(row)[key] = mul_rn(score, p.scaling);
      }
    }
  }

  // Bit r: row r sees this thread's key.
  W2A4_DEVICE uint32_t seen_rows(int64_t key) const {
    uint32_t seen = 0;
    W2A4_UNROLL
    for (int r = 0; r < kRows; ++r) {
      bool sees = key < shared.row(r).seen;
      if (sees && p.mask)
        sees = p.mask[task.batch * p.mask_batch + head_of(args, task, r) * p.mask_head +
                      token_of(args, task, r) * p.mask_q + key * p.mask_key];
      seen |= sees ? 1u << r : 0;
    }
    return seen;
  }

  // The warp's largest scores, and largest scales of values, of each row.
  W2A4_DEVICE void note_maxima(uint32_t seen, float v_scale) const {
    W2A4_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const bool sees = seen >> r & 1;
      const uint32_t score = warp_max(sees ? ordered_bits(shared.score(r)[threadIdx.x]) : 0);
      const uint32_t scale = warp_max(sees ? magnitude_bits(v_scale) : 0);
      if (lane == 0) shared.top_score(r)[warp] = score, shared.top_scale(r)[warp] = scale;
    }
  }

  // Scores become weights, and weights times scales digits.
  W2A4_DEVICE void weigh(uint32_t seen, float v_scale, float v_zero, int sinks) const {
    float sums[2 * kRows];
    unsigned char* digits = shared.weight_digits(0) + 32 * warp + key_place(lane);
    const bool sink = static_cast<int>(threadIdx.x) < sinks;
    W2A4_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const uint32_t most = block_max(shared.top_score(r));
      const float top = most == 0 ? kHidden : from_ordered_bits(most);
      const Fixed fixed = fixed_of(block_max(shared.top_scale(r)));
      const bool sees = (seen >> r & 1) && top != kHidden;
      float& score = shared.score(r)[threadIdx.x];
      const float weight = sees ? exp_f32(add_rn(score, -top)) : 0.0f;
      if (sink) score = weight;
      const bool packed = sees && !sink;
      sums[r] = weight;
      sums[kRows + r] = packed ? mul_rn(weight, v_zero) : 0.0f;
      const uint32_t word = packed ? digits_of(mul_rn(mul_rn(weight, v_scale), fixed.up)) : 0;
      W2A4_UNROLL
      for (int i = 0; i < 4; ++i)
        digits[(4 * r + i) * kDigitRow] = static_cast<unsigned char>(word >> 8 * i);
      if (threadIdx.x == 0) shared.result(r) = {top, fixed.down, 0.0f, 0.0f};
    }
    const int which = warp_sums<2 * kRows>(sums);
    if (lane < 2 * kRows) shared.sums(which)[warp] = sums[0];
  }

  // Sums over keys of weights times codes: a warp takes 32 elements and some of the keys.
  W2A4_DEVICE void add_values(int count) const {
    const int split = warp / args.blocks, b = warp - split * args.blocks;
    if (split >= args.splits) return;
    int32_t sums[2][kTiles][4];
    W2A4_UNROLL
    for (int i = 0; i < 8 * kTiles; ++i) sums[i / 4 / kTiles][i / 4 % kTiles][i % 4] = kMagic;
    const int groups = 8 / args.splits;  // of 32 keys
    const unsigned char* values = shared.values(args) + lane * args.pitch + 16 * b;
    W2A4_NO_UNROLL
    for (int u = split * groups; u < (split + 1) * groups && 32 * u < count; ++u) {
      uint32_t w[4], a[2][4];
      ldmatrix_x4_trans(w, values + 32 * u * args.pitch);
      W2A4_UNROLL
      for (int half = 0; half < 2; ++half) W2A4_UNROLL
      for (int side = 0; side < 2; ++side) {  // the first or the second byte of each pair
        const uint32_t bytes = prmt(w[2 * half], w[2 * half + 1], side ? 0x7531 : 0x6420);
        a[side][2 * half] = bytes & 0x0f0f0f0f, a[side][2 * half + 1] = bytes >> 4 & 0x0f0f0f0f;
      }
      W2A4_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        const unsigned char* digits = shared.weight_digits(8 * t + g) + 32 * u + 4 * j;
        const uint32_t weights[2] = {read_u32(digits), read_u32(digits + 16)};
        W2A4_UNROLL
        for (int side = 0; side < 2; ++side)
          mma_s8_16x8x32(sums[side][t], a[side], weights, sums[side][t]);
      }
    }
    W2A4_UNROLL
    for (int side = 0; side < 2; ++side) W2A4_UNROLL
    for (int t = 0; t < kTiles; ++t)
      shared.output(args, split, 2 * t + j / 2)[32 * b + 4 * g + 2 * side + j % 2] =
          join_digits(sums[side][t]);
  }

  // Sums of the warps, in order, become those of the rows.
  W2A4_DEVICE void finish_sums() const {
    const int i = threadIdx.x;
    if (i >= 2 * kRows) return;
    float sum = shared.sums(i)[0];
    for (int w = 1; w < 8; ++w) sum = add_rn(sum, shared.sums(i)[w]);
    if (i < kRows)
      shared.result(i).weight = sum;
    else
      shared.result(i - kRows).zero = sum;
  }

  // The chunk's result for one element of one row.
  W2A4_DEVICE Part part_of(int row, int element, const Place& place) const {
    const RowResult& result = shared.result(row);
    float sum = shared.output(args, 0, row)[element];
    for (int split = 1; split < args.splits; ++split)
      sum = add_rn(sum, shared.output(args, split, row)[element]);
    float o = fma_rn(sum, result.down, result.zero);
    for (int key = 0; key < place.sinks; ++key) {
      const float weight = shared.score(row)[key];
      const int64_t at = offset_of(p.v_sink, task.batch, task.head, place.first + key) + element;
      if (weight != 0.0f) o = fma_rn(weight, load_number(p.v_sink.data, p.v_sink_dtype, at), o);
    }
    return {result.top, result.weight, o};
  }

  // Calls f(n, row, element) for the results that this thread merges.
  template <class F>
  W2A4_DEVICE void for_each_result(const F& f) const {
    const int element = threadIdx.x & ((1 << args.log_width) - 1);
    W2A4_UNROLL
    for (int n = 0; n < kValues; ++n) {
      const int row = (threadIdx.x + n * kAttentionThreads) >> args.log_width;
      if (element < p.head_dim && row < kRows && task.first_row + row < args.rows)
        f(n, row, element);
    }
  }

  // All stages of a chunk; codes of the next one are on their way as soon as there is room.
  W2A4_DEVICE void run_chunk(int chunk) const {
    const auto [first, count, sinks] = place_of_chunk(p, task, chunk);
    uint32_t k_params[2];
    W2A4_UNROLL
    for (int m = 0; m < 2; ++m)
      k_params[m] = load_params(p.k_params, task, first, 32 * warp + score_key(lane, m), count);
    const uint32_t v_params = load_params(p.v_params, task, first, threadIdx.x, count);
    if (sinks) score_sinks(first, sinks);
    cp_async_wait<1>();
    sync_block();
    score_keys(k_params, sinks);
    sync_warp();
    const float v_scale = float_from_half(static_cast<uint16_t>(v_params));
    const float v_zero = float_from_half(static_cast<uint16_t>(v_params >> 16));
    const uint32_t seen = seen_rows(first + threadIdx.x);
    note_maxima(seen, static_cast<int>(threadIdx.x) < sinks ? 0.0f : v_scale);
    sync_block();
    if constexpr (!kSplit) copy_keys(chunk + 1);
    weigh(seen, v_scale, v_zero, sinks);
    cp_async_wait<kSplit ? 0 : 1>();
    sync_block();
    add_values(count);
    finish_sums();
    sync_block();
    if constexpr (!kSplit) copy_values(chunk + 1);
  }

  W2A4_DEVICE void start() {
    copy_keys(task.chunk);
    copy_values(task.chunk);
    prepare_queries();
    load_queries();
  }

  // One chunk, whose results merge_kv4_kernel merges with the others'.
  W2A4_DEVICE void run_one() {
    if (task.chunk >= task.chunks) return;
    start();
    run_chunk(task.chunk);
    const Place place = place_of_chunk(p, task, task.chunk);
    for_each_result([&](int, int row, int element) {
      store_partial(args, task, row, task.chunk, element, part_of(row, element, place));
    });
  }

  // All chunks, one after another.
  W2A4_DEVICE void run_all() {
    start();
    // Results of all chunks, and of the group of chunks that is not complete.
    const auto total = [&](int n) -> Part& { return shared.part(args, n); };
    [[maybe_unused]] Part in_registers[kValues];
    const auto group = [&](int n) -> Part& {
      if constexpr (kTiles == 4)
        return shared.part(args, kValues + n);
      else
        return in_registers[n];
    };
    W2A4_UNROLL
    for (int n = 0; n < kValues; ++n) group(n) = total(n) = {kHidden, 0.0f, 0.0f};
    W2A4_NO_UNROLL
    for (int chunk = 0; chunk < task.chunks; ++chunk) {
      run_chunk(chunk);
      const Place place = place_of_chunk(p, task, chunk);
      for_each_result([&](int n, int row, int element) {
        merge(group(n), part_of(row, element, place));
        if (chunk % kGroupChunks < kGroupChunks - 1 && chunk + 1 < task.chunks) return;
        merge(total(n), group(n));
        group(n) = {kHidden, 0.0f, 0.0f};
      });
      if (place.sinks) sync_block();  // weights of sinks have been read
    }
    cp_async_wait<0>();  // for copies of the chunk behind the last, which has no keys
    for_each_result([&](int n, int row, int element) {
      store_output(args, task.batch, head_of(args, task, row), token_of(args, task, row), element,
                   total(n));
    });
  }
};

// Blocks that registers should leave room for on a multiprocessor.
template <int kTiles, int kBlocks, bool kSplit>
constexpr int kResidentBlocks = kSplit && kTiles <= 2 && kBlocks <= 4 ? 4 : 2;

// kSplit: a block does one chunk, else all of them.
template <int kTiles, int kBlocks, bool kSplit>
__global__ void __launch_bounds__(kAttentionThreads, kResidentBlocks<kTiles, kBlocks, kSplit>)
    attention_kv4_kernel(const __grid_constant__ AttentionArgs args) {
  wait_for_previous_kernel();
  Attention<kTiles, kBlocks, kSplit> attention(args);
  if constexpr (kSplit)
    attention.run_one();
  else
    attention.run_all();
}

// Merges the chunks of a row, 32 elements a block: a warp takes a group of chunks at a time.
__global__ void __launch_bounds__(kAttentionThreads)
    merge_kv4_kernel(const __grid_constant__ AttentionArgs args) {
  wait_for_previous_kernel();
  const AttentionKV4Params& p = args.p;
  auto* parts = reinterpret_cast<Part*>(shared_memory());  // [8, 32]
  const AttentionTask task = task_of_block(args, 1);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int element = static_cast<int>(blockIdx.y) * 32 + lane;
  Part total = {kHidden, 0.0f, 0.0f};
  for (int first = 0; first < task.chunks; first += 8 * kGroupChunks) {
    Part loaded[kGroupChunks], group = {kHidden, 0.0f, 0.0f};
    const int begin = first + kGroupChunks * warp;
    W2A4_UNROLL
    for (int i = 0; i < kGroupChunks; ++i) {
      loaded[i] = {kHidden, 0.0f, 0.0f};
      if (begin + i < task.chunks && element < p.head_dim)
        loaded[i] = load_partial(args, task, begin + i, element);
    }
    W2A4_UNROLL
    for (int i = 0; i < kGroupChunks; ++i) merge(group, loaded[i]);
    parts[threadIdx.x] = group;
    sync_block();
    for (int w = 0; w < 8 && warp == 0; ++w) merge(total, parts[32 * w + lane]);
    sync_block();
  }
  if (warp == 0 && element < p.head_dim)
    store_output(args, task.batch, head_of(args, task, 0), token_of(args, task, 0), element, total);
}

}  // namespace w2a4::cuda
