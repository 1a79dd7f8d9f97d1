// Which kernel serves a call of quantize_a4 or of what may come before it, with which grid and
// shared memory: one rule for the launcher and for the tests, which run the kernels on a CPU.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "quantize_a4.cuh"

namespace w2a4::cuda {

struct QuantizePlan {
  QuantizeArgs args;
  unsigned blocks, threads;
  size_t shared;
};

inline void check_quantize(const QuantizeA4Params& p) {
  if (p.rmsnorm && (p.block_size > 1 || p.up))
    throw std::runtime_error(
        "w2a4.quantize_a4: the CUDA kernels have RMSNorm with neither silu(x) * up nor a Hadamard "
        "transform; do it first");
  if (p.k > 1 && p.k % 2 && p.block_size == p.k)
    throw std::runtime_error("w2a4.quantize_a4: a Hadamard transform of blocks of " +
                             std::to_string(p.block_size) +
                             "; the CUDA kernels take an even number of features a block");
  if (p.rmsnorm && p.norm_weight && p.norm_dtype == ScalarType::Double)
    throw std::runtime_error(
        "w2a4.rmsnorm_a4: the CUDA kernels take a weight of float32, float16 "
        "or bfloat16, not float64; convert with weight.float()");
}

// The Hadamard transform of a call that has one.
inline TransformCall quantize_call(const QuantizeA4Params& p, int processors, size_t most_shared) {
  TransformCall c{};
  c.had_k = p.had_k, c.k = p.k, c.block_size = p.block_size;
  c.tokens = p.tokens, c.features = p.features;
  c.aligned = aligned_16(p.x) && aligned_16(p.up) && aligned_16(p.codes);
  c.prepares = true;
  c.terms = p.up || p.dtype == ScalarType::Float ? 3 : 1;
  c.processors = processors;
  c.most_shared = most_shared;
  c.other_shared = 16 * (p.features / p.group_size);
  c.group_size = p.group_size;
  return c;
}

inline QuantizePlan plan_quantize(const QuantizeA4Params& p, int processors, size_t most_shared) {
  check_quantize(p);
  QuantizePlan plan{};
  plan.args.p = p;
  const bool aligned =
      aligned_16(p.x) && aligned_16(p.up) && aligned_16(p.codes) && aligned_16(p.norm_weight);
  int64_t groups = p.features / p.group_size;
  if (p.block_size > 1) {
    Transform& t = plan.args.t;
    t = plan_transform(quantize_call(p, processors, most_shared));
    groups = t.unit / p.group_size;
    plan.shared = t.table_bytes + t.work_bytes + 16 * groups;
    plan.threads = t.warps * 32;
    plan.blocks = transform_blocks(t, processors, plan.shared, most_shared);
  } else {
    const int64_t runs = divide_up(p.features, 8);
    const int64_t warps = std::min<int64_t>(divide_up(runs, 32), kQuantizeWarps);
    plan.args.vector = aligned && p.features % 8 == 0;
    plan.args.whole = groups == 1 || (p.group_size % 8 == 0 && p.features <= 65536);
    const bool fits = plan.args.vector && groups == 1 && p.tokens <= int64_t{1} << 30;
    for (int r = 1; r <= kRuns && fits && !plan.args.token_runs; r *= 2)
      if (runs <= r * kQuantizeWarps * 32) plan.args.token_runs = r;
    plan.args.slices = static_cast<int>(divide_up(runs, warps * 32 * kRuns));
    plan.shared = kQuantizeWarps * (plan.args.token_runs ? 8 : 4) + 16 * groups;
    plan.threads = static_cast<unsigned>(warps * 32);
    if (plan.args.token_runs)
      plan.threads = static_cast<unsigned>(32 * divide_up(runs, 32 * plan.args.token_runs));
    plan.blocks = static_cast<unsigned>(std::min<int64_t>(p.tokens, int64_t{1} << 30));
  }
  if (plan.shared > most_shared)
    throw std::runtime_error("w2a4.quantize_a4: " + std::to_string(groups) + " groups of " +
                             std::to_string(p.group_size) + " need " + std::to_string(plan.shared) +
                             " bytes of shared memory, this device has " +
                             std::to_string(most_shared) + " a block; use larger groups");
  return plan;
}

using QuantizeKernel = void (*)(QuantizeArgs);

template <class T>
using QuantizeKernelOf = std::integral_constant<QuantizeKernel, quantize_kernel<T>>;
template <int kTokenRuns>
struct QuantizeTokenKernels {
  template <class T>
  using Of = std::integral_constant<QuantizeKernel, quantize_token_kernel<T, kTokenRuns>>;
};
template <bool kSilu, Mix kMix>
struct HadamardQuantizeKernels {
  template <class T>
  using Of = std::integral_constant<QuantizeKernel, hadamard_quantize_kernel<T, kSilu, kMix>>;
};

template <Mix kMix, class Run>
void with_hadamard_quantize_kernel(const QuantizeA4Params& p, Run&& run) {
  if (p.up)
    with_format<HadamardQuantizeKernels<true, kMix>::template Of>("silu_mul_hadamard_a4", p.dtype,
                                                                  run);
  else if constexpr (kMix == Mix::kStaged)  // of float32 only
    run(typename HadamardQuantizeKernels<false, kMix>::template Of<Float32>{});
  else
    with_format<HadamardQuantizeKernels<false, kMix>::template Of>("hadamard_a4", p.dtype, run);
}

// Calls run(kernel), kernel a std::integral_constant of the function.
template <class Run>
void with_quantize_kernel(const QuantizeArgs& args, Run&& run) {
  const QuantizeA4Params& p = args.p;
  if (args.token_runs == 1)
    with_format<QuantizeTokenKernels<1>::Of>("quantize_a4", p.dtype, run);
  else if (args.token_runs == 2)
    with_format<QuantizeTokenKernels<2>::Of>("quantize_a4", p.dtype, run);
  else if (args.token_runs == 4)
    with_format<QuantizeTokenKernels<4>::Of>("quantize_a4", p.dtype, run);
  else if (p.block_size <= 1)
    with_format<QuantizeKernelOf>("quantize_a4", p.dtype, run);
  else if (args.t.mix == Mix::kNone)
    with_format<HadamardQuantizeKernels<true, Mix::kNone>::Of>("hadamard_a4", p.dtype, run);
  else if (args.t.mix == Mix::kDirect)
    with_hadamard_quantize_kernel<Mix::kDirect>(p, run);
  else
    with_hadamard_quantize_kernel<Mix::kStaged>(p, run);
}

// Calls run(kernel, its argument, Launch) with the kernel that serves a call on such a device.
template <class Run>
void with_quantize(const QuantizeA4Params& p, int arch, int processors, size_t most_shared,
                   Run&& run) {
  check_quantize(p);
  ClusterArgs args{};
  const bool whole = p.block_size > 1 && p.group_size == p.features;
  if (whole &&
      plan_cluster(quantize_call(p, processors, most_shared), most_cluster(arch), args.t)) {
    args.x = p.x, args.up = p.up, args.clip = p.clip;
    args.codes = p.codes, args.scale = p.scale;
    with_cluster_kernel<true>("hadamard_a4", p.dtype, args.t, [&](auto kernel) {
      run(kernel, args, cluster_launch(args.t, processors, most_shared));
    });
    return;
  }
  const QuantizePlan plan = plan_quantize(p, processors, most_shared);
  with_quantize_kernel(plan.args, [&](auto kernel) {
    run(kernel, plan.args, Launch{plan.blocks, plan.threads, plan.shared});
  });
}

}  // namespace w2a4::cuda
