// quantize_kv4, append_kv4 and rope_append_kv4, see QuantizeKV4Params and RopeAppendKV4Params. A
// warp takes one head of one token and holds it in registers from the load to the codes: lane l has
// elements 2 * (l + 32 * r) and the next one as [r][0] and [r][1], so that stages of R3 within 64
// elements are shuffles and later ones are within a lane.
#pragma once

#include "formats.cuh"
#include "quantizer.cuh"

namespace w2a4::cuda {

constexpr int kHeadWarps = 4;  // of a thread block

template <int kRounds>
using Head = float[kRounds][2];

struct QuantizeKV4Args {
  QuantizeKV4Params p;
  bool pairs;     // elements 2i and 2i + 1 of x can be read at once
  uint32_t rows;  // batch * heads * tokens
};

struct RopeAppendKV4Args {
  RopeAppendKV4Params p;
  bool pairs;       // of qkv
  bool rope_pairs;  // of cos and sin
  uint32_t rows;    // batch * tokens * (q_heads + 2 * kv_heads)
  float scale;      // of R3, 1 / sqrt(block_size)
  int log_power;    // block_size is k << log_power
  bool mixed;       // by had_k, through shared memory
  // Of kv4_wide.cuh, which serves if `lanes`, those of a head, are not 0: groups of heads that a
  // token has, and blocks that share them.
  int lanes;
  uint32_t groups, splits;
};

// Calls f(r, pair) for the pairs of elements of a head that the lane holds.
template <int kRounds, class F>
W2A4_DEVICE void for_each_pair(int head_dim, const F& f) {
  const int lane = threadIdx.x % 32;
  W2A4_UNROLL
  for (int r = 0; r < kRounds; ++r) {
    if (64 * r >= head_dim) break;
    if (2 * (lane + 32 * r) < head_dim) f(r, lane + 32 * r);
  }
}

template <class T>
W2A4_DEVICE void load_pair(const void* x, int64_t at, bool whole, float (&v)[2]) {
  if (whole) return load_run<T>(x, at, v);
  v[0] = load_one<T>(x, at);
  v[1] = load_one<T>(x, at + 1);
}

// Where a token of this call lies in the cache: a sequence, or a block of a paged one, and a
// position in it; -1 where it must not be written.
struct Cell {
  int64_t row, position;
};

// starts and slots lie on the device, and nothing has checked them.
template <class Params>
W2A4_DEVICE Cell cell_of(const Params& p, int64_t batch, int64_t token) {
  if (p.slots.at) {
    const int64_t slot = p.slots.at[batch * p.tokens + token], size = p.slots.block_tokens;
    if (slot < 0 || slot >= p.slots.blocks * size) return {0, -1};
    return {slot / size, slot % size};
  }
  const int64_t position = (p.starts ? p.starts[batch] : p.start) + token;
  return {batch, position >= 0 && position < p.start + p.tokens ? position : -1};
}

// ---- quantisation

// Scale and zero-point of a head, float16 bits.
struct HeadGrid {
  uint16_t scale, zero;
};

W2A4_DEVICE HeadGrid grid_of(float low, float high, float clip) {
  const float middle = mul_rn(add_rn(low, high), 0.5f);
  const float half = mul_rn(mul_rn(add_rn(high, -low), 0.5f), clip);
  return {half_from_float(quotient_rn<15>(add_rn(half, half))),
          half_from_float(add_rn(middle, -half))};
}

// Codes [head_dim / 2] and params [2] of a head, as reference.quantize_kv4 makes them, bit for bit.
template <int kRounds>
W2A4_DEVICE void quantize_head(const Head<kRounds>& x, int head_dim, float clip, uint8_t* codes,
                               uint16_t* params) {
  uint32_t most = 0, least = 0;  // ordered bits of the largest, inverted ones of the smallest
  for_each_pair<kRounds>(head_dim, [&](int r, int) {
    W2A4_UNROLL
    for (int i = 0; i < 2; ++i) {
      most = larger(most, ordered_bits(x[r][i]));
      least = larger(least, ~ordered_bits(x[r][i]));
    }
  });
  const float high = from_ordered_bits(warp_max(most));
  const float low = from_ordered_bits(~warp_max(least));
  const HeadGrid grid = grid_of(low, high, clip);
  const float scale = float_from_half(grid.scale), zero = float_from_half(grid.zero);
  const Quantizer q = quantizer_of(scale);
  const uint32_t mask = scale == 0.0f ? 0 : q.mask;
  for_each_pair<kRounds>(head_dim, [&](int r, int pair) {
    uint32_t code[2];
    W2A4_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float quotient = quotient_of(q, add_rn(x[r][i], -zero));
      code[i] = rounded_bits(min_f32(max_f32(quotient, 0.0f), 15.0f)) & mask;
    }
    codes[pair] = static_cast<uint8_t>(code[0] | code[1] << 4);
  });
  const int lane = threadIdx.x % 32;
  if (lane < 2) params[lane] = lane == 0 ? grid.scale : grid.zero;
}

template <int kRounds>
W2A4_DEVICE void write_head(const Strided4& codes, const Strided4& params, const Cell& cell,
                            int64_t head, const Head<kRounds>& x, int head_dim, float clip) {
  if (cell.position < 0) return;
  quantize_head<kRounds>(
      x, head_dim, clip,
      static_cast<uint8_t*>(codes.data) + offset_of(codes, cell.row, head, cell.position),
      static_cast<uint16_t*>(params.data) + offset_of(params, cell.row, head, cell.position));
}

// The row of this warp: rows are divided among warps in order.
W2A4_DEVICE uint32_t row_of_warp() {
  return blockIdx.x * kHeadWarps + threadIdx.x / 32;
}

template <class T, int kRounds>
__global__ void __launch_bounds__(kHeadWarps * 32)
    quantize_kv4_kernel(const __grid_constant__ QuantizeKV4Args args) {
  wait_for_previous_kernel();
  const QuantizeKV4Params& p = args.p;
  const uint32_t row = row_of_warp();
  if (row >= args.rows) return;
  const auto heads = static_cast<uint32_t>(p.heads), tokens = static_cast<uint32_t>(p.tokens);
  const uint32_t head = row % heads, token = row / heads % tokens, batch = row / heads / tokens;
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t first = offset_of(p.x, batch, head, token);
  Head<kRounds> x;
  for_each_pair<kRounds>(head_dim, [&](int r, int pair) {
    load_pair<T>(p.x.data, first + 2 * pair, args.pairs, x[r]);
  });
  write_head<kRounds>(p.codes, p.params, cell_of(p, batch, token), head, x, head_dim, p.clip);
}

// ---- RoPE and R3

// x turned by RoPE: elements i and i + head_dim / 2 are the coordinates of a plane. `first` is the
// element of qkv that the head starts at; the other coordinate is read again, from L1.
template <class T, class Rope, int kRounds>
W2A4_DEVICE void turn(const RopeAppendKV4Args& args, int64_t first, int64_t angles,
                      Head<kRounds>& x) {
  const RopeAppendKV4Params& p = args.p;
  const int head_dim = static_cast<int>(p.head_dim), middle = head_dim / 2;
  for_each_pair<kRounds>(head_dim, [&](int r, int pair) {
    float other[2];
    const int element = 2 * pair;
    if (args.pairs && middle % 2 == 0) {
      load_run<T>(p.qkv, first + (element < middle ? element + middle : element - middle), other);
    } else {
      W2A4_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int e = element + i;
        other[i] = load_one<T>(p.qkv, first + (e < middle ? e + middle : e - middle));
      }
    }
    float cos[2], sin[2];
    load_pair<Rope>(p.cos, angles + element, args.rope_pairs, cos);
    load_pair<Rope>(p.sin, angles + element, args.rope_pairs, sin);
    W2A4_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float across = element + i < middle ? -other[i] : other[i];
      x[r][i] = add_rn(mul_rn(x[r][i], cos[i]), mul_rn(across, sin[i]));
    }
  });
}

// Sylvester's part of the transform: an element and the one whose number differs in one bit.
template <int kRounds>
W2A4_DEVICE void butterflies(int head_dim, int log_power, Head<kRounds>& x) {
  for (int stage = 0; stage < log_power && stage < 6; ++stage) {
    const int mask = 1 << stage >> 1;
    const float sign = threadIdx.x & mask ? -1.0f : 1.0f;
    W2A4_UNROLL
    for (int r = 0; r < kRounds; ++r) {
      if (64 * r >= head_dim) break;
      const float a = x[r][0], b = x[r][1];
      x[r][0] = stage == 0 ? add_rn(a, b) : fma_rn(a, sign, shfl_xor(a, mask));
      x[r][1] = stage == 0 ? add_rn(a, -b) : fma_rn(b, sign, shfl_xor(b, mask));
    }
  }
  W2A4_UNROLL
  for (int step = 1; step < kRounds; step *= 2) {
    if (64 * step >= 1 << log_power) break;
    W2A4_UNROLL
    for (int r = 0; r < kRounds; ++r) {
      if (r & step) continue;
      W2A4_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float a = x[r][i], b = x[r + step][i];
        x[r][i] = add_rn(a, b);
        x[r + step][i] = add_rn(a, -b);
      }
    }
  }
}

// had_k's part, by way of `mine`, floats [head_dim] of this warp.
template <int kRounds>
W2A4_DEVICE void mix(const RopeAppendKV4Args& args, float* mine, Head<kRounds>& x) {
  const RopeAppendKV4Params& p = args.p;
  const int head_dim = static_cast<int>(p.head_dim), k = static_cast<int>(p.k);
  const int block_size = static_cast<int>(p.block_size);
  for_each_pair<kRounds>(
      head_dim, [&](int r, int pair) { mine[2 * pair] = x[r][0], mine[2 * pair + 1] = x[r][1]; });
  sync_warp();
  for_each_pair<kRounds>(head_dim, [&](int r, int pair) {
    W2A4_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int element = 2 * pair + i, within = element % block_size;
      const int8_t* signs = p.had_k + (within >> args.log_power);
      const float* column = mine + element - (within >> args.log_power << args.log_power);
      float sum = 0.0f;
      for (int row = 0; row < k; ++row) {
        const float v = column[row << args.log_power];
        sum = add_rn(sum, signs[row * k] < 0 ? -v : v);
      }
      x[r][i] = sum;
    }
  });
}

template <class T, int kRounds>
__global__ void __launch_bounds__(kHeadWarps * 32)
    rope_append_kv4_kernel(const __grid_constant__ RopeAppendKV4Args args) {
  wait_for_previous_kernel();
  const RopeAppendKV4Params& p = args.p;
  const uint32_t row = row_of_warp();
  if (row >= args.rows) return;
  const auto q_heads = static_cast<uint32_t>(p.q_heads),
             kv_heads = static_cast<uint32_t>(p.kv_heads);
  const uint32_t heads = q_heads + 2 * kv_heads, tokens = static_cast<uint32_t>(p.tokens);
  const uint32_t head = row % heads, token = row / heads % tokens, batch = row / heads / tokens;
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t first = int64_t{row} * head_dim;
  Head<kRounds> x = {};
  for_each_pair<kRounds>(
      head_dim, [&](int r, int pair) { load_pair<T>(p.qkv, first + 2 * pair, args.pairs, x[r]); });
  if (head < q_heads + kv_heads) {
    const int64_t angles = batch * p.rope_batch + int64_t{token} * head_dim;
    if (p.rope_dtype == ScalarType::Half)
      turn<T, Float16, kRounds>(args, first, angles, x);
    else if (p.rope_dtype == ScalarType::BFloat16)
      turn<T, BFloat16, kRounds>(args, first, angles, x);
    else
      turn<T, Float32, kRounds>(args, first, angles, x);
    butterflies<kRounds>(head_dim, args.log_power, x);
    if (args.mixed)
      mix<kRounds>(args, reinterpret_cast<float*>(shared_memory()) + threadIdx.x / 32 * head_dim,
                   x);
    for_each_pair<kRounds>(head_dim, [&](int r, int) {
      x[r][0] = mul_rn(x[r][0], args.scale), x[r][1] = mul_rn(x[r][1], args.scale);
    });
  }
  if (head < q_heads) {
    const int64_t to = ((int64_t{batch} * q_heads + head) * tokens + token) * head_dim;
    for_each_pair<kRounds>(head_dim,
                           [&](int r, int pair) { store_run<T>(p.q, to + 2 * pair, x[r]); });
    return;
  }
  const Cell cell = cell_of(p, batch, token);
  if (head < q_heads + kv_heads)
    write_head<kRounds>(p.k_codes, p.k_params, cell, head - q_heads, x, head_dim, p.clip);
  else
    write_head<kRounds>(p.v_codes, p.v_params, cell, head - q_heads - kv_heads, x, head_dim,
                        p.clip);
}

}  // namespace w2a4::cuda
