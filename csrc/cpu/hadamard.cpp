// hadamard: x @ H, block by block.
#include "hadamard.h"

#include "kernels.h"

namespace w2a4::cpu {
namespace {

// x and y of type Real.
template <class Arch, class Real>
W2A4_INLINE void transform_as(const HadamardParams& p, int64_t begin, int64_t end) {
  HadamardBlock<Real> h(p.had_k, p.k, p.block_size, p.transpose);
  for (int64_t first = begin * p.block_size; first < end * p.block_size; first += p.block_size)
    transform_block<Arch>(h, static_cast<const Real*>(p.x) + first,
                          static_cast<Real*>(p.y) + first);
}

// x and y of two-byte floats, computed in float.
template <class Arch>
W2A4_INLINE void transform_converted(const HadamardParams& p, int64_t begin, int64_t end) {
  HadamardBlock<float> h(p.had_k, p.k, p.block_size, p.transpose);
  std::vector<float> x(p.block_size);
  for (int64_t first = begin * p.block_size; first < end * p.block_size; first += p.block_size) {
    load(p.x, p.dtype, first, p.block_size, x.data());
    transform_block<Arch>(h, x.data(), x.data());
    store(x.data(), p.y, p.dtype, first, p.block_size);
  }
}

template <class Arch>
W2A4_INLINE void transform_blocks(const HadamardParams& p, int64_t begin, int64_t end) {
  if (p.dtype == ScalarType::Double)
    transform_as<Arch, double>(p, begin, end);
  else if (p.dtype == ScalarType::Float)
    transform_as<Arch, float>(p, begin, end);
  else
    transform_converted<Arch>(p, begin, end);
}
W2A4_DISPATCH(transform_blocks, HadamardParams)

}  // namespace

void hadamard(const HadamardParams& p) {
  parallel(p.rows * (p.n / p.block_size), 1 + 16384 / p.block_size, p, transform_blocks_dispatch);
}

}  // namespace w2a4::cpu
