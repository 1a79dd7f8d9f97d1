// Which GEMV kernel serves a call, with which grid and shared memory: one rule for the launcher and
// for the tests, which run the kernels on a CPU.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "gemv_bmma.cuh"
#include "gemv_imma.cuh"

namespace w2a4::cuda {

enum class Gemv { kAuto, kBmma, kImma };

struct GemvPlan {
  bool bmma;
  int tokens;                             // of a block, gemv_bmma
  int subs;                               // groups in a unit, gemv_imma
  int halves;                             // of 16 rows, in a tile of gemv_imma
  bool grouped;                           // activation scales, more than one a token
  unsigned blocks_x, blocks_y, blocks_z;  // for rows; for tokens, y first
};

// Binary tensor cores pay for few tokens. Instructions a weight on sm_90, counted in SASS:
// gemv_bmma 0.70 for one token, 0.95 for two, and about 0.25 more for each further one;
// gemv_imma 1.46 for one to eight. Blackwell has no binary tensor cores and emulates them.
constexpr int kBmmaTokens = 2;
constexpr bool has_bmma(int arch) {
  return arch >= 80 && arch < 100;
}

// gemv_imma's blocks of a multiprocessor; blocks stay for all their tiles.
constexpr unsigned kImmaBlocks = 2;

constexpr int64_t kMostBlocksY = 65535;

inline size_t bmma_shared(const LinearA4Params& p, int tokens, bool grouped) {
  const int64_t in = p.in_features;
  if (grouped)
    return tokens == 1 ? Bmma<1, true>::shared_bytes(in) : Bmma<2, true>::shared_bytes(in);
  return tokens == 1 ? Bmma<1, false>::shared_bytes(in) : Bmma<2, false>::shared_bytes(in);
}

// Blocks for `tiles`, at most `most`, none of which has more than one tile more than it needs to.
inline unsigned balanced(unsigned tiles, unsigned most) {
  const unsigned each = (tiles + most - 1) / most;
  return (tiles + each - 1) / each;
}

// gemv_bmma loads scales two at a time.
inline bool scales_in_pairs(const LinearA4Params& p) {
  return reinterpret_cast<uintptr_t>(p.scale) % 4 == 0 &&
         p.out_features * (p.in_features / p.group_size) % 2 == 0;
}

inline void check_aligned(const void* data, const char* name, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(data) % bytes != 0) {
    throw std::runtime_error("w2a4: " + std::string(name) +
                             " starts at an address that is not a multiple of " +
                             std::to_string(bytes) + " bytes; pass " + name + ".clone()");
  }
}

inline bool power_of_two(int64_t n) {
  return (n & (n - 1)) == 0;
}

// Activation scales of whole units, in groups of a power of two, with weights whose groups are
// whole units too.
inline bool grouped_units(const LinearA4Params& p) {
  return p.act_group != p.in_features && p.act_group % kUnit == 0 && power_of_two(p.act_group) &&
         p.group_size % kUnit == 0;
}

// Rows of whole 16-byte pieces, groups that units divide or that divide units, and one activation
// scale a token or several of whole units.
inline bool regular(const LinearA4Params& p) {
  const bool whole_row = p.group_size == p.in_features;
  return (p.act_group == p.in_features || grouped_units(p)) &&
         p.in_features % (128 / p.weight_bits) == 0 && p.in_features % 32 == 0 &&
         ((whole_row && p.in_features % kUnit == 0) ||
          (!whole_row && p.group_size >= 32 && power_of_two(p.group_size)));
}

// `arch` is 10 * major + minor; most_shared is what a block may have. Throws std::runtime_error for
// what no kernel takes.
inline GemvPlan plan_gemv(const LinearA4Params& p, int arch, int processors, size_t most_shared,
                          Gemv asked) {
  if (p.block % 32 != 0 && p.block != p.in_features) {
    throw std::runtime_error("w2a4.linear_w" + std::to_string(p.weight_bits) +
                             "a4: group_size=" + std::to_string(p.group_size) +
                             " with activation groups of " + std::to_string(p.act_group) +
                             "; the CUDA kernels take multiples of 32 and whole rows");
  }
  if (regular(p)) {
    check_aligned(p.weight, "weight", 16);
    check_aligned(p.a_codes, "a_codes", 16);
  }
  if (p.levels) check_aligned(p.levels, "levels", 4);
  // Offsets within a block's rows, and groups, are counted in 32 bits.
  if (p.in_features > (1 << 26) || p.out_features * (p.in_features / p.group_size) > 0xffffffff) {
    throw std::runtime_error("w2a4: a weight of " + std::to_string(p.out_features) + " x " +
                             std::to_string(p.in_features) +
                             " is more than the CUDA kernels can index");
  }
  const bool whole_units = regular(p) && p.group_size % kUnit == 0;
  const int tokens = p.tokens <= 1 ? 1 : kBmmaTokens;
  const bool grouped = p.act_group != p.in_features;
  const size_t shared = bmma_shared(p, tokens, grouped);
  const bool can = p.weight_bits == 2 && whole_units && shared <= most_shared && scales_in_pairs(p);
  if (asked == Gemv::kBmma && !can) {
    throw std::runtime_error(
        "w2a4: W2A4_GEMV=bmma does not serve this call; it takes 2-bit weights in groups of 128 * "
        "2**i or rows of a multiple of 128, an even number of them, and one activation scale a "
        "token or groups of 128 * 2**i; use imma or auto");
  }
  GemvPlan plan{};
  plan.bmma = asked == Gemv::kBmma ||
              (asked == Gemv::kAuto && can && p.tokens <= kBmmaTokens && has_bmma(arch));
  plan.grouped = grouped;
  plan.tokens = plan.bmma ? tokens : Imma<2, 1, 1, false>::kTokens;
  plan.subs = !regular(p)                 ? 0
              : p.group_size % kUnit == 0 ? 1
                                          : static_cast<int>(kUnit / p.group_size);
  const auto sixteens = static_cast<unsigned>((p.out_features + 15) / 16);
  if (plan.bmma) {
    // Each block has 1 KB that is not its own.
    const auto fit = static_cast<unsigned>((most_shared + 1024) / (shared + 1024));
    const unsigned resident = fit < 3 ? fit : tokens == 1 ? 3 : 2;
    plan.blocks_x = balanced(sixteens, processors * resident);
  } else {
    // Tiles of 32 rows do more with an activation that they load. For 2-bit weights idle
    // multiprocessors cost more than that, and before Hopper two blocks of them would not fit.
    const unsigned most = kImmaBlocks * processors;
    const bool few = p.weight_bits == 2 && (sixteens <= most || arch < 90) && !grouped;
    plan.halves = plan.subs > 1 || (plan.subs == 1 && few) ? 1 : 2;
    plan.blocks_x = balanced((sixteens + plan.halves - 1) / plan.halves, most);
  }
  const int64_t blocks = (p.tokens + plan.tokens - 1) / plan.tokens;
  plan.blocks_y = static_cast<unsigned>(blocks < kMostBlocksY ? blocks : kMostBlocksY);
  plan.blocks_z = static_cast<unsigned>((blocks + kMostBlocksY - 1) / kMostBlocksY);
  return plan;
}

using GemvKernel = void (*)(LinearA4Params);

template <int kTokens, bool kGrouped, class Run>
void with_bmma(const LinearA4Params& p, Run&& run) {
  run(std::integral_constant<GemvKernel, gemv_bmma_kernel<kTokens, kGrouped>>{}, "gemv_bmma",
      Bmma<kTokens, kGrouped>::shared_bytes(p.in_features));
}

template <int kBits, int kSubs, int kHalves, bool kGrouped, class Run>
void with_variant(Run&& run) {
  run(std::integral_constant<GemvKernel, gemv_imma_kernel<kBits, kSubs, kHalves, kGrouped>>{},
      "gemv_imma", size_t{Imma<kBits, kSubs, kHalves, kGrouped>::kSharedBytes});
}

template <int kBits, class Run>
void with_imma(const GemvPlan& plan, Run&& run) {
  switch (plan.subs) {
    case 0:
      return with_variant<kBits, 0, 2, false>(run);
    case 1:
      if (plan.grouped) return with_variant<kBits, 1, 2, true>(run);
      if constexpr (kBits == 2)
        if (plan.halves == 1) return with_variant<kBits, 1, 1, false>(run);
      return with_variant<kBits, 1, 2, false>(run);
    case 2:
      return with_variant<kBits, 2, 1, false>(run);
    default:
      return with_variant<kBits, 4, 1, false>(run);
  }
}

// Calls run(kernel, name, bytes of shared memory), kernel a std::integral_constant of the function.
template <class Run>
void with_gemv_kernel(const LinearA4Params& p, const GemvPlan& plan, Run&& run) {
  if (plan.bmma && plan.tokens == 1)
    return plan.grouped ? with_bmma<1, true>(p, run) : with_bmma<1, false>(p, run);
  if (plan.bmma)
    return plan.grouped ? with_bmma<kBmmaTokens, true>(p, run)
                        : with_bmma<kBmmaTokens, false>(p, run);
  p.weight_bits == 2 ? with_imma<2>(plan, run) : with_imma<4>(plan, run);
}

}  // namespace w2a4::cuda
