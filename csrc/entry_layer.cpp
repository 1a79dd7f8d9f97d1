// Entry points of decoder_layer and decoder_layers: layers of a packed LLaMA, so that a token costs
// one call from Python instead of a dozen a layer. They check what the ops that a layer is made of
// check, once, and call their kernels on memory of their own.
#include <utility>
#include <vector>

#include "backend.h"
#include "checks.h"
#include "cpu/linear_a4.h"
#include "ops.h"
#include "registration.h"
#include "tensors.h"

namespace w2a4 {
namespace {

// Some of a list's tensors.
struct Tensors {
  const Tensor* first;
  size_t count;

  const Tensor* begin() const { return first; }
  const Tensor* end() const { return first + count; }
};

// A packed linear, its tensors given as weight, scale, act_clip, then levels (int8, if its weights
// have 2 or 3 bits) and bias (floating), where it has them.
struct Linear {
  const char* name;
  const Tensor &clip, *levels = nullptr;
  int64_t act_group;
  LinearA4Params p;

  Linear(const Check& check, const char* name, Tensors tensors, int64_t group_size,
         int64_t act_group)
      : name(name), clip(whole(check, name, tensors).first[2]), act_group(act_group) {
    std::optional<Tensor> bias;
    for (size_t i = 3; i < tensors.count; ++i)
      if (tensors.first[i].scalar_type() == kI8)
        levels = &tensors.first[i];
      else
        bias = tensors.first[i];
    if (levels)
      check.that(levels->dim() == 3, name, " has levels of shape ", shape_name(*levels),
                 ", expected [out, groups, levels]");
    const int bits = !levels ? 4 : levels->size(-1) == 8 ? 3 : 2;
    Check own(bits == 4 ? "linear_w4a4" : bits == 3 ? "linear_w3a4" : "linear_w2a4");
    p = linear_a4_params(own, bits, tensors.first[0], levels, tensors.first[1], bias, group_size);
    set_act_group(own, p, act_group);
  }

  void sized(const Check& check, int64_t inputs, int64_t outputs) const {
    check.that(p.in_features == inputs, name, " has ", p.in_features, " inputs, expected ", inputs);
    check.that(p.out_features == outputs, name, " has ", p.out_features, " outputs, expected ",
               outputs, " like x");
  }

 private:
  static const Tensors& whole(const Check& check, const char* name, const Tensors& tensors) {
    check.that(tensors.count >= 3 && tensors.count <= 5, name, " has ", tensors.count,
               " tensors, expected weight, scale, act_clip and, if there are, levels and bias");
    return tensors;
  }
};

// What all layers of a call have in common.
struct Call {
  const Tensor &x, &cos, &sin;
  const std::optional<Tensor>& mask;
  double eps;
  const std::optional<Tensor>& r3;
  int64_t r3_block;
  const std::optional<Tensor>& r4;
  int64_t r4_block;
  int64_t start;
  double kv_clip, scaling;
  const std::optional<Tensor>&starts, &slots, &block_table;
};

// The tensors of one layer.
struct Parts {
  const Tensor& attention_norm;
  const Tensor& mlp_norm;
  Tensors qkv_proj, o_proj, gate_up_proj, down_proj;
  const int64_t *group_sizes, *act_group_sizes;  // of the four
  const Tensor &k_codes, &k_params, &v_codes, &v_params;
  std::optional<Tensor> k_sink, v_sink;
};

// A cache, which is written. It lies apart from what is read.
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

void check_apart(const Check& check, const Call& call, const Parts& parts) {
  check.written({{&parts.k_codes, "k_codes"},
                 {&parts.k_params, "k_params"},
                 {&parts.v_codes, "v_codes"},
                 {&parts.v_params, "v_params"}},
                {});
  const Written caches[]{{parts.k_codes, "k_codes"},
                         {parts.k_params, "k_params"},
                         {parts.v_codes, "v_codes"},
                         {parts.v_params, "v_params"}};
  for (auto [tensor, name] : {std::pair{&call.x, "x"},
                              {&call.cos, "cos"},
                              {&call.sin, "sin"},
                              {&parts.attention_norm, "norms"},
                              {&parts.mlp_norm, "norms"}})
    apart(check, caches, *tensor, name);
  for (auto [tensors, name] : {std::pair{&parts.qkv_proj, "qkv_proj"},
                               {&parts.o_proj, "o_proj"},
                               {&parts.gate_up_proj, "gate_up_proj"},
                               {&parts.down_proj, "down_proj"}})
    for (const Tensor& tensor : *tensors) apart(check, caches, tensor, name);
  for (auto [tensor, name] : {std::pair{&call.mask, "mask"},
                              {&call.r3, "r3"},
                              {&call.r4, "r4"},
                              {&call.starts, "starts"},
                              {&call.slots, "slots"},
                              {&call.block_table, "block_table"}})
    if (*tensor) apart(check, caches, **tensor, name);
  if (parts.k_sink) apart(check, caches, *parts.k_sink, "k_sink");
  if (parts.v_sink) apart(check, caches, *parts.v_sink, "v_sink");
}

// Memory for what lies between the kernels of a layer, the same for all layers if it is enough.
class Scratch {
 public:
  // Pieces of so many bytes, one behind the other.
  template <size_t n>
  void cut(const int64_t (&bytes)[n], void* (&pieces)[n]) {
    int64_t total = 0;
    for (int64_t size : bytes) total += aligned_size(size);
    if (blocks_.empty() || total > size_)
      blocks_.push_back(cpu::aligned<char>(size_ = total));  // earlier layers keep theirs
    char* next = blocks_.back().get();
    for (size_t i = 0; i < n; ++i) pieces[i] = next, next += aligned_size(bytes[i]);
  }

 private:
  static int64_t aligned_size(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

  std::vector<cpu::Aligned<char>> blocks_;
  int64_t size_ = 0;
};

// The kernels of one layer in their order, with what each of them reads and writes.
struct Layer {
  QuantizeA4Params quantize[4];
  LinearA4Params linear[4];  // qkv_proj, o_proj, gate_up_proj, down_proj
  RopeAppendKV4Params rope;
  AttentionKV4Params attention;

  Layer(const Check& check, const Call& call, const Parts& parts, const void* x, void* out,
        Scratch& scratch) {
    check_apart(check, call, parts);
    const Linear qkv(check, "qkv_proj", parts.qkv_proj, parts.group_sizes[0],
                     parts.act_group_sizes[0]);
    const Linear o(check, "o_proj", parts.o_proj, parts.group_sizes[1], parts.act_group_sizes[1]);
    const Linear gate_up(check, "gate_up_proj", parts.gate_up_proj, parts.group_sizes[2],
                         parts.act_group_sizes[2]);
    const Linear down(check, "down_proj", parts.down_proj, parts.group_sizes[3],
                      parts.act_group_sizes[3]);
    const ScalarType dtype = call.x.scalar_type();
    const int64_t batch = call.x.size(0), length = call.x.size(1), hidden = call.x.size(2);
    const int64_t tokens = batch * length, ffn = gate_up.p.out_features / 2;

    // In pages a slot says where a token goes, and `starts` how many are before it.
    Check rope_check("rope_append_kv4");
    rope =
        rope_append_kv4_params(rope_check, batch, length, qkv.p.out_features, dtype, call.cos,
                               call.sin, call.r3, call.r3_block, parts.k_codes, parts.k_params,
                               parts.v_codes, parts.v_params, call.slots ? 0 : call.start,
                               call.kv_clip, call.slots ? std::nullopt : call.starts, call.slots);
    Check attention_check("attention_kv4");
    attention = attention_kv4_params(
        attention_check, batch, rope.q_heads, length, rope.head_dim, dtype, parts.k_codes,
        parts.k_params, parts.v_codes, parts.v_params, call.start + length, call.mask, !call.mask,
        call.scaling, parts.k_sink, parts.v_sink, call.starts, call.block_table);
    check.that(gate_up.p.out_features % 2 == 0, "gate_up_proj has ", gate_up.p.out_features,
               " outputs, expected as many of gate_proj as of up_proj");
    const int64_t heads = rope.q_heads * rope.head_dim;
    qkv.sized(check, hidden, qkv.p.out_features);
    o.sized(check, heads, hidden);
    gate_up.sized(check, hidden, 2 * ffn);
    down.sized(check, ffn, hidden);

    Check norm_check("rmsnorm_a4");
    quantize[0] = quantize_a4_params(norm_check, {"x", &call.x}, qkv.clip, dtype, tokens, hidden,
                                     qkv.act_group);
    set_rmsnorm(norm_check, quantize[0], parts.attention_norm, call.eps);
    Check quantize_check("quantize_a4");
    quantize[1] =
        quantize_a4_params(quantize_check, {"x"}, o.clip, dtype, tokens, heads, o.act_group);
    quantize[2] = quantize_a4_params(norm_check, {"x"}, gate_up.clip, dtype, tokens, hidden,
                                     gate_up.act_group);
    set_rmsnorm(norm_check, quantize[2], parts.mlp_norm, call.eps);
    Check silu_check("silu_mul_hadamard_a4");
    quantize[3] =
        quantize_a4_params(silu_check, {"gate"}, down.clip, dtype, tokens, ffn, down.act_group);
    set_hadamard(silu_check, quantize[3], {"gate"}, call.r4, call.r4_block);
    quantize[3].stride = 2 * ffn;

    // Each activation that is rounded takes the place of the one before.
    const int64_t element = call.x.element_size();
    int64_t codes = 0, scales = 0;
    for (const QuantizeA4Params& q : quantize) {
      codes = std::max(codes, tokens * ceil_div(q.features, 2));
      scales = std::max<int64_t>(scales, tokens * (q.features / q.group_size) * sizeof(float));
    }
    void* pieces[7];
    scratch.cut({codes, scales, tokens * qkv.p.out_features * element, tokens * heads * element,
                 tokens * heads * element, tokens * hidden * element, tokens * 2 * ffn * element},
                pieces);
    auto [a_codes, a_scale, qkv_out, q, context, y, gate_up_out] = pieces;
    linear[0] = qkv.p, linear[1] = o.p, linear[2] = gate_up.p, linear[3] = down.p;
    const void* from[]{x, context, y, gate_up_out};
    void* to[]{qkv_out, y, gate_up_out, out};
    for (int i = 0; i < 4; ++i) {
      quantize[i].x = from[i];
      linear[i].a_codes = quantize[i].codes = static_cast<uint8_t*>(a_codes);
      linear[i].a_scale = quantize[i].scale = static_cast<float*>(a_scale);
      linear[i].y = to[i];
      linear[i].tokens = tokens;
      linear[i].out_dtype = dtype;
    }
    quantize[3].up = static_cast<char*>(gate_up_out) + ffn * element;
    linear[1].residual = x;
    linear[3].residual = y;
    rope.qkv = qkv_out;
    rope.q = q;
    attention.q = {q, rope.q_heads * length * rope.head_dim, length * rope.head_dim, rope.head_dim};
    attention.y = context;
  }

  void run() const {
    kernels::quantize_a4(quantize[0]);
    kernels::linear_a4(linear[0]);
    kernels::rope_append_kv4(rope);
    kernels::attention_kv4(attention);
    for (int i = 1; i < 4; ++i) {
      kernels::quantize_a4(quantize[i]);
      kernels::linear_a4(linear[i]);
    }
  }
};

void check_call(Check& check, const Call& call) {
  check.dtype(call.x, "x", {kF32, kF16, ScalarType::BFloat16});
  check.that(call.x.dim() == 3, "x has shape ", shape_name(call.x),
             ", expected [batch, tokens, hidden]");
  check.contiguous(call.x, "x");
  check.that(call.slots.has_value() == call.block_table.has_value(),
             call.slots ? "block_table" : "slots",
             " is missing; pass both slots and block_table or neither");
}

void check_sizes(const Check& check, const std::vector<int64_t>& group_sizes,
                 const std::vector<int64_t>& act_group_sizes, size_t layers) {
  for (auto [sizes, name] :
       {std::pair{&group_sizes, "group_sizes"}, {&act_group_sizes, "act_group_sizes"}})
    check.that(sizes->size() == 4 * layers, name, " has ", sizes->size(), " numbers, expected ",
               4 * layers, ": of qkv_proj, o_proj, gate_up_proj and down_proj",
               layers == 1 ? "" : " of each layer");
}

// Layer i of a list that has as many tensors of each.
Tensors part(const std::vector<Tensor>& tensors, size_t layers, size_t i) {
  const size_t count = tensors.size() / layers;
  return {tensors.data() + i * count, count};
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
  const Call call{x,        cos,   sin,     mask,    eps,    r3,    r3_block,   r4,
                  r4_block, start, kv_clip, scaling, starts, slots, block_table};
  check_call(check, call);
  check.that(norms.size() == 2, "norms has ", norms.size(), " tensors, expected 2");
  check_sizes(check, group_sizes, act_group_sizes, 1);
  const Parts parts{norms[0],
                    norms[1],
                    part(qkv_proj, 1, 0),
                    part(o_proj, 1, 0),
                    part(gate_up_proj, 1, 0),
                    part(down_proj, 1, 0),
                    group_sizes.data(),
                    act_group_sizes.data(),
                    k_codes,
                    k_params,
                    v_codes,
                    v_params,
                    k_sink,
                    v_sink};
  Tensor out = empty(x, with_last(x, x.size(2)), x.scalar_type());
  Scratch scratch;
  const Layer layer(check, call, parts, x.data_ptr(), out.data_ptr(), scratch);
  cpu::Team::run([&] { layer.run(); });
  return out;
}

Tensor decoder_layers(const Tensor& x, const Tensor& cos, const Tensor& sin,
                      const std::optional<Tensor>& mask, const std::vector<Tensor>& norms,
                      double eps, const std::vector<Tensor>& qkv_proj,
                      const std::vector<Tensor>& o_proj, const std::vector<Tensor>& gate_up_proj,
                      const std::vector<Tensor>& down_proj, const std::vector<int64_t>& group_sizes,
                      const std::vector<int64_t>& act_group_sizes, const std::optional<Tensor>& r3,
                      int64_t r3_block, const std::optional<Tensor>& r4, int64_t r4_block,
                      const std::vector<Tensor>& k_codes, const std::vector<Tensor>& k_params,
                      const std::vector<Tensor>& v_codes, const std::vector<Tensor>& v_params,
                      const std::vector<Tensor>& k_sink, const std::vector<Tensor>& v_sink,
                      int64_t start, double kv_clip, double scaling,
                      const std::optional<Tensor>& starts) {
  Check check("decoder_layers");
  const std::optional<Tensor> none;
  const Call call{x,        cos,   sin,     mask,    eps,    r3,   r3_block, r4,
                  r4_block, start, kv_clip, scaling, starts, none, none};
  check_call(check, call);
  const size_t layers = k_codes.size();
  check.that(layers >= 1, "k_codes has no tensor, expected one for each layer");
  check.that(norms.size() == 2 * layers, "norms has ", norms.size(),
             " tensors, expected 2 for "
             "each of ",
             layers, " layers");
  check_sizes(check, group_sizes, act_group_sizes, layers);
  for (auto [tensors, name] : {std::pair{&qkv_proj, "qkv_proj"},
                               {&o_proj, "o_proj"},
                               {&gate_up_proj, "gate_up_proj"},
                               {&down_proj, "down_proj"}})
    check.that(tensors->size() % layers == 0, name, " has ", tensors->size(),
               " tensors, expected as many for each of ", layers, " layers");
  for (auto [tensors, name] :
       {std::pair{&k_params, "k_params"}, {&v_codes, "v_codes"}, {&v_params, "v_params"}})
    check.that(tensors->size() == layers, name, " has ", tensors->size(), " tensors, expected ",
               layers, " like k_codes");
  for (auto [tensors, name] : {std::pair{&k_sink, "k_sink"}, {&v_sink, "v_sink"}})
    check.that(tensors->empty() || tensors->size() == layers, name, " has ", tensors->size(),
               " tensors, expected none or ", layers, " like k_codes");

  Tensor out = empty(x, with_last(x, x.size(2)), x.scalar_type());
  Scratch scratch;
  const auto sink = [](const std::vector<Tensor>& sinks, size_t i) {
    return sinks.empty() ? std::nullopt : std::optional<Tensor>(sinks[i]);
  };
  std::vector<Layer> plan;  // all is checked before anything is written
  plan.reserve(layers);
  for (size_t i = 0; i < layers; ++i) {
    const Parts parts{norms[2 * i],
                      norms[2 * i + 1],
                      part(qkv_proj, layers, i),
                      part(o_proj, layers, i),
                      part(gate_up_proj, layers, i),
                      part(down_proj, layers, i),
                      group_sizes.data() + 4 * i,
                      act_group_sizes.data() + 4 * i,
                      k_codes[i],
                      k_params[i],
                      v_codes[i],
                      v_params[i],
                      sink(k_sink, i),
                      sink(v_sink, i)};
    // Behind the first, a layer reads its input before it writes its result over it.
    const void* from = i == 0 ? x.data_ptr() : out.data_ptr();
    plan.emplace_back(check, call, parts, from, out.data_ptr(), scratch);
  }
  cpu::Team::run([&] {
    for (const Layer& layer : plan) layer.run();
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(w2a4, W2A4_DEVICE, m) {
  W2A4_IMPL(m, decoder_layer);
  W2A4_IMPL(m, decoder_layers);
}

}  // namespace w2a4
