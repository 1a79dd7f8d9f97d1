// What launchers need from torch and the CUDA runtime: the current stream, the device, the launch.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace w2a4::cuda {

struct Device {
  int index;
  int arch;        // 10 * major + minor, e.g. 90
  int processors;  // multiprocessors
  int shared;      // bytes of shared memory that a block may ask for
};

// The current device, which an entry point has set to that of its arguments.
const Device& current_device();

// torch's current stream of the current device. Every kernel runs there.
cudaStream_t current_stream();

// Throws std::runtime_error if `status` is an error.
void check(cudaError_t status, const char* what);

#ifdef __CUDACC__
// Runs kKernel(p) on the current stream, with `shared` bytes of dynamic shared memory.
template <auto kKernel, class Params>
void launch(const char* name, dim3 grid, unsigned threads, size_t shared, const Params& p) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  // More than 48 KB must be asked for, once a device. Bit i: asked for on device i.
  static std::atomic<uint64_t> asked{0};
  const Device& device = current_device();
  const uint64_t bit = uint64_t{1} << device.index % 64;
  if (!(asked.load(std::memory_order_relaxed) & bit)) {
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared),
          name);
    // All kernels ask for the same division of L1, since changing it between two costs
    // microseconds.
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          name);
    asked.fetch_or(bit, std::memory_order_relaxed);
  }
  kKernel<<<grid, threads, shared, current_stream()>>>(p);
  check(cudaGetLastError(), name);
}
#endif

}  // namespace w2a4::cuda
