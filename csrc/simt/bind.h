// What the bindings of the kernels share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "../params.h"

using Signs = std::optional<pybind11::array_t<int8_t, pybind11::array::c_style>>;

inline w2a4::ScalarType dtype_of(const std::string& name) {
  return name == "float16"    ? w2a4::ScalarType::Half
         : name == "bfloat16" ? w2a4::ScalarType::BFloat16
         : name == "float64"  ? w2a4::ScalarType::Double
                              : w2a4::ScalarType::Float;
}
