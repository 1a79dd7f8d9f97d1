// Which kernels serve a call of attention_kv4, with which grid and workspace: one rule for the
// launcher, the entry point and the tests, which run the kernels on a CPU.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention_kv4.cuh"

namespace w2a4::cuda {

struct AttentionPlan {
  AttentionArgs args;
  int tiles;          // of two query rows, in a thread block
  unsigned blocks_x;  // row tiles of all sequences and KV heads
  unsigned blocks_y;  // chunks, or 1
  unsigned merge_x;   // rows of all sequences and KV heads, if chunks are merged by a kernel
  unsigned merge_y;   // pieces of 32 elements
  size_t shared;
  int64_t workspace;  // floats; 0: a thread block does all chunks of its rows
};

constexpr int64_t kMostWorkspace = int64_t{1} << 26;  // floats

// Throws std::runtime_error for what no kernel takes.
inline void check_attention(const AttentionKV4Params& p, size_t shared, size_t most_shared) {
  const std::string op = "w2a4.attention_kv4: ";
  if (p.head_dim > 256)
    throw std::runtime_error(op + "head_dim=" + std::to_string(p.head_dim) +
                             "; the CUDA kernels take up to 256");
  if (p.length >= int64_t{1} << 30 || p.batch * p.q_tokens * p.q_heads >= int64_t{1} << 30)
    throw std::runtime_error(
        op + "length=" + std::to_string(p.length) + " with " + std::to_string(p.q_tokens) +
        " query tokens of " + std::to_string(p.q_heads) +
        " heads; the CUDA kernels take fewer than 2**30 keys, and rows in all");
  if (shared > most_shared)
    throw std::runtime_error(op + "head_dim=" + std::to_string(p.head_dim) + " needs " +
                             std::to_string(shared) + " bytes of shared memory, this device has " +
                             std::to_string(most_shared) + " a block");
}

// How a cache of codes can be copied.
inline Copy copy_of(const Strided4& codes, int64_t head_dim) {
  const auto fits = [&](int64_t bytes) {
    return head_dim / 2 % bytes == 0 && reinterpret_cast<uintptr_t>(codes.data) % bytes == 0 &&
           codes.batch % bytes == 0 && codes.head % bytes == 0 && codes.token % bytes == 0;
  };
  return fits(16) ? Copy::kPieces16 : fits(8) ? Copy::kPieces8 : Copy::kBytes;
}

// With p.workspace null, blocks do all chunks whatever plan.workspace says would be better.
inline AttentionPlan plan_attention_kv4(const AttentionKV4Params& p, int processors,
                                        size_t most_shared) {
  AttentionPlan plan{};
  AttentionArgs& args = plan.args;
  args.p = p;
  args.repeat = static_cast<int>(p.q_heads / p.kv_heads);
  args.rows = static_cast<int>(p.q_tokens * args.repeat);
  const int64_t pairs = p.batch * p.kv_heads;
  // Registers do not hold the queries of 8 rows of more than 128 elements.
  const int most_tiles = p.head_dim > 128 ? 2 : 4;
  plan.tiles = std::min(args.rows <= 2 ? 1 : args.rows <= 4 ? 2 : 4, most_tiles);
  args.row_tiles = (args.rows + 2 * plan.tiles - 1) / (2 * plan.tiles);
  args.chunks = static_cast<int>((p.length + kChunkKeys - 1) / kChunkKeys);
  args.blocks = static_cast<int>((p.head_dim + 31) / 32);
  args.pitch = 16 * (args.blocks | 1);
  args.log_width = 5;
  while (int64_t{1} << args.log_width < p.head_dim) ++args.log_width;
  args.splits = 8 / args.blocks;
  args.k_copy = copy_of(p.k_codes, p.head_dim);
  args.v_copy = copy_of(p.v_codes, p.head_dim);
  // One token: chunks always are what there is to divide. Several: only if rows are too few.
  const int64_t floats = pairs * args.rows * args.chunks * (p.head_dim + 2);
  const bool few = args.row_tiles == 1 || pairs * args.row_tiles < 4 * processors;
  if (few && args.chunks > 1 && args.chunks < 65536 && floats <= kMostWorkspace)
    plan.workspace = floats;
  if (plan.workspace && p.workspace) {
    args.partial = p.workspace;
    plan.merge_x = static_cast<unsigned>(pairs * args.rows);
    plan.merge_y = static_cast<unsigned>(args.blocks);
  } else {
    plan.tiles = most_tiles;
    args.row_tiles = (args.rows + 2 * plan.tiles - 1) / (2 * plan.tiles);
  }
  plan.blocks_x = static_cast<unsigned>(pairs * args.row_tiles);
  plan.blocks_y = args.partial ? static_cast<unsigned>(args.chunks) : 1;
  if (!args.partial)  // four parts a thread, or twice as many, see Attention::run_all
    plan.shared =
        plan.tiles == 4 ? attention_shared<8>(args.pitch, 8) : attention_shared<4>(args.pitch, 4);
  else
    plan.shared = plan.tiles == 1   ? attention_shared<2>(args.pitch, 0)
                  : plan.tiles == 2 ? attention_shared<4>(args.pitch, 0)
                                    : attention_shared<8>(args.pitch, 0);
  check_attention(p, plan.shared, most_shared);
  return plan;
}

constexpr size_t kMergeShared = kAttentionThreads * sizeof(Part);

using AttentionKernel = void (*)(AttentionArgs);
template <int kTiles, int kBlocks, bool kSplit>
using AttentionKernelOf =
    std::integral_constant<AttentionKernel, attention_kv4_kernel<kTiles, kBlocks, kSplit>>;

// Calls run(kernel), kernel a std::integral_constant of the function.
template <class Run>
void with_attention_kernel(const AttentionPlan& plan, Run&& run) {
  const bool wide = plan.args.blocks > 4;
  if (!plan.args.partial)
    return wide ? run(AttentionKernelOf<2, 8, false>{}) : run(AttentionKernelOf<4, 4, false>{});
  if (plan.tiles == 4) return run(AttentionKernelOf<4, 4, true>{});
  if (plan.tiles == 2)
    return wide ? run(AttentionKernelOf<2, 8, true>{}) : run(AttentionKernelOf<2, 4, true>{});
  return wide ? run(AttentionKernelOf<1, 8, true>{}) : run(AttentionKernelOf<1, 4, true>{});
}

}  // namespace w2a4::cuda
