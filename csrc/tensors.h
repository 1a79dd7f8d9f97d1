// What the entry points share: tensors made and measured.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "checks.h"

namespace w2a4 {

constexpr ScalarType kU8 = ScalarType::Byte;
constexpr ScalarType kI8 = ScalarType::Char;
constexpr ScalarType kF16 = ScalarType::Half;
constexpr ScalarType kF32 = ScalarType::Float;

// An uninitialised tensor on the device of `like`.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
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
