// What the entry points share: tensors made and measured.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"

namespace w2a4 {

constexpr ScalarType kU8 = ScalarType::Byte;
constexpr ScalarType kI8 = ScalarType::Char;
constexpr ScalarType kF16 = ScalarType::Half;
constexpr ScalarType kF32 = ScalarType::Float;

// An uninitialised, contiguous tensor on the device of `like`. By the C shim: the dispatcher, which
// torch::stable::new_empty goes through, takes microseconds to find an op by its name.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;)
    strides[i] = stride, stride *= std::max<int64_t>(shape[i], 1);
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      like.is_cpu() ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(),
      like.is_cpu() ? 0 : like.get_device_index(), &handle));
  return Tensor(handle);
}

// Shape of `t` with its last dimension replaced.
inline std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
  shape.back() = last;
  return shape;
}

// Rows of a tensor seen as [rows, last dimension]; right also when the last dimension is empty.
inline int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline void check_bias(Check& check, const std::optional<Tensor>& bias, int64_t out_features) {
  if (!bias) return;
  check.floating(*bias, "bias");
  check.shape(*bias, "bias", {out_features}, "[out_features]");
  check.contiguous(*bias, "bias");
}

}  // namespace w2a4
