#include "runtime.h"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>

namespace w2a4::cuda {
namespace {

// torch's CUDA library exports the current stream through its C shim. It is looked up at run time,
// so that this extension builds against a torch without CUDA.
using GetStream = int32_t (*)(int32_t device_index, void** stream);

GetStream find_get_stream() {
  void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = torch ? dlsym(torch, "aoti_torch_get_current_cuda_stream") : nullptr;
  if (!symbol) {
    throw std::runtime_error(
        "w2a4: this torch has no aoti_torch_get_current_cuda_stream, which the CUDA kernels need; "
        "install a CUDA build of torch >= 2.11");
  }
  return reinterpret_cast<GetStream>(symbol);
}

Device query(int index) {
  Device d{index, 0, 0, 0};
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "device query");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "device query");
  check(cudaDeviceGetAttribute(&d.processors, cudaDevAttrMultiProcessorCount, index),
        "device query");
  check(cudaDeviceGetAttribute(&d.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
        "device query");
  d.arch = 10 * major + minor;
  return d;
}

}  // namespace

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("w2a4: CUDA kernel ") + what + ": " +
                           cudaGetErrorString(status));
}

const Device& use_device(int index) {
  static Device devices[kMostDevices];
  static std::once_flag known[kMostDevices];
  if (index < 0 || index >= kMostDevices)
    throw std::runtime_error("w2a4: there is no CUDA device " + std::to_string(index) +
                             " for w2a4; it takes devices 0 to 63");
  int current = -1;
  check(cudaGetDevice(&current), "device query");
  if (current != index) check(cudaSetDevice(index), "device change");
  std::call_once(known[index], [&] { devices[index] = query(index); });
  return devices[index];
}

bool kernels_overlap() {
  static const bool overlap = [] {
    const char* asked = std::getenv("W2A4_OVERLAP");
    return !asked || std::string(asked) != "0";
  }();
  return overlap;
}

cudaStream_t current_stream(const Device& device) {
  static const GetStream get_stream = find_get_stream();
  void* stream = nullptr;
  if (get_stream(device.index, &stream) != 0)
    throw std::runtime_error("w2a4: torch did not give its current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace w2a4::cuda
