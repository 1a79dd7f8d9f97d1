// Which kernels serve a call of attention_kv4, with which grid and workspace: one rule for the
// launcher, the entry point and the tests, which run the kernels on a CPU.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention_kv4.cuh"

namespace w2a4::cuda {

struct AttentionPlan {
  AttentionArgs args;
  int quads;          // of four query rows, in a thread block
  int blocks;         // of 32 elements that the kernel takes
  unsigned blocks_x;  // row tiles of all sequences and KV heads
  unsigned blocks_y;  // that share the chunks, or 1
  unsigned merge_x;   // rows of all sequences and KV heads, if chunks are merged by a kernel
  unsigned merge_y;   // pieces of 64 elements
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
  if (p.table.blocks >= int64_t{1} << 31 || p.table.block_tokens >= int64_t{1} << 31)
    throw std::runtime_error(op + std::to_string(p.table.blocks) + " blocks of " +
                             std::to_string(p.table.block_tokens) +
                             " tokens; the CUDA kernels take fewer than 2**31 of either");
  if (p.length >= int64_t{1} << 30 || p.batch * p.q_tokens * p.q_heads >= int64_t{1} << 30)
    throw std::runtime_error(
        op + "length=" + std::to_string(p.length) + " with " + std::to_string(p.q_tokens) +
        " query tokens of " + std::to_string(p.q_heads) +
        " heads; the CUDA kernels take fewer than 2**30 keys, and rows in all");
  for (const Strided4* t : {&p.k_codes, &p.v_codes, &p.k_params, &p.v_params})
    for (int64_t stride : {t->batch, t->head, t->token})
      if (stride >= int64_t{1} << (t == &p.k_codes || t == &p.v_codes ? 32 : 31))
        throw std::runtime_error(op + "a cache has a stride of " + std::to_string(stride) +
                                 " elements; the CUDA kernels take less than 4 GiB");
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

// Can scales and zero-points of four keys, from a multiple of four on, be read at once?
inline bool reads_fours(const Strided4& params) {
  return params.token == 2 && params.batch % 8 == 0 && params.head % 8 == 0 &&
         reinterpret_cast<uintptr_t>(params.data) % 16 == 0;
}

inline int block_shift_of(int64_t block_tokens) {
  int shift = 0;
  while (shift < 30 && int64_t{1} << shift < block_tokens) ++shift;
  return int64_t{1} << shift == block_tokens ? shift : -1;
}

using AttentionKernel = void (*)(AttentionArgs);
template <int kQuads, int kBlocks, bool kSplit, bool kPaged>
struct AttentionKernelOf
    : std::integral_constant<AttentionKernel,
                             kPaged ? attention_kv4_paged_kernel<kQuads, kBlocks, kSplit>
                                    : attention_kv4_kernel<kQuads, kBlocks, kSplit>> {
  static constexpr int kResident = kResidentBlocks<kQuads, kBlocks, kSplit>;
  static constexpr size_t kShared =
      AttentionShared<4 * kQuads, kBlocks>::kParts +
      Attention<kQuads, kBlocks, kSplit, kPaged>::kSharedParts * kAttentionThreads * sizeof(Part);
};

// Calls run(kernel), kernel an AttentionKernelOf.
template <class Run>
void with_attention_kernel(const AttentionPlan& plan, Run&& run) {
  const auto with_blocks = [&](auto split, auto paged) {
    constexpr bool kSplit = decltype(split)::value, kPaged = decltype(paged)::value;
    if (plan.blocks == 8) return run(AttentionKernelOf<1, 8, kSplit, kPaged>{});
    if constexpr (kSplit) {
      if (plan.quads == 1)
        return plan.blocks == 2 ? run(AttentionKernelOf<1, 2, kSplit, kPaged>{})
                                : run(AttentionKernelOf<1, 4, kSplit, kPaged>{});
    }
    return plan.blocks == 2 ? run(AttentionKernelOf<2, 2, kSplit, kPaged>{})
                            : run(AttentionKernelOf<2, 4, kSplit, kPaged>{});
  };
  const auto with_split = [&](auto split) {
    if (plan.args.p.table.at) return with_blocks(split, std::true_type{});
    return with_blocks(split, std::false_type{});
  };
  if (plan.args.partial) return with_split(std::true_type{});
  return with_split(std::false_type{});
}

// With p.workspace null, blocks do all chunks whatever plan.workspace says would be better.
inline AttentionPlan plan_attention_kv4(const AttentionKV4Params& p, int processors,
                                        size_t most_shared) {
  AttentionPlan plan{};
  AttentionArgs& args = plan.args;
  args.p = p;
  args.repeat = static_cast<int>(p.q_heads / p.kv_heads);
  args.rows = static_cast<int>(p.q_tokens * args.repeat);
  args.tokens = static_cast<int>(p.q_tokens), args.length = static_cast<int>(p.length);
  const int64_t pairs = p.batch * p.kv_heads;
  // Registers do not hold the queries of 8 rows of more than 128 elements.
  const int most_quads = p.head_dim > 128 ? 1 : 2;
  const auto divide_rows = [&](int quads) {
    plan.quads = quads, args.row_tiles = (args.rows + 4 * quads - 1) / (4 * quads);
  };
  divide_rows(std::min(args.rows <= 4 ? 1 : 2, most_quads));
  plan.blocks = p.head_dim <= 64 ? 2 : p.head_dim <= 128 ? 4 : 8;
  args.chunks = static_cast<int>((p.length + kChunkKeys - 1) / kChunkKeys);
  args.scaling = p.scaling * 1.44269504f;
  args.copy = std::max(copy_of(p.k_codes, p.head_dim), copy_of(p.v_codes, p.head_dim));
  const bool fours = !p.table.at || (p.table.block_tokens % 4 == 0 && p.sinks % 4 == 0);
  args.k_fours = fours && reads_fours(p.k_params), args.v_fours = fours && reads_fours(p.v_params);
  args.block_shift = block_shift_of(p.table.block_tokens);
  // One token: chunks always are what there is to divide. Several: only if rows are too few.
  const int64_t floats = pairs * args.rows * args.chunks * (p.head_dim + 2);
  const bool few = args.row_tiles == 1 || pairs * args.row_tiles < 4 * processors;
  if (few && args.chunks > 1 && floats <= kMostWorkspace) plan.workspace = floats;
  if (plan.workspace && p.workspace) {
    args.partial = p.workspace;
    plan.merge_x = static_cast<unsigned>(pairs * args.rows);
    plan.merge_y = static_cast<unsigned>((p.head_dim + 63) / 64);
  } else {
    divide_rows(most_quads);
  }
  plan.blocks_x = static_cast<unsigned>(pairs * args.row_tiles);
  with_attention_kernel(plan, [&](auto kernel) {
    plan.shared = kernel.kShared;
    plan.blocks_y = 1;
    if (!args.partial) return;
    // All blocks run at once, if there are not more of them anyway, with as many chunks each.
    const int64_t room = int64_t{processors} * kernel.kResident / plan.blocks_x;
    const int64_t each =
        (args.chunks + std::max<int64_t>(room, 1) - 1) / std::max<int64_t>(room, 1);
    plan.blocks_y = static_cast<unsigned>((args.chunks + each - 1) / each);
  });
  check_attention(p, plan.shared, most_shared);
  return plan;
}

constexpr size_t kMergeShared = kAttentionThreads * sizeof(Part);

}  // namespace w2a4::cuda
