// Which kernels the entry points call: the build compiles entry_a4.cpp and entry_kv4.cpp for
// w2a4._C with those of cpu/ and, with W2A4_CUDA defined, for w2a4._cuda with those of cuda/.
#pragma once

#include <torch/csrc/stable/tensor.h>

#ifdef W2A4_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"

namespace w2a4 {
namespace kernels = cuda;

// Makes the device of `t` the current one while an op runs.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};
}  // namespace w2a4
#else
#include "cpu/kernels.h"

namespace w2a4 {
namespace kernels = cpu;

struct OnDeviceOf {
  explicit OnDeviceOf(const torch::stable::Tensor&) {}
};
}  // namespace w2a4
#endif
