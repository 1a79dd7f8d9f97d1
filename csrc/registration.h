// Registers kernels of the ops. Schemas stand in w2a4/ops only, which defines the ops before it
// loads this; it compares them with the types of the functions, which torch does not.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#ifdef W2A4_CUDA
#define W2A4_DEVICE CUDA
#else
#define W2A4_DEVICE CPU
#endif

// In a block `STABLE_TORCH_LIBRARY_IMPL(w2a4, W2A4_DEVICE, m)`: the function that runs the op of
// its name.
#define W2A4_IMPL(m, op)         \
  (m).impl(#op, TORCH_BOX(&op)); \
  w2a4::signatures() += w2a4::signature(#op, &op)

namespace w2a4 {

// The ops of this module, a line each: `name(Tensor, int) -> Tensor`.
inline std::string& signatures() {
  static std::string lines;
  return lines;
}

// A type as schemas name it.
template <typename T>
struct TypeName;

template <>
struct TypeName<void> {
  static std::string get() { return "()"; }
};
template <>
struct TypeName<torch::stable::Tensor> {
  static std::string get() { return "Tensor"; }
};
template <>
struct TypeName<torch::headeronly::ScalarType> {
  static std::string get() { return "ScalarType"; }
};
template <>
struct TypeName<int64_t> {
  static std::string get() { return "int"; }
};
template <>
struct TypeName<double> {
  static std::string get() { return "float"; }
};
template <>
struct TypeName<bool> {
  static std::string get() { return "bool"; }
};
template <typename T>
struct TypeName<const T&> : TypeName<T> {};
template <typename T>
struct TypeName<std::optional<T>> {
  static std::string get() { return TypeName<T>::get() + "?"; }
};
template <typename T>
struct TypeName<std::vector<T>> {
  static std::string get() { return TypeName<T>::get() + "[]"; }
};

template <typename... T>
std::string listed() {
  std::string list;
  ((list += (list.empty() ? "" : ", ") + TypeName<T>::get()), ...);
  return "(" + list + ")";
}
template <typename... T>
struct TypeName<std::tuple<T...>> {
  static std::string get() { return listed<T...>(); }
};

template <typename Result, typename... Arguments>
std::string signature(const char* op, Result (*)(Arguments...)) {
  return op + listed<Arguments...>() + " -> " + TypeName<Result>::get() + "\n";
}

}  // namespace w2a4
