// round_columns: the inner loop of GPTQ and of coordinate descent. Rows of a weight matrix do not
// depend on each other, so a tile of some rows goes through all columns in the innermost cache.
#include <algorithm>
#include <vector>

#include "../checks.h"
#include "../registration.h"
#include "../tensors.h"
#include "arch.h"
#include "numbers.h"

namespace w2a4 {
namespace cpu {
namespace {

// Columns of a weight matrix, which are rows here, rounded one after another.
struct RoundColumnsParams {
  const float* work;      // [columns, out]
  const float* coupling;  // [columns, columns]
  const float* current;   // [columns, out], or null: work as it has become
  const float* grid;      // [groups, points, out]: eight or four points, ascending,
                          // or one scale, of the steps of `bits` bits
  const int64_t* group;   // [columns]
  int8_t* codes;          // [columns, out]
  float* change;          // [columns, out]
  int64_t columns, out, points;
  int bits;
};

constexpr int64_t kTile = 64;  // rows of the weight matrix, which are columns of what lies here

// q = the grid value nearest to v, and its code.
template <int kPoints>
W2A4_INLINE void nearest_level(const float* v, const float* points, int64_t stride, int64_t n,
                               int8_t* code, float* q) {
  for (int64_t i = 0; i < n; ++i) {
    int above = 0;
    float nearest = points[i];
#pragma GCC unroll 8
    for (int k = 1; k < kPoints; ++k) {
      const float lower = points[(k - 1) * stride + i], upper = points[k * stride + i];
      const bool beyond = v[i] > (upper + lower) / 2;
      above += beyond;
      nearest = beyond ? upper : nearest;
    }
    code[i] = static_cast<int8_t>(above);
    q[i] = nearest;
  }
}

W2A4_INLINE void nearest_step(const float* v, const float* scale, int bits, int64_t n, int8_t* code,
                              float* q) {
  const float least = static_cast<float>(-(1 << (bits - 1))), most = -least - 1.0f;
  for (int64_t i = 0; i < n; ++i) {
    // Clamped first, so that round_even is exact.
    const float steps = v[i] / scale[i];
    const float k = round_even(steps < least ? least : steps > most ? most : steps);
    code[i] = static_cast<int8_t>(k);
    q[i] = k * scale[i];
  }
}

template <class Arch>
W2A4_INLINE void round_tiles(const RoundColumnsParams& p, int64_t begin, int64_t end) {
  std::vector<float> scratch((p.columns + 2) * kTile);  // zeros
  float *tile = scratch.data(), *q = tile + p.columns * kTile, *change = q + kTile;
  for (int64_t first = begin * kTile; first < end * kTile; first += kTile) {
    const int64_t n = std::min(kTile, p.out - first);
    std::fill_n(change, kTile, 0.0f);
    for (int64_t j = 0; j < p.columns; ++j)
      std::copy_n(p.work + j * p.out + first, n, tile + j * kTile);
    for (int64_t j = 0; j < p.columns; ++j) {
      const float* v = tile + j * kTile;
      const float* grid = p.grid + p.group[j] * p.points * p.out + first;
      int8_t* code = p.codes + j * p.out + first;
      if (p.points == 8)
        nearest_level<8>(v, grid, p.out, n, code, q);
      else if (p.points == 4)
        nearest_level<4>(v, grid, p.out, n, code, q);
      else
        nearest_step(v, grid, p.bits, n, code, q);
      const float* from = p.current ? p.current + j * p.out + first : v;
      for (int64_t i = 0; i < n; ++i) change[i] = q[i] - from[i];
      std::copy_n(change, n, p.change + j * p.out + first);
      for (int64_t later = j + 1; later < p.columns; ++later) {
        const float factor = p.coupling[j * p.columns + later];
        float* row = tile + later * kTile;
        for (int64_t i = 0; i < kTile; ++i) row[i] -= factor * change[i];  // 0 beyond n
      }
    }
  }
}
W2A4_DISPATCH(round_tiles, RoundColumnsParams)

void round_columns(const RoundColumnsParams& p) {
  parallel((p.out + kTile - 1) / kTile, 1, p, round_tiles_dispatch);
}

}  // namespace
}  // namespace cpu

std::tuple<Tensor, Tensor> round_columns(const Tensor& work, const Tensor& coupling,
                                         const std::optional<Tensor>& current, const Tensor& grid,
                                         const Tensor& group, int64_t bits) {
  Check check("round_columns");
  const auto floats = [&](const Tensor& t, const char* name) {
    check.dtype(t, name, {kF32});
    check.contiguous(t, name);
    return static_cast<const float*>(t.data_ptr());
  };
  cpu::RoundColumnsParams p{};
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
  check.that(grid.dim() == 3 && grid.size(2) == p.out &&
                 (grid.size(1) == 8 || grid.size(1) == 4 || grid.size(1) == 1),
             "grid has shape ", shape_name(grid), ", expected [groups, 8, 4 or 1, ", p.out,
             "]: eight or four points, or a scale");
  p.points = grid.size(1);
  check.that(2 <= bits && bits <= 8, "bits=", bits, ", expected 2 to 8");
  p.bits = static_cast<int>(bits);
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
  cpu::round_columns(p);
  return {codes, change};
}

STABLE_TORCH_LIBRARY_IMPL(w2a4, W2A4_DEVICE, m) {
  W2A4_IMPL(m, round_columns);
}

}  // namespace w2a4
