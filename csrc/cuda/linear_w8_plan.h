// How many blocks linear_w8 runs in, and with how much shared memory: for the launcher and the
// tests.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "linear_w8.cuh"

namespace w2a4::cuda {

constexpr int kW8Tokens = 4;  // of a block, where there are several and their x fits

struct LinearW8Plan {
  LinearW8Args args;
  bool vector;  // rows of W are aligned to 16 bytes
  int tokens;   // of a block
  unsigned blocks_x, blocks_y;
  size_t shared;
};

inline LinearW8Plan plan_linear_w8(const LinearW8Params& p, int processors, size_t most_shared) {
  // At least one, of zeros.
  const int64_t span = std::max<int64_t>(1, (p.in_features + kW8Span - 1) / kW8Span) * kW8Span;
  const size_t bytes = span * sizeof(float);  // of a token's x
  if (bytes > most_shared)
    throw std::runtime_error("w2a4.linear_w8: x of " + std::to_string(p.in_features) +
                             " features needs " + std::to_string(bytes) +
                             " bytes of shared memory, this device has " +
                             std::to_string(most_shared) + " a block; quantise fewer features");
  LinearW8Plan plan{};
  plan.args = {p, static_cast<int>(span)};
  plan.vector = reinterpret_cast<uintptr_t>(p.weight) % 16 == 0 && p.in_features % 16 == 0;
  plan.tokens = plan.vector && p.tokens > 1 && kW8Tokens * bytes <= most_shared ? kW8Tokens : 1;
  plan.shared = plan.tokens * bytes;
  // As many blocks as run at once, which then share the rows: x is staged once for many of them.
  const int64_t at_once = std::clamp<int64_t>(most_shared / plan.shared, 1, 4);
  const int64_t rows = kW8Rows * kW8Warps;
  const int64_t needed = (p.out_features + rows - 1) / rows;
  plan.blocks_x = static_cast<unsigned>(std::min(needed, processors * at_once));
  plan.blocks_y = static_cast<unsigned>((p.tokens + plan.tokens - 1) / plan.tokens);
  return plan;
}

using LinearW8Kernel = void (*)(LinearW8Args);
template <int kTokens, bool kVector>
struct LinearW8Kernels {
  template <class T>
  using Of = std::integral_constant<LinearW8Kernel, linear_w8_kernel<T, kTokens, kVector>>;
};

// Calls run(kernel), kernel a std::integral_constant of the function.
template <class Run>
void with_linear_w8_kernel(const LinearW8Plan& plan, Run&& run) {
  const ScalarType dtype = plan.args.p.dtype;
  if (!plan.vector)
    with_format<LinearW8Kernels<1, false>::Of>("linear_w8", dtype, run);
  else if (plan.tokens == 1)
    with_format<LinearW8Kernels<1, true>::Of>("linear_w8", dtype, run);
  else
    with_format<LinearW8Kernels<kW8Tokens, true>::Of>("linear_w8", dtype, run);
}

}  // namespace w2a4::cuda
