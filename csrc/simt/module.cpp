// The Python module of the tests that run CUDA kernels on a CPU; tests/support/simt.py compiles it.
#include <pybind11/pybind11.h>

void bind_gemv(pybind11::module_& m);
void bind_linear_w8(pybind11::module_& m);
void bind_kv4(pybind11::module_& m);
void bind_planted(pybind11::module_& m);
void bind_quantize(pybind11::module_& m);

PYBIND11_MODULE(w2a4_simt, m) {
  bind_gemv(m);
  bind_linear_w8(m);
  bind_kv4(m);
  bind_planted(m);
  bind_quantize(m);
}
