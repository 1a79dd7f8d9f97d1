// Entry points of the ops that training passes through; they have CPU kernels only.
#include "backend.h"
#include "checks.h"
#include "ops.h"
#include "tensors.h"

namespace w2a4 {
namespace {

const float* floats(Check& check, const Tensor& t, const char* name) {
  check.dtype(t, name, {kF32});
  check.contiguous(t, name);
  return static_cast<const float*>(t.data_ptr());
}

float* out(const Tensor& t) {
  return static_cast<float*>(t.data_ptr());
}

void check_grad(Check& check, const Tensor& grad, const Tensor& like, const char* name) {
  bool same = grad.dim() == like.dim();
  for (int64_t i = 0; same && i < like.dim(); ++i) same = grad.size(i) == like.size(i);
  check.that(same, "grad has shape ", shape_name(grad), ", expected that of ", name, ", ",
             shape_name(like));
}

SnapParams snap_params(Check& check, const Tensor& w, const Tensor& levels) {
  SnapParams p{};
  p.w = floats(check, w, "w");
  check.that(w.dim() == 3, "w has shape ", shape_name(w), ", expected [out, groups, group_size]");
  p.levels = floats(check, levels, "levels");
  check.shape(levels, "levels", {w.size(0), w.size(1), 4}, "[out, groups, 4]");
  p.groups = w.size(0) * w.size(1);
  p.group_size = w.size(2);
  return p;
}

FakeQuantParams fake_quant_params(Check& check, const Tensor& x, const Tensor& clip, bool kv) {
  FakeQuantParams p{};
  p.x = floats(check, x, "x");
  check.at_least_1d(x, "x");
  check.that(x.size(-1) >= 1, "x has shape ", shape_name(x), ", expected at least one feature");
  const float* value = floats(check, clip, "clip");
  check.shape(clip, "clip", {1}, "[1]");
  p.rows = rows_of(x);
  p.size = x.size(-1);
  p.clip = *value;
  p.kv = kv;
  return p;
}

}  // namespace

Tensor snap(const Tensor& w, const Tensor& levels) {
  Check check("snap");
  SnapParams p = snap_params(check, w, levels);
  Tensor y = empty(w, with_last(w, p.group_size), kF32);
  p.y = out(y);
  kernels::snap(p);
  return y;
}

std::tuple<Tensor, Tensor> snap_backward(const Tensor& grad, const Tensor& w, const Tensor& soft,
                                         const Tensor& levels) {
  Check check("snap_backward");
  SnapParams p = snap_params(check, w, levels);
  p.grad = floats(check, grad, "grad");
  check_grad(check, grad, w, "w");
  p.soft = floats(check, soft, "soft");
  check.shape(soft, "soft", {w.size(0), w.size(1), 4}, "[out, groups, 4]");
  Tensor grad_w = empty(w, with_last(w, p.group_size), kF32);
  Tensor grad_soft = empty(w, with_last(w, 4), kF32);
  p.grad_w = out(grad_w);
  p.grad_soft = out(grad_soft);
  kernels::snap(p);
  return {grad_w, grad_soft};
}

Tensor fake_quant_rows(const Tensor& x, const Tensor& clip, bool kv) {
  Check check("fake_quant_rows");
  FakeQuantParams p = fake_quant_params(check, x, clip, kv);
  Tensor y = empty(x, with_last(x, p.size), kF32);
  p.y = out(y);
  kernels::fake_quant_rows(p);
  return y;
}

std::tuple<Tensor, Tensor> fake_quant_rows_backward(const Tensor& grad, const Tensor& x,
                                                    const Tensor& clip, bool kv) {
  Check check("fake_quant_rows_backward");
  FakeQuantParams p = fake_quant_params(check, x, clip, kv);
  p.grad = floats(check, grad, "grad");
  check_grad(check, grad, x, "x");
  Tensor grad_x = empty(x, with_last(x, p.size), kF32);
  Tensor grad_clip = empty(x, {p.rows}, kF32);
  p.grad_x = out(grad_x);
  p.grad_clip = out(grad_clip);
  kernels::fake_quant_rows(p);
  return {grad_x, grad_clip};
}

}  // namespace w2a4
