// Entry point of the op that fitting weights passes through; it has a CPU kernel only.
#include "backend.h"
#include "checks.h"
#include "ops.h"
#include "tensors.h"

namespace w2a4 {

std::tuple<Tensor, Tensor> round_columns(const Tensor& work, const Tensor& coupling,
                                         const std::optional<Tensor>& current, const Tensor& grid,
                                         const Tensor& group) {
  Check check("round_columns");
  const auto floats = [&](const Tensor& t, const char* name) {
    check.dtype(t, name, {kF32});
    check.contiguous(t, name);
    return static_cast<const float*>(t.data_ptr());
  };
  RoundColumnsParams p{};
  p.work = floats(work, "work");
  check.that(work.dim() == 2, "work has shape ", shape_name(work), ", expected [columns, out]");
  p.columns = work.size(0);
  p.out = work.size(1);
  p.coupling = floats(coupling, "coupling");
  check.shape(coupling, "coupling", {p.columns, p.columns}, "[columns, columns]");
  if (current) {
    p.current = floats(*current, "current");
    check.shape(*current, "current", {p.columns, p.out}, "[columns, out]");
  }
  p.grid = floats(grid, "grid");
  check.that(grid.dim() == 3 && (grid.size(1) == 4 || grid.size(1) == 1) && grid.size(2) == p.out,
             "grid has shape ", shape_name(grid), ", expected [groups, 4 or 1, ", p.out,
             "]: four points, or a scale");
  p.points = grid.size(1);
  check.dtype(group, "group", {ScalarType::Long});
  check.shape(group, "group", {p.columns}, "[columns]");
  check.contiguous(group, "group");
  p.group = static_cast<const int64_t*>(group.data_ptr());
  for (int64_t j = 0; j < p.columns; ++j)
    check.that(p.group[j] >= 0 && p.group[j] < grid.size(0), "group[", j, "] is ", p.group[j],
               ", expected 0 to ", grid.size(0) - 1);
  Tensor codes = empty(work, {p.columns, p.out}, kI8);
  Tensor change = empty(work, {p.columns, p.out}, kF32);
  p.codes = static_cast<int8_t*>(codes.data_ptr());
  p.change = static_cast<float*>(change.data_ptr());
  kernels::round_columns(p);
  return {codes, change};
}

}  // namespace w2a4
