// Checks of arguments: a failure is a Python exception that names the argument, quotes what it was
// given and says what is expected. Nothing that passes can make a kernel read out of bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <ostream>
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

inline const char* dtype_name(ScalarType dtype) {
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
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// The shape of a tensor, for a message: spelt out only if there is one.
struct ShapeName {
  const Tensor& t;
};
inline ShapeName shape_name(const Tensor& t) {
  return {t};
}
inline std::ostream& operator<<(std::ostream& out, const ShapeName& shape) {
  out << "[";
  for (int64_t i = 0; i < shape.t.dim(); ++i) out << (i ? ", " : "") << shape.t.size(i);
  return out << "]";
}

// Where a tensor lies: -1 is the CPU, -2 neither that nor a CUDA device.
inline int device_of(const Tensor& t) {
  return t.is_cpu() ? -1 : t.is_cuda() ? t.get_device() : -2;
}
inline std::string device_name(int device) {
  return device == -1   ? "the CPU"
         : device == -2 ? "another device"
                        : "cuda:" + std::to_string(device);
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
    const int where = device_of(t);
    if (!first_) device_ = where, first_ = name;
    if (where == device_) return;
    fail(op_, name, " is on ", device_name(where), ", ", first_, " on ", device_name(device_),
         "; move them to one device");
  }

  void dtype(const Tensor& t, const char* name, std::initializer_list<ScalarType> allowed) {
    device(t, name);
    const ScalarType dtype = t.scalar_type();
    for (ScalarType want : allowed)
      if (dtype == want) return;
    std::string names;
    for (ScalarType want : allowed)
      names += (names.empty() ? "" : ", ") + std::string(dtype_name(want));
    fail(op_, name, " has dtype ", dtype_name(dtype), ", expected ", names);
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
    int64_t i = 0;
    for (int64_t size : want) same = same && t.size(i++) == size;
    if (same) return;
    std::string expected;
    for (int64_t size : want) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
    fail(op_, name, " has shape ", shape_name(t), ", expected [", expected, "] = ", meaning);
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
  const char* op_;
  const char* first_ = nullptr;  // the tensor that set device_
  int device_ = 0;
};

}  // namespace w2a4
