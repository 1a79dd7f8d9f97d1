// What training passes through, forward and backward: snap (weights to the four levels of their
// group) and fake_quant_rows (activations, keys and values, a scale a row). Backward computes codes
// again instead of reading them. Sums are of eight lanes, whatever the instruction set.
#include <cmath>
#include <vector>

#include "../checks.h"
#include "../registration.h"
#include "../tensors.h"
#include "arch.h"
#include "numbers.h"

namespace w2a4 {
namespace cpu {
namespace {

// snap, and backward where grad is given: y, or grad_w and grad_soft, is written.
struct SnapParams {
  const float* w;       // [groups, group_size]
  const float* levels;  // [groups, 4], ascending
  float* y;             // [groups, group_size]
  const float* grad;    // [groups, group_size], of y; or null
  const float* soft;    // [groups, 4], ascending: levels before they were rounded
  float* grad_w;        // [groups, group_size]
  float* grad_soft;     // [groups, 4]
  int64_t groups, group_size;
};

// fake_quant_rows, and backward where grad is given: y, or grad_x and grad_clip, is written.
struct FakeQuantParams {
  const float* x;     // [rows, size]
  float* y;           // [rows, size]
  const float* grad;  // [rows, size], of y; or null
  float* grad_x;      // [rows, size]
  float* grad_clip;   // [rows]: its sum is the gradient
  int64_t rows, size;
  float clip;
  bool kv;  // asymmetric with a zero-point, else activations
};

constexpr int64_t kGrain = 1 << 14;  // elements of one thread that are worth waking another

W2A4_INLINE float sum(const float* x, int64_t n) {
  constexpr int kLanes = 8;
  typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
  Vec lanes = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) lanes += *reinterpret_cast<const Vec*>(x + i);
  for (int lane = 0; i < n; ++i, ++lane) lanes[lane] += x[i];
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
         ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

W2A4_INLINE int64_t count_equal(const float* x, int64_t n, float value) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += x[i] == value;
  return count;
}

// The four levels of a group, ascending, and their middles: a weight above the k-th middle takes
// level k + 1 or a higher one.
struct Levels {
  float level[4], middle[3];

  explicit W2A4_INLINE Levels(const float* levels) {
    for (int k = 0; k < 4; ++k) level[k] = levels[k];
    for (int k = 0; k < 3; ++k) middle[k] = (levels[k + 1] + levels[k]) / 2;
  }
};

template <class Arch>
W2A4_INLINE void snap_groups(const SnapParams& p, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) {
    const Levels l(p.levels + 4 * group);
    const float* w = p.w + group * p.group_size;
    float* y = p.y + group * p.group_size;
    for (int64_t i = 0; i < p.group_size; ++i) {
      const float low = w[i] > l.middle[0] ? l.level[1] : l.level[0];
      const float high = w[i] > l.middle[2] ? l.level[3] : l.level[2];
      y[i] = w[i] > l.middle[1] ? high : low;
    }
  }
}
W2A4_DISPATCH(snap_groups, SnapParams)

// To a weight its gradient, where it lies between the end levels; to a level the sum of those of
// the weights that take it, from sums over the weights above each middle.
template <class Arch>
W2A4_INLINE void snap_backward_groups(const SnapParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.group_size;
  std::vector<float> above(n);
  for (int64_t group = begin; group < end; ++group) {
    const Levels l(p.levels + 4 * group);
    const float *w = p.w + group * n, *grad = p.grad + group * n;
    const float low = p.soft[4 * group], high = p.soft[4 * group + 3];
    float* grad_w = p.grad_w + group * n;
    for (int64_t i = 0; i < n; ++i)
      grad_w[i] = grad[i] * (w[i] >= low && w[i] <= high ? 1.0f : 0.0f);
    float rest = sum(grad, n);
    for (int k = 0; k < 3; ++k) {
      for (int64_t i = 0; i < n; ++i) above[i] = w[i] > l.middle[k] ? grad[i] : 0.0f;
      const float part = sum(above.data(), n);
      p.grad_soft[4 * group + k] = rest - part;
      rest = part;
    }
    p.grad_soft[4 * group + 3] = rest;
  }
}
W2A4_DISPATCH(snap_backward_groups, SnapParams)

// Scale and zero-point of a row, as the packed forms have them, and their slopes by clip.
struct Row {
  float least, most;  // code range
  float low, high;    // of the row; without zero-point the number furthest from 0 is high
  float scale, zero;
  float scale_by_clip, zero_by_clip;

  W2A4_INLINE Row(const float* x, int64_t n, float clip, bool kv) {
    if (kv) {
      least = 0, most = 15;
      range(x, n, low, high);
      const float middle = (low + high) * 0.5f, half = (high - low) * 0.5f * clip;
      scale = to_half((half + half) / 15.0f);
      zero = to_half(middle - half);
      scale_by_clip = (high - low) / 15.0f;
      zero_by_clip = (low - high) * 0.5f;
    } else {
      least = -8, most = 7;
      high = furthest_from_zero(x, n);
      scale = a4_scale(clip, high);
      zero = zero_by_clip = low = 0.0f;
      scale_by_clip = scale == 0.0f ? 0.0f : clip < 0.0f ? high / 8.0f : std::fabs(high) / 7.0f;
    }
  }

  // By which the row is divided.
  W2A4_INLINE float divisor() const { return scale == 0.0f ? 1.0f : scale; }

  W2A4_INLINE float steps(float x) const { return (x - zero) / divisor(); }
  // NaN stays NaN.
  W2A4_INLINE float code(float steps) const {
    float clipped = steps < least ? least : steps;
    clipped = clipped > most ? most : clipped;
    return round_even(clipped);
  }

 private:
  static W2A4_INLINE float to_half(float x) {
    F16 half;
    from_float(x, half);
    return to_float(half);
  }
};

template <class Arch>
W2A4_INLINE void fake_quant(const FakeQuantParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float* x = p.x + i * p.size;
    const Row row(x, p.size, p.clip, p.kv);
    const float scale = p.kv ? row.scale : row.divisor();
    float* y = p.y + i * p.size;
    // Without a zero-point nothing is added: 0 would make -0 a 0.
    if (p.kv)
      for (int64_t j = 0; j < p.size; ++j) y[j] = row.code(row.steps(x[j])) * scale + row.zero;
    else
      for (int64_t j = 0; j < p.size; ++j) y[j] = row.code(row.steps(x[j])) * scale;
  }
}
W2A4_DISPATCH(fake_quant, FakeQuantParams)

// grad_x[j] += share for the entries that are `extreme`, which divide it equally.
W2A4_INLINE void add_to_extreme(const float* x, int64_t n, float extreme, float gradient,
                                float* grad_x) {
  const float share = gradient / static_cast<float>(count_equal(x, n, extreme));
  for (int64_t j = 0; j < n; ++j) grad_x[j] += x[j] == extreme ? share : 0.0f;
}

// Gradient of scale * code + zero, roundings passed through: to x inside the range, and through
// scale and zero-point to the entries that set them; to clip a sum for each row.
template <class Arch>
W2A4_INLINE void fake_quant_backward(const FakeQuantParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.size;
  std::vector<float> by_scale(n), clipped(n), magnitudes(n);
  for (int64_t i = begin; i < end; ++i) {
    const float *x = p.x + i * n, *grad = p.grad + i * n;
    const Row row(x, n, p.clip, p.kv);
    // Keys and values without a range have no code that could move.
    const bool moves = !p.kv || row.scale != 0.0f;
    float* grad_x = p.grad_x + i * n;
    for (int64_t j = 0; j < n; ++j) {
      const float steps = row.steps(x[j]);
      const bool inside = moves && steps >= row.least && steps <= row.most;
      by_scale[j] = grad[j] * (row.code(steps) - (inside ? steps : 0.0f));
      clipped[j] = inside ? 0.0f : grad[j];
      grad_x[j] = inside ? grad[j] : 0.0f;
    }
    const float to_scale = sum(by_scale.data(), n);
    if (p.kv) {
      const float to_zero = sum(clipped.data(), n), by_range = to_scale * p.clip / 15.0f;
      add_to_extreme(x, n, row.high, by_range + to_zero * (0.5f - 0.5f * p.clip), grad_x);
      add_to_extreme(x, n, row.low, to_zero * (0.5f + 0.5f * p.clip) - by_range, grad_x);
      p.grad_clip[i] = to_scale * row.scale_by_clip + to_zero * row.zero_by_clip;
    } else {
      p.grad_clip[i] = to_scale * row.scale_by_clip;
      if (row.scale == 0.0f) continue;
      if (p.clip < 0.0f) {
        add_to_extreme(x, n, row.high, to_scale * p.clip / 8.0f, grad_x);
        continue;
      }
      for (int64_t j = 0; j < n; ++j) magnitudes[j] = std::fabs(x[j]);
      const float most = std::fabs(row.high);
      const float each =
          to_scale * p.clip / 7.0f / static_cast<float>(count_equal(magnitudes.data(), n, most));
      for (int64_t j = 0; j < n; ++j)
        grad_x[j] += magnitudes[j] == most ? (x[j] < 0 ? -each : each) : 0.0f;
    }
  }
}
W2A4_DISPATCH(fake_quant_backward, FakeQuantParams)

int64_t grain(int64_t size) {
  return 1 + kGrain / (size > 0 ? size : 1);
}

// A pointer to no weights at all is null, so what is written says which of the two is meant.
void snap(const SnapParams& p) {
  parallel(p.groups, grain(p.group_size), p,
           p.grad_soft ? snap_backward_groups_dispatch : snap_groups_dispatch);
}

void fake_quant_rows(const FakeQuantParams& p) {
  parallel(p.rows, grain(p.size), p, p.grad ? fake_quant_backward_dispatch : fake_quant_dispatch);
}

}  // namespace
}  // namespace cpu
namespace {

const float* floats(Check& check, const Tensor& t, const char* name) {
  check.dtype(t, name, {kF32});
  check.contiguous(t, name);
  return static_cast<const float*>(t.data_ptr());
}

float* out(const Tensor& t) {
  return static_cast<float*>(t.data_ptr());
}

void check_grad(Check& check, const Tensor& grad, const Tensor& like, const char* name) {
  bool same = grad.dim() == like.dim();
  for (int64_t i = 0; same && i < like.dim(); ++i) same = grad.size(i) == like.size(i);
  check.that(same, "grad has shape ", shape_name(grad), ", expected that of ", name, ", ",
             shape_name(like));
}

cpu::SnapParams snap_params(Check& check, const Tensor& w, const Tensor& levels) {
  cpu::SnapParams p{};
  p.w = floats(check, w, "w");
  check.that(w.dim() == 3, "w has shape ", shape_name(w), ", expected [out, groups, group_size]");
  p.levels = floats(check, levels, "levels");
  check.shape(levels, "levels", {w.size(0), w.size(1), 4}, "[out, groups, 4]");
  p.groups = w.size(0) * w.size(1);
  p.group_size = w.size(2);
  return p;
}

cpu::FakeQuantParams fake_quant_params(Check& check, const Tensor& x, const Tensor& clip, bool kv) {
  cpu::FakeQuantParams p{};
  p.x = floats(check, x, "x");
  check.at_least_1d(x, "x");
  check.that(x.size(-1) >= 1, "x has shape ", shape_name(x), ", expected at least one feature");
  const float* value = floats(check, clip, "clip");
  check.shape(clip, "clip", {1}, "[1]");
  p.rows = rows_of(x);
  p.size = x.size(-1);
  p.clip = *value;
  p.kv = kv;
  return p;
}

}  // namespace

Tensor snap(const Tensor& w, const Tensor& levels) {
  Check check("snap");
  cpu::SnapParams p = snap_params(check, w, levels);
  Tensor y = empty(w, with_last(w, p.group_size), kF32);
  p.y = out(y);
  cpu::snap(p);
  return y;
}

std::tuple<Tensor, Tensor> snap_backward(const Tensor& grad, const Tensor& w, const Tensor& soft,
                                         const Tensor& levels) {
  Check check("snap_backward");
  cpu::SnapParams p = snap_params(check, w, levels);
  p.grad = floats(check, grad, "grad");
  check_grad(check, grad, w, "w");
  p.soft = floats(check, soft, "soft");
  check.shape(soft, "soft", {w.size(0), w.size(1), 4}, "[out, groups, 4]");
  Tensor grad_w = empty(w, with_last(w, p.group_size), kF32);
  Tensor grad_soft = empty(w, with_last(w, 4), kF32);
  p.grad_w = out(grad_w);
  p.grad_soft = out(grad_soft);
  cpu::snap(p);
  return {grad_w, grad_soft};
}

Tensor fake_quant_rows(const Tensor& x, const Tensor& clip, bool kv) {
  Check check("fake_quant_rows");
  cpu::FakeQuantParams p = fake_quant_params(check, x, clip, kv);
  Tensor y = empty(x, with_last(x, p.size), kF32);
  p.y = out(y);
  cpu::fake_quant_rows(p);
  return y;
}

std::tuple<Tensor, Tensor> fake_quant_rows_backward(const Tensor& grad, const Tensor& x,
                                                    const Tensor& clip, bool kv) {
  Check check("fake_quant_rows_backward");
  cpu::FakeQuantParams p = fake_quant_params(check, x, clip, kv);
  p.grad = floats(check, grad, "grad");
  check_grad(check, grad, x, "x");
  Tensor grad_x = empty(x, with_last(x, p.size), kF32);
  Tensor grad_clip = empty(x, {p.rows}, kF32);
  p.grad_x = out(grad_x);
  p.grad_clip = out(grad_clip);
  cpu::fake_quant_rows(p);
  return {grad_x, grad_clip};
}

STABLE_TORCH_LIBRARY_IMPL(w2a4, W2A4_DEVICE, m) {
  W2A4_IMPL(m, snap);
  W2A4_IMPL(m, snap_backward);
  W2A4_IMPL(m, fake_quant_rows);
  W2A4_IMPL(m, fake_quant_rows_backward);
}

}  // namespace w2a4
