// The Python module w2a4._C: importing it registers the CPU kernels of the ops that Python has
// defined, and it says what was built.
#include <Python.h>
#include <torch/headeronly/version.h>

#include "cpu/arch.h"
#include "registration.h"

#if defined(__clang__)
#define W2A4_COMPILER "clang " __clang_version__
#else
#define W2A4_COMPILER "gcc " __VERSION__
#endif

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr) {
    PyModule_AddStringConstant(module, "build_info",
                               "w2a4._C: CPU kernels, abi3, built with torch " TORCH_VERSION
                               " headers, " W2A4_COMPILER);
    PyModule_AddStringConstant(module, "signatures", w2a4::signatures().c_str());
    PyModule_AddStringConstant(module, "cpu_isa", w2a4::cpu::isa_name());
    PyModule_AddStringConstant(module, "no_cuda", W2A4_NO_CUDA);  // why w2a4._cuda was not built
  }
  return module;
}
