// What launchers need from torch and the CUDA runtime: the current stream, the device, the launch.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace w2a4::cuda {

constexpr int kMostDevices = 64;

struct Device {
  int index;
  int arch;        // 10 * major + minor, e.g. 90
  int processors;  // multiprocessors
  int shared;      // bytes of shared memory that a block may ask for
};

// The device of this index, which is then the one that launches go to. This library's CUDA runtime
// is linked statically, and what torch's runtime has set need not be known to it. Nothing is set
// back here: both runtimes share the thread's context, and the entry point's guard gives torch's
// back.
const Device& use_device(int index);

// torch's current stream of a device. Every kernel runs there.
cudaStream_t current_stream(const Device& device);

// Whether a kernel may start before the one it follows has ended; W2A4_OVERLAP=0 forbids it.
bool kernels_overlap();

// Throws std::runtime_error if `status` is an error.
void check(cudaError_t status, const char* what);

#ifdef __CUDACC__
// Runs kKernel(p) on the current stream of `device`, from use_device, with `shared` bytes of
// dynamic shared memory, in clusters of so many blocks along x (more than one from Hopper on). From
// Hopper on it may start while the kernel before it still runs, and calls wait_for_previous_kernel.
template <auto kKernel, class Params>
void launch(const char* name, const Device& device, dim3 grid, unsigned threads, size_t shared,
            const Params& p, unsigned cluster = 1) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  // More than 48 KB must be asked for, once a device. Bit i: asked for on device i.
  static std::atomic<uint64_t> asked{0};
  static_assert(kMostDevices <= 64, "a bit a device");
  const uint64_t bit = uint64_t{1} << device.index;
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
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (device.arch >= 90 && kernels_overlap()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = current_stream(device);
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kKernel, p), name);
}
#endif

}  // namespace w2a4::cuda
