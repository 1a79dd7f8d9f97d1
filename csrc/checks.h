// Checks of arguments: a failure is a Python exception that names the argument, quotes what it was
// given and says what is expected. Nothing that passes can make a kernel read out of bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "params.h"

namespace w2a4 {

using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "w2a4." << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string shape_name(const Tensor& t) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << "]";
  return out.str();
}

// Checks of one op's arguments.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  template <typename... Parts>
  void that(bool ok, const Parts&... parts) const {
    if (!ok) fail(op_, parts...);
  }

  // The first tensor that is checked sets the device; every other one has to lie there.
  void device(const Tensor& t, const char* name) {
    const std::string where = device_name(t);
    if (device_.empty()) {
      device_ = where, first_ = name;
      return;
    }
    that(where == device_, name, " is on ", where, ", ", first_, " on ", device_,
         "; move them to one device");
  }

  void dtype(const Tensor& t, const char* name, std::initializer_list<ScalarType> allowed) {
    device(t, name);
    std::string names;
    for (ScalarType want : allowed) {
      if (t.scalar_type() == want) return;
      names += (names.empty() ? "" : ", ") + dtype_name(want);
    }
    fail(op_, name, " has dtype ", dtype_name(t.scalar_type()), ", expected ", names);
  }

  void floating(const Tensor& t, const char* name) {
    dtype(t, name, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double});
  }

  void contiguous(const Tensor& t, const char* name) const {
    that(t.is_contiguous(), name, " of shape ", shape_name(t), " is not contiguous; pass ", name,
         ".contiguous()");
  }

  // A dense tensor of this shape; `meaning` spells the shape out in the argument names.
  void shape(const Tensor& t, const char* name, std::initializer_list<int64_t> want,
             const char* meaning) const {
    bool same = t.dim() == static_cast<int64_t>(want.size());
    std::ostringstream expected;
    expected << "[";
    int64_t i = 0;
    for (int64_t size : want) {
      same = same && t.size(i) == size;
      expected << (i++ ? ", " : "") << size;
    }
    expected << "] = " << meaning;
    that(same, name, " has shape ", shape_name(t), ", expected ", expected.str());
  }

  void at_least_1d(const Tensor& t, const char* name) const {
    that(t.dim() >= 1, name, " has no dimension, expected [..., features]");
  }

  // Four dimensions, the last of stride 1: read and written through its strides.
  Strided4 strided(const Tensor& t, const char* name) const {
    that(t.dim() == 4, name, " has shape ", shape_name(t),
         ", expected four dimensions [batch, heads, tokens, ...]");
    that(t.size(3) <= 1 || t.stride(3) == 1 || t.numel() == 0, name, " has stride ", t.stride(3),
         " in its last dimension, expected 1 (contiguous)");
    return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
  }

 private:
  static std::string device_name(const Tensor& t) {
    return t.is_cpu()    ? "the CPU"
           : t.is_cuda() ? "cuda:" + std::to_string(t.get_device())
                         : "another device";
  }

  const char* op_;
  const char* first_ = "";
  std::string device_;
};

}  // namespace w2a4
