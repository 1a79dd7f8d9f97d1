// The op table: schemas, and which entry point serves which device.
#include "ops.h"

STABLE_TORCH_LIBRARY(w2a4, m) {
  m.def("hadamard(Tensor x, Tensor? had_k, int block_size, bool transpose=False) -> Tensor");
  m.def("quantize_a4(Tensor x, Tensor clip, int group_size=-1) -> (Tensor, Tensor)");
  m.def(
      "hadamard_a4(Tensor x, Tensor? had_k, int block_size, Tensor clip, int group_size=-1) -> "
      "(Tensor, Tensor)");
  m.def(
      "rmsnorm_a4(Tensor x, Tensor? weight, float eps, Tensor clip, int group_size=-1) -> "
      "(Tensor, Tensor)");
  m.def(
      "silu_mul_hadamard_a4(Tensor gate, Tensor up, Tensor? had_k, int block_size, Tensor clip, "
      "int group_size=-1) -> (Tensor, Tensor)");
  m.def(
      "linear_w2a4(Tensor a_codes, Tensor a_scale, Tensor weight, Tensor levels, Tensor scale, "
      "Tensor? bias, int group_size, ScalarType out_dtype, Tensor? residual=None) -> Tensor");
  m.def(
      "linear_w4a4(Tensor a_codes, Tensor a_scale, Tensor weight, Tensor scale, Tensor? bias, "
      "int group_size, ScalarType out_dtype, Tensor? residual=None) -> Tensor");
  m.def("linear_w8(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor");
  m.def("quantize_kv4(Tensor x, float clip) -> (Tensor, Tensor)");
  m.def(
      "append_kv4(Tensor x, Tensor(a!) codes, Tensor(b!) params, SymInt start, float clip, "
      "Tensor? starts=None, Tensor? slots=None) -> ()");
  m.def(
      "rope_append_kv4(Tensor qkv, Tensor cos, Tensor sin, Tensor? had_k, int block_size, "
      "Tensor(a!) k_codes, Tensor(b!) k_params, Tensor(c!) v_codes, Tensor(d!) v_params, "
      "SymInt start, float clip, Tensor? starts=None, Tensor? slots=None) -> Tensor");
  m.def(
      "attention_kv4(Tensor q, Tensor k_codes, Tensor k_params, Tensor v_codes, Tensor v_params, "
      "SymInt length, Tensor? mask, bool causal, float scaling, Tensor? k_sink=None, "
      "Tensor? v_sink=None, Tensor? starts=None, Tensor? block_table=None) -> Tensor");
  m.def(
      "decoder_layer(Tensor x, Tensor cos, Tensor sin, Tensor? mask, Tensor[] norms, float eps, "
      "Tensor[] qkv_proj, Tensor[] o_proj, Tensor[] gate_up_proj, Tensor[] down_proj, "
      "int[] group_sizes, int[] act_group_sizes, Tensor? r3, int r3_block, Tensor? r4, int "
      "r4_block, "
      "Tensor(a!) k_codes, Tensor(b!) k_params, Tensor(c!) v_codes, Tensor(d!) v_params, "
      "Tensor? k_sink, Tensor? v_sink, SymInt start, float kv_clip, float scaling, "
      "Tensor? starts=None) -> Tensor");
  m.def(
      "round_columns(Tensor work, Tensor coupling, Tensor? current, Tensor grid, Tensor group) -> "
      "(Tensor, Tensor)");
  m.def("snap(Tensor w, Tensor levels) -> Tensor");
  m.def("snap_backward(Tensor grad, Tensor w, Tensor soft, Tensor levels) -> (Tensor, Tensor)");
  m.def("fake_quant_rows(Tensor x, Tensor clip, bool kv) -> Tensor");
  m.def(
      "fake_quant_rows_backward(Tensor grad, Tensor x, Tensor clip, bool kv) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(w2a4, CPU, m) {
  w2a4::register_a4(m);
  w2a4::register_w8(m);
  w2a4::register_kv4(m);
  m.impl("decoder_layer", TORCH_BOX(&w2a4::decoder_layer));
  m.impl("round_columns", TORCH_BOX(&w2a4::round_columns));
  m.impl("snap", TORCH_BOX(&w2a4::snap));
  m.impl("snap_backward", TORCH_BOX(&w2a4::snap_backward));
  m.impl("fake_quant_rows", TORCH_BOX(&w2a4::fake_quant_rows));
  m.impl("fake_quant_rows_backward", TORCH_BOX(&w2a4::fake_quant_rows_backward));
}
