// attention_kv4 on CUDA, see attention_kv4.cuh.
#include "attention_kv4_plan.h"
#include "kernels.h"
#include "runtime.h"

namespace w2a4::cuda {
namespace {

AttentionPlan plan_here(const AttentionKV4Params& p) {
  const Device& device = current_device();
  return plan_attention_kv4(p, device.processors, device.shared);
}

}  // namespace

int64_t attention_kv4_workspace(const AttentionKV4Params& p) {
  return plan_here(p).workspace;
}

void attention_kv4(const AttentionKV4Params& p) {
  const AttentionPlan plan = plan_here(p);
  with_attention_kernel(plan, [&](auto kernel) {
    launch<decltype(kernel)::value>("attention_kv4", dim3(plan.blocks_x, plan.blocks_y),
                                    kAttentionThreads, plan.shared, plan.args);
  });
  if (plan.args.partial)
    launch<merge_kv4_kernel>("attention_kv4", dim3(plan.merge_x, plan.merge_y), kAttentionThreads,
                             kMergeShared, plan.args);
}

}  // namespace w2a4::cuda
