// What the entry points share: tensors made and measured.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"

namespace w2a4 {

constexpr ScalarType kU8 = ScalarType::Byte;
constexpr ScalarType kI8 = ScalarType::Char;
constexpr ScalarType kF16 = ScalarType::Half;
constexpr ScalarType kF32 = ScalarType::Float;

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;)
    strides[i] = stride, stride *= std::max<int64_t>(shape[i], 1);
  return strides;
}

// An uninitialised, contiguous tensor on the device of `like`. By the C shim: the dispatcher, which
// torch::stable::new_empty goes through, takes microseconds to find an op by its name.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  const std::vector<int64_t> strides = contiguous_strides(shape);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      like.is_cpu() ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(),
      like.is_cpu() ? 0 : like.get_device_index(), &handle));
  return Tensor(handle);
}

// The memory of a contiguous `t`, from element `offset` on, as a contiguous tensor of another
// shape.
inline Tensor view_of(const Tensor& t, const std::vector<int64_t>& shape, int64_t offset = 0) {
  const std::vector<int64_t> strides = contiguous_strides(shape);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      t.get(), static_cast<int64_t>(shape.size()), shape.data(), strides.data(), offset, &handle));
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

// An activation that a message speaks of: an argument, or what lies between two kernels.
struct Activation {
  const char* name;
  const Tensor* t = nullptr;
};
inline std::ostream& operator<<(std::ostream& out, const Activation& x) {
  out << "the last dimension of " << x.name;
  return x.t ? out << ", shape " << shape_name(*x.t) : out;
}

// K of had_k, after checks that `block_size` is K times a power of two and divides the features of
// x.
inline int64_t check_hadamard(Check& check, const Activation& x, int64_t features,
                              const std::optional<Tensor>& had_k, int64_t block_size) {
  int64_t k = 1;
  if (had_k) {
    check.dtype(*had_k, "had_k", {kI8});
    check.that(had_k->dim() == 2 && had_k->size(0) == had_k->size(1) && had_k->size(0) >= 1,
               "had_k has shape ", shape_name(*had_k), ", expected a square matrix [K, K]");
    check.contiguous(*had_k, "had_k");
    k = had_k->size(0);
  }
  const int64_t power = block_size / k;
  check.that(block_size >= 1 && block_size % k == 0 && (power & (power - 1)) == 0,
             "block_size=", block_size, ", expected K times a power of two with K=", k,
             " of had_k");
  check.that(features % block_size == 0, "block_size=", block_size, " does not divide ", x,
             x.t ? "" : ", " + std::to_string(features));
  return k;
}

inline const int8_t* had_k_data(const std::optional<Tensor>& had_k) {
  return had_k ? static_cast<const int8_t*>(had_k->data_ptr()) : nullptr;
}

}  // namespace w2a4
