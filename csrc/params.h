// Parameters of each op: what passes the checks is put in one of these, and kernels read nothing
// else. Every pointer carries its shape. Bit layouts are drawn in w2a4/ops/packing.py. `device` is
// the index of the CUDA device that all tensors are on, from which launchers take it; -1 is the
// CPU.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace w2a4 {

using torch::headeronly::ScalarType;

struct HadamardParams {
  const void* x;        // [rows, n], of dtype
  void* y;              // [rows, n], of dtype
  const int8_t* had_k;  // [k, k] of +-1, or null for k = 1
  ScalarType dtype;     // float64, float32, float16 or bfloat16
  int64_t rows, n;
  int64_t block_size;  // k * 2**m, divides n
  int64_t k;
  bool transpose;
  int device = -1;
};

// quantize_a4, and the stages that may come before it: each is done in float32, in the order they
// are listed, and nothing is rounded to dtype in between.
struct QuantizeA4Params {
  const void* x;      // [tokens, features], of dtype
  const float* clip;  // [1]
  uint8_t* codes;     // [tokens, ceil(features / 2)], signed nibbles
  float* scale;       // [tokens, features / group_size]
  ScalarType dtype;   // float64, float32, float16 or bfloat16
  int64_t tokens, features;
  int64_t stride;  // between tokens of x and of up, in elements; CUDA kernels know `features` only
  int64_t group_size;

  const void* up = nullptr;  // [tokens, features], of dtype: x becomes silu(x) * up; or null

  bool rmsnorm = false;               // x becomes norm_weight * x / sqrt(mean(x * x) + eps)
  const void* norm_weight = nullptr;  // [features], of norm_dtype; null: ones
  ScalarType norm_dtype = ScalarType::Float;
  float eps = 0;

  const int8_t* had_k = nullptr;  // [k, k] of +-1, or null for k = 1
  int64_t k = 1;
  int64_t block_size = 1;  // k * 2**m, divides features: x becomes x @ H; 1: no Hadamard
  int device = -1;
};

struct LinearA4Params {
  const uint8_t* a_codes;  // [tokens, ceil(in / 2)], signed nibbles
  const float* a_scale;    // [tokens, in / act_group]
  const uint8_t* weight;   // [out, packed_width(in, weight_bits)], see packing.py
  const int8_t* levels;    // [out, in / group_size, 2**weight_bits]; null if weight_bits is 4
  const uint16_t* scale;   // [out, in / group_size], float16 bits
  const void* bias;        // [out], of bias_dtype, or null
  const void* residual;    // [tokens, out], of out_dtype, is added to the rounded result; or null
  void* y;                 // [tokens, out], of out_dtype
  ScalarType bias_dtype, out_dtype;
  int64_t tokens, out_features, in_features;
  int64_t group_size;  // one of group_size and act_group divides the other
  int64_t act_group;
  int64_t block;  // the smaller of the two: inputs of one exact integer sum
  int weight_bits;
  int device = -1;
};

struct LinearW8Params {
  const void* x;          // [tokens, in], of dtype
  const int8_t* weight;   // [out, in]
  const uint16_t* scale;  // [out], float16 bits
  const void* bias;       // [out], of bias_dtype, or null
  void* y;                // [tokens, out], of dtype
  ScalarType dtype, bias_dtype;
  int64_t tokens, out_features, in_features;
  int device = -1;
};

// A tensor read through strides, all in elements; its last dimension is contiguous.
struct Strided4 {
  void* data;
  int64_t batch, head, token;
};

// Where the tokens of a call are written in a paged cache. Its tensors are [blocks, heads,
// block_tokens, ...], and `batch` of their strides is that of a block.
struct Slots {
  const int64_t* at;  // [batch, tokens]: block * block_tokens + position; negative: not written.
                      // Null: the cache is not paged.
  int64_t blocks, block_tokens;
};

// Where the keys of sequences lie in such a cache.
struct BlockTable {
  const int32_t* at;  // [batch, row]: key j of sequence b, counted behind the sinks, is key
                      // j % block_tokens of block at[b * row + j / block_tokens]. Null: the cache
                      // is not paged.
  int64_t row;
  int64_t blocks, block_tokens;
};

struct QuantizeKV4Params {
  Strided4 x;       // [batch, heads, tokens, head_dim], of dtype
  Strided4 codes;   // uint8 [batch, heads, >= start + tokens, head_dim / 2], unsigned nibbles
  Strided4 params;  // float16 [batch, heads, >= start + tokens, 2]: scale, zero-point
  ScalarType dtype;
  int64_t batch, heads, tokens, head_dim;
  int64_t start;          // token of codes and params that x's first token is written to
  const int64_t* starts;  // [batch]: instead of start, which is the most of them; or null
  Slots slots;            // instead of both
  float clip;
  int device = -1;
};

// Queries, keys and values of new tokens on their way to attention: queries and keys are turned by
// RoPE and R3; keys and values go into their caches.
struct RopeAppendKV4Params {
  const void* qkv;        // [batch, tokens, (q_heads + 2 * kv_heads) * head_dim], of dtype
  const void *cos, *sin;  // [batch, tokens, head_dim], of rope_dtype
  int64_t rope_batch;     // their stride of batch, 0 where they are broadcast
  void* q;                // [batch, q_heads, tokens, head_dim], of dtype
  Strided4 k_codes, v_codes, k_params, v_params;  // as in QuantizeKV4Params
  const int8_t* had_k;                            // [k, k] of +-1, or null for k = 1
  ScalarType dtype, rope_dtype;
  int64_t batch, tokens, q_heads, kv_heads, head_dim;
  int64_t block_size, k;  // of R3: k * 2**m, divides head_dim; 1: no R3
  int64_t start;
  const int64_t* starts;  // as in QuantizeKV4Params, and
  Slots slots;
  float clip;
  int device = -1;
};

struct AttentionKV4Params {
  Strided4 q;                   // [batch, q_heads, q_tokens, head_dim], of dtype
  Strided4 k_codes, v_codes;    // uint8 [batch, kv_heads, >= length, head_dim / 2]
  Strided4 k_params, v_params;  // float16 [batch, kv_heads, >= length, 2]
  Strided4 k_sink, v_sink;      // [batch, kv_heads, >= sinks, head_dim], of *_sink_dtype
  const bool* mask;             // [batch, q_heads, q_tokens, length] by mask_*, or null
  int64_t mask_batch, mask_head, mask_q, mask_key;  // strides, 0 where the mask is broadcast
  void* y;           // [batch, q_tokens, q_heads, head_dim], of dtype
  float* workspace;  // what attention_kv4_workspace asks for, or null
  ScalarType dtype, k_sink_dtype, v_sink_dtype;
  int64_t batch, q_heads, kv_heads, q_tokens, head_dim;
  int64_t length;
  const int64_t* starts;  // [batch]: a sequence has starts + q_tokens keys, length at most; or null
  BlockTable table;       // of the caches
  int64_t sinks;          // the first keys, read from k_sink and v_sink; a paged cache lacks them
  bool causal;
  float scaling;
  int device = -1;
};

// y += x.
struct AddParams {
  const void* x;  // [n], of dtype
  void* y;        // [n], of dtype
  ScalarType dtype;
  int64_t n;
};

}  // namespace w2a4
