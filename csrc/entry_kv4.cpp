// Entry points of the ops of the 4-bit KV cache, on each device.
#include <algorithm>
#include <cmath>

#include "backend.h"
#include "checks.h"
#include "ops.h"
#include "registration.h"
#include "tensors.h"

namespace w2a4 {
namespace {

// Packed cache: codes uint8 [batch, heads, capacity, head_dim / 2], params float16 [..., 2]. A
// paged one has blocks in place of sequences.
void check_cache(Check& check, const Tensor& codes, const char* codes_name, const Tensor& params,
                 const char* params_name, int64_t batch, int64_t heads, int64_t least,
                 int64_t head_dim) {
  check.dtype(codes, codes_name, {kU8});
  check.dtype(params, params_name, {kF16});
  for (auto [t, name, last] :
       {std::tuple{&codes, codes_name, head_dim / 2}, {&params, params_name, int64_t{2}}}) {
    check.that(t->dim() == 4 && t->size(0) == batch && t->size(1) == heads && t->size(2) >= least &&
                   t->size(3) == last,
               name, " has shape ", shape_name(*t), ", expected [", batch, ", ", heads,
               ", >= ", least, ", ", last, "] = [batch, kv_heads, capacity, ",
               last == 2 ? "2]" : "head_dim / 2]");
  }
}

// A cache that `tokens` of `x` are written into from `start` on, or, a paged one, into slots.
void check_written_cache(Check& check, const Tensor& codes, const char* codes_name,
                         const Tensor& params, const char* params_name, int64_t batch,
                         int64_t heads, int64_t head_dim, int64_t start, int64_t tokens,
                         const char* x_name, bool paged) {
  const int64_t rows = paged && codes.dim() == 4 ? codes.size(0) : batch;
  check_cache(check, codes, codes_name, params, params_name, rows, heads, 0, head_dim);
  const int64_t capacity = std::min(codes.size(2), params.size(2));
  if (paged)
    check.that(codes.size(2) == params.size(2), params_name, " has shape ", shape_name(params),
               ", expected blocks of ", codes.size(2), " tokens like ", codes_name);
  else
    check.that(start >= 0 && start <= capacity - tokens, "start=", start, " with ", tokens,
               " tokens of ", x_name, " does not fit ", codes_name, " of capacity ", capacity);
}

// Data of `starts`, int64 [batch]: tokens that each sequence has had, `most` at most. On a CUDA
// device they cannot be looked at here; kernels neither read nor write beyond what `most` allows.
const int64_t* check_starts(Check& check, const std::optional<Tensor>& starts, int64_t batch,
                            const char* most_name, int64_t most) {
  if (!starts) return nullptr;
  check.dtype(*starts, "starts", {ScalarType::Long});
  check.shape(*starts, "starts", {batch}, "[batch]");
  check.contiguous(*starts, "starts");
  const auto* data = static_cast<const int64_t*>(starts->data_ptr());
  if (starts->is_cpu())
    for (int64_t b = 0; b < batch; ++b)
      check.that(data[b] >= 0 && data[b] <= most, "starts[", b, "]=", data[b], ", expected 0 to ",
                 most, " of ", most_name);
  return data;
}

// Where the tokens of a call go in a paged cache, whose blocks `codes` has; of a call that has
// neither start nor starts.
Slots check_slots(Check& check, const std::optional<Tensor>& slots, const Tensor& codes,
                  int64_t batch, int64_t tokens, int64_t start,
                  const std::optional<Tensor>& starts) {
  if (!slots) return {};
  check.that(start == 0 && !starts, "slots say where tokens go, and so do start=", start,
             starts ? " and starts" : "", "; pass start=0 and no starts");
  check.dtype(*slots, "slots", {ScalarType::Long});
  check.that((slots->dim() == 2 && slots->size(0) == batch && slots->size(1) == tokens) ||
                 (slots->dim() == 1 && slots->size(0) == batch * tokens),
             "slots has shape ", shape_name(*slots), ", expected [", batch, ", ", tokens,
             "] = [batch, tokens], or both in one");
  check.contiguous(*slots, "slots");
  const Slots found{static_cast<const int64_t*>(slots->data_ptr()), codes.size(0), codes.size(2)};
  if (slots->is_cpu())
    for (int64_t i = 0; i < batch * tokens; ++i)
      check.that(found.at[i] < found.blocks * found.block_tokens, "slots holds ", found.at[i],
                 " for token ", i % tokens, " of sequence ", i / tokens, ", expected less than ",
                 found.blocks * found.block_tokens, " of ", found.blocks, " blocks of ",
                 found.block_tokens, ", or a negative number for a token that is not written");
  return found;
}

// Where `length` keys of each sequence lie, or those that it has, in a paged cache, but for sinks.
BlockTable check_block_table(Check& check, const std::optional<Tensor>& table, const Tensor& codes,
                             int64_t batch, int64_t length, int64_t sinks) {
  if (!table) return {};
  check.dtype(*table, "block_table", {ScalarType::Int});
  check.that(table->dim() == 2 && table->size(0) == batch, "block_table has shape ",
             shape_name(*table), ", expected [", batch, ", blocks of a sequence]");
  check.that(table->size(1) <= 1 || table->stride(1) == 1, "block_table has stride ",
             table->stride(1), " in its last dimension, expected 1 (contiguous)");
  check.that(length - sinks <= table->size(1) * codes.size(2), "length=", length,
             ", but block_table has ", table->size(1), " blocks of ", codes.size(2),
             " tokens for each sequence, and ", sinks, " sinks stand before them");
  return {static_cast<const int32_t*>(table->data_ptr()), table->stride(0), codes.size(0),
          codes.size(2)};
}

// Entries of the table that kernels read; on a CUDA device they cannot be looked at here.
void check_blocks(const Check& check, const AttentionKV4Params& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t keys = (p.starts ? p.starts[b] + p.q_tokens : p.length) - p.sinks;
    for (int64_t i = 0; i * p.table.block_tokens < keys; ++i) {
      const int32_t block = p.table.at[b * p.table.row + i];
      check.that(block >= 0 && block < p.table.blocks, "block_table[", b, ", ", i, "]=", block,
                 ", expected 0 to ", p.table.blocks - 1, ", the blocks of the caches; sequence ", b,
                 " has ", keys, " keys in them");
    }
  }
}

QuantizeKV4Params kv4_params(Check& check, const Tensor& x, double clip) {
  check.floating(x, "x");
  QuantizeKV4Params p{};
  p.x = check.strided(x, "x");
  check.that(x.size(3) >= 2 && x.size(3) % 2 == 0, "x has shape ", shape_name(x),
             ", expected an even head_dim of at least 2");
  p.dtype = x.scalar_type();
  p.batch = x.size(0);
  p.heads = x.size(1);
  p.tokens = x.size(2);
  p.head_dim = x.size(3);
  p.clip = static_cast<float>(clip);
  return p;
}

}  // namespace

std::tuple<Tensor, Tensor> quantize_kv4(const Tensor& x, double clip) {
  Check check("quantize_kv4");
  QuantizeKV4Params p = kv4_params(check, x, clip);
  Tensor codes = empty(x, with_last(x, p.head_dim / 2), kU8);
  Tensor params = empty(x, with_last(x, 2), kF16);
  p.codes = check.strided(codes, "codes");
  p.params = check.strided(params, "params");
  const OnDeviceOf device(x);
  p.device = device.index;
  kernels::quantize_kv4(p);
  return {codes, params};
}

void append_kv4(const Tensor& x, const Tensor& codes, const Tensor& params, int64_t start,
                double clip, const std::optional<Tensor>& starts,
                const std::optional<Tensor>& slots) {
  Check check("append_kv4");
  QuantizeKV4Params p = kv4_params(check, x, clip);
  check_written_cache(check, codes, "codes", params, "params", p.batch, p.heads, p.head_dim, start,
                      p.tokens, "x", slots.has_value());
  p.codes = check.strided(codes, "codes");
  p.params = check.strided(params, "params");
  check.written({{&codes, "codes"}, {&params, "params"}}, {{&x, "x"}});
  p.start = start;
  p.slots = check_slots(check, slots, codes, p.batch, p.tokens, start, starts);
  p.starts = check_starts(check, starts, p.batch, "start", start);
  const OnDeviceOf device(x);
  p.device = device.index;
  kernels::quantize_kv4(p);
}

RopeAppendKV4Params rope_append_kv4_params(Check& check, int64_t batch, int64_t tokens,
                                           int64_t width, ScalarType dtype, const Tensor& cos,
                                           const Tensor& sin, const std::optional<Tensor>& had_k,
                                           int64_t block_size, const Tensor& k_codes,
                                           const Tensor& k_params, const Tensor& v_codes,
                                           const Tensor& v_params, int64_t start, double clip,
                                           const std::optional<Tensor>& starts,
                                           const std::optional<Tensor>& slots) {
  RopeAppendKV4Params p{};
  check.floating(cos, "cos");
  check.that(cos.dim() == 3 && (cos.size(0) == batch || cos.size(0) == 1) &&
                 cos.size(1) == tokens && cos.size(2) >= 2 && cos.size(2) % 2 == 0,
             "cos has shape ", shape_name(cos), ", expected [", batch, " or 1, ", tokens,
             ", head_dim] with an even head_dim");
  check.contiguous(cos, "cos");
  p.batch = batch;
  p.tokens = tokens;
  p.head_dim = cos.size(2);
  check.dtype(sin, "sin", {cos.scalar_type()});
  check.shape(sin, "sin", {cos.size(0), p.tokens, p.head_dim}, "the shape of cos");
  check.contiguous(sin, "sin");
  check.that(k_codes.dim() == 4, "k_codes has shape ", shape_name(k_codes),
             ", expected [batch, kv_heads, capacity, head_dim / 2]");
  p.kv_heads = k_codes.size(1);
  p.q_heads = width / p.head_dim - 2 * p.kv_heads;
  check.that(width % p.head_dim == 0 && p.kv_heads >= 1 && p.q_heads >= 1, "qkv has shape [", batch,
             ", ", tokens, ", ", width, "], expected a last dimension of (q_heads + 2 * ",
             p.kv_heads, ") * ", p.head_dim, " with at least one query head");
  for (auto [codes, codes_name, params, params_name] :
       {std::tuple{&k_codes, "k_codes", &k_params, "k_params"},
        {&v_codes, "v_codes", &v_params, "v_params"}})
    check_written_cache(check, *codes, codes_name, *params, params_name, p.batch, p.kv_heads,
                        p.head_dim, start, p.tokens, "qkv", slots.has_value());
  if (slots)
    check.that(v_codes.size(0) == k_codes.size(0) && v_codes.size(2) == k_codes.size(2),
               "v_codes has shape ", shape_name(v_codes),
               ", expected the blocks of k_codes, shape ", shape_name(k_codes));
  p.k_codes = check.strided(k_codes, "k_codes");
  p.k_params = check.strided(k_params, "k_params");
  p.v_codes = check.strided(v_codes, "v_codes");
  p.v_params = check.strided(v_params, "v_params");
  p.k = check_hadamard(check, {"cos", &cos}, p.head_dim, had_k, block_size);
  p.had_k = had_k_data(had_k);
  p.block_size = block_size;
  p.cos = cos.data_ptr();
  p.sin = sin.data_ptr();
  p.rope_batch = cos.size(0) == 1 ? 0 : p.tokens * p.head_dim;
  p.dtype = dtype;
  p.rope_dtype = cos.scalar_type();
  p.start = start;
  p.slots = check_slots(check, slots, k_codes, p.batch, p.tokens, start, starts);
  p.starts = check_starts(check, starts, p.batch, "start", start);
  p.clip = static_cast<float>(clip);
  return p;
}

AttentionKV4Params attention_kv4_params(
    Check& check, int64_t batch, int64_t q_heads, int64_t q_tokens, int64_t head_dim,
    ScalarType dtype, const Tensor& k_codes, const Tensor& k_params, const Tensor& v_codes,
    const Tensor& v_params, int64_t length, const std::optional<Tensor>& mask, bool causal,
    double scaling, const std::optional<Tensor>& k_sink, const std::optional<Tensor>& v_sink,
    const std::optional<Tensor>& starts, const std::optional<Tensor>& block_table) {
  AttentionKV4Params p{};
  p.dtype = dtype;
  p.batch = batch;
  p.q_heads = q_heads;
  p.q_tokens = q_tokens;
  p.head_dim = head_dim;
  check.that(k_codes.dim() == 4, "k_codes has shape ", shape_name(k_codes),
             ", expected [batch, kv_heads, capacity, head_dim / 2]");
  p.kv_heads = k_codes.size(1);
  check.that(p.kv_heads >= 1 && p.q_heads % p.kv_heads == 0, "q has ", p.q_heads,
             " heads and k_codes ", p.kv_heads, "; the second must divide the first");
  check.that(length >= 0, "length=", length, ", expected at least 0");
  check.that(std::isfinite(static_cast<float>(scaling)), "scaling=", scaling,
             ", expected a finite float32 number");
  const int64_t rows = block_table ? k_codes.size(0) : p.batch;
  const int64_t least = block_table ? k_codes.size(2) : length;
  check_cache(check, k_codes, "k_codes", k_params, "k_params", rows, p.kv_heads, least, p.head_dim);
  check_cache(check, v_codes, "v_codes", v_params, "v_params", rows, p.kv_heads, least, p.head_dim);
  p.k_codes = check.strided(k_codes, "k_codes");
  p.k_params = check.strided(k_params, "k_params");
  p.v_codes = check.strided(v_codes, "v_codes");
  p.v_params = check.strided(v_params, "v_params");
  if (mask) {
    check.dtype(*mask, "mask", {ScalarType::Bool});
    check.that(mask->dim() == 4 && (mask->size(0) == p.batch || mask->size(0) == 1) &&
                   (mask->size(1) == p.q_heads || mask->size(1) == 1) &&
                   mask->size(2) == p.q_tokens && mask->size(3) == length,
               "mask has shape ", shape_name(*mask), ", expected [", p.batch, " or 1, ", p.q_heads,
               " or 1, ", p.q_tokens, ", ", length, "] = [batch, q_heads, q_tokens, length]");
    p.mask = static_cast<const bool*>(mask->data_ptr());
    p.mask_batch = mask->size(0) == 1 ? 0 : mask->stride(0);
    p.mask_head = mask->size(1) == 1 ? 0 : mask->stride(1);
    p.mask_q = mask->stride(2);
    p.mask_key = mask->stride(3);
  }
  check.that(k_sink.has_value() == v_sink.has_value(), k_sink ? "v_sink" : "k_sink",
             " is missing; pass both k_sink and v_sink or neither");
  if (k_sink) {
    for (auto [t, name] : {std::pair{&*k_sink, "k_sink"}, {&*v_sink, "v_sink"}}) {
      check.floating(*t, name);
      check.that(t->dim() == 4 && t->size(0) == p.batch && t->size(1) == p.kv_heads &&
                     t->size(2) == k_sink->size(2) && t->size(3) == p.head_dim,
                 name, " has shape ", shape_name(*t), ", expected [", p.batch, ", ", p.kv_heads,
                 ", s, ", p.head_dim, "] = [batch, kv_heads, s, head_dim]");
    }
    p.k_sink = check.strided(*k_sink, "k_sink");
    p.v_sink = check.strided(*v_sink, "v_sink");
    p.k_sink_dtype = k_sink->scalar_type();
    p.v_sink_dtype = v_sink->scalar_type();
    p.sinks = std::min(length, k_sink->size(2));
  }
  p.length = length;
  p.starts = check_starts(check, starts, p.batch, "length - q_tokens", length - p.q_tokens);
  p.table = check_block_table(check, block_table, k_codes, p.batch, length, p.sinks);
  if (p.table.at && k_codes.is_cpu()) check_blocks(check, p);
  p.causal = causal;
  p.scaling = static_cast<float>(scaling);
  return p;
}

Tensor rope_append_kv4(const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                       const std::optional<Tensor>& had_k, int64_t block_size,
                       const Tensor& k_codes, const Tensor& k_params, const Tensor& v_codes,
                       const Tensor& v_params, int64_t start, double clip,
                       const std::optional<Tensor>& starts, const std::optional<Tensor>& slots) {
  Check check("rope_append_kv4");
  check.floating(qkv, "qkv");
  check.that(qkv.dim() == 3, "qkv has shape ", shape_name(qkv),
             ", expected [batch, tokens, (q_heads + 2 * kv_heads) * head_dim]");
  check.contiguous(qkv, "qkv");
  RopeAppendKV4Params p = rope_append_kv4_params(
      check, qkv.size(0), qkv.size(1), qkv.size(2), qkv.scalar_type(), cos, sin, had_k, block_size,
      k_codes, k_params, v_codes, v_params, start, clip, starts, slots);
  check.written({{&k_codes, "k_codes"},
                 {&k_params, "k_params"},
                 {&v_codes, "v_codes"},
                 {&v_params, "v_params"}},
                {{&qkv, "qkv"}, {&cos, "cos"}, {&sin, "sin"}});
  Tensor q = empty(qkv, {p.batch, p.q_heads, p.tokens, p.head_dim}, qkv.scalar_type());
  p.qkv = qkv.data_ptr();
  p.q = q.data_ptr();
  const OnDeviceOf device(qkv);
  p.device = device.index;
  kernels::rope_append_kv4(p);
  return q;
}

Tensor attention_kv4(const Tensor& q, const Tensor& k_codes, const Tensor& k_params,
                     const Tensor& v_codes, const Tensor& v_params, int64_t length,
                     const std::optional<Tensor>& mask, bool causal, double scaling,
                     const std::optional<Tensor>& k_sink, const std::optional<Tensor>& v_sink,
                     const std::optional<Tensor>& starts,
                     const std::optional<Tensor>& block_table) {
  Check check("attention_kv4");
  check.floating(q, "q");
  const Strided4 queries = check.strided(q, "q");
  check.that(q.size(3) >= 2 && q.size(3) % 2 == 0, "q has shape ", shape_name(q),
             ", expected an even head_dim of at least 2");
  AttentionKV4Params p = attention_kv4_params(
      check, q.size(0), q.size(1), q.size(2), q.size(3), q.scalar_type(), k_codes, k_params,
      v_codes, v_params, length, mask, causal, scaling, k_sink, v_sink, starts, block_table);
  p.q = queries;
  Tensor y = empty(q, {p.batch, p.q_tokens, p.q_heads, p.head_dim}, p.dtype);
  p.y = y.data_ptr();
  const OnDeviceOf device(q);
  std::optional<Tensor> workspace;
  p.device = device.index;
  if (const int64_t floats = kernels::attention_kv4_workspace(p)) {
    workspace = empty(q, {floats}, kF32);
    p.workspace = static_cast<float*>(workspace->data_ptr());
  }
  kernels::attention_kv4(p);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(w2a4, W2A4_DEVICE, m) {
  W2A4_IMPL(m, quantize_kv4);
  W2A4_IMPL(m, append_kv4);
  W2A4_IMPL(m, rope_append_kv4);
  W2A4_IMPL(m, attention_kv4);
}

}  // namespace w2a4
