// linear_w8 on CUDA, see linear_w8.cuh.
#include "kernels.h"
#include "linear_w8_plan.h"
#include "runtime.h"

namespace w2a4::cuda {

void linear_w8(const LinearW8Params& p) {
  if (p.tokens == 0 || p.out_features == 0) return;
  const Device& device = use_device(p.device);
  const LinearW8Plan plan = plan_linear_w8(p, device.processors, device.shared);
  // Tokens beyond what a grid takes go into further launches.
  constexpr int64_t kMostBlocksY = 65535;
  LinearW8Args args = plan.args;
  for (int64_t first = 0; first < plan.blocks_y; first += kMostBlocksY) {
    const int64_t tokens = first * plan.tokens;
    const int64_t bytes = p.dtype == ScalarType::Float ? 4 : 2;
    args.p.x = static_cast<const char*>(p.x) + tokens * p.in_features * bytes;
    args.p.y = static_cast<char*>(p.y) + tokens * p.out_features * bytes;
    args.p.tokens = p.tokens - tokens;
    const auto blocks = static_cast<unsigned>(std::min(kMostBlocksY, plan.blocks_y - first));
    with_linear_w8_kernel(plan, [&](auto kernel) {
      launch<decltype(kernel)::value>("linear_w8", device, dim3(plan.blocks_x, blocks),
                                      kW8Warps * 32, plan.shared, args);
    });
  }
}

}  // namespace w2a4::cuda
