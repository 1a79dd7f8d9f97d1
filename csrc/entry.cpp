// Entry points: check the arguments, allocate the result, launch the kernel.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "ops.h"

namespace w2a4 {
namespace {

constexpr ScalarType kU8 = ScalarType::Byte;
constexpr ScalarType kI8 = ScalarType::Char;
constexpr ScalarType kF16 = ScalarType::Half;
constexpr ScalarType kF32 = ScalarType::Float;

Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype);
}

// Shape of `t` with its last dimension replaced.
std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
  shape.back() = last;
  return shape;
}

// Rows of a tensor seen as [rows, last dimension]; right also when the last dimension is empty.
int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

void check_bias(const Check& check, const std::optional<Tensor>& bias, int64_t out_features) {
  if (!bias) return;
  check.floating(*bias, "bias");
  check.shape(*bias, "bias", {out_features}, "[out_features]");
  check.contiguous(*bias, "bias");
}

Tensor linear_a4(const Check& check, int weight_bits, const Tensor& a_codes, const Tensor& a_scale,
                 const Tensor& weight, const Tensor* levels, const Tensor& scale,
                 const std::optional<Tensor>& bias, int64_t group_size, ScalarType out_dtype) {
  check.dtype(a_codes, "a_codes", {kU8});
  check.dtype(a_scale, "a_scale", {kF32});
  check.dtype(weight, "weight", {kU8});
  check.dtype(scale, "scale", {kF16});
  check.that(group_size >= 1, "group_size=", group_size, ", expected at least 1");
  check.that(scale.dim() == 2, "scale has shape ", shape_name(scale),
             ", expected [out, in / group_size]");
  const int64_t out_features = scale.size(0), groups = scale.size(1);
  check.that(groups >= 1, "scale has shape ", shape_name(scale),
             ", expected at least one group a row");
  // An exact sum of `in` products of at most 128 * 8 must fit 32 bits.
  check.that(group_size <= (std::numeric_limits<int32_t>::max() / 1024) / groups,
             "group_size=", group_size, " times ", groups,
             " groups is more inputs than a 32-bit sum can hold (2097151)");
  const int64_t in_features = groups * group_size;
  check.shape(weight, "weight", {out_features, ceil_div(in_features * weight_bits, 8)},
              weight_bits == 2 ? "[out, ceil(in / 4)], in = groups of scale * group_size"
                               : "[out, ceil(in / 2)], in = groups of scale * group_size");
  if (levels) {
    check.dtype(*levels, "levels", {kI8});
    check.shape(*levels, "levels", {out_features, groups, 4}, "[out, in / group_size, 4]");
    check.contiguous(*levels, "levels");
  }
  check.at_least_1d(a_codes, "a_codes");
  check.that(a_codes.size(-1) == ceil_div(in_features, 2), "a_codes has shape ",
             shape_name(a_codes), ", expected [..., ", ceil_div(in_features, 2),
             "] for in_features=", in_features);
  check.at_least_1d(a_scale, "a_scale");
  const int64_t act_groups = a_scale.size(-1), tokens = rows_of(a_codes);
  check.that(act_groups >= 1 && in_features % act_groups == 0, "a_scale has shape ",
             shape_name(a_scale), ", its last dimension does not divide in_features=", in_features);
  check.that(rows_of(a_scale) == tokens && a_scale.dim() == a_codes.dim(), "a_scale has shape ",
             shape_name(a_scale), ", expected the tokens of a_codes, which has shape ",
             shape_name(a_codes));
  const int64_t act_group = in_features / act_groups;
  check.that(group_size % act_group == 0 || act_group % group_size == 0, "group_size=", group_size,
             " and the activation group ", act_group, " of a_scale: one must divide the other");
  check_bias(check, bias, out_features);
  for (auto [t, name] : {std::pair{&a_codes, "a_codes"},
                         {&a_scale, "a_scale"},
                         {&weight, "weight"},
                         {&scale, "scale"}})
    check.contiguous(*t, name);
  check.that(out_dtype == kF32 || out_dtype == kF16 || out_dtype == ScalarType::BFloat16 ||
                 out_dtype == ScalarType::Double,
             "out_dtype is ", dtype_name(out_dtype),
             ", expected float32, float16, bfloat16 or float64");
  Tensor y = empty(with_last(a_codes, out_features), out_dtype);
  LinearA4Params p{};
  p.a_codes = static_cast<const uint8_t*>(a_codes.data_ptr());
  p.a_scale = static_cast<const float*>(a_scale.data_ptr());
  p.weight = static_cast<const uint8_t*>(weight.data_ptr());
  p.levels = levels ? static_cast<const int8_t*>(levels->data_ptr()) : nullptr;
  p.scale = static_cast<const uint16_t*>(scale.data_ptr());
  p.bias = bias ? bias->data_ptr() : nullptr;
  p.bias_dtype = bias ? bias->scalar_type() : kF32;
  p.y = y.data_ptr();
  p.out_dtype = out_dtype;
  p.tokens = tokens;
  p.out_features = out_features;
  p.in_features = in_features;
  p.group_size = group_size;
  p.act_group = act_group;
  p.block = std::min(group_size, act_group);
  p.weight_bits = weight_bits;
  cpu::linear_a4(p);
  return y;
}

}  // namespace

Tensor hadamard(const Tensor& x, const std::optional<Tensor>& had_k, int64_t block_size,
                bool transpose) {
  const Check check("hadamard");
  check.floating(x, "x");
  check.at_least_1d(x, "x");
  check.contiguous(x, "x");
  int64_t k = 1;
  if (had_k) {
    check.dtype(*had_k, "had_k", {kI8});
    check.that(had_k->dim() == 2 && had_k->size(0) == had_k->size(1) && had_k->size(0) >= 1,
               "had_k has shape ", shape_name(*had_k), ", expected a square matrix [K, K]");
    check.contiguous(*had_k, "had_k");
    k = had_k->size(0);
  }
  const int64_t n = x.size(-1);
  const int64_t power = block_size / k;
  check.that(block_size >= 1 && block_size % k == 0 && (power & (power - 1)) == 0,
             "block_size=", block_size, ", expected K times a power of two with K=", k,
             " of had_k");
  check.that(n % block_size == 0, "block_size=", block_size,
             " does not divide the last dimension of x, shape ", shape_name(x));
  Tensor y = empty(with_last(x, n), x.scalar_type());
  HadamardParams p{};
  p.x = x.data_ptr();
  p.y = y.data_ptr();
  p.had_k = had_k ? static_cast<const int8_t*>(had_k->data_ptr()) : nullptr;
  p.dtype = x.scalar_type();
  p.rows = rows_of(x);
  p.n = n;
  p.block_size = block_size;
  p.k = k;
  p.transpose = transpose;
  cpu::hadamard(p);
  return y;
}

std::tuple<Tensor, Tensor> quantize_a4(const Tensor& x, const Tensor& clip, int64_t group_size) {
  const Check check("quantize_a4");
  check.floating(x, "x");
  check.at_least_1d(x, "x");
  check.contiguous(x, "x");
  check.dtype(clip, "clip", {kF32});
  check.shape(clip, "clip", {1}, "[1]");
  const int64_t features = x.size(-1);
  check.that(features >= 1, "x has shape ", shape_name(x), ", expected at least one feature");
  check.that(group_size == -1 || (group_size >= 1 && features % group_size == 0),
             "group_size=", group_size, " does not divide the last dimension of x, shape ",
             shape_name(x), "; -1 is the whole token");
  if (group_size == -1) group_size = features;
  Tensor codes = empty(with_last(x, ceil_div(features, 2)), kU8);
  Tensor scale = empty(with_last(x, features / group_size), kF32);
  QuantizeA4Params p{};
  p.x = x.data_ptr();
  p.clip = static_cast<const float*>(clip.data_ptr());
  p.codes = static_cast<uint8_t*>(codes.data_ptr());
  p.scale = static_cast<float*>(scale.data_ptr());
  p.dtype = x.scalar_type();
  p.tokens = rows_of(x);
  p.features = features;
  p.group_size = group_size;
  cpu::quantize_a4(p);
  return {codes, scale};
}

Tensor linear_w2a4(const Tensor& a_codes, const Tensor& a_scale, const Tensor& weight,
                   const Tensor& levels, const Tensor& scale, const std::optional<Tensor>& bias,
                   int64_t group_size, ScalarType out_dtype) {
  return linear_a4(Check("linear_w2a4"), 2, a_codes, a_scale, weight, &levels, scale, bias,
                   group_size, out_dtype);
}

Tensor linear_w4a4(const Tensor& a_codes, const Tensor& a_scale, const Tensor& weight,
                   const Tensor& scale, const std::optional<Tensor>& bias, int64_t group_size,
                   ScalarType out_dtype) {
  return linear_a4(Check("linear_w4a4"), 4, a_codes, a_scale, weight, nullptr, scale, bias,
                   group_size, out_dtype);
}

Tensor linear_w8(const Tensor& x, const Tensor& weight, const Tensor& scale,
                 const std::optional<Tensor>& bias) {
  const Check check("linear_w8");
  check.floating(x, "x");
  check.at_least_1d(x, "x");
  check.contiguous(x, "x");
  check.dtype(weight, "weight", {kI8});
  check.that(weight.dim() == 2, "weight has shape ", shape_name(weight), ", expected [out, in]");
  check.contiguous(weight, "weight");
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  check.that(x.size(-1) == in_features, "x has shape ", shape_name(x), ", expected [..., ",
             in_features, "] for weight of shape ", shape_name(weight));
  check.dtype(scale, "scale", {kF16});
  check.shape(scale, "scale", {out_features}, "[out]");
  check.contiguous(scale, "scale");
  check_bias(check, bias, out_features);
  Tensor y = empty(with_last(x, out_features), x.scalar_type());
  LinearW8Params p{};
  p.x = x.data_ptr();
  p.weight = static_cast<const int8_t*>(weight.data_ptr());
  p.scale = static_cast<const uint16_t*>(scale.data_ptr());
  p.bias = bias ? bias->data_ptr() : nullptr;
  p.y = y.data_ptr();
  p.dtype = x.scalar_type();
  p.bias_dtype = bias ? bias->scalar_type() : kF32;
  p.tokens = rows_of(x);
  p.out_features = out_features;
  p.in_features = in_features;
  cpu::linear_w8(p);
  return y;
}

namespace {

// Packed cache: codes uint8 [batch, heads, capacity, head_dim / 2], params float16 [..., 2].
void check_cache(const Check& check, const Tensor& codes, const char* codes_name,
                 const Tensor& params, const char* params_name, int64_t batch, int64_t heads,
                 int64_t least, int64_t head_dim) {
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

QuantizeKV4Params kv4_params(const Check& check, const Tensor& x, double clip) {
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
  const Check check("quantize_kv4");
  QuantizeKV4Params p = kv4_params(check, x, clip);
  Tensor codes = empty(with_last(x, p.head_dim / 2), kU8);
  Tensor params = empty(with_last(x, 2), kF16);
  p.codes = check.strided(codes, "codes");
  p.params = check.strided(params, "params");
  cpu::quantize_kv4(p);
  return {codes, params};
}

void append_kv4(const Tensor& x, const Tensor& codes, const Tensor& params, int64_t start,
                double clip) {
  const Check check("append_kv4");
  QuantizeKV4Params p = kv4_params(check, x, clip);
  check_cache(check, codes, "codes", params, "params", p.batch, p.heads, 0, p.head_dim);
  const int64_t capacity = std::min(codes.size(2), params.size(2));
  check.that(start >= 0 && start <= capacity - p.tokens, "start=", start, " with ", p.tokens,
             " tokens of x does not fit a cache of capacity ", capacity);
  p.codes = check.strided(codes, "codes");
  p.params = check.strided(params, "params");
  p.start = start;
  cpu::quantize_kv4(p);
}

Tensor attention_kv4(const Tensor& q, const Tensor& k_codes, const Tensor& k_params,
                     const Tensor& v_codes, const Tensor& v_params, int64_t length,
                     const std::optional<Tensor>& mask, bool causal, double scaling,
                     const std::optional<Tensor>& k_sink, const std::optional<Tensor>& v_sink) {
  const Check check("attention_kv4");
  AttentionKV4Params p{};
  check.floating(q, "q");
  p.q = check.strided(q, "q");
  p.dtype = q.scalar_type();
  p.batch = q.size(0);
  p.q_heads = q.size(1);
  p.q_tokens = q.size(2);
  p.head_dim = q.size(3);
  check.that(p.head_dim >= 2 && p.head_dim % 2 == 0, "q has shape ", shape_name(q),
             ", expected an even head_dim of at least 2");
  check.that(k_codes.dim() == 4, "k_codes has shape ", shape_name(k_codes),
             ", expected [batch, kv_heads, capacity, head_dim / 2]");
  p.kv_heads = k_codes.size(1);
  check.that(p.kv_heads >= 1 && p.q_heads % p.kv_heads == 0, "q has ", p.q_heads,
             " heads and k_codes ", p.kv_heads, "; the second must divide the first");
  check.that(length >= 0, "length=", length, ", expected at least 0");
  check_cache(check, k_codes, "k_codes", k_params, "k_params", p.batch, p.kv_heads, length,
              p.head_dim);
  check_cache(check, v_codes, "v_codes", v_params, "v_params", p.batch, p.kv_heads, length,
              p.head_dim);
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
  Tensor y = empty({p.batch, p.q_tokens, p.q_heads, p.head_dim}, p.dtype);
  p.y = y.data_ptr();
  p.length = length;
  p.causal = causal;
  p.scaling = static_cast<float>(scaling);
  cpu::attention_kv4(p);
  return y;
}

}  // namespace w2a4
