// quantize_a4 and what may come before it, see QuantizeA4Params. A thread block takes whole tokens:
// values stay in its registers from the load to the codes, while the groups' maxima and then their
// scales lie in shared memory. Only tokens too wide for the registers are computed twice, once for
// the maxima and once for the codes.
#pragma once

#include "hadamard.cuh"
#include "quantizer.cuh"

namespace w2a4::cuda {

// ---- the groups of a unit

struct Groups {
  Quantizer* all;  // [count], in shared memory
  int count;       // of the unit that is worked on
  int size;        // elements
  bool one;        // a unit has one

  uint32_t inverse;  // 2**32 / size, rounded up: divides elements whose product with size is less

  W2A4_DEVICE int group_of(int element) const { return one ? 0 : element / size; }
  W2A4_DEVICE int quick_group_of(int element) const {
    return one ? 0 : static_cast<int>(mul_high(element, inverse));
  }
  W2A4_DEVICE Quantizer quantizer(int group) const {
    const U32x4 v = read_u32x4(all + group);
    return {as_float(v.x), as_float(v.y), as_float(v.z), v.w};
  }
  W2A4_DEVICE void note(int group, uint32_t most) const {
    atomic_max(reinterpret_cast<uint32_t*>(all + group), most);
  }
};

W2A4_DEVICE Groups make_groups(unsigned char* shared, int64_t size, int64_t unit) {
  return {reinterpret_cast<Quantizer*>(shared), static_cast<int>(unit / size),
          static_cast<int>(size), size == unit,
          static_cast<uint32_t>(0xffffffffu / static_cast<uint32_t>(size)) + 1};
}

W2A4_DEVICE void clear_maxima(const Groups& groups) {
  for (int i = threadIdx.x; i < groups.count; i += blockDim.x)
    *reinterpret_cast<uint32_t*>(groups.all + i) = 0;
}

// The block's maxima become scales: p.scale from `first_group` on, and quantizers.
W2A4_DEVICE void finish_scales(const QuantizeA4Params& p, const Groups& groups,
                               int64_t first_group) {
  for (int i = threadIdx.x; i < groups.count; i += blockDim.x) {
    const float scale = scale_of(*p.clip, *reinterpret_cast<uint32_t*>(groups.all + i));
    p.scale[first_group + i] = scale;
    const Quantizer q = quantizer_of(scale);
    store_u32x4(groups.all + i,
                {as_bits(q.factor), as_bits(q.scale), as_bits(q.reciprocal), q.mask});
  }
}

// ---- quantisation after a Hadamard transform

struct QuantizeArgs {
  QuantizeA4Params p;
  Transform t;      // of the Hadamard stage, if there is one
  int group_bytes;  // of shared memory
  bool vector;      // no Hadamard: runs of 8 are whole and aligned
  bool whole;       // no Hadamard: and lie in one group
  int slices;       // no Hadamard: passes over a token's vectors
  int token_runs;   // no Hadamard: of 8 values a thread, where a block holds a token as one group
};

W2A4_DEVICE void note_maxima(const Transform& t, const Unit& unit, const Task& task,
                             const Groups& groups, const Values& y, unsigned char* work) {
  uint32_t most_of_all = 0;
  if (t.vector && t.whole) {
    for_each_run(t, task, y, [&](int row, int column, const auto& v) {
      uint32_t most = 0;
      W2A4_UNROLL
      for (int i = 0; i < kCountOf<decltype(v)>; ++i) most = larger(most, distance_bits(v[i]));
      const int element = element_at(t, row, column);
      if (!inside(t, unit, row, element)) return;
      most_of_all = larger(most_of_all, most);
      if (!groups.one) groups.note(groups.quick_group_of(element), most);
    });
  } else {
    for_each_number(t, task, y, work, [&](int row, int column, float v) {
      const int element = element_at(t, row, column);
      if (!inside(t, unit, row, element)) return;
      most_of_all = larger(most_of_all, distance_bits(v));
      if (!groups.one) groups.note(groups.group_of(element), distance_bits(v));
    });
  }
  if (!groups.one) return;
  most_of_all = warp_max(most_of_all);
  if (threadIdx.x % 32 == 0) groups.note(0, most_of_all);
}

// Codes of the unit, whose first element's byte is at `codes`. A block has an even number of
// elements, so a byte's two codes are in one lane, unless a block has one column: then they are in
// rows next to each other, four lanes apart.
W2A4_DEVICE void write_codes(const Transform& t, const Unit& unit, const Task& task,
                             const Groups& groups, const Values& y, unsigned char* work,
                             uint8_t* codes) {
  if (t.vector && t.whole) {
    Quantizer q = groups.quantizer(0);
    for_each_run(t, task, y, [&](int row, int column, const auto& v) {
      const int element = element_at(t, row, column);
      if (!inside(t, unit, row, element)) return;
      if (!groups.one) q = groups.quantizer(groups.quick_group_of(element));
      uint32_t word = 0;
      W2A4_UNROLL
      for (int i = 0; i < kCountOf<decltype(v)>; ++i) word |= code_of(q, v[i]) << 4 * i;
      if constexpr (kCountOf<decltype(v)> == 8)
        store_u32(codes + element / 2, word);
      else
        codes[element / 2] = static_cast<uint8_t>(word);
    });
    return;
  }
  uint32_t even = 0;
  for_each_number(t, task, y, work, [&](int row, int column, float v) {
    const int element = element_at(t, row, column);
    const bool there = inside(t, unit, row, element);
    const uint32_t code = there ? code_of(groups.quantizer(groups.group_of(element)), v) : 0;
    const uint32_t below = shfl_xor(code, 4);  // of the next row, if this one is even
    const bool first = t.log_m == 0 && row % 2 == 0;
    if (there && (first || (t.log_m > 0 && column % 2)))
      codes[element / 2] = static_cast<uint8_t>(first ? code | below << 4 : even | code << 4);
    even = code;
  });
}

W2A4_DEVICE Task task_of_step(const Transform& t, int step) {
  return task_of_warp(t, step < t.slices ? step : step - t.slices);
}

template <class T, bool kSilu, Mix kMix>
__global__ void __launch_bounds__(kTransformWarps * 32)
    hadamard_quantize_kernel(const __grid_constant__ QuantizeArgs args) {
  wait_for_previous_kernel();
  const Transform& t = args.t;
  const QuantizeA4Params& p = args.p;
  unsigned char* signs = shared_memory();
  unsigned char* work = signs + t.table_bytes;
  const Input<T, kSilu> in{p.x, p.up};
  Groups groups = make_groups(work + t.work_bytes, p.group_size, t.unit);
  if (kMix != Mix::kNone) fill_signs(t, signs);
  for (int round = 0; unit_of_round(t, round).elements > 0; ++round) {
    sync_block();  // the quantizers of the unit before have been read
    groups.count = unit_of_round(t, round).elements / groups.size;
    clear_maxima(groups);
    sync_block();
    Values y;
    // A second pass over the slices computes them again, unless there is one.
    for (int step = 0; step < t.slices || (t.slices > 1 && step < 2 * t.slices); ++step) {
      transform<kMix>(t, signs, work, unit_of_round(t, round), task_of_step(t, step), in, y);
      // Computed again, rather than kept in registers over the transform.
      const Unit unit = unit_of_round(t, fence_loads(round));
      const Task task = task_of_step(t, fence_loads(step));
      groups.count = unit.elements / groups.size;
      if (step < t.slices) note_maxima(t, unit, task, groups, y, work);
      if (step == t.slices - 1) {
        sync_block();
        finish_scales(p, groups, unit.first / groups.size);
        sync_block();
      }
      if (t.slices == 1 || step >= t.slices)
        write_codes(t, unit_of_round(t, fence_loads(round)), task_of_step(t, fence_loads(step)),
                    groups, y, work, p.codes + unit.first / 2);
    }
  }
}

// ---- quantisation without a Hadamard transform

constexpr int kRuns = 4;            // of 8 values, that a thread holds
constexpr int kQuantizeWarps = 16;  // of a thread block, at most

using Runs = float[kRuns][8];

// Drops the first number and adds one at the end: indexing for rolled loops over registers.
W2A4_DEVICE void shift_in(float (&v)[8], float last) {
  W2A4_UNROLL
  for (int i = 0; i < 7; ++i) v[i] = v[i + 1];
  v[7] = last;
}

// v[i] = values of the token from element `element` on, through silu(x) * up; zeros beyond its end.
template <class T>
W2A4_DEVICE void load_token_run(const QuantizeArgs& args, int64_t token, int element,
                                float (&v)[8]) {
  const QuantizeA4Params& p = args.p;
  const int features = static_cast<int>(p.features);
  const int64_t first = token * features + element;
  W2A4_UNROLL
  for (int i = 0; i < 8; ++i) v[i] = 0.0f;
  if (args.vector) {
    if (element >= features) return;
    load_run<T>(p.x, first, v);
    if (!p.up) return;
    float up[8];
    load_run<T>(p.up, first, up);
    W2A4_UNROLL
    for (int i = 0; i < 8; ++i) v[i] = silu(v[i]) * up[i];
    return;
  }
  W2A4_ROLLED
  for (int n = 0; n < 8; ++n) {
    float x = 0.0f;
    if (element + n < features) {
      x = load_one<T>(p.x, first + n);
      if (p.up) x = silu(x) * load_one<T>(p.up, first + n);
    }
    shift_in(v, x);
  }
}

W2A4_DEVICE float norm_weight_at(const QuantizeA4Params& p, int element) {
  switch (p.norm_dtype) {
    case ScalarType::Half:
      return load_one<Float16>(p.norm_weight, element);
    case ScalarType::BFloat16:
      return load_one<BFloat16>(p.norm_weight, element);
    default:
      return load_one<Float32>(p.norm_weight, element);
  }
}

W2A4_DEVICE void load_norm_weight(const QuantizeArgs& args, int element, float (&weight)[8]) {
  const QuantizeA4Params& p = args.p;
  if (args.vector && p.norm_dtype == ScalarType::Half)
    return load_run<Float16>(p.norm_weight, element, weight);
  if (args.vector && p.norm_dtype == ScalarType::BFloat16)
    return load_run<BFloat16>(p.norm_weight, element, weight);
  if (args.vector) return load_run<Float32>(p.norm_weight, element, weight);
  W2A4_ROLLED
  for (int n = 0; n < 8; ++n)
    shift_in(weight, element + n < p.features ? norm_weight_at(p, element + n) : 0.0f);
}

// The sum over the block, the same bits in every thread. `sums` is [kQuantizeWarps].
W2A4_DEVICE float block_sum(float value, float* sums) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  sync_block();
  float sum = 0.0f;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) sum = add_rn(sum, sums[i]);
  return sum;
}

W2A4_DEVICE float sum_of_squares(const Runs& v) {
  float sum = 0.0f;
  W2A4_UNROLL
  for (int r = 0; r < kRuns; ++r) W2A4_UNROLL
  for (int i = 0; i < 8; ++i) sum = fma_rn(v[r][i], v[r][i], sum);
  return sum;
}

// Element of run r of this thread.
W2A4_DEVICE int run_at(int slice, int r) {
  return 8 * static_cast<int>((slice * kRuns + r) * blockDim.x + threadIdx.x);
}

W2A4_DEVICE void apply_norm(const QuantizeArgs& args, int slice, float factor, Runs& v) {
  W2A4_UNROLL
  for (int r = 0; r < kRuns; ++r) {
    const int element = run_at(slice, r);
    if (element >= args.p.features) break;
    float weight[8];
    W2A4_UNROLL
    for (int i = 0; i < 8; ++i) weight[i] = 1.0f;
    if (args.p.norm_weight) load_norm_weight(args, element, weight);
    W2A4_UNROLL
    for (int i = 0; i < 8; ++i) v[r][i] = mul_rn(weight[i], mul_rn(v[r][i], factor));
  }
}

W2A4_DEVICE void note_run_maxima(const QuantizeArgs& args, const Groups& groups, int slice,
                                 Runs& v) {
  const int features = static_cast<int>(args.p.features);
  uint32_t most_of_all = 0;
  W2A4_UNROLL
  for (int r = 0; r < kRuns; ++r) {
    const int element = run_at(slice, r);
    if (element >= features) break;
    uint32_t most = 0;
    W2A4_UNROLL
    for (int i = 0; i < 8; ++i) most = larger(most, distance_bits(v[r][i]));  // 0 beyond the end
    most_of_all = larger(most_of_all, most);
    if (groups.one) continue;
    if (args.whole) {
      groups.note(groups.quick_group_of(element), most);
      continue;
    }
    W2A4_ROLLED
    for (int n = 0; n < 8; ++n) {  // once round the run
      if (element + n < features) groups.note(groups.group_of(element + n), distance_bits(v[r][0]));
      shift_in(v[r], v[r][0]);
    }
  }
  if (!groups.one) return;
  most_of_all = warp_max(most_of_all);
  if (threadIdx.x % 32 == 0) groups.note(0, most_of_all);
}

// Codes of one token, from `codes` on; the last nibble of an odd one is zero.
W2A4_DEVICE void write_run_codes(const QuantizeArgs& args, const Groups& groups, int slice, Runs& v,
                                 uint8_t* codes) {
  const int features = static_cast<int>(args.p.features);
  W2A4_UNROLL
  for (int r = 0; r < kRuns; ++r) {
    const int element = run_at(slice, r);
    if (element >= features) break;
    if (args.vector && args.whole) {
      const Quantizer q = groups.quantizer(groups.quick_group_of(element));
      uint32_t word = 0;
      W2A4_UNROLL
      for (int i = 0; i < 8; ++i) word |= code_of(q, v[r][i]) << 4 * i;
      store_u32(codes + element / 2, word);
      continue;
    }
    uint32_t even = 0;
    W2A4_ROLLED
    for (int n = 0; n < 8 && element + n < features; ++n) {
      const uint32_t code = code_of(groups.quantizer(groups.group_of(element + n)), v[r][0]);
      if (n % 2 || element + n + 1 == features)
        codes[(element + n) / 2] = static_cast<uint8_t>(n % 2 ? even | code << 4 : code);
      even = code;
      shift_in(v[r], v[r][0]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kQuantizeWarps * 32)
    quantize_kernel(const __grid_constant__ QuantizeArgs args) {
  wait_for_previous_kernel();
  const QuantizeA4Params& p = args.p;
  auto* sums = reinterpret_cast<float*>(shared_memory());
  const Groups groups = make_groups(shared_memory() + kQuantizeWarps * 4, p.group_size, p.features);
  enum Phase { kNorm, kMaxima, kCodes };
  for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    sync_block();  // the quantizers of the token before have been read
    clear_maxima(groups);
    sync_block();
    float squares = 0.0f, factor = 1.0f;
    Runs v;
    const int first_phase = p.rmsnorm ? kNorm : kMaxima;
    for (int phase = first_phase; phase <= kCodes; ++phase) {
      for (int slice = 0; slice < args.slices; ++slice) {
        const bool loads = phase == first_phase || args.slices > 1;
        if (loads) {
          W2A4_UNROLL
          for (int r = 0; r < kRuns; ++r) load_token_run<T>(args, token, run_at(slice, r), v[r]);
        }
        if (phase == kNorm) squares = add_rn(squares, sum_of_squares(v));
        if (p.rmsnorm && (phase == kMaxima || (phase == kCodes && loads)))
          apply_norm(args, slice, factor, v);
        if (phase == kMaxima) note_run_maxima(args, groups, slice, v);
        if (phase == kCodes)
          write_run_codes(args, groups, slice, v, p.codes + token * ((p.features + 1) / 2));
      }
      if (phase == kNorm) {
        const float mean = div_approx(block_sum(squares, sums), static_cast<float>(p.features));
        factor = rsqrt_approx(add_rn(mean, p.eps));
      }
      if (phase == kMaxima) {
        sync_block();
        finish_scales(p, groups, token * groups.count);
        sync_block();
      }
    }
  }
}

// ---- one group a token, aligned, that fits the registers of a block: what models have

// Zeros where this thread's run has no elements.
template <class T>
W2A4_DEVICE void load_aligned_run(const QuantizeArgs& args, int element, float (&v)[8]) {
  const QuantizeA4Params& p = args.p;
  W2A4_UNROLL
  for (int i = 0; i < 8; ++i) v[i] = 0.0f;
  if (element >= p.features) return;
  const int64_t at = blockIdx.x * p.features + element;
  if (p.up)
    Input<T, true>{p.x, p.up}.run(at, v);
  else
    Input<T, false>{p.x, nullptr}.run(at, v);
}

// A value of every warp in every thread. `all` is [kQuantizeWarps], for this alone.
W2A4_DEVICE void share(uint32_t value, uint32_t* all, uint32_t (&values)[kQuantizeWarps]) {
  const unsigned warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) all[threadIdx.x / 32] = value;
  if (threadIdx.x >= warps && threadIdx.x < kQuantizeWarps) all[threadIdx.x] = 0;
  sync_block();
  W2A4_UNROLL
  for (int i = 0; i < kQuantizeWarps; i += 4) {
    const U32x4 v = read_u32x4(all + i);
    values[i] = v.x, values[i + 1] = v.y, values[i + 2] = v.z, values[i + 3] = v.w;
  }
}

// A block is a token; everything stays in registers, with one barrier for the norm and one for the
// maximum. Sums are in the order of quantize_kernel.
template <class T, int kTokenRuns>
__global__ void __launch_bounds__(kQuantizeWarps * 32)
    quantize_token_kernel(const __grid_constant__ QuantizeArgs args) {
  const QuantizeA4Params& p = args.p;
  auto* sums = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* maxima = sums + kQuantizeWarps;
  float v[kTokenRuns][8], weight[kTokenRuns][8];
  W2A4_UNROLL
  for (int r = 0; r < kTokenRuns; ++r) {  // the weight does not depend on the kernel before
    const int element = 8 * static_cast<int>(r * blockDim.x + threadIdx.x);
    W2A4_UNROLL
    for (int i = 0; i < 8; ++i) weight[r][i] = 1.0f;
    if (p.norm_weight && element < p.features) load_norm_weight(args, element, weight[r]);
  }
  wait_for_previous_kernel();
  const float clip = *p.clip;
  W2A4_UNROLL
  for (int r = 0; r < kTokenRuns; ++r)
    load_aligned_run<T>(args, 8 * static_cast<int>(r * blockDim.x + threadIdx.x), v[r]);
  uint32_t of_warps[kQuantizeWarps];
  if (p.rmsnorm) {
    float squares = 0.0f;
    W2A4_UNROLL
    for (int i = 0; i < 8 * kTokenRuns; ++i)
      squares = fma_rn(v[i / 8][i % 8], v[i / 8][i % 8], squares);
    share(as_bits(warp_sum(squares)), sums, of_warps);
    float sum = 0.0f;
    W2A4_UNROLL
    for (int i = 0; i < kQuantizeWarps; ++i) sum = add_rn(sum, as_float(of_warps[i]));
    const float mean = div_approx(sum, static_cast<float>(p.features));
    const float factor = rsqrt_approx(add_rn(mean, p.eps));
    W2A4_UNROLL
    for (int i = 0; i < 8 * kTokenRuns; ++i)
      v[i / 8][i % 8] = mul_rn(weight[i / 8][i % 8], mul_rn(v[i / 8][i % 8], factor));
  }
  uint32_t most = 0;
  W2A4_UNROLL
  for (int i = 0; i < 8 * kTokenRuns; ++i) most = larger(most, distance_bits(v[i / 8][i % 8]));
  share(warp_max(most), maxima, of_warps);
  W2A4_UNROLL
  for (int i = 0; i < kQuantizeWarps; ++i) most = larger(most, of_warps[i]);
  const float scale = scale_of(clip, most);
  if (threadIdx.x == 0) p.scale[blockIdx.x] = scale;
  const Quantizer q = quantizer_of(scale);
  W2A4_UNROLL
  for (int r = 0; r < kTokenRuns; ++r) {
    const int element = 8 * static_cast<int>(r * blockDim.x + threadIdx.x);
    if (element >= p.features) break;
    uint32_t word = 0;
    W2A4_UNROLL
    for (int i = 0; i < 8; ++i) word |= code_of(q, v[r][i]) << 4 * i;
    store_u32(p.codes + (blockIdx.x * p.features + element) / 2, word);
  }
}

}  // namespace w2a4::cuda
