// GEMV on int8 tensor cores, for up to eight tokens: the levels of a group are the four bytes of a
// register, `prmt` looks codes up in it four at a time, and mma sums products of signed bytes.
//
// The order of inputs within a unit is the same for weights and activations, so it is free: lane
// (g, q) = (lane / 4, lane % 4) takes inputs 32q .. 32q + 31 of a unit, 8 to an mma, the even ones
// before the odd ones, as they come out of packed codes. Activations, and 4-bit weights, stay in
// the upper half of a byte, 16 times their value, which saves the sign extension.
#pragma once

#include "gemv.cuh"

namespace w2a4::cuda {

// kBits: of a weight. kSubs: groups in a unit, 1, 2 or 4, for groups of 128 * 2**i, 64 and 32
// inputs and one activation scale a token; 0 is any other shape: a unit then is a piece of one
// block, loaded byte by byte. kHalves: of 16 rows each, in a tile; one if there are few rows, or
// many groups. kGrouped, for kSubs 1: a token has an activation scale for every act_group inputs,
// whole units, and not one.
template <int kBits, int kSubs, int kHalves, bool kGrouped>
struct Imma {
  static_assert(!kGrouped || kSubs == 1, "a unit has one activation scale");
  static constexpr bool kAny = kSubs == 0;
  static constexpr int kRows = 16 * kHalves;  // of a tile
  static constexpr int kTokens = 8;
  static constexpr int kRowBytes = 64;  // of a stage
  static constexpr int kUnits = kRowBytes * 8 / kBits / kUnit;
  static constexpr int kUnitBytes = kRowBytes / kUnits;
  static constexpr int kTokenBytes = kUnits * kUnit / 2;
  static constexpr int kGroups = kAny ? 1 : kSubs;  // in a unit
  static constexpr int kEntries = kUnits * kGroups;
  static constexpr int kStages = 3;
  // With two units a stage, sums over even and over odd units are kept apart, see gemv.cuh.
  static constexpr int kParities = kUnits;
  // A product is 16 times too large for each operand in the upper half of a byte.
  static constexpr float kUnshift = kBits == 2 ? 1.0f / 16 : 1.0f / 256;

  // Shared memory of a warp, from its start on.
  static constexpr int kActivations = kRows * kRowBytes;  // of a slot, after its weights
  static constexpr int kSlotBytes = kActivations + kTokens * kTokenBytes;
  static constexpr int kLastSlot = (kStages - 1) * kSlotBytes;
  static constexpr int kTable = kStages * kSlotBytes;
  // [2, kEntries, kRows]: four levels, and the scale as a float
  static constexpr int kWarpBytes = kTable + 2 * kEntries * kRows * 8;
  // Then, of the block, the warps' sums of a tile [2, kWarps, kTokens, kRows].
  static constexpr int kSums = kWarps * kWarpBytes;
  static constexpr int kSumBytes = kTokens * kRows * 4;  // of a warp
  static constexpr int kSharedBytes = kSums + 2 * kWarps * kSumBytes;

  static constexpr int kSteps = kUnitsInChunk / kUnits;           // stages of a chunk
  static constexpr int kChunkBytes = kSteps * kRowBytes;          // of a row
  static constexpr int kTokenLanes = kTokenBytes / 16;            // that load one token
  static constexpr int kTokenLoads = kTokens * kTokenLanes / 32;  // of a lane

  // A stage: its tile of rows, its first unit, and what this lane loads of it: 16 bytes of rows
  // lane / 4 + 8 * i and of tokens lane / kTokenLanes + ..., from here on. last_row is of the tile;
  // rows beyond are read as that one.
  struct Stage {
    uint32_t tile, unit;
    const uint8_t *weights, *activations;
    uint32_t last_row;
  };

  const LinearA4Params& p;
  unsigned char* shared;  // of this warp
  int lane, g, q, warp;
  uint32_t units;      // of a row
  int units_in_block;  // kAny
  Stage next;          // to be loaded
  uint32_t row_bytes, token_bytes;
  uint32_t last_token;  // of the block; tokens beyond are read as this one
  int shift;            // input >> shift is its group
  U32x2 entries[kEntries];
  float acc[kHalves][kParities][4];

  W2A4_DEVICE explicit Imma(const LinearA4Params& p)
      : p(p),
        shared(shared_memory() + threadIdx.x / 32 * kWarpBytes),
        lane(threadIdx.x % 32),
        g(lane / 4),
        q(lane % 4),
        warp(threadIdx.x / 32),
        units_in_block(kAny ? static_cast<int>((p.block + kUnit - 1) / kUnit) : 0),
        shift(kAny ? 0 : input_shift(p)) {
    units = static_cast<uint32_t>(kAny ? p.in_features / p.block * units_in_block
                                       : (p.in_features + kUnit - 1) / kUnit);
    last_token = static_cast<uint32_t>(clamp_token(first_token() + kTokens - 1) -
                                       clamp_token(first_token()));
    row_bytes = static_cast<uint32_t>(p.in_features * kBits / 8);
    token_bytes = static_cast<uint32_t>(p.in_features / 2);
    next = start_of(first_unit() < units ? blockIdx.x : tiles());
  }

  // kAny: the first input of a unit, and how many it has.
  W2A4_DEVICE int64_t unit_start(uint32_t unit) const {
    return int64_t{unit} / units_in_block * p.block + int64_t{unit} % units_in_block * kUnit;
  }
  W2A4_DEVICE int unit_length(uint32_t unit) const {
    const int64_t rest = p.block - int64_t{unit} % units_in_block * kUnit;
    return rest < kUnit ? static_cast<int>(rest) : kUnit;
  }

  // Not kept, for want of registers.
  W2A4_DEVICE uint32_t tiles() const {
    return static_cast<uint32_t>((p.out_features + kRows - 1) / kRows);
  }
  W2A4_DEVICE uint32_t first_unit() const { return warp * kUnitsInChunk; }
  W2A4_DEVICE static int64_t first_token() {
    return (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * kTokens;
  }
  W2A4_DEVICE static uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }
  // Rows and tokens beyond the last are read as the last, and not written.
  W2A4_DEVICE uint32_t clamp_row(uint32_t row) const {
    return least(row, static_cast<uint32_t>(p.out_features - 1));
  }
  W2A4_DEVICE int64_t clamp_token(int64_t token) const {
    return token < p.tokens ? token : p.tokens - 1;
  }

  // Rows 64 bytes apart would meet in the same banks: every other pair of rows swaps its halves.
  W2A4_DEVICE static int weight_offset(int row, int byte) {
    return row * kRowBytes + (byte ^ (row >> 1 & 1) * 32);
  }
  // The same for tokens 128 bytes apart.
  W2A4_DEVICE static int activation_offset(int token, int byte) {
    return token * kTokenBytes + (kTokenBytes == 128 ? byte ^ (token & 1) * 64 : byte);
  }

  // ---- loading

  // The warp's stage after the one from `unit` on: the next of its chunk, or the first of the chunk
  // that is kWarps further.
  W2A4_DEVICE static bool ends_chunk(uint32_t unit) {
    return unit % kUnitsInChunk == kUnitsInChunk - kUnits;
  }
  W2A4_DEVICE static uint32_t unit_after(uint32_t unit) {
    return unit + kUnits + (ends_chunk(unit) ? (kWarps - 1) * kUnitsInChunk : 0);
  }

  // The first stage of a tile.
  W2A4_DEVICE Stage start_of(uint32_t tile) const {
    const int weight_byte = warp * kChunkBytes + lane % 4 * 16,
              activation_byte = warp * kSteps * kTokenBytes + lane % kTokenLanes * 16;
    return {tile, first_unit(), row_of(p.weight, tile * kRows, row_bytes) + weight_byte,
            p.a_codes + clamp_token(first_token()) * token_bytes + activation_byte,
            clamp_row(tile * kRows + kRows - 1) - tile * kRows};
  }

  // The one after it: this warp's next one of the tile, or the first of the block's next tile.
  W2A4_DEVICE void move_on(Stage& stage) const {
    const int chunks = ends_chunk(stage.unit) ? kWarps - 1 : 0;  // passed over
    stage.weights += kRowBytes + chunks * kChunkBytes;
    stage.activations += kTokenBytes + chunks * kSteps * kTokenBytes;
    stage.unit = unit_after(stage.unit);
    if (stage.unit >= units) stage = start_of(stage.tile + gridDim.x);
  }

  W2A4_DEVICE bool exists(const Stage& stage) const { return stage.tile < tiles(); }

  W2A4_DEVICE int inputs_left(const Stage& stage) const {
    return static_cast<int>(p.in_features) - static_cast<int>(stage.unit * kUnit);
  }

  // Past the row's end nothing is read, and activations are 0, so that it does not matter what the
  // weights are.
  W2A4_DEVICE void load_weights(const Stage& stage, unsigned char* slot) const {
    if (!exists(stage)) return;
    if constexpr (kAny) {
      copy_weights(stage, slot);
    } else {
      W2A4_UNROLL
      for (int i = 0; i < kRows / 8; ++i)
        cp_async_16(slot + weight_offset(lane / 4 + 8 * i, lane % 4 * 16),
                    row_of(stage.weights, least(lane / 4 + 8 * i, stage.last_row), row_bytes),
                    inputs_left(stage) > lane % 4 * (128 / kBits) ? 16 : 0);
    }
  }

  W2A4_DEVICE void load_activations(const Stage& stage, unsigned char* slot) const {
    if (!exists(stage)) return;
    if constexpr (kAny) {
      copy_activations(stage, slot);
    } else {
      W2A4_UNROLL
      for (int i = 0; i < kTokenLoads; ++i)
        cp_async_16(
            slot + kActivations +
                activation_offset(lane / kTokenLanes + i * 32 / kTokenLanes,
                                  lane % kTokenLanes * 16),
            row_of(stage.activations, least(lane / kTokenLanes + i * 32 / kTokenLanes, last_token),
                   token_bytes),
            inputs_left(stage) > lane % kTokenLanes * 32 ? 16 : 0);
    }
  }

  W2A4_DEVICE void copy_weights(const Stage& stage, unsigned char* slot) const {
    const int64_t row_bytes = (p.in_features * kBits + 7) / 8;
    for (int u = 0; u < kUnits; ++u) {
      const uint32_t unit = stage.unit + u;
      const int64_t start = unit_start(unit) * kBits / 8;
      const int bits = unit < units ? unit_length(unit) * kBits : 0;
      for (int i = lane; i < kRows * kUnitBytes; i += 32) {
        const int row = i / kUnitBytes, byte = i % kUnitBytes;
        slot[weight_offset(row, u * kUnitBytes + byte)] =
            byte * 8 < bits
                ? p.weight[clamp_row(stage.tile * kRows + row) * row_bytes + start + byte]
                : 0;
      }
    }
  }

  W2A4_DEVICE void copy_activations(const Stage& stage, unsigned char* slot) const {
    const int64_t token_bytes = (p.in_features + 1) / 2;
    for (int u = 0; u < kUnits; ++u) {
      const uint32_t unit = stage.unit + u;
      const int64_t start = unit_start(unit) / 2;
      const int length = unit < units ? unit_length(unit) : 0;
      for (int i = lane; i < kTokens * kUnit / 2; i += 32) {
        const int token = i / (kUnit / 2), byte = i % (kUnit / 2), rest = length - 2 * byte;
        const int64_t at = clamp_token(first_token() + token) * token_bytes + start + byte;
        slot[kActivations + activation_offset(token, u * kUnit / 2 + byte)] =
            rest >= 2   ? p.a_codes[at]
            : rest == 1 ? p.a_codes[at] & 15
                        : 0;
      }
    }
  }

  // Levels and scales of the groups of a stage, of the tile's row `lane`.
  W2A4_DEVICE void load_entries(uint32_t tile, uint32_t first_unit) {
    const uint32_t first_group = clamp_row(tile * kRows + lane % kRows) * groups();
    W2A4_UNROLL
    for (int e = 0; e < kEntries; ++e) {
      const uint32_t unit = first_unit + e / kGroups;
      uint32_t group;
      bool there;
      if constexpr (kAny) {
        there = unit < units;
        group = first_group + static_cast<uint32_t>(unit_start(unit) / p.group_size);
      } else {
        const uint32_t input = unit * kUnit + e % kGroups * (kUnit / kGroups);
        there = input < static_cast<uint32_t>(p.in_features);
        group = first_group + (input >> shift);
      }
      entries[e].x = there && kBits == 2 ? load_u32(p.levels + 4 * size_t{group}) : 0;
      entries[e].y = there ? load_u16(p.scale + group) : 0;
    }
  }

  W2A4_DEVICE uint32_t groups() const {  // of a row
    if constexpr (kAny) return static_cast<uint32_t>(p.in_features / p.group_size);
    return shift == 31 ? 1 : static_cast<uint32_t>(p.in_features) >> shift;
  }

  W2A4_DEVICE void store_entries(U32x2* table) {
    if (lane >= kRows) return;
    W2A4_UNROLL
    for (int e = 0; e < kEntries; ++e) {
      const float scale = mul_rn(float_from_half(static_cast<uint16_t>(entries[e].y)), kUnshift);
      table[e * kRows + lane] = {entries[e].x, as_bits(scale)};
    }
  }

  // ---- computing

  // Operands of the four mma of a unit: a[mma][register] for rows g and g + 8 of a half.
  W2A4_DEVICE void decode(const unsigned char* weights, const U32x2* levels, int unit, int half,
                          uint32_t (&a)[4][4]) const {
    W2A4_UNROLL
    for (int eight = 0; eight < 2; ++eight) {
      const int row = half * 16 + eight * 8 + g;
      const unsigned char* at =
          weights + weight_offset(row, unit * kUnitBytes + q * (kUnitBytes / 4));
      if constexpr (kBits == 2) {
        const U32x2 codes = read_u32x2(at);
        const uint32_t table = levels[(unit * kGroups + q * kGroups / 4) * kRows + row].x;
        W2A4_UNROLL
        for (int word = 0; word < 2; ++word) {
          const uint32_t x = word ? codes.y : codes.x;
          const uint32_t even = x & 0x33333333, odd = x >> 2 & 0x33333333;
          a[2 * word][eight] = prmt(table, table, even);
          a[2 * word][2 + eight] = prmt(table, table, odd);
          a[2 * word + 1][eight] = prmt(table, table, even >> 16);
          a[2 * word + 1][2 + eight] = prmt(table, table, odd >> 16);
        }
      } else {
        const U32x4 codes = read_u32x4(at);
        const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
        W2A4_UNROLL
        for (int word = 0; word < 4; ++word) {
          a[word][eight] = words[word] << 4 & 0xf0f0f0f0;
          a[word][2 + eight] = words[word] & 0xf0f0f0f0;
        }
      }
    }
  }

  // Activation scales of tokens 2q, 2q + 1 in a unit, where a token has several.
  W2A4_DEVICE void load_act_scales(uint32_t unit, float (&act_scales)[2]) const {
    if constexpr (kAny || kGrouped) {
      W2A4_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int64_t token = clamp_token(first_token() + 2 * q + i);
        act_scales[i] = 0.0f;
        if (unit >= units) continue;
        if constexpr (kGrouped) {
          const int act_shift = act_input_shift(p) - 7;
          act_scales[i] = p.a_scale[token * (units >> act_shift) + (unit >> act_shift)];
        } else {
          act_scales[i] =
              p.a_scale[token * (p.in_features / p.act_group) + unit_start(unit) / p.act_group];
        }
      }
    }
  }

  // acc += scale * sums, of rows g, g + 8 and tokens 2q, 2q + 1.
  W2A4_DEVICE void add_sums(const int32_t (&sums)[4], const U32x2* levels,
                            const float (&act_scales)[2], int unit, int sub, int half,
                            float (&to)[4]) const {
    W2A4_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = half * 16 + i / 2 * 8 + g;
      float scale = as_float(levels[(unit * kGroups + sub) * kRows + row].y);
      if constexpr (kAny || kGrouped) scale = mul_rn(scale, act_scales[i % 2]);
      to[i] = fma_rn(exact_float(sums[i]), scale, to[i]);
    }
  }

  W2A4_DEVICE void compute(uint32_t first_unit, const unsigned char* slot, const U32x2* levels) {
    W2A4_UNROLL
    for (int unit = 0; unit < kUnits; ++unit) {
      float act_scales[2];
      load_act_scales(first_unit + unit, act_scales);
      const U32x4 x =
          read_u32x4(slot + kActivations + activation_offset(g, unit * kUnit / 2 + q * 16));
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
      uint32_t b[4][2];
      W2A4_UNROLL
      for (int i = 0; i < 4; ++i) {
        b[i][0] = words[i] << 4 & 0xf0f0f0f0;
        b[i][1] = words[i] & 0xf0f0f0f0;
      }
      W2A4_UNROLL
      for (int half = 0; half < kHalves; ++half) {
        uint32_t a[4][4];
        decode(slot, levels, unit, half, a);
        W2A4_UNROLL
        for (int sub = 0; sub < kGroups; ++sub) {
          // Inputs of the other groups are left out by taking their activations as 0.
          const uint32_t mine = q * kGroups / 4 == sub ? 0xffffffffu : 0;
          int32_t sums[4] = {kMagic, kMagic, kMagic, kMagic};
          W2A4_UNROLL
          for (int i = 0; i < 4; ++i) {
            const uint32_t masked[2] = {kGroups == 1 ? b[i][0] : b[i][0] & mine,
                                        kGroups == 1 ? b[i][1] : b[i][1] & mine};
            mma_s8_16x8x32(sums, a[i], masked, sums);
          }
          add_sums(sums, levels, act_scales, unit, sub, half, acc[half][unit % kParities]);
        }
      }
    }
  }

  W2A4_DEVICE void clear_sums() {
    W2A4_UNROLL
    for (int half = 0; half < kHalves; ++half) W2A4_UNROLL
    for (int parity = 0; parity < kParities; ++parity) W2A4_UNROLL
    for (int i = 0; i < 4; ++i) acc[half][parity][i] = 0.0f;
  }

  W2A4_DEVICE void store_sums(float* sums) const {
    W2A4_UNROLL
    for (int half = 0; half < kHalves; ++half) W2A4_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = half * 16 + i / 2 * 8 + g, token = 2 * q + i % 2;
      float sum = acc[half][0][i];
      if (kParities == 2) sum = add_rn(sum, acc[half][kParities - 1][i]);
      sums[token * kRows + row] = sum;
    }
  }

  W2A4_DEVICE void run() {
    // A ring of slots: while one is computed, the others are on their way. Weights need not wait
    // for the kernel before this one.
    Stage stage = next;
    W2A4_UNROLL
    for (int i = 0; i < kStages - 1; ++i) {
      load_weights(stage, shared + i * kSlotBytes);
      move_on(stage);
    }
    if (exists(next)) load_entries(next.tile, next.unit);
    wait_for_previous_kernel();
    W2A4_UNROLL
    for (int i = 0; i < kStages - 1; ++i) {
      load_activations(next, shared + i * kSlotBytes);
      cp_async_commit();
      move_on(next);
    }
    uint32_t slot = 0, table_slot = 0;
    // Sums of two tiles in a row lie apart, so that one barrier a tile is enough: who comes to the
    // next one has read those of the tile before.
    unsigned char* sums = shared_memory() + kSums;
    int other_sums = kWarps * kSumBytes;
    W2A4_NO_UNROLL
    for (uint32_t tile = blockIdx.x; tile < tiles(); tile += gridDim.x) {
      clear_sums();
      W2A4_NO_UNROLL
      for (uint32_t unit = first_unit(); unit < units;) {
        U32x2* levels = reinterpret_cast<U32x2*>(shared + kTable + table_slot);
        cp_async_wait<kStages - 2>();
        store_entries(levels);
        sync_warp();  // everyone's part of this stage is there, and the slot before it is free
        const uint32_t following = unit_after(unit);
        const bool last = following >= units;
        if (!last || tile + gridDim.x < tiles())
          load_entries(last ? tile + gridDim.x : tile, last ? first_unit() : following);
        unsigned char* free = shared + (slot ? slot - kSlotBytes : kLastSlot);
        load_weights(next, free);
        load_activations(next, free);
        cp_async_commit();
        move_on(next);
        compute(unit, shared + slot, levels);
        slot = slot < kLastSlot ? slot + kSlotBytes : 0;
        table_slot ^= kEntries * kRows * 8;
        unit = following;
      }
      store_sums(reinterpret_cast<float*>(sums + warp * kSumBytes));
      sync_block();
      finish_rows<kRows, kTokens, !kAny && !kGrouped>(p, sums, kSumBytes, int64_t{tile} * kRows,
                                                      first_token(), threadIdx.x, kThreads);
      sums += other_sums;
      other_sums = -other_sums;
    }
  }
};

template <int kBits, int kSubs, int kHalves, bool kGrouped>
__global__ void __launch_bounds__(kThreads, kSubs == 1 ? 2 : 1)
    gemv_imma_kernel(const __grid_constant__ LinearA4Params p) {
  Imma<kBits, kSubs, kHalves, kGrouped>(p).run();
}

}  // namespace w2a4::cuda
