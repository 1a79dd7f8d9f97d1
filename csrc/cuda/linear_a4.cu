// linear_w2a4 and linear_w4a4 on CUDA: gemv_bmma_kernel or gemv_imma_kernel, see gemv_plan.h.
#include <cstdlib>
#include <string>

#include "gemv_plan.h"
#include "kernels.h"
#include "runtime.h"

namespace w2a4::cuda {
namespace {

Gemv asked_gemv() {
  const char* name = std::getenv("W2A4_GEMV");
  const std::string asked = name ? name : "auto";
  if (asked == "auto") return Gemv::kAuto;
  if (asked == "bmma") return Gemv::kBmma;
  if (asked == "imma") return Gemv::kImma;
  throw std::runtime_error("w2a4: W2A4_GEMV=" + asked + ", expected auto, bmma or imma");
}

}  // namespace

void linear_a4(const LinearA4Params& p) {
  if (p.tokens == 0 || p.out_features == 0) return;
  const Device& device = use_device(p.device);
  const GemvPlan plan = plan_gemv(p, device.arch, device.processors, device.shared, asked_gemv());
  with_gemv_kernel(p, plan, [&](auto kernel, const char* name, size_t shared) {
    launch<decltype(kernel)::value>(name, device, dim3(plan.blocks_x, plan.blocks_y, plan.blocks_z),
                                    kThreads, shared, p);
  });
}

}  // namespace w2a4::cuda
