// Asymmetric 4-bit keys and values, bit-exact to the reference: quantize_kv4, append_kv4, and the
// latter behind RoPE and R3.
#include <vector>

#include "hadamard.h"
#include "kernels.h"
#include "numbers.h"

namespace w2a4::cpu {
namespace {

W2A4_INLINE void quantize_head(const float* x, int64_t n, float clip, uint8_t* codes, F16* params) {
  float low, high;
  range(x, n, low, high);
  const float middle = (low + high) * 0.5f, half = (high - low) * 0.5f * clip;
  from_float((half + half) / 15.0f, params[0]);
  from_float(middle - half, params[1]);
  const float scale = to_float(params[0]), zero = to_float(params[1]);
  if (scale == 0.0f) {
    std::memset(codes, 0, n / 2);
    return;
  }
  int32_t code[2];
  for (int64_t j = 0; j < n / 2; ++j) {
    for (int half_byte = 0; half_byte < 2; ++half_byte) {
      float value = (x[2 * j + half_byte] - zero) / scale;
      value = value > 0.0f ? value : 0.0f;  // also for NaN
      value = value < 15.0f ? value : 15.0f;
      code[half_byte] = static_cast<int32_t>(round_even(value));
    }
    codes[j] = static_cast<uint8_t>(code[0] | code[1] << 4);
  }
}

// Where a token of a call lies in the cache: a sequence, or a block of a paged one, and a position
// in it; -1 if it is not to be written.
struct Cell {
  int64_t row, position;
};

template <class Params>
W2A4_INLINE Cell cell_of(const Params& p, int64_t batch, int64_t token) {
  if (!p.slots.at) return {batch, (p.starts ? p.starts[batch] : p.start) + token};
  const int64_t slot = p.slots.at[batch * p.tokens + token];
  if (slot < 0) return {0, -1};
  return {slot / p.slots.block_tokens, slot % p.slots.block_tokens};
}

template <class Arch>
W2A4_INLINE void quantize_heads(const QuantizeKV4Params& p, int64_t begin, int64_t end) {
  std::vector<float> x(p.head_dim);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = i % p.tokens, head = i / p.tokens % p.heads,
                  batch = i / p.tokens / p.heads;
    const Cell cell = cell_of(p, batch, token);
    if (cell.position < 0) continue;
    const auto offset = [&](const Strided4& t, const Cell& at) {
      return at.row * t.batch + head * t.head + at.position * t.token;
    };
    load(p.x.data, p.dtype, offset(p.x, {batch, token}), p.head_dim, x.data());
    quantize_head(x.data(), p.head_dim, p.clip,
                  static_cast<uint8_t*>(p.codes.data) + offset(p.codes, cell),
                  static_cast<F16*>(p.params.data) + offset(p.params, cell));
  }
}
W2A4_DISPATCH(quantize_heads, QuantizeKV4Params)

// x turned by RoPE: its halves are the two coordinates of planes, each with its angle.
W2A4_INLINE void rope(float* x, const float* cos, const float* sin, int64_t n) {
  for (int64_t i = 0, j = n / 2; j < n; ++i, ++j) {
    const float first = x[i], second = x[j];
    x[i] = first * cos[i] - second * sin[i];
    x[j] = second * cos[j] + first * sin[j];
  }
}

// A row is one head of one token of qkv.
template <class Arch>
W2A4_INLINE void rope_append_heads(const RopeAppendKV4Params& p, int64_t begin, int64_t end) {
  const int64_t n = p.head_dim, rotated = p.q_heads + p.kv_heads, heads = rotated + p.kv_heads;
  HadamardBlock<float> hadamard(p.had_k, p.k, p.block_size, false);
  std::vector<float> x(n), cos(n), sin(n);
  for (int64_t i = begin, loaded = -1; i < end; ++i) {
    const int64_t head = i % heads, token = i / heads % p.tokens, batch = i / heads / p.tokens;
    load(p.qkv, p.dtype, i * n, n, x.data());
    if (head < rotated) {
      const int64_t angles = batch * p.rope_batch + token * n;
      if (angles != loaded) {
        load(p.cos, p.rope_dtype, angles, n, cos.data());
        load(p.sin, p.rope_dtype, angles, n, sin.data());
        loaded = angles;
      }
      rope(x.data(), cos.data(), sin.data(), n);
      if (p.block_size > 1 || p.had_k)
        for (int64_t at = 0; at < n; at += p.block_size)
          transform_block<Arch>(hadamard, x.data() + at, x.data() + at);
    }
    if (head < p.q_heads) {
      store(x.data(), p.q, p.dtype, ((batch * p.q_heads + head) * p.tokens + token) * n, n);
      continue;
    }
    const Strided4& codes = head < rotated ? p.k_codes : p.v_codes;
    const Strided4& params = head < rotated ? p.k_params : p.v_params;
    const int64_t kv_head = head < rotated ? head - p.q_heads : head - rotated;
    const Cell cell = cell_of(p, batch, token);
    if (cell.position < 0) continue;
    const auto offset = [&](const Strided4& t) {
      return cell.row * t.batch + kv_head * t.head + cell.position * t.token;
    };
    quantize_head(x.data(), n, p.clip, static_cast<uint8_t*>(codes.data) + offset(codes),
                  static_cast<F16*>(params.data) + offset(params));
  }
}
W2A4_DISPATCH(rope_append_heads, RopeAppendKV4Params)

}  // namespace

void rope_append_kv4(const RopeAppendKV4Params& p) {
  const int64_t heads = p.q_heads + 2 * p.kv_heads;
  parallel(p.batch * p.tokens * heads, 1 + 16384 / p.head_dim, p, rope_append_heads_dispatch);
}

void quantize_kv4(const QuantizeKV4Params& p) {
  parallel(p.batch * p.heads * p.tokens, 1 + 16384 / p.head_dim, p, quantize_heads_dispatch);
}

}  // namespace w2a4::cpu
