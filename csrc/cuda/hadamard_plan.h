// How a Hadamard transform is divided among warps: one rule for the launchers and for the tests,
// which run the kernels on a CPU.
//
// A block of the transform, size = k * 2**m, is a matrix of `rows` x `columns`, row-major, with
// columns = 2**log_m and rows = k * 2**a, and H = R x S: R [rows, rows] is had_k x Sylvester(2**a)
// and S is Sylvester's matrix of the columns. R is mixed by tensor cores, S by butterflies; the two
// commute. A *task* is what a warp holds in registers: 16 * tiles rows times a chunk of 64 columns.
// A *unit* is what a thread block transforms at a time: whole tokens, so whole blocks.
//
// Blocks of at most 64 numbers are not mixed (rows are then pieces of 64 numbers, all butterflies).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace w2a4::cuda {

// A grid: blocks along x, threads and bytes of shared memory of each, blocks of a cluster.
struct Launch {
  unsigned blocks, threads;
  size_t shared;
  unsigned cluster = 1;
};

constexpr int kChunk = 64;                  // columns of a task
constexpr int kTransformWarps = 16;         // of a thread block, at most
constexpr int kExchange = 16 * kChunk * 4;  // bytes of shared memory a warp exchanges through

// How R is done: not at all; on inputs as they come from memory; on inputs that were prepared for
// all warps in shared memory, as three bfloat16 terms.
enum class Mix { kNone, kDirect, kStaged };

struct Transform {
  const int8_t* had_k;  // [k, k] of +-1, or null
  int k;
  int log_copies;  // a: R is had_k x Sylvester(2**a)
  int rows, log_m, size;
  int stages;  // butterflies within a chunk
  int log_c;   // log2 of the chunks of a block; stages between them follow an exchange
  Mix mix;
  bool transpose;
  bool word_signs;  // rows of had_k can be read by aligned words
  bool vector;      // runs of 8 columns are contiguous, whole and aligned to 16 bytes
  bool whole;       // and lie in one group, of a unit of at most 65536 unless it is the only one
  bool swizzle;     // what is staged is permuted, to spread over banks
  int tiles;        // 16 rows each, of a task
  int chunks;       // of a unit
  int tasks;        // of a unit
  int warps;        // of a thread block; tasks beyond are done in further slices
  int slices;
  int unit;                     // elements
  int64_t units, total;         // of the call; total in elements
  float scale;                  // 1 / sqrt(size)
  int table_bytes, work_bytes;  // shared memory: signs of R; staging or exchange
};

// What a transform is asked to do.
struct TransformCall {
  const int8_t* had_k;
  int64_t k, block_size;
  bool transpose;
  int64_t tokens, features;          // a unit is whole tokens
  bool aligned;                      // pointers to 16 bytes
  int terms;                         // of an input on the tensor cores: 1, or 3 for float32 values
  bool prepares;                     // inputs are functions of what lies in memory
  bool large_units;                  // several tokens a unit, where they are small
  int64_t group_size;                // that runs of 8 columns lie in, if all is well
  size_t most_shared, other_shared;  // of a block; of that, taken for other things
  int processors;
};

inline int log2_of(int64_t n) {
  int log = 0;
  while (int64_t{1} << (log + 1) <= n) ++log;
  return log;
}

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline bool is_mixed(const int8_t* had_k, int64_t block_size) {
  return had_k != nullptr || block_size > kChunk;
}

// R has at most 32 rows where it can, so that an input is read and prepared once; up to 64 if that
// leaves one chunk and so no exchange; never fewer than 8 columns, which are a 16-byte load, nor
// more than 1024, which 16 warps hold.
inline void choose_rows(Transform& t, int64_t k, int64_t block_size) {
  const int log_power = log2_of(block_size / k);
  int a = 0;
  while (k << (a + 1) <= 32 && log_power - a > 3) ++a;
  a = std::max(a, log_power - 10);
  if (log_power - a > 6 && k << (log_power - 6) <= 64) a = log_power - 6;
  t.log_copies = a;
  t.rows = static_cast<int>(k << a);
  t.log_m = log_power - a;
  t.stages = std::min(t.log_m, 6);
  t.log_c = std::max(t.log_m - 6, 0);
}

// Tokens of a unit so that its columns fill a chunk, and a few tasks if units may be large.
inline int64_t tokens_of_unit(const Transform& t, const TransformCall& c) {
  const int64_t columns = (c.features / c.block_size) << t.log_m;  // of a token
  int64_t tokens = std::max<int64_t>(1, kChunk / columns);
  const int64_t enough = divide_up(c.tokens, 2 * std::max(c.processors, 1));
  const auto tasks = [&](int64_t n) {
    return divide_up(t.rows, 32) * divide_up(n * columns, kChunk);
  };
  while (c.large_units && tasks(tokens) < 4 && tokens < enough) tokens *= 2;
  return std::min(tokens, std::max<int64_t>(c.tokens, 1));
}

inline void choose_tasks(Transform& t, const TransformCall& c) {
  const int64_t columns = (t.unit / t.size) << t.log_m;
  t.chunks = t.mix != Mix::kNone ? static_cast<int>(divide_up(columns, kChunk)) : 1;
  // Few tokens: spread one over more warps, at the price of reading inputs twice.
  const int64_t small_tasks = divide_up(t.rows, 16) * t.chunks;
  t.tiles =
      t.mix == Mix::kNone || (t.units <= c.processors && small_tasks <= kTransformWarps) ? 1 : 2;
  t.tasks = static_cast<int>(divide_up(t.rows, 16 * t.tiles) * t.chunks);
  t.slices = static_cast<int>(divide_up(t.tasks, kTransformWarps));
  const int block_warps = 1 << t.log_c;  // warps of one block exchange among themselves
  t.warps = static_cast<int>(divide_up(divide_up(t.tasks, t.slices), block_warps)) * block_warps;
}

// Throws std::runtime_error if the shared memory of a block does not suffice.
inline Transform plan_transform(const TransformCall& c) {
  Transform t{};
  t.had_k = c.had_k;
  t.k = static_cast<int>(c.k);
  t.transpose = c.transpose;
  t.word_signs = c.k % 4 == 0 && reinterpret_cast<uintptr_t>(c.had_k) % 4 == 0;
  const bool mixed = is_mixed(c.had_k, c.block_size);
  t.mix = mixed ? Mix::kDirect : Mix::kNone;
  t.total = c.tokens * c.features;
  t.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(c.block_size)));
  if (c.features > int64_t{1} << 24 || c.k > 2048)
    throw std::runtime_error("w2a4: a Hadamard transform of " + std::to_string(c.features) +
                             " features with K=" + std::to_string(c.k) +
                             "; the CUDA kernels take up to 16777216 features and K up to 2048");
  if (mixed) {
    choose_rows(t, c.k, c.block_size);
    t.size = static_cast<int>(c.block_size);
    t.unit = static_cast<int>(tokens_of_unit(t, c) * c.features);
  } else {
    t.log_m = 6, t.stages = log2_of(c.block_size);
    t.unit = static_cast<int>(c.features);
    t.rows = static_cast<int>(divide_up(t.unit, kChunk));
    t.size = t.rows * kChunk;
  }
  t.units = divide_up(t.total, t.unit);
  t.swizzle = t.log_m >= 6 && t.rows % 4 == 0;
  t.vector = c.aligned && t.log_m >= 3 && c.features % 8 == 0;
  choose_tasks(t, c);
  const int tiles = static_cast<int>(divide_up(t.rows, 16));
  t.table_bytes = mixed ? 64 * tiles * tiles : 0;
  t.whole = c.group_size == t.unit || (c.group_size % 8 == 0 && t.unit <= 65536);
  // Some path is slow and goes through the warps' exchange regions.
  const bool scratch = !t.vector || !t.whole || (!mixed && c.prepares);
  t.work_bytes = t.log_c || scratch ? t.warps * kExchange : 0;
  const size_t taken = t.table_bytes + c.other_shared;
  const int staging = 6 * t.unit;
  const bool staged = mixed && c.terms == 3 && t.vector && t.tasks > t.chunks && t.slices == 1 &&
                      taken + staging <= c.most_shared;
  if (staged) {
    t.mix = Mix::kStaged;
    t.work_bytes = std::max(t.work_bytes, staging);
  }
  if (taken + t.work_bytes > c.most_shared)
    throw std::runtime_error(
        "w2a4: a Hadamard transform of blocks of " + std::to_string(c.block_size) +
        " with K=" + std::to_string(c.k) + " needs " + std::to_string(taken + t.work_bytes) +
        " bytes of shared memory, this device has " + std::to_string(c.most_shared) + " a block");
  return t;
}

// Thread blocks that keep every processor busy; each does several units.
inline unsigned transform_blocks(const Transform& t, int processors, size_t shared,
                                 size_t most_shared) {
  const size_t by_shared = most_shared / (shared + 1024);
  const size_t by_registers = kTransformWarps / t.warps;
  const auto resident =
      static_cast<int64_t>(std::max<size_t>(1, std::min(by_shared, by_registers)));
  return static_cast<unsigned>(std::min<int64_t>(t.units, resident * processors));
}

}  // namespace w2a4::cuda
