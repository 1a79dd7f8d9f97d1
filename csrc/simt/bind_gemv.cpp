// linear_a4 of cuda/, run on a CPU: the same plan, kernels and grid as cuda/linear_a4.cu launches.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "../cuda/gemv_plan.h"
#include "bind.h"

namespace py = pybind11;
using namespace w2a4;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

cuda::Gemv variant(const std::string& name) {
  return name == "bmma"   ? cuda::Gemv::kBmma
         : name == "imma" ? cuda::Gemv::kImma
                          : cuda::Gemv::kAuto;
}

// y, and residual if it is not None, are [tokens, out]: float32, or uint16 holding float16
// ("float16") or bfloat16 ("bfloat16"). Returns the name of the kernel that ran.
std::string linear_a4(const Array<uint8_t>& a_codes, const Array<float>& a_scale,
                      const Array<uint8_t>& weight, const py::object& levels,
                      const Array<uint16_t>& scale, const py::object& bias,
                      const py::object& residual, py::array& y, int64_t in_features,
                      int64_t group_size, const std::string& out_dtype, const std::string& gemv,
                      int arch, int processors, size_t most_shared, unsigned seed) {
  LinearA4Params p{};
  p.a_codes = a_codes.data();
  p.a_scale = a_scale.data();
  p.weight = weight.data();
  const auto levels_array = levels.is_none() ? Array<int8_t>() : levels.cast<Array<int8_t>>();
  const auto bias_array = bias.is_none() ? Array<float>() : bias.cast<Array<float>>();
  p.levels = levels.is_none() ? nullptr : levels_array.data();
  p.scale = scale.data();
  p.bias = bias.is_none() ? nullptr : bias_array.data();
  p.bias_dtype = ScalarType::Float;
  const auto residual_array = residual.is_none() ? py::array() : residual.cast<py::array>();
  p.residual = residual.is_none() ? nullptr : residual_array.data();
  p.y = y.mutable_data();
  p.out_dtype = dtype_of(out_dtype);
  p.tokens = a_codes.shape(0);
  p.out_features = weight.shape(0);
  p.in_features = in_features;
  p.group_size = group_size;
  p.act_group = in_features / a_scale.shape(1);
  p.block = std::min(p.group_size, p.act_group);
  p.weight_bits = levels.is_none() ? 4 : 2;
  const cuda::GemvPlan plan = cuda::plan_gemv(p, arch, processors, most_shared, variant(gemv));
  std::string ran;
  cuda::with_gemv_kernel(p, plan, [&](auto kernel, const char* name, size_t shared) {
    ran = name;
    if (shared > most_shared) throw std::runtime_error("simt: more shared memory than there is");
    simt::launch({plan.blocks_x, plan.blocks_y, plan.blocks_z}, cuda::kThreads, shared, seed,
                 [&] { decltype(kernel)::value(p); });
  });
  return ran;
}

}  // namespace

void bind_gemv(py::module_& m) {
  m.def("linear_a4", &linear_a4);
}
