// hadamard on CUDA, see hadamard_cluster.cuh for whole large blocks, hadamard.cuh for the rest.
#include "hadamard.cuh"
#include "kernels.h"
#include "runtime.h"

namespace w2a4::cuda {

void hadamard(const HadamardParams& p) {
  if (p.rows == 0 || p.n == 0) return;
  const Device& device = use_device(p.device);
  with_hadamard(p, device.arch, device.processors, device.shared,
                [&](auto kernel, const auto& args, const Launch& how) {
                  launch<decltype(kernel)::value>("hadamard", device, dim3(how.blocks), how.threads,
                                                  how.shared, args, how.cluster);
                });
}

}  // namespace w2a4::cuda
