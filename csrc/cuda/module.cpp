// The Python module w2a4._cuda: importing it registers the CUDA kernels of the ops that Python
// has defined.
#include <Python.h>
#include <torch/headeronly/version.h>

#include "../registration.h"

extern "C" PyMODINIT_FUNC PyInit__cuda(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr) {
    PyModule_AddStringConstant(module, "build_info",
                               "w2a4._cuda: CUDA kernels, abi3, built with torch " TORCH_VERSION
                               " headers, nvcc " W2A4_NVCC " for " W2A4_ARCHS);
    PyModule_AddStringConstant(module, "signatures", w2a4::signatures().c_str());
  }
  return module;
}
