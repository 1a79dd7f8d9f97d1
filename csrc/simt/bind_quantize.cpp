// hadamard and quantize_a4 of cuda/, run on a CPU: the same plans, kernels and grids as the
// launchers in cuda/ use. Arrays of 2-byte formats are uint16; outputs are written in place.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "../cuda/hadamard.cuh"
#include "../cuda/quantize_plan.h"
#include "bind.h"

namespace py = pybind11;
using namespace w2a4;

namespace {

py::dict describe(const cuda::ClusterTransform& t, const cuda::Launch& how) {
  py::dict d;
  d["rows"] = t.rows, d["columns"] = 1 << t.log_columns, d["at_once"] = t.at_once;
  d["warps"] = t.warps, d["cluster"] = how.cluster, d["blocks"] = how.blocks;
  d["shared"] = how.shared;
  return d;
}

py::dict describe(const cuda::Transform& t, const cuda::Launch& how) {
  py::dict d;
  d["cluster"] = 0;
  d["rows"] = t.rows, d["columns"] = 1 << t.log_m, d["tiles"] = t.tiles, d["chunks"] = t.chunks;
  d["warps"] = t.warps, d["slices"] = t.slices, d["units"] = t.units,
  d["mix"] = static_cast<int>(t.mix);
  d["exchange"] = t.log_c > 0, d["vector"] = t.vector;
  d["blocks"] = how.blocks, d["shared"] = how.shared;
  return d;
}

// Runs what it is given, and says in `plan` how that was divided.
auto run_into(py::dict& plan, unsigned seed) {
  return [&plan, seed](auto kernel, const auto& args, const cuda::Launch& how) {
    simt::launch(
        {how.blocks}, how.threads, how.shared, seed, [&] { decltype(kernel)::value(args); },
        how.cluster);
    plan = describe(args.t, how);
  };
}

// x and y [rows, n]. Returns how the transform was divided.
py::dict hadamard(const py::array& x, py::array& y, const std::string& dtype, const Signs& had_k,
                  int64_t block_size, bool transpose, int arch, int processors, size_t most_shared,
                  unsigned seed) {
  HadamardParams p{};
  p.x = x.data(), p.y = y.mutable_data(), p.dtype = dtype_of(dtype);
  p.had_k = had_k ? had_k->data() : nullptr, p.k = had_k ? had_k->shape(0) : 1;
  p.rows = x.shape(0), p.n = x.shape(1), p.block_size = block_size, p.transpose = transpose;
  py::dict plan;
  cuda::with_hadamard(p, arch, processors, most_shared, run_into(plan, seed));
  return plan;
}

// x and up [tokens, features], codes uint8 [tokens, ceil(features / 2)], scale float32
// [tokens, groups], norm_weight [features]. rmsnorm if eps is given.
py::dict quantize_a4(const py::array& x, const py::array_t<float>& clip,
                     py::array_t<uint8_t>& codes, py::array_t<float>& scale,
                     const std::string& dtype, const std::optional<py::array>& up,
                     const std::optional<float>& eps, const std::optional<py::array>& norm_weight,
                     const std::string& norm_dtype, const Signs& had_k, int64_t block_size,
                     int arch, int processors, size_t most_shared, unsigned seed) {
  QuantizeA4Params p{};
  p.x = x.data(), p.clip = clip.data(), p.dtype = dtype_of(dtype);
  p.codes = codes.mutable_data(), p.scale = scale.mutable_data();
  p.tokens = x.shape(0), p.features = x.shape(1), p.group_size = p.features / scale.shape(1);
  p.up = up ? up->data() : nullptr;
  p.rmsnorm = eps.has_value(), p.eps = eps.value_or(0.0f);
  p.norm_weight = norm_weight ? norm_weight->data() : nullptr, p.norm_dtype = dtype_of(norm_dtype);
  p.had_k = had_k ? had_k->data() : nullptr, p.k = had_k ? had_k->shape(0) : 1;
  p.block_size = block_size;
  py::dict plan;
  cuda::with_quantize(p, arch, processors, most_shared, run_into(plan, seed));
  return plan;
}

}  // namespace

void bind_quantize(py::module_& m) {
  m.def("hadamard", &hadamard);
  m.def("quantize_a4", &quantize_a4);
}
