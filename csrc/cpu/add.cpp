// add: the residual of a decoder layer.
#include <algorithm>

#include "kernels.h"
#include "numbers.h"

namespace w2a4::cpu {
namespace {

template <class Arch>
W2A4_INLINE void add_span(const AddParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kSpan = 256;
  float x[kSpan], y[kSpan];
  for (int64_t first = begin; first < end; first += kSpan) {
    const int64_t n = std::min(kSpan, end - first);
    load(p.x, p.dtype, first, n, x);
    load(p.y, p.dtype, first, n, y);
    for (int64_t i = 0; i < n; ++i) y[i] += x[i];
    store(y, p.y, p.dtype, first, n);
  }
}
W2A4_DISPATCH(add_span, AddParams)

}  // namespace

void add(const AddParams& p) {
  parallel(p.n, 1 << 16, p, add_span_dispatch);
}

}  // namespace w2a4::cpu
