// quantize_kv4, rope_append_kv4 and attention_kv4 of cuda/, run on a CPU: the same plans, kernels
// and grids as the launchers in cuda/ use. Arrays of 2-byte formats are uint16; caches may be views
// with strides.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "../cuda/attention_kv4_plan.h"
#include "../cuda/kv4_plan.h"
#include "bind.h"

namespace py = pybind11;
using namespace w2a4;

namespace {

using Starts = std::optional<py::array_t<int64_t, py::array::c_style>>;
using Table = std::optional<py::array_t<int32_t, py::array::c_style>>;

const int64_t* data_of(const Starts& starts) {
  return starts ? starts->data() : nullptr;
}

Slots slots_of(const Starts& slots, const py::array& codes) {
  if (!slots) return {};
  return {slots->data(), codes.shape(0), codes.shape(2)};
}

BlockTable table_of(const Table& table, const py::array& codes) {
  if (!table) return {};
  return {table->data(), table->shape(1), codes.shape(0), codes.shape(2)};
}

Strided4 strided(const py::array& a) {
  const auto stride = [&](int i) { return a.strides(i) / a.itemsize(); };
  return {const_cast<void*>(a.data()), stride(0), stride(1), stride(2)};
}

template <class Args>
void run_heads(const cuda::HeadsPlan<Args>& plan, unsigned seed) {
  cuda::with_kv4_kernel(plan.args, [&](auto kernel) {
    if (plan.blocks)
      simt::launch({plan.blocks}, cuda::kHeadWarps * 32, plan.shared, seed,
                   [&] { decltype(kernel)::value(plan.args); });
  });
}

// x [batch, heads, tokens, head_dim], codes and params as in QuantizeKV4Params.
void quantize_kv4(const py::array& x, const py::array& codes, const py::array& params,
                  const std::string& dtype, int64_t start, const Starts& starts, float clip,
                  unsigned seed, const Starts& slots) {
  QuantizeKV4Params p{};
  p.x = strided(x), p.codes = strided(codes), p.params = strided(params);
  p.dtype = dtype_of(dtype);
  p.batch = x.shape(0), p.heads = x.shape(1), p.tokens = x.shape(2), p.head_dim = x.shape(3);
  p.start = start, p.starts = data_of(starts), p.clip = clip, p.slots = slots_of(slots, codes);
  run_heads(cuda::plan_quantize_kv4(p), seed);
}

// qkv [batch, tokens, ...], cos and sin [batch or 1, tokens, head_dim], q written. From `wide_rows`
// heads of tokens on by kv4_wide.cuh if it serves; returns whether it did.
bool rope_append_kv4(const py::array& qkv, const std::string& dtype, const py::array& cos,
                     const py::array& sin, const std::string& rope_dtype, const Signs& had_k,
                     int64_t block_size, const py::array& k_codes, const py::array& k_params,
                     const py::array& v_codes, const py::array& v_params, int64_t start,
                     const Starts& starts, float clip, py::array& q, unsigned seed,
                     uint32_t wide_rows, const Starts& slots) {
  RopeAppendKV4Params p{};
  p.qkv = qkv.data(), p.cos = cos.data(), p.sin = sin.data(), p.q = q.mutable_data();
  p.k_codes = strided(k_codes), p.k_params = strided(k_params);
  p.v_codes = strided(v_codes), p.v_params = strided(v_params);
  p.had_k = had_k ? had_k->data() : nullptr, p.k = had_k ? had_k->shape(0) : 1;
  p.block_size = block_size;
  p.dtype = dtype_of(dtype), p.rope_dtype = dtype_of(rope_dtype);
  p.batch = qkv.shape(0), p.tokens = qkv.shape(1), p.head_dim = cos.shape(2);
  p.rope_batch = cos.shape(0) == 1 ? 0 : p.tokens * p.head_dim;
  p.q_heads = q.shape(1), p.kv_heads = k_codes.shape(1);
  p.start = start, p.starts = data_of(starts), p.clip = clip, p.slots = slots_of(slots, k_codes);
  const auto plan = cuda::plan_rope_append_kv4(p, wide_rows);
  run_heads(plan, seed);
  return plan.args.lanes != 0;
}

void fill_mask(AttentionKV4Params& p, const std::optional<py::array_t<bool>>& mask) {
  if (!mask) return;
  p.mask = mask->data();
  p.mask_batch = mask->shape(0) == 1 ? 0 : mask->strides(0);
  p.mask_head = mask->shape(1) == 1 ? 0 : mask->strides(1);
  p.mask_q = mask->strides(2), p.mask_key = mask->strides(3);
}

// y [batch, q_tokens, q_heads, head_dim]. `workspace` is what the chunks' results may take, float32
// of any size; too small or none: a block does all chunks. Returns whether it was used.
bool attention_kv4(const py::array& q, const std::string& dtype, const py::array& k_codes,
                   const py::array& k_params, const py::array& v_codes, const py::array& v_params,
                   int64_t length, const std::optional<py::array_t<bool>>& mask, bool causal,
                   float scaling, const std::optional<py::array>& k_sink,
                   const std::optional<py::array>& v_sink, const std::string& sink_dtype,
                   const Starts& starts, py::array& y,
                   std::optional<py::array_t<float, py::array::c_style>> workspace, int processors,
                   size_t most_shared, unsigned seed, const Table& block_table) {
  AttentionKV4Params p{};
  p.q = strided(q), p.y = y.mutable_data(), p.dtype = dtype_of(dtype);
  p.batch = q.shape(0), p.q_heads = q.shape(1), p.q_tokens = q.shape(2), p.head_dim = q.shape(3);
  p.k_codes = strided(k_codes), p.k_params = strided(k_params);
  p.v_codes = strided(v_codes), p.v_params = strided(v_params);
  p.kv_heads = k_codes.shape(1);
  p.length = length, p.causal = causal, p.scaling = scaling, p.starts = data_of(starts);
  p.table = table_of(block_table, k_codes);
  fill_mask(p, mask);
  p.k_sink_dtype = p.v_sink_dtype = dtype_of(sink_dtype);
  if (k_sink) p.k_sink = strided(*k_sink), p.v_sink = strided(*v_sink);
  if (k_sink) p.sinks = std::min<int64_t>(length, k_sink->shape(2));
  const int64_t wanted = cuda::plan_attention_kv4(p, processors, most_shared).workspace;
  if (workspace && workspace->size() >= wanted) p.workspace = workspace->mutable_data();
  const cuda::AttentionPlan plan = cuda::plan_attention_kv4(p, processors, most_shared);
  cuda::with_attention_kernel(plan, [&](auto kernel) {
    if (plan.blocks_x)
      simt::launch({plan.blocks_x, plan.blocks_y}, cuda::kAttentionThreads, plan.shared, seed,
                   [&] { decltype(kernel)::value(plan.args); });
  });
  if (plan.args.partial)
    simt::launch({plan.merge_x, plan.merge_y}, cuda::kAttentionThreads, cuda::kMergeShared, seed,
                 [&] { cuda::merge_kv4_kernel(plan.args); });
  return plan.args.partial != nullptr;
}

}  // namespace

void bind_kv4(py::module_& m) {
  m.def("quantize_kv4", &quantize_kv4);
  m.def("rope_append_kv4", &rope_append_kv4);
  m.def("attention_kv4", &attention_kv4);
}
