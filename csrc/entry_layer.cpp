// Entry point of decoder_layer: a whole layer of a packed LLaMA, so that a token costs one call
// from Python a layer instead of a dozen. It calls the entry points of the ops it is made of, which
// check their own arguments, and adds the residuals.
#include <cstring>
#include <vector>

#include "backend.h"
#include "checks.h"
#include "ops.h"
#include "registration.h"
#include "tensors.h"

namespace w2a4 {
namespace {

using Quantized = std::tuple<Tensor, Tensor>;  // codes and scale of activations

// A packed linear, its tensors given as weight, scale, act_clip, then levels (int8, if its weights
// have 2 or 3 bits) and bias (floating), where it has them.
struct Linear {
  Tensor weight, scale, clip;
  std::optional<Tensor> levels, bias;
  int64_t group_size, act_group_size;

  Linear(const Check& check, const char* name, const std::vector<Tensor>& tensors,
         int64_t group_size, int64_t act_group_size)
      : group_size(group_size), act_group_size(act_group_size) {
    check.that(tensors.size() >= 3 && tensors.size() <= 5, name, " has ", tensors.size(),
               " tensors, expected weight, scale, act_clip and, if there are, levels and bias");
    weight = tensors[0], scale = tensors[1], clip = tensors[2];
    for (size_t i = 3; i < tensors.size(); ++i)
      (tensors[i].scalar_type() == kI8 ? levels : bias) = tensors[i];
    if (levels)
      check.that(levels->dim() == 3, name, " has levels of shape ", shape_name(*levels),
                 ", expected [out, groups, levels]");
  }

  Tensor operator()(const Quantized& a, ScalarType dtype) const {
    const auto& [codes, a_scale] = a;
    if (!levels)
      return linear_w4a4(codes, a_scale, weight, scale, bias, group_size, dtype, std::nullopt);
    const auto linear = levels->size(-1) == 8 ? linear_w3a4 : linear_w2a4;
    return linear(codes, a_scale, weight, *levels, scale, bias, group_size, dtype, std::nullopt);
  }
};

// x += y, which is a linear's result, and so contiguous and new.
void add(const Check& check, const Tensor& x, const Tensor& y, const char* name) {
  check.that(x.sizes().equals(y.sizes()), name, " has ", x.size(-1), " outputs, expected ",
             y.size(-1), " like x");
  kernels::add({y.data_ptr(), x.data_ptr(), x.scalar_type(), x.numel()});
}

// A cache, which is written. Each op looks at its own arguments only; a cache lies apart from those
// of the others too.
struct Written {
  const char* name;
  bool any;
  Extent place;

  Written(const Tensor& t, const char* name)
      : name(name), any(t.numel() != 0), place(any ? extent_of(t) : Extent{}) {}
};

void apart(const Check& check, const Written (&caches)[4], const Tensor& read, const char* name) {
  if (read.numel() == 0) return;
  const Extent place = extent_of(read);
  for (const Written& cache : caches)
    check.that(!cache.any || !overlaps(cache.place, place), cache.name,
               " is written, but shares memory with ", name, "; pass tensors that do not overlap");
}

// The halves of the last dimension, contiguous: what gate_proj and up_proj give.
std::pair<Tensor, Tensor> halves(const Check& check, const Tensor& x) {
  check.that(x.size(-1) % 2 == 0, "gate_up_proj has ", x.size(-1),
             " outputs, expected as many of gate_proj as of up_proj");
  const int64_t rows = rows_of(x), half = x.size(-1) / 2;
  const std::vector<int64_t> shape = with_last(x, half);
  if (rows == 1) return {view_of(x, shape), view_of(x, shape, half)};
  const std::pair<Tensor, Tensor> out{empty(x, shape, x.scalar_type()),
                                      empty(x, shape, x.scalar_type())};
  const size_t bytes = half * x.element_size();
  const char* from = static_cast<const char*>(x.data_ptr());
  for (int64_t row = 0; row < rows; ++row, from += 2 * bytes) {
    std::memcpy(static_cast<char*>(out.first.data_ptr()) + row * bytes, from, bytes);
    std::memcpy(static_cast<char*>(out.second.data_ptr()) + row * bytes, from + bytes, bytes);
  }
  return out;
}

}  // namespace

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
                     double scaling, const std::optional<Tensor>& starts,
                     const std::optional<Tensor>& slots, const std::optional<Tensor>& block_table) {
  Check check("decoder_layer");
  check.dtype(x, "x", {kF32, kF16, ScalarType::BFloat16});
  check.that(x.dim() == 3, "x has shape ", shape_name(x), ", expected [batch, tokens, hidden]");
  check.that(norms.size() == 2, "norms has ", norms.size(), " tensors, expected 2");
  for (auto [sizes, name] :
       {std::pair{&group_sizes, "group_sizes"}, {&act_group_sizes, "act_group_sizes"}})
    check.that(sizes->size() == 4, name, " has ", sizes->size(),
               " numbers, expected 4: of qkv_proj, o_proj, gate_up_proj and down_proj");
  check.that(slots.has_value() == block_table.has_value(), slots ? "block_table" : "slots",
             " is missing; pass both slots and block_table or neither");
  const Linear qkv(check, "qkv_proj", qkv_proj, group_sizes[0], act_group_sizes[0]);
  const Linear o(check, "o_proj", o_proj, group_sizes[1], act_group_sizes[1]);
  const Linear gate_up(check, "gate_up_proj", gate_up_proj, group_sizes[2], act_group_sizes[2]);
  const Linear down(check, "down_proj", down_proj, group_sizes[3], act_group_sizes[3]);
  const ScalarType dtype = x.scalar_type();
  const Written caches[]{
      {k_codes, "k_codes"}, {k_params, "k_params"}, {v_codes, "v_codes"}, {v_params, "v_params"}};
  for (auto [tensor, name] : {std::pair{&x, "x"},
                              {&cos, "cos"},
                              {&sin, "sin"},
                              {&norms[0], "norms"},
                              {&norms[1], "norms"}})
    apart(check, caches, *tensor, name);
  for (auto [tensors, name] : {std::pair{&qkv_proj, "qkv_proj"},
                               {&o_proj, "o_proj"},
                               {&gate_up_proj, "gate_up_proj"},
                               {&down_proj, "down_proj"}})
    for (const Tensor& tensor : *tensors) apart(check, caches, tensor, name);
  for (auto [tensor, name] : {std::pair{&mask, "mask"},
                              {&r3, "r3"},
                              {&r4, "r4"},
                              {&k_sink, "k_sink"},
                              {&v_sink, "v_sink"},
                              {&starts, "starts"},
                              {&slots, "slots"},
                              {&block_table, "block_table"}})
    if (*tensor) apart(check, caches, **tensor, name);

  const Tensor heads = qkv(rmsnorm_a4(x, norms[0], eps, qkv.clip, qkv.act_group_size), dtype);
  // In pages a slot says where a token goes, and `starts` how many are before it.
  const Tensor q =
      rope_append_kv4(heads, cos, sin, r3, r3_block, k_codes, k_params, v_codes, v_params,
                      slots ? 0 : start, kv_clip, slots ? std::nullopt : starts, slots);
  const Tensor context = attention_kv4(q, k_codes, k_params, v_codes, v_params, start + x.size(1),
                                       mask, !mask, scaling, k_sink, v_sink, starts, block_table);
  const Tensor joined = view_of(context, {x.size(0), x.size(1), q.size(1) * q.size(3)});
  const Tensor y = o(quantize_a4(joined, o.clip, o.act_group_size), dtype);
  add(check, y, x, "o_proj");

  const auto [gate, up] = halves(
      check, gate_up(rmsnorm_a4(y, norms[1], eps, gate_up.clip, gate_up.act_group_size), dtype));
  const Tensor out =
      down(silu_mul_hadamard_a4(gate, up, r4, r4_block, down.clip, down.act_group_size), dtype);
  add(check, out, y, "down_proj");
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(w2a4, W2A4_DEVICE, m) {
  W2A4_IMPL(m, decoder_layer);
}

}  // namespace w2a4
