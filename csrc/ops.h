// Entry points that another one calls. An entry point checks the arguments, allocates the result
// and launches the kernel.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace w2a4 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> quantize_a4(const Tensor& x, const Tensor& clip, int64_t group_size);

std::tuple<Tensor, Tensor> rmsnorm_a4(const Tensor& x, const std::optional<Tensor>& weight,
                                      double eps, const Tensor& clip, int64_t group_size);

std::tuple<Tensor, Tensor> silu_mul_hadamard_a4(const Tensor& gate, const Tensor& up,
                                                const std::optional<Tensor>& had_k,
                                                int64_t block_size, const Tensor& clip,
                                                int64_t group_size);

Tensor linear_w2a4(const Tensor& a_codes, const Tensor& a_scale, const Tensor& weight,
                   const Tensor& levels, const Tensor& scale, const std::optional<Tensor>& bias,
                   int64_t group_size, ScalarType out_dtype, const std::optional<Tensor>& residual);

Tensor linear_w3a4(const Tensor& a_codes, const Tensor& a_scale, const Tensor& weight,
                   const Tensor& levels, const Tensor& scale, const std::optional<Tensor>& bias,
                   int64_t group_size, ScalarType out_dtype, const std::optional<Tensor>& residual);

Tensor linear_w4a4(const Tensor& a_codes, const Tensor& a_scale, const Tensor& weight,
                   const Tensor& scale, const std::optional<Tensor>& bias, int64_t group_size,
                   ScalarType out_dtype, const std::optional<Tensor>& residual);

Tensor rope_append_kv4(const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                       const std::optional<Tensor>& had_k, int64_t block_size,
                       const Tensor& k_codes, const Tensor& k_params, const Tensor& v_codes,
                       const Tensor& v_params, int64_t start, double clip,
                       const std::optional<Tensor>& starts, const std::optional<Tensor>& slots);

Tensor attention_kv4(const Tensor& q, const Tensor& k_codes, const Tensor& k_params,
                     const Tensor& v_codes, const Tensor& v_params, int64_t length,
                     const std::optional<Tensor>& mask, bool causal, double scaling,
                     const std::optional<Tensor>& k_sink, const std::optional<Tensor>& v_sink,
                     const std::optional<Tensor>& starts, const std::optional<Tensor>& block_table);

}  // namespace w2a4
