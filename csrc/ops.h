// Entry points of the ops: check the arguments, allocate the result, launch the kernel.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace w2a4 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor hadamard(const Tensor& x, const std::optional<Tensor>& had_k, int64_t block_size,
                bool transpose);

std::tuple<Tensor, Tensor> quantize_a4(const Tensor& x, const Tensor& clip, int64_t group_size);

std::tuple<Tensor, Tensor> hadamard_a4(const Tensor& x, const std::optional<Tensor>& had_k,
                                       int64_t block_size, const Tensor& clip, int64_t group_size);

std::tuple<Tensor, Tensor> rmsnorm_a4(const Tensor& x, const std::optional<Tensor>& weight,
                                      double eps, const Tensor& clip, int64_t group_size);

std::tuple<Tensor, Tensor> silu_mul_hadamard_a4(const Tensor& gate, const Tensor& up,
                                                const std::optional<Tensor>& had_k,
                                                int64_t block_size, const Tensor& clip,
                                                int64_t group_size);

Tensor linear_w2a4(const Tensor& a_codes, const Tensor& a_scale, const Tensor& weight,
                   const Tensor& levels, const Tensor& scale, const std::optional<Tensor>& bias,
                   int64_t group_size, ScalarType out_dtype, const std::optional<Tensor>& residual);

Tensor linear_w4a4(const Tensor& a_codes, const Tensor& a_scale, const Tensor& weight,
                   const Tensor& scale, const std::optional<Tensor>& bias, int64_t group_size,
                   ScalarType out_dtype, const std::optional<Tensor>& residual);

Tensor linear_w8(const Tensor& x, const Tensor& weight, const Tensor& scale,
                 const std::optional<Tensor>& bias);

std::tuple<Tensor, Tensor> quantize_kv4(const Tensor& x, double clip);

void append_kv4(const Tensor& x, const Tensor& codes, const Tensor& params, int64_t start,
                double clip, const std::optional<Tensor>& starts,
                const std::optional<Tensor>& slots);

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

Tensor decoder_layer(const Tensor& x, const Tensor& cos, const Tensor& sin,
                     const std::optional<Tensor>& mask, const std::vector<Tensor>& norms,
                     double eps, const std::vector<Tensor>& qkv_proj,
                     const std::vector<Tensor>& o_proj, const std::vector<Tensor>& gate_up_proj,
                     const std::vector<Tensor>& down_proj, const std::vector<int64_t>& group_sizes,
                     const std::vector<int64_t>& act_group_sizes, const std::optional<Tensor>& r3,
                     int64_t r3_block, const std::optional<Tensor>& r4, int64_t r4_block,
                     const Tensor& k_codes, const Tensor& k_params, const Tensor& v_codes,
                     const Tensor& v_params, const std::optional<Tensor>& k_sink,
                     const std::optional<Tensor>& v_sink, int64_t start, double kv_clip,
                     double scaling, const std::optional<Tensor>& starts);

std::tuple<Tensor, Tensor> round_columns(const Tensor& work, const Tensor& coupling,
                                         const std::optional<Tensor>& current, const Tensor& grid,
                                         const Tensor& group);

Tensor snap(const Tensor& w, const Tensor& levels);

std::tuple<Tensor, Tensor> snap_backward(const Tensor& grad, const Tensor& w, const Tensor& soft,
                                         const Tensor& levels);

Tensor fake_quant_rows(const Tensor& x, const Tensor& clip, bool kv);

std::tuple<Tensor, Tensor> fake_quant_rows_backward(const Tensor& grad, const Tensor& x,
                                                    const Tensor& clip, bool kv);

// Registers the ops of entry_a4.cpp, which w2a4._C and w2a4._cuda each compile for their device.
inline void register_a4(torch::stable::detail::StableLibrary& m) {
  m.impl("hadamard", TORCH_BOX(&hadamard));
  m.impl("quantize_a4", TORCH_BOX(&quantize_a4));
  m.impl("hadamard_a4", TORCH_BOX(&hadamard_a4));
  m.impl("rmsnorm_a4", TORCH_BOX(&rmsnorm_a4));
  m.impl("silu_mul_hadamard_a4", TORCH_BOX(&silu_mul_hadamard_a4));
  m.impl("linear_w2a4", TORCH_BOX(&linear_w2a4));
  m.impl("linear_w4a4", TORCH_BOX(&linear_w4a4));
}

// The same of entry_w8.cpp.
inline void register_w8(torch::stable::detail::StableLibrary& m) {
  m.impl("linear_w8", TORCH_BOX(&linear_w8));
}

// The same of entry_kv4.cpp.
inline void register_kv4(torch::stable::detail::StableLibrary& m) {
  m.impl("quantize_kv4", TORCH_BOX(&quantize_kv4));
  m.impl("append_kv4", TORCH_BOX(&append_kv4));
  m.impl("rope_append_kv4", TORCH_BOX(&rope_append_kv4));
  m.impl("attention_kv4", TORCH_BOX(&attention_kv4));
}

}  // namespace w2a4
