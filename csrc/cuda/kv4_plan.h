// Which kernel serves a call of quantize_kv4, append_kv4 or rope_append_kv4, with which grid: one
// rule for the launchers and for the tests, which run the kernels on a CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kv4.cuh"
#include "kv4_wide.cuh"

namespace w2a4::cuda {

template <class Args>
struct HeadsPlan {
  Args args;
  unsigned blocks;
  size_t shared;
};

// Rows as the kernels count them.
inline uint32_t checked_rows(const char* op, int64_t rows, int64_t head_dim) {
  if (head_dim > 1024)
    throw std::runtime_error(std::string("w2a4.") + op + ": head_dim=" + std::to_string(head_dim) +
                             "; the CUDA kernels take up to 1024");
  if (rows >= int64_t{1} << 31)
    throw std::runtime_error(
        std::string("w2a4.") + op + ": " + std::to_string(rows) +
        " heads of tokens in one call; the CUDA kernels take fewer than 2**31");
  return static_cast<uint32_t>(rows);
}

// Slots are counted in 32 bits.
inline void checked_slots(const char* op, const Slots& slots) {
  if (slots.at && slots.block_tokens > 0 && slots.blocks > (int64_t{1} << 31) / slots.block_tokens)
    throw std::runtime_error(std::string("w2a4.") + op + ": " + std::to_string(slots.blocks) +
                             " blocks of " + std::to_string(slots.block_tokens) +
                             " tokens; the CUDA kernels take up to 2**31 tokens");
}

inline unsigned blocks_of_rows(uint32_t rows) {
  return (rows + kHeadWarps - 1) / kHeadWarps;
}

// Can elements 2i and 2i + 1 be read at once?
inline bool reads_pairs(const void* x, ScalarType dtype) {
  return reinterpret_cast<uintptr_t>(x) % (dtype == ScalarType::Float ? 8 : 4) == 0;
}

inline HeadsPlan<QuantizeKV4Args> plan_quantize_kv4(const QuantizeKV4Params& p) {
  const uint32_t rows = checked_rows("quantize_kv4", p.batch * p.heads * p.tokens, p.head_dim);
  checked_slots("quantize_kv4", p.slots);
  const bool pairs = reads_pairs(p.x.data, p.dtype) && p.x.batch % 2 == 0 && p.x.head % 2 == 0 &&
                     p.x.token % 2 == 0;
  return {{p, pairs, rows}, blocks_of_rows(rows), 0};
}

// From so many heads of tokens on, more than the warps that an H200 holds, rope_append_kv4 is done
// by kv4_wide.cuh.
constexpr uint32_t kWideRows = 8192;
// Blocks that it makes at least, as long as there are heads for them.
constexpr uint32_t kWideBlocks = 2048;

inline bool wide_cache(const Strided4& codes) {
  return reinterpret_cast<uintptr_t>(codes.data) % 4 == 0 && codes.batch % 4 == 0 &&
         codes.head % 4 == 0 && codes.token % 4 == 0;
}

// Lanes of a head in kv4_wide.cuh, or 0 where that cannot serve.
inline int wide_lanes(const RopeAppendKV4Params& p) {
  for (const void* x : {p.qkv, p.cos, p.sin, static_cast<const void*>(p.q)})
    if (reinterpret_cast<uintptr_t>(x) % 16 != 0) return 0;
  const bool sizes = p.head_dim == 64 || p.head_dim == 128 || p.head_dim == 256;
  if (!sizes || p.had_k != nullptr || !wide_cache(p.k_codes) || !wide_cache(p.v_codes)) return 0;
  return static_cast<int>(p.head_dim) / (2 * kHalfRun);
}

inline HeadsPlan<RopeAppendKV4Args> plan_rope_append_kv4(const RopeAppendKV4Params& p,
                                                         uint32_t wide_rows = kWideRows) {
  const uint32_t rows = checked_rows("rope_append_kv4",
                                     p.batch * p.tokens * (p.q_heads + 2 * p.kv_heads), p.head_dim);
  checked_slots("rope_append_kv4", p.slots);
  int log_power = 0;
  while (p.k << (log_power + 1) <= p.block_size) ++log_power;
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.block_size)));
  const bool mixed = p.had_k != nullptr;
  if (p.rope_dtype == ScalarType::Double)
    throw std::runtime_error(
        "w2a4.rope_append_kv4: the CUDA kernels take cos and sin of float32, float16 and bfloat16, "
        "not float64; convert with cos.float()");
  const bool rope_pairs = reads_pairs(p.cos, p.rope_dtype) && reads_pairs(p.sin, p.rope_dtype);
  RopeAppendKV4Args args{
      p, reads_pairs(p.qkv, p.dtype), rope_pairs, rows, scale, log_power, mixed, 0, 0, 0};
  args.lanes = rows >= wide_rows ? wide_lanes(p) : 0;
  if (args.lanes == 0)
    return {args, blocks_of_rows(rows),
            mixed ? static_cast<size_t>(kHeadWarps * p.head_dim * 4) : 0};
  const auto groups = [&](int64_t heads) {
    return static_cast<uint32_t>((heads * args.lanes + 31) / 32);
  };
  const auto row_count = static_cast<uint32_t>(p.batch * p.tokens);
  args.groups = groups(p.q_heads) + 2 * groups(p.kv_heads);
  const uint32_t most = (args.groups + kHeadWarps - 1) / kHeadWarps;
  args.splits = std::min(most, (kWideBlocks + row_count - 1) / std::max(row_count, 1u));
  return {args, row_count * args.splits, 0};
}

using QuantizeKV4Kernel = void (*)(QuantizeKV4Args);
using RopeAppendKV4Kernel = void (*)(RopeAppendKV4Args);

template <int kRounds>
struct KV4Kernels {
  template <class T>
  using Quantize = std::integral_constant<QuantizeKV4Kernel, quantize_kv4_kernel<T, kRounds>>;
  template <class T>
  using RopeAppend =
      std::integral_constant<RopeAppendKV4Kernel, rope_append_kv4_kernel<T, kRounds>>;
};

template <int kLanes>
struct WideKernel {
  template <class T>
  using RopeAppend =
      std::integral_constant<RopeAppendKV4Kernel, rope_append_kv4_wide_kernel<T, kLanes>>;
};

// Calls run(kernel), kernel a std::integral_constant of the function.
template <class Run>
void with_kv4_kernel(const QuantizeKV4Args& args, Run&& run) {
  if (args.p.head_dim <= 256)
    with_format<KV4Kernels<4>::Quantize>("quantize_kv4", args.p.dtype, run);
  else
    with_format<KV4Kernels<16>::Quantize>("quantize_kv4", args.p.dtype, run);
}

template <class Run>
void with_kv4_kernel(const RopeAppendKV4Args& args, Run&& run) {
  const char* op = "rope_append_kv4";
  if (args.lanes == 4)
    with_format<WideKernel<4>::RopeAppend>(op, args.p.dtype, run);
  else if (args.lanes == 8)
    with_format<WideKernel<8>::RopeAppend>(op, args.p.dtype, run);
  else if (args.lanes == 16)
    with_format<WideKernel<16>::RopeAppend>(op, args.p.dtype, run);
  else if (args.p.head_dim <= 256)
    with_format<KV4Kernels<4>::RopeAppend>(op, args.p.dtype, run);
  else
    with_format<KV4Kernels<16>::RopeAppend>(op, args.p.dtype, run);
}

}  // namespace w2a4::cuda
