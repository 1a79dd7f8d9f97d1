// Hadamard transforms of whole tokens by a cluster of thread blocks each: which serve them, and how
// a token is divided. One rule for the launchers and for the tests, see hadamard_plan.h.
//
// H = R x S as there, of a matrix of `rows` x `columns` with up to 256 columns, so R is small. The
// order is the other one: butterflies of S first, within a warp, which holds 256 numbers of the
// token as they lie in memory, then R on the tensor cores. Each block mixes its share of columns.
#pragma once

#include "hadamard_plan.h"

namespace w2a4::cuda {

constexpr int kClusterWarps = 16;      // of a thread block, at most
constexpr int kPiece = 256;            // numbers of a token that a warp has at a time
constexpr int kMostTiles = 16;         // of 16 rows: their signs are in four registers
constexpr int kEnoughMma = 600;        // of a block, a token: more are spread over more blocks
constexpr int kLeastOfCluster = 2048;  // numbers of a token that are worth it
// Tokens: more of them fill the multiprocessors with blocks of their own, which do not exchange. An
// H200 takes 63 us for 382 tokens of 11008 by clusters and 46 by blocks; one token, 6 and 20.
constexpr int kMostTokens = 64;

struct ClusterTransform {
  const int8_t* had_k;  // [k, k] of +-1, or null
  int k, log_copies;    // R is had_k x Sylvester(2**log_copies)
  bool transpose;
  int size, rows, log_columns;
  int log_blocks;  // of a cluster
  int tiles;       // of 16 rows
  int own;         // tiles of 8 columns of a block
  int at_once;     // of them, that a warp mixes
  int warps;
  float scale;     // 1 / sqrt(size)
  int tile_bytes;  // of shared memory, of a term of a tile of 8 columns
  int64_t tokens;
};

// Bytes of shared memory: three bfloat16 terms of the block's columns, and maxima.
inline size_t cluster_shared(const ClusterTransform& t) {
  return size_t{3} * t.own * t.tile_bytes + 4 * 8 * kClusterWarps;
}

// Divides a token among 2**t.log_blocks blocks. False if registers or shared memory do not suffice.
inline bool divide_token(ClusterTransform& t, size_t most_shared) {
  t.own = (1 << t.log_columns >> t.log_blocks) / 8;
  if (t.own == 0) return false;
  t.at_once = 1;
  while (t.at_once < 2 && t.own % (2 * t.at_once) == 0 &&
         t.tiles * t.own > t.at_once * kClusterWarps)
    t.at_once *= 2;
  const int tasks = t.tiles * t.own / t.at_once;
  const int pieces = static_cast<int>(divide_up(t.size, kPiece << t.log_blocks));
  t.warps = std::max(tasks, std::min(pieces, kClusterWarps));
  // Rows are padded to what one ldmatrix reads. One more keeps neighbours in different banks.
  t.tile_bytes = 16 * (static_cast<int>(divide_up(t.tiles, 2)) * 32 + 1);
  return tasks <= kClusterWarps && cluster_shared(t) <= most_shared;
}

// Whether a cluster of up to `most_blocks` transforms each token, and how. A token's last bits so
// depend on whether it is one of few or of many, as those of linears do.
inline bool plan_cluster(const TransformCall& c, int most_blocks, ClusterTransform& t) {
  if (!c.aligned || c.block_size != c.features || c.features < kLeastOfCluster ||
      c.features > int64_t{1} << 20 || c.tokens > kMostTokens)
    return false;
  const int log_power = log2_of(c.block_size / c.k);
  t.had_k = c.had_k, t.k = static_cast<int>(c.k), t.transpose = c.transpose;
  t.size = static_cast<int>(c.block_size);
  t.log_columns = std::min(log_power, log2_of(kPiece));
  t.log_copies = log_power - t.log_columns;
  t.rows = t.size >> t.log_columns;
  t.tiles = static_cast<int>(divide_up(t.rows, 16));
  t.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(c.block_size)));
  t.tokens = c.tokens;
  if (t.log_columns < 6 || t.tiles > kMostTiles) return false;
  // The fewest blocks that leave a warp one piece and a block few products; else the most.
  bool found = false;
  for (int log_blocks = 0; 1 << log_blocks <= most_blocks; ++log_blocks) {
    ClusterTransform one = t;
    one.log_blocks = log_blocks;
    if (!divide_token(one, c.most_shared)) continue;
    t = one, found = true;
    const bool enough = 3 * t.tiles * t.tiles * t.own <= kEnoughMma;
    if (enough && t.size <= kPiece * kClusterWarps << log_blocks) break;
  }
  return found;
}

// Blocks that a cluster may have anywhere: Hopper brought clusters, before it other kernels serve.
inline int most_cluster(int arch) {
  return arch >= 90 ? 8 : 0;
}

// Thread blocks that are resident at once, in whole clusters that do the same number of tokens. A
// cluster lies within a part of the device, so a few processors may be left over.
inline Launch cluster_launch(const ClusterTransform& t, int processors, size_t most_shared) {
  const int64_t by_warps = (t.at_once == 2 ? 1 : 2) * kClusterWarps / t.warps;
  const auto by_shared = static_cast<int64_t>(most_shared / (cluster_shared(t) + 1024));
  int64_t most = std::max<int64_t>(1, std::min(by_warps, by_shared)) * processors;
  if (t.log_blocks) most = std::max<int64_t>(1, most * 7 / 8 >> t.log_blocks);
  const int64_t rounds = std::max<int64_t>(1, divide_up(t.tokens, most));
  return {static_cast<unsigned>(divide_up(t.tokens, rounds) << t.log_blocks),
          static_cast<unsigned>(t.warps * 32), cluster_shared(t), 1u << t.log_blocks};
}

}  // namespace w2a4::cuda
