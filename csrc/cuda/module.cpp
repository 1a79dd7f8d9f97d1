// The Python module w2a4._cuda: importing it registers the CUDA kernels of the ops that w2a4._C
// defines.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include "../ops.h"

STABLE_TORCH_LIBRARY_IMPL(w2a4, CUDA, m) {
  m.impl("hadamard", TORCH_BOX(&w2a4::hadamard));
  m.impl("quantize_a4", TORCH_BOX(&w2a4::quantize_a4));
  m.impl("hadamard_a4", TORCH_BOX(&w2a4::hadamard_a4));
  m.impl("rmsnorm_a4", TORCH_BOX(&w2a4::rmsnorm_a4));
  m.impl("silu_mul_hadamard_a4", TORCH_BOX(&w2a4::silu_mul_hadamard_a4));
  m.impl("linear_w2a4", TORCH_BOX(&w2a4::linear_w2a4));
  m.impl("linear_w4a4", TORCH_BOX(&w2a4::linear_w4a4));
}

extern "C" PyMODINIT_FUNC PyInit__cuda(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr) {
    PyModule_AddStringConstant(module, "build_info",
                               "w2a4._cuda: CUDA kernels, abi3, built with torch " TORCH_VERSION
                               " headers, nvcc " W2A4_NVCC " for " W2A4_ARCHS);
  }
  return module;
}
