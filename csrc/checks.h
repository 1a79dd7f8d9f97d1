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
#include <utility>

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

// The bytes of a tensor's elements as its strides lay them out: three outer dimensions, the last of
// them contiguous, or any tensor as one run of bytes from its first element to its last.
struct Extent {
  const char* data;
  int64_t stride[3], size[3];  // in bytes and elements; of size 1 where there is none
  int64_t last;                // bytes of the last dimension

  int64_t end() const {
    int64_t bytes = last;
    for (int i = 0; i < 3; ++i) bytes += (size[i] - 1) * stride[i];
    return bytes;
  }
};

inline Extent extent_of(const Tensor& t) {
  const int64_t element = t.element_size(), dims = t.dim();
  Extent e{static_cast<const char*>(t.data_ptr()), {0, 0, 0}, {1, 1, 1}, element};
  if (dims == 4) {
    e.last = t.size(3) * element;
    for (int i = 0; i < 3; ++i) e.size[i] = t.size(i), e.stride[i] = t.stride(i) * element;
    // Strides that nothing is stepped by may be anything. The largest first.
    for (int i = 0; i < 3; ++i)
      if (e.size[i] == 1) e.stride[i] = 0;
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2 - i; ++j)
        if (e.stride[j] < e.stride[j + 1])
          std::swap(e.stride[j], e.stride[j + 1]), std::swap(e.size[j], e.size[j + 1]);
  } else {
    for (int64_t i = 0; i < dims; ++i) e.last += (t.size(i) - 1) * t.stride(i) * element;
  }
  return e;
}

// Whether no two elements lie in one place. Strides that only happen not to meet count as meeting.
inline bool is_disjoint(const Extent& e) {
  int64_t inner = e.last;
  for (int i = 2; i >= 0; --i) {
    if (e.size[i] == 1) continue;
    if (e.stride[i] < inner) return false;
    inner = (e.size[i] - 1) * e.stride[i] + inner;
  }
  return true;
}

// Whether b, `distance` bytes behind a, shares a byte with it, from dimension `i` on; both of the
// same strides there.
inline bool meets(const Extent& a, const Extent& b, int64_t distance, int i = 0) {
  while (i < 3 && a.stride[i] == 0) ++i;
  if (i == 3) return distance < a.last && -distance < b.last;
  // b's element k and a's element m are `distance + (k - m) * stride` apart: only steps that bring
  // them near can make them meet.
  const int64_t step = a.stride[i];
  const int64_t below = distance >= 0 ? distance / step : -((-distance + step - 1) / step);
  for (int64_t steps : {below, below + 1})
    if (steps < a.size[i] && -steps < b.size[i] && meets(a, b, distance - steps * step, i + 1))
      return true;
  return false;
}

inline bool overlaps(const Extent& a, const Extent& b) {
  const int64_t distance = b.data - a.data;
  if (distance >= a.end() || -distance >= b.end()) return false;
  for (int i = 0; i < 3; ++i)
    if (a.stride[i] != b.stride[i]) return true;
  return meets(a, b, distance);
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

  // What is written lies in no place twice, and in none that is read or written as another
  // argument: threads would race, and a result would depend on which comes first.
  void written(std::initializer_list<std::pair<const Tensor*, const char*>> outs,
               std::initializer_list<std::pair<const Tensor*, const char*>> ins) const {
    for (const auto* out = outs.begin(); out != outs.end(); ++out) {
      if (out->first->numel() == 0) continue;
      const Extent e = extent_of(*out->first);
      that(is_disjoint(e), out->second, " of shape ", shape_name(*out->first),
           " is written, but some of its elements share memory; pass a tensor of its own, such as ",
           out->second, ".clone()");
      const auto apart = [&](const std::pair<const Tensor*, const char*>& other) {
        that(other.first->numel() == 0 || !overlaps(e, extent_of(*other.first)), out->second,
             " is written, but shares memory with ", other.second,
             "; pass tensors that do not overlap");
      };
      for (const auto* other = out + 1; other != outs.end(); ++other) apart(*other);
      for (const auto& in : ins) apart(in);
    }
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
