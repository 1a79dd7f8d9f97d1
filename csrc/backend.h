// Which kernels the entry points call: the build compiles entry_a4.cpp, entry_kv4.cpp and
// entry_w8.cpp for w2a4._C with those of cpu/ and, with W2A4_CUDA defined, for w2a4._cuda with
// those of cuda/.
#pragma once

#include <torch/csrc/stable/tensor.h>

#ifdef W2A4_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"

namespace w2a4 {
namespace kernels = cuda;

// Makes the device of `t` torch's current one while an op runs. `index` goes into the parameters,
// for the launcher: which device torch has set is nothing that it could ask the CUDA runtime.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& t)
      : index(t.get_device_index()), guard_(index) {}

  const int index;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};
}  // namespace w2a4
#else
#include "cpu/kernels.h"
#include "cpu/team.h"

namespace w2a4 {
namespace kernels = cpu;

struct OnDeviceOf {
  explicit OnDeviceOf(const torch::stable::Tensor&) {}

  static constexpr int index = -1;
};
}  // namespace w2a4
#endif
