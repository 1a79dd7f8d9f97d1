// Entry points of the ops that have CPU and CUDA kernels: compiled once for each, see backend.h.
#include <algorithm>
#include <limits>

#include "backend.h"
#include "checks.h"
#include "ops.h"
#include "registration.h"
#include "tensors.h"

namespace w2a4 {
LinearA4Params linear_a4_params(Check& check, int weight_bits, const Tensor& weight,
                                const Tensor* levels, const Tensor& scale,
                                const std::optional<Tensor>& bias, int64_t group_size) {
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
  const int64_t width = weight_bits == 4   ? ceil_div(in_features, 2)
                        : weight_bits == 3 ? ceil_div(in_features, 4) + ceil_div(in_features, 8)
                                           : ceil_div(in_features, 4);
  check.shape(weight, "weight", {out_features, width},
              weight_bits == 4 ? "[out, ceil(in / 2)], in = groups of scale * group_size"
              : weight_bits == 3
                  ? "[out, ceil(in / 4) + ceil(in / 8)], in = groups of scale * group_size"
                  : "[out, ceil(in / 4)], in = groups of scale * group_size");
  if (levels) {
    check.dtype(*levels, "levels", {kI8});
    check.shape(*levels, "levels", {out_features, groups, int64_t{1} << weight_bits},
                weight_bits == 3 ? "[out, in / group_size, 8]" : "[out, in / group_size, 4]");
    check.contiguous(*levels, "levels");
  }
  check_bias(check, bias, out_features);
  check.contiguous(weight, "weight");
  check.contiguous(scale, "scale");
  LinearA4Params p{};
  p.weight = static_cast<const uint8_t*>(weight.data_ptr());
  p.levels = levels ? static_cast<const int8_t*>(levels->data_ptr()) : nullptr;
  p.scale = static_cast<const uint16_t*>(scale.data_ptr());
  p.bias = bias ? bias->data_ptr() : nullptr;
  p.bias_dtype = bias ? bias->scalar_type() : kF32;
  p.out_features = out_features;
  p.in_features = in_features;
  p.group_size = group_size;
  p.weight_bits = weight_bits;
  return p;
}

void set_act_group(const Check& check, LinearA4Params& p, int64_t act_group) {
  p.act_group = act_group == -1 ? p.in_features : act_group;
  check.that(
      p.act_group >= 1 && (p.group_size % p.act_group == 0 || p.act_group % p.group_size == 0),
      "group_size=", p.group_size, " and the activation group ", p.act_group,
      " of a_scale: one must divide the other");
  p.block = std::min(p.group_size, p.act_group);
}

QuantizeA4Params quantize_a4_params(Check& check, const Activation& x, const Tensor& clip,
                                    ScalarType dtype, int64_t tokens, int64_t features,
                                    int64_t group_size) {
  check.dtype(clip, "clip", {kF32});
  check.shape(clip, "clip", {1}, "[1]");
  check.that(group_size == -1 || (group_size >= 1 && features % group_size == 0),
             "group_size=", group_size, " does not divide ", x, "; -1 is the whole token");
  QuantizeA4Params p{};
  p.clip = static_cast<const float*>(clip.data_ptr());
  p.dtype = dtype;
  p.tokens = tokens;
  p.features = p.stride = features;
  p.group_size = group_size == -1 ? features : group_size;
  return p;
}

void set_rmsnorm(Check& check, QuantizeA4Params& p, const std::optional<Tensor>& weight,
                 double eps) {
  if (weight) {
    check.floating(*weight, "weight");
    check.shape(*weight, "weight", {p.features}, "[last dimension of x]");
    check.contiguous(*weight, "weight");
    p.norm_weight = weight->data_ptr();
    p.norm_dtype = weight->scalar_type();
  }
  check.that(eps >= 0, "eps=", eps, ", expected at least 0");
  p.rmsnorm = true;
  p.eps = static_cast<float>(eps);
}

void set_hadamard(Check& check, QuantizeA4Params& p, const Activation& x,
                  const std::optional<Tensor>& had_k, int64_t block_size) {
  p.k = check_hadamard(check, x, p.features, had_k, block_size);
  check.that(block_size > 1 || !had_k, "block_size=", block_size,
             " is no transform, but had_k has ", "shape [1, 1]; pass had_k=None");
  p.had_k = had_k_data(had_k);
  p.block_size = block_size;
}

namespace {

Tensor linear_a4(Check& check, int weight_bits, const Tensor& a_codes, const Tensor& a_scale,
                 const Tensor& weight, const Tensor* levels, const Tensor& scale,
                 const std::optional<Tensor>& bias, int64_t group_size, ScalarType out_dtype,
                 const std::optional<Tensor>& residual) {
  check.dtype(a_codes, "a_codes", {kU8});
  check.dtype(a_scale, "a_scale", {kF32});
  check.at_least_1d(a_codes, "a_codes");
  check.at_least_1d(a_scale, "a_scale");
  const int64_t act_groups = a_scale.size(-1), tokens = rows_of(a_codes);
  LinearA4Params p = linear_a4_params(check, weight_bits, weight, levels, scale, bias, group_size);
  check.that(act_groups >= 1 && p.in_features % act_groups == 0, "a_scale has shape ",
             shape_name(a_scale),
             ", its last dimension does not divide in_features=", p.in_features);
  set_act_group(check, p, p.in_features / act_groups);
  check.that(a_codes.size(-1) == ceil_div(p.in_features, 2), "a_codes has shape ",
             shape_name(a_codes), ", expected [..., ", ceil_div(p.in_features, 2),
             "] for in_features=", p.in_features);
  check.that(rows_of(a_scale) == tokens && a_scale.dim() == a_codes.dim(), "a_scale has shape ",
             shape_name(a_scale), ", expected the tokens of a_codes, which has shape ",
             shape_name(a_codes));
  check.contiguous(a_codes, "a_codes");
  check.contiguous(a_scale, "a_scale");
  check.that(out_dtype == kF32 || out_dtype == kF16 || out_dtype == ScalarType::BFloat16 ||
                 out_dtype == ScalarType::Double,
             "out_dtype is ", dtype_name(out_dtype),
             ", expected float32, float16, bfloat16 or float64");
  const OnDeviceOf device(a_codes);
  Tensor y = empty(a_codes, with_last(a_codes, p.out_features), out_dtype);
  if (residual) {
    check.dtype(*residual, "residual", {out_dtype});
    check.that(residual->sizes().equals(y.sizes()), "residual has shape ", shape_name(*residual),
               ", expected ", shape_name(y));
    check.contiguous(*residual, "residual");
  }
  p.a_codes = static_cast<const uint8_t*>(a_codes.data_ptr());
  p.a_scale = static_cast<const float*>(a_scale.data_ptr());
  p.residual = residual ? residual->data_ptr() : nullptr;
  p.y = y.data_ptr();
  p.out_dtype = out_dtype;
  p.tokens = tokens;
  p.device = device.index;
  kernels::linear_a4(p);
  return y;
}

void check_activations(Check& check, const Tensor& x, const char* name) {
  check.floating(x, name);
  check.at_least_1d(x, name);
  check.contiguous(x, name);
}

// The parameters without a stage: checks x, clip and group_size.
QuantizeA4Params quantize_params(Check& check, const Tensor& x, const char* name,
                                 const Tensor& clip, int64_t group_size) {
  check_activations(check, x, name);
  check.that(x.size(-1) >= 1, name, " has shape ", shape_name(x),
             ", expected at least one feature");
  QuantizeA4Params p = quantize_a4_params(check, {name, &x}, clip, x.scalar_type(), rows_of(x),
                                          x.size(-1), group_size);
  p.x = x.data_ptr();
  return p;
}

// Allocates codes and scale like x, and launches.
std::tuple<Tensor, Tensor> quantize(QuantizeA4Params& p, const Tensor& x) {
  const OnDeviceOf device(x);
  Tensor codes = empty(x, with_last(x, ceil_div(p.features, 2)), kU8);
  Tensor scale = empty(x, with_last(x, p.features / p.group_size), kF32);
  p.codes = static_cast<uint8_t*>(codes.data_ptr());
  p.scale = static_cast<float*>(scale.data_ptr());
  p.device = device.index;
  kernels::quantize_a4(p);
  return {codes, scale};
}

}  // namespace

Tensor hadamard(const Tensor& x, const std::optional<Tensor>& had_k, int64_t block_size,
                bool transpose) {
  Check check("hadamard");
  check_activations(check, x, "x");
  const int64_t n = x.size(-1);
  const int64_t k = check_hadamard(check, {"x", &x}, n, had_k, block_size);
  const OnDeviceOf device(x);
  Tensor y = empty(x, with_last(x, n), x.scalar_type());
  HadamardParams p{};
  p.x = x.data_ptr();
  p.y = y.data_ptr();
  p.had_k = had_k_data(had_k);
  p.dtype = x.scalar_type();
  p.rows = rows_of(x);
  p.n = n;
  p.block_size = block_size;
  p.k = k;
  p.transpose = transpose;
  p.device = device.index;
  kernels::hadamard(p);
  return y;
}

std::tuple<Tensor, Tensor> quantize_a4(const Tensor& x, const Tensor& clip, int64_t group_size) {
  Check check("quantize_a4");
  QuantizeA4Params p = quantize_params(check, x, "x", clip, group_size);
  return quantize(p, x);
}

std::tuple<Tensor, Tensor> hadamard_a4(const Tensor& x, const std::optional<Tensor>& had_k,
                                       int64_t block_size, const Tensor& clip, int64_t group_size) {
  Check check("hadamard_a4");
  QuantizeA4Params p = quantize_params(check, x, "x", clip, group_size);
  set_hadamard(check, p, {"x", &x}, had_k, block_size);
  return quantize(p, x);
}

std::tuple<Tensor, Tensor> rmsnorm_a4(const Tensor& x, const std::optional<Tensor>& weight,
                                      double eps, const Tensor& clip, int64_t group_size) {
  Check check("rmsnorm_a4");
  QuantizeA4Params p = quantize_params(check, x, "x", clip, group_size);
  set_rmsnorm(check, p, weight, eps);
  return quantize(p, x);
}

std::tuple<Tensor, Tensor> silu_mul_hadamard_a4(const Tensor& gate, const Tensor& up,
                                                const std::optional<Tensor>& had_k,
                                                int64_t block_size, const Tensor& clip,
                                                int64_t group_size) {
  Check check("silu_mul_hadamard_a4");
  QuantizeA4Params p = quantize_params(check, gate, "gate", clip, group_size);
  check.dtype(up, "up", {gate.scalar_type()});
  check.that(up.sizes().equals(gate.sizes()), "up has shape ", shape_name(up),
             ", expected that of gate, ", shape_name(gate));
  check.contiguous(up, "up");
  p.up = up.data_ptr();
  set_hadamard(check, p, {"gate", &gate}, had_k, block_size);
  return quantize(p, gate);
}

Tensor linear_w2a4(const Tensor& a_codes, const Tensor& a_scale, const Tensor& weight,
                   const Tensor& levels, const Tensor& scale, const std::optional<Tensor>& bias,
                   int64_t group_size, ScalarType out_dtype,
                   const std::optional<Tensor>& residual) {
  Check check("linear_w2a4");
  return linear_a4(check, 2, a_codes, a_scale, weight, &levels, scale, bias, group_size, out_dtype,
                   residual);
}

#ifndef W2A4_CUDA  // no CUDA kernel: there the op runs its reference
Tensor linear_w3a4(const Tensor& a_codes, const Tensor& a_scale, const Tensor& weight,
                   const Tensor& levels, const Tensor& scale, const std::optional<Tensor>& bias,
                   int64_t group_size, ScalarType out_dtype,
                   const std::optional<Tensor>& residual) {
  Check check("linear_w3a4");
  return linear_a4(check, 3, a_codes, a_scale, weight, &levels, scale, bias, group_size, out_dtype,
                   residual);
}
#endif

Tensor linear_w4a4(const Tensor& a_codes, const Tensor& a_scale, const Tensor& weight,
                   const Tensor& scale, const std::optional<Tensor>& bias, int64_t group_size,
                   ScalarType out_dtype, const std::optional<Tensor>& residual) {
  Check check("linear_w4a4");
  return linear_a4(check, 4, a_codes, a_scale, weight, nullptr, scale, bias, group_size, out_dtype,
                   residual);
}

STABLE_TORCH_LIBRARY_IMPL(w2a4, W2A4_DEVICE, m) {
  W2A4_IMPL(m, hadamard);
  W2A4_IMPL(m, quantize_a4);
  W2A4_IMPL(m, hadamard_a4);
  W2A4_IMPL(m, rmsnorm_a4);
  W2A4_IMPL(m, silu_mul_hadamard_a4);
  W2A4_IMPL(m, linear_w2a4);
#ifndef W2A4_CUDA
  W2A4_IMPL(m, linear_w3a4);
#endif
  W2A4_IMPL(m, linear_w4a4);
}

}  // namespace w2a4
