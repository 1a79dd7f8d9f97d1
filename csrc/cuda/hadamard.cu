// hadamard on CUDA, see hadamard.cuh.
#include "hadamard.cuh"
#include "kernels.h"
#include "runtime.h"

namespace w2a4::cuda {

void hadamard(const HadamardParams& p) {
  if (p.rows == 0 || p.n == 0) return;
  const Device& device = use_device(p.device);
  const Transform t = plan_hadamard(p, device.processors, device.shared);
  const size_t shared = t.table_bytes + t.work_bytes;
  const unsigned blocks = transform_blocks(t, device.processors, shared, device.shared);
  with_hadamard_kernel(p.dtype, t, [&](auto kernel) {
    launch<decltype(kernel)::value>("hadamard", device, dim3(blocks), t.warps * 32, shared,
                                    HadamardArgs{p, t});
  });
}

}  // namespace w2a4::cuda
