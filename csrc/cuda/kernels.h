// CUDA kernels, one launcher an op. Arguments have passed the checks; launches are asynchronous, on
// torch's current stream of the current device.
#pragma once

#include "../params.h"

namespace w2a4::cuda {

void hadamard(const HadamardParams& p);
void quantize_a4(const QuantizeA4Params& p);
void linear_a4(const LinearA4Params& p);
void linear_w8(const LinearW8Params& p);

}  // namespace w2a4::cuda
