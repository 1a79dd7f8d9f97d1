// Entry point of linear_w8, on each device.
#include <algorithm>

#include "backend.h"
#include "checks.h"
#include "ops.h"
#include "registration.h"
#include "tensors.h"

namespace w2a4 {

Tensor linear_w8(const Tensor& x, const Tensor& weight, const Tensor& scale,
                 const std::optional<Tensor>& bias) {
  Check check("linear_w8");
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
  Tensor y = empty(x, with_last(x, out_features), x.scalar_type());
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
  const OnDeviceOf device(x);
  p.device = device.index;
  kernels::linear_w8(p);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(w2a4, W2A4_DEVICE, m) {
  W2A4_IMPL(m, linear_w8);
}

}  // namespace w2a4
