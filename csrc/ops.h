// Parameters of kernels out of checked arguments, for the entry point of an op and for that of a
// decoder layer, which calls several kernels. What is an op's own result or another's result,
// activations and their shape, stands in the parameters' remaining fields, which the caller sets.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "checks.h"
#include "params.h"
#include "tensors.h"

namespace w2a4 {

LinearA4Params linear_a4_params(Check& check, int weight_bits, const Tensor& weight,
                                const Tensor* levels, const Tensor& scale,
                                const std::optional<Tensor>& bias, int64_t group_size);
// act_group: inputs of a scale of activations; -1 is all.
void set_act_group(const Check& check, LinearA4Params& p, int64_t act_group);

// Without a stage before the quantisation; the next two add one.
QuantizeA4Params quantize_a4_params(Check& check, const Activation& x, const Tensor& clip,
                                    ScalarType dtype, int64_t tokens, int64_t features,
                                    int64_t group_size);
void set_rmsnorm(Check& check, QuantizeA4Params& p, const std::optional<Tensor>& weight,
                 double eps);
// block_size 1 is no transform: had_k could only change signs then.
void set_hadamard(Check& check, QuantizeA4Params& p, const Activation& x,
                  const std::optional<Tensor>& had_k, int64_t block_size);

// Of qkv [batch, tokens, width]. That nothing written shares memory is left to the caller.
RopeAppendKV4Params rope_append_kv4_params(Check& check, int64_t batch, int64_t tokens,
                                           int64_t width, ScalarType dtype, const Tensor& cos,
                                           const Tensor& sin, const std::optional<Tensor>& had_k,
                                           int64_t block_size, const Tensor& k_codes,
                                           const Tensor& k_params, const Tensor& v_codes,
                                           const Tensor& v_params, int64_t start, double clip,
                                           const std::optional<Tensor>& starts,
                                           const std::optional<Tensor>& slots);

AttentionKV4Params attention_kv4_params(
    Check& check, int64_t batch, int64_t q_heads, int64_t q_tokens, int64_t head_dim,
    ScalarType dtype, const Tensor& k_codes, const Tensor& k_params, const Tensor& v_codes,
    const Tensor& v_params, int64_t length, const std::optional<Tensor>& mask, bool causal,
    double scaling, const std::optional<Tensor>& k_sink, const std::optional<Tensor>& v_sink,
    const std::optional<Tensor>& starts, const std::optional<Tensor>& block_table);

}  // namespace w2a4
