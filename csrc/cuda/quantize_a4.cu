// quantize_a4, hadamard_a4, rmsnorm_a4 and silu_mul_hadamard_a4 on CUDA, see quantize_a4.cuh.
#include "kernels.h"
#include "quantize_plan.h"
#include "runtime.h"

namespace w2a4::cuda {

void quantize_a4(const QuantizeA4Params& p) {
  if (p.tokens == 0) return;
  const Device& device = use_device(p.device);
  with_quantize(p, device.arch, device.processors, device.shared,
                [&](auto kernel, const auto& args, const Launch& how) {
                  launch<decltype(kernel)::value>("quantize_a4", device, dim3(how.blocks),
                                                  how.threads, how.shared, args, how.cluster);
                });
}

}  // namespace w2a4::cuda
