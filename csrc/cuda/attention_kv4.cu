// attention_kv4 on CUDA, see attention_kv4.cuh.
#include "attention_kv4_plan.h"
#include "kernels.h"
#include "runtime.h"

namespace w2a4::cuda {
namespace {

AttentionPlan plan_on(const Device& device, const AttentionKV4Params& p) {
  return plan_attention_kv4(p, device.processors, device.shared);
}

}  // namespace

int64_t attention_kv4_workspace(const AttentionKV4Params& p) {
  return plan_on(use_device(p.device), p).workspace;
}

void attention_kv4(const AttentionKV4Params& p) {
  const Device& device = use_device(p.device);
  const AttentionPlan plan = plan_on(device, p);
  with_attention_kernel(plan, [&](auto kernel) {
    launch<decltype(kernel)::value>("attention_kv4", device, dim3(plan.blocks_x, plan.blocks_y),
                                    kAttentionThreads, plan.shared, plan.args);
  });
  if (plan.args.partial)
    launch<merge_kv4_kernel>("attention_kv4", device, dim3(plan.merge_x, plan.merge_y),
                             kAttentionThreads, kMergeShared, plan.args);
}

}  // namespace w2a4::cuda
