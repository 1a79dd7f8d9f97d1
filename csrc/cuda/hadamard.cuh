// x @ H, see hadamard_plan.h for how a transform is divided among warps and for the names.
//
// A warp holds y[tile][s][2h + b]: of its 16 * tiles rows and 64 columns, lane 4g + j has
//     row 16 * tile + 8h + g, column 16j + 8b + s            (g < 8, j < 4; h, b < 2; s < 8)
// which is how the tensor core leaves it if lane 4g + j supplies columns 8g .. 8g + 7 of the
// inputs, one 16-byte load a row. Four stages of butterflies are then within a lane and two across
// lanes. Stages between chunks need an exchange through shared memory, tile by tile; after it warp
// c of the 2**log_c that share a block holds rows of all chunks:
//     position p = sub * 2**log_c + chunk < 16, row 16 * tile + c * (16 >> log_c) + sub,
//     columns 64 * chunk + 2 * lane + {0, 1} in y[tile][p / 2][p % 2 * 2 + {0, 1}]
#pragma once

#include <type_traits>

#include "../params.h"
#include "hadamard_cluster.cuh"

namespace w2a4::cuda {

// ---- butterflies

W2A4_DEVICE void butterfly(float& a, float& b) {
  const float sum = add_rn(a, b);
  b = add_rn(a, -b);
  a = sum;
}

// The first t.stages stages of S, of one tile.
W2A4_DEVICE void butterflies_in_chunk(int stages, float (&y)[8][4]) {
  W2A4_UNROLL
  for (int bit = 1; bit < 8; bit *= 2) {
    if (stages <= (bit == 1 ? 0 : bit == 2 ? 1 : 2)) return;
    W2A4_UNROLL
    for (int s = 0; s < 8; ++s)
      if (!(s & bit)) {
        W2A4_UNROLL
        for (int r = 0; r < 4; ++r) butterfly(y[s][r], y[s + bit][r]);
      }
  }
  if (stages <= 3) return;
  W2A4_UNROLL
  for (int s = 0; s < 8; ++s) butterfly(y[s][0], y[s][1]), butterfly(y[s][2], y[s][3]);
  for (int mask = 1; mask <= 2 && mask < stages - 3; ++mask) {
    const float sign = threadIdx.x & mask ? -1.0f : 1.0f;
    W2A4_UNROLL
    for (int s = 0; s < 8; ++s) W2A4_UNROLL
    for (int r = 0; r < 4; ++r) y[s][r] = fma_rn(y[s][r], sign, shfl_xor(y[s][r], mask));
  }
}

// Float of a warp's exchange region at row < 16 and column < 64 of one chunk: 16-byte pieces are
// permuted so that both the writes below and the reads, a row a warp, spread over all banks.
W2A4_DEVICE int exchange_at(int row, int column) {
  const int piece = column / 4;
  return row * kChunk + (piece ^ (piece >> 3 << 1 | (row & 1))) * 4 + column % 4;
}

// The stages between the chunks of a block, of one tile; leaves the second layout. All warps come.
W2A4_DEVICE void butterflies_between_chunks(const Transform& t, float* work, float (&y)[8][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  const int mates = 1 << t.log_c, first = warp & -mates;
  constexpr int kFloats = kExchange / 4;
  sync_block();  // what was read from `work` before has been read
  W2A4_UNROLL
  for (int r = 0; r < 4; ++r) W2A4_UNROLL
  for (int s = 0; s < 8; s += 4)
    store_u32x4(
        work + warp * kFloats + exchange_at(8 * (r / 2) + g, 16 * j + 8 * (r % 2) + s),
        {as_bits(y[s][r]), as_bits(y[s + 1][r]), as_bits(y[s + 2][r]), as_bits(y[s + 3][r])});
  sync_block();
  W2A4_UNROLL
  for (int p = 0; p < 16; ++p) {
    const int chunk = p & (mates - 1), row = (warp - first) * (16 >> t.log_c) + (p >> t.log_c);
    const U32x2 v = read_u32x2(work + (first + chunk) * kFloats + exchange_at(row, 2 * lane));
    y[p / 2][p % 2 * 2] = as_float(v.x), y[p / 2][p % 2 * 2 + 1] = as_float(v.y);
  }
  W2A4_UNROLL
  for (int bit = 1; bit < 16; bit *= 2) {
    if (bit >= mates) break;
    W2A4_UNROLL
    for (int p = 0; p < 16; ++p)
      if (!(p & bit)) {
        W2A4_UNROLL
        for (int e = 0; e < 2; ++e)
          butterfly(y[p / 2][p % 2 * 2 + e], y[(p + bit) / 2][(p + bit) % 2 * 2 + e]);
      }
  }
}

// 32 floats of this lane in its warp's exchange region, 32 apart.
W2A4_DEVICE float* lane_floats(unsigned char* work) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  return reinterpret_cast<float*>(work + warp * kExchange) + lane;
}

// y = the warp's share of x @ H. All warps of the block come.
template <Mix kMix, class In>
W2A4_DEVICE void transform(const Transform& t, const unsigned char* signs, unsigned char* work,
                           const Unit& unit, const Task& task, const In& in, Values& y) {
  // 32 floats of this lane, where there is a slow path. It ends in for_each_number, whose barrier
  // stands behind all that others have read there.
  float* mine = lane_floats(work);
  if constexpr (kMix == Mix::kNone) {
    load_rows(t, unit, task, in, mine, y[0]);
  } else if constexpr (In::kTerms == 1) {
    const int first = lane_column(task);
    const Column column = column_at(t, unit, first);
    const auto fetch = [&](int row, int) {
      return t.vector ? load_bits(t, column, in.x, row)
                      : load_bits_slowly(t, unit, in.x, row, first);
    };
    clear(y);
    mix_bits<typename In::Format, 1>(t, signs, task, fetch, y);
  } else if constexpr (kMix == Mix::kStaged) {
    auto* staged = reinterpret_cast<uint16_t*>(work);
    sync_block();
    stage_terms(t, unit, in, staged);
    sync_block();
    clear(y);  // not earlier: it takes registers
    const Column column = column_at(t, {0, unit.elements}, lane_column(task));
    // A lane's rows 16 * step + 4j + i all have the same permutation.
    const int offset = threadIdx.x % 4 << (t.log_m + 2);
    const int first = staged_at(t, static_cast<int>(column.first) + offset) - offset;
    const auto fetch = [&](int row, int term) {
      return row < column.rows ? read_u32x4(staged + term * t.unit + first + (row << t.log_m))
                               : U32x4{};
    };
    mix_bits<BFloat16, 3>(t, signs, task, fetch, y);
  } else {
    clear(y);
    mix_values(t, signs, unit, task, in, mine, y);
  }
  W2A4_UNROLL
  for (int tile = 0; tile < 2; ++tile) {
    if (tile >= t.tiles) break;
    butterflies_in_chunk(t.stages, y[tile]);
    if (t.log_c) butterflies_between_chunks(t, reinterpret_cast<float*>(work), y[tile]);
  }
  W2A4_UNROLL
  for (int i = 0; i < 64; ++i) {
    float& v = y[i / 32][i / 4 % 8][i % 4];
    v = mul_rn(v, t.scale);
  }
}

// Numbers of an array that is passed by reference.
template <class Array>
constexpr int kCountOf = static_cast<int>(std::extent_v<std::remove_reference_t<Array>>);

// Calls f(row, column, values) for every run of columns that the lane holds: 8 columns, or 2 after
// an exchange. Rows and columns may lie outside the unit. Places are not computed ahead of their
// run: all of them together do not fit the registers.
template <class F>
W2A4_DEVICE void for_each_run(const Transform& t, const Task& task, const Values& y, const F& f) {
  const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  W2A4_UNROLL
  for (int tile = 0; tile < 2; ++tile) {
    if (tile >= t.tiles) break;
    if (t.log_c == 0) {
      W2A4_UNROLL
      for (int r = 0; r < 4; ++r) {
        float v[8];
        W2A4_UNROLL
        for (int s = 0; s < 8; ++s) v[s] = y[tile][s][r];
        f(fence_loads(task.row) + 16 * tile + 8 * (r / 2) + g, task.column + 16 * j + 8 * (r % 2),
          v);
      }
      continue;
    }
    const int mates = 1 << t.log_c, mate = threadIdx.x / 32 & (mates - 1);
    const int row = task.row + 16 * tile + mate * (16 >> t.log_c);
    W2A4_UNROLL
    for (int p = 0; p < 16; ++p) {
      const float v[2] = {y[tile][p / 2][p % 2 * 2], y[tile][p / 2][p % 2 * 2 + 1]};
      f(fence_loads(row) + (p >> t.log_c),
        task.column + ((p & (mates - 1)) - mate) * kChunk + 2 * lane, v);
    }
  }
}

// Calls f(row, column, value) for every number that the lane holds, columns in order, by way of
// `work`: the slow path, whose loop is rolled. All warps of the block come.
template <class F>
W2A4_DEVICE void for_each_number(const Transform& t, const Task& task, const Values& y,
                                 unsigned char* work, const F& f) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  const int mates = 1 << t.log_c, mate = warp & (mates - 1);
  float* mine = lane_floats(work);
  sync_block();  // what was read from `work` before has been read
  W2A4_UNROLL
  for (int tile = 0; tile < 2; ++tile) {
    if (tile >= t.tiles) break;
    W2A4_UNROLL
    for (int i = 0; i < 32; ++i) mine[32 * i] = y[tile][i / 4][i % 4];
    W2A4_ROLLED
    for (int i = 0; i < 32; ++i) {
      const int r = i / 8, s = i % 8, p = i / 2;
      if (t.log_c == 0)
        f(task.row + 16 * tile + 8 * (r / 2) + g, task.column + 16 * j + 8 * (r % 2) + s,
          mine[32 * (4 * s + r)]);
      else
        f(task.row + 16 * tile + mate * (16 >> t.log_c) + (p >> t.log_c),
          task.column + ((p & (mates - 1)) - mate) * kChunk + 2 * lane + i % 2, mine[32 * i]);
    }
  }
}

// ---- hadamard

struct HadamardArgs {
  HadamardParams p;
  Transform t;
};

template <class T, Mix kMix>
__global__ void __launch_bounds__(kTransformWarps * 32)
    hadamard_kernel(const __grid_constant__ HadamardArgs args) {
  wait_for_previous_kernel();
  const Transform& t = args.t;
  unsigned char* signs = shared_memory();
  unsigned char* work = signs + t.table_bytes;
  const Input<T, false> in{args.p.x, nullptr};
  if (kMix != Mix::kNone) fill_signs(t, signs);
  sync_block();
  for (int round = 0; unit_of_round(t, round).elements > 0; ++round) {
    for (int slice = 0; slice < t.slices; ++slice) {
      Values y;
      transform<kMix>(t, signs, work, unit_of_round(t, round), task_of_warp(t, slice), in, y);
      // Computed again, rather than kept in registers over the transform.
      const Unit unit = unit_of_round(t, fence_loads(round));
      const Task task = task_of_warp(t, fence_loads(slice));
      if (t.vector) {
        for_each_run(t, task, y, [&](int row, int column, const auto& v) {
          const int element = element_at(t, row, column);
          if (inside(t, unit, row, element)) store_run<T>(args.p.y, unit.first + element, v);
        });
      } else {
        for_each_number(t, task, y, work, [&](int row, int column, float v) {
          const int element = element_at(t, row, column);
          if (inside(t, unit, row, element)) store_one<T>(args.p.y, unit.first + element, v);
        });
      }
    }
  }
}

inline bool aligned_16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Blocks are tokens here; those that are not mixed are cut into units regardless of where they end.
inline TransformCall hadamard_call(const HadamardParams& p, int processors, size_t most_shared) {
  TransformCall c{};
  c.had_k = p.had_k, c.k = p.k, c.block_size = p.block_size, c.transpose = p.transpose;
  const bool mixed = is_mixed(p.had_k, p.block_size);
  const int64_t total = p.rows * p.n;
  c.features = mixed ? p.block_size : 128 * kChunk;
  c.tokens = mixed ? total / p.block_size : divide_up(total, c.features);
  c.aligned = aligned_16(p.x) && aligned_16(p.y) && total % 8 == 0;
  c.terms = p.dtype == ScalarType::Float ? 3 : 1;
  c.large_units = true;
  c.group_size = 8;
  c.most_shared = most_shared, c.processors = processors;
  return c;
}

inline Transform plan_hadamard(const HadamardParams& p, const TransformCall& c) {
  Transform t = plan_transform(c);
  t.total = p.rows * p.n;
  return t;
}

using HadamardKernel = void (*)(HadamardArgs);

template <Mix kMix>
struct HadamardKernels {
  template <class T>
  using Of = std::integral_constant<HadamardKernel, hadamard_kernel<T, kMix>>;
};

template <class Run>
void with_hadamard_kernel(ScalarType dtype, const Transform& t, Run&& run) {
  if (t.mix == Mix::kNone)
    with_format<HadamardKernels<Mix::kNone>::Of>("hadamard", dtype, run);
  else if (t.mix == Mix::kDirect)
    with_format<HadamardKernels<Mix::kDirect>::Of>("hadamard", dtype, run);
  else  // of float32 only
    run(HadamardKernels<Mix::kStaged>::Of<Float32>{});
}

// Calls run(kernel, its argument, Launch) with the kernel that serves a call on such a device.
template <class Run>
void with_hadamard(const HadamardParams& p, int arch, int processors, size_t most_shared,
                   Run&& run) {
  const TransformCall c = hadamard_call(p, processors, most_shared);
  ClusterArgs args{};
  if (plan_cluster(c, most_cluster(arch), args.t)) {
    args.x = p.x, args.y = p.y;
    with_cluster_kernel<false>("hadamard", p.dtype, args.t, [&](auto kernel) {
      run(kernel, args, cluster_launch(args.t, processors, most_shared));
    });
    return;
  }
  const Transform t = plan_hadamard(p, c);
  const size_t shared = t.table_bytes + t.work_bytes;
  const unsigned blocks = transform_blocks(t, processors, shared, most_shared);
  with_hadamard_kernel(p.dtype, t, [&](auto kernel) {
    run(kernel, HadamardArgs{p, t}, Launch{blocks, static_cast<unsigned>(t.warps * 32), shared});
  });
}

}  // namespace w2a4::cuda
