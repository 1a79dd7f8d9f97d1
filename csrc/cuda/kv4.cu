// quantize_kv4, append_kv4 and rope_append_kv4 on CUDA, see kv4.cuh.
#include "kernels.h"
#include "kv4_plan.h"
#include "runtime.h"

namespace w2a4::cuda {
namespace {

template <class Args>
void launch_heads(const char* name, const HeadsPlan<Args>& plan) {
  const Device& device = use_device(plan.args.p.device);
  with_kv4_kernel(plan.args, [&](auto kernel) {
    launch<decltype(kernel)::value>(name, device, dim3(plan.blocks), kHeadWarps * 32, plan.shared,
                                    plan.args);
  });
}

}  // namespace

void quantize_kv4(const QuantizeKV4Params& p) {
  launch_heads("quantize_kv4", plan_quantize_kv4(p));
}

void rope_append_kv4(const RopeAppendKV4Params& p) {
  launch_heads("rope_append_kv4", plan_rope_append_kv4(p));
}

}  // namespace w2a4::cuda
