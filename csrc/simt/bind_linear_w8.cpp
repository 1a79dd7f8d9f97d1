// linear_w8 of cuda/, run on a CPU: the same plan, kernels and grid as cuda/linear_w8.cu launches.
#include <pybind11/pybind11.h>

#include "../cuda/linear_w8_plan.h"
#include "bind.h"

namespace py = pybind11;
using namespace w2a4;

namespace {

// x [tokens, in] and y [tokens, out] of dtype, 2-byte formats as uint16; weight int8 [out, in],
// scale uint16 [out], bias float32 [out]. Returns how many tokens a block took.
int linear_w8(const py::array& x, const py::array_t<int8_t>& weight,
              const py::array_t<uint16_t>& scale, const std::optional<py::array_t<float>>& bias,
              py::array& y, const std::string& dtype, int processors, size_t most_shared,
              unsigned seed) {
  LinearW8Params p{};
  p.x = x.data(), p.weight = weight.data(), p.scale = scale.data(), p.y = y.mutable_data();
  p.bias = bias ? bias->data() : nullptr, p.bias_dtype = ScalarType::Float;
  p.dtype = dtype_of(dtype);
  p.tokens = x.shape(0), p.in_features = x.shape(1), p.out_features = weight.shape(0);
  const cuda::LinearW8Plan plan = cuda::plan_linear_w8(p, processors, most_shared);
  cuda::with_linear_w8_kernel(plan, [&](auto kernel) {
    simt::launch({plan.blocks_x, plan.blocks_y}, cuda::kW8Warps * 32, plan.shared, seed,
                 [&] { decltype(kernel)::value(plan.args); });
  });
  return plan.tokens;
}

}  // namespace

void bind_linear_w8(py::module_& m) {
  m.def("linear_w8", &linear_w8);
}
