// CPU kernels, one launcher an op. Arguments have passed the checks.
#pragma once

#include "../params.h"

namespace w2a4::cpu {

void hadamard(const HadamardParams& p);
void quantize_a4(const QuantizeA4Params& p);
void linear_a4(const LinearA4Params& p);
void linear_w8(const LinearW8Params& p);
void quantize_kv4(const QuantizeKV4Params& p);
void rope_append_kv4(const RopeAppendKV4Params& p);
void attention_kv4(const AttentionKV4Params& p);
inline int64_t attention_kv4_workspace(const AttentionKV4Params&) {
  return 0;
}
void add(const AddParams& p);

}  // namespace w2a4::cpu
