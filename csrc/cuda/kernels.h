// CUDA kernels, one launcher an op. Arguments have passed the checks; launches are asynchronous, on
// torch's current stream of the device that the parameters name.
#pragma once

#include "../params.h"

namespace w2a4::cuda {

void hadamard(const HadamardParams& p);
void quantize_a4(const QuantizeA4Params& p);
void linear_a4(const LinearA4Params& p);
void linear_w8(const LinearW8Params& p);
void quantize_kv4(const QuantizeKV4Params& p);
void rope_append_kv4(const RopeAppendKV4Params& p);
void attention_kv4(const AttentionKV4Params& p);
// Floats of workspace that it is fastest with.
int64_t attention_kv4_workspace(const AttentionKV4Params& p);

}  // namespace w2a4::cuda
