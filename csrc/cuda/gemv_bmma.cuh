// GEMV on binary tensor cores, for one or two tokens and groups of a multiple of 128 inputs.
//
// With n(i) the number of inputs of a unit that have code i and bit p of their activation set, the
// unit's sum is that over planes p of (1, 2, 4, -8)[p] * sum over i of level[i] * n(i). The tensor
// core counts: rows of A are the weights' low bits, high bits, and both; columns of B are the four
// bit-planes of a token, once for an even unit and once for the odd one after it, zero elsewhere.
// Counts become bytes of one register, and dp4a multiplies them by the levels.
//
// Inputs lie in an mma in the order that makes bit-planes of packed codes cheapest: lane (g, q) =
// (lane / 4, lane % 4) takes 64 inputs from 64q on, in two words of 32; bit 2i of a plane is input
// i of its word, bit 2i + 1 is input 16 + i.
#pragma once

#include "gemv.cuh"

namespace w2a4::cuda {

// Bits 0 and bits 1 of the 2-bit fields of a word of 32 inputs.
W2A4_DEVICE void split_planes(uint32_t first16, uint32_t last16, uint32_t& low, uint32_t& high) {
  low = select_bits(0x55555555, first16, last16 << 1);
  high = select_bits(0x55555555, first16 >> 1, last16);
}

// The lower two bits of 16 packed nibbles, as 16 fields of two bits.
W2A4_DEVICE uint32_t gather_pairs(uint32_t first8, uint32_t last8) {
  first8 &= 0x33333333, last8 &= 0x33333333;
  first8 = (first8 | first8 >> 2) & 0x0f0f0f0f, last8 = (last8 | last8 >> 2) & 0x0f0f0f0f;
  return prmt(first8 | first8 >> 4, last8 | last8 >> 4, 0x6420);
}

// The four bit-planes of 32 packed activations.
W2A4_DEVICE void activation_planes(const U32x4& x, uint32_t (&planes)[4]) {
  split_planes(gather_pairs(x.x, x.y), gather_pairs(x.z, x.w), planes[0], planes[1]);
  split_planes(gather_pairs(x.x >> 2, x.y >> 2), gather_pairs(x.z >> 2, x.w >> 2), planes[2],
               planes[3]);
}

// kGrouped: a token has an activation scale for every act_group inputs, whole units, and not one.
template <int kTokens, bool kGrouped>
struct Bmma {
  static constexpr int kRows = 16;       // of a tile
  static constexpr int kRowBytes = 128;  // of a stage, which is a chunk
  static constexpr int kStages = 3;
  static constexpr int kSteps = 2;  // of 256 inputs, two units, in a stage

  // A slot of the ring: weights [kRows, 128], then for each unit and row the four levels, and the
  // two scales next to each other of which one is the unit's.
  static constexpr int kLevels = kRows * kRowBytes;
  static constexpr int kScales = kLevels + kUnitsInChunk * kRows * 4;
  static constexpr int kSlotBytes = kScales + kUnitsInChunk * kRows * 4;
  static constexpr int kLastSlot = (kStages - 1) * kSlotBytes;
  // Shared memory of the block: a ring a warp; the warps' sums of a tile [2, kWarps, kTokens,
  // kRows]; bit-planes [chunks, kTokens, step, q, plane, 2]; counts of set bits [chunks, kTokens,
  // unit, plane]; activation scales [chunks, kTokens, unit], if they are grouped; and zeros for the
  // lanes whose columns are another unit's.
  static constexpr int kSums = kWarps * kStages * kSlotBytes;
  static constexpr int kSumBytes = kTokens * kRows * 4;  // of a warp
  static constexpr int kPlanes = kSums + 2 * kWarps * kSumBytes;
  // Of a chunk and token.
  static constexpr int kPlaneBytes = 256, kCountBytes = 64, kActScaleBytes = kGrouped ? 16 : 0;

  W2A4_HOST static size_t shared_bytes(int64_t in_features) {
    const int64_t chunks = (in_features + kUnit * kUnitsInChunk - 1) / (kUnit * kUnitsInChunk);
    return static_cast<size_t>(
        kPlanes + (chunks * (kPlaneBytes + kCountBytes + kActScaleBytes) + kPlaneBytes) * kTokens);
  }

  const LinearA4Params& p;
  unsigned char *ring, *planes, *counts, *act_scales;  // the ring is this warp's
  int64_t first_token;
  int lane, g, q, warp;
  uint32_t units, chunks, tiles;
  uint32_t groups;  // of a row
  int group_shift;  // unit >> group_shift is its group
  // The stage that is loaded next: its tile, the unit whose levels and scales this lane loads, of
  // rows lane / 4 and lane / 4 + 8, whose first groups are these, and the weights that it loads of
  // them: 64 bytes apart; weights_left bytes of the row are still to come.
  uint32_t next_tile, next_unit;
  uint32_t first_group[2];
  const uint8_t* weights[2];
  int weights_left;
  float acc[kTokens];  // of row g + 8 * (q % 2), units of parity q / 2

  W2A4_DEVICE explicit Bmma(const LinearA4Params& p)
      : p(p),
        ring(shared_memory() + threadIdx.x / 32 * kStages * kSlotBytes),
        planes(shared_memory() + kPlanes),
        first_token((int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * kTokens),
        lane(threadIdx.x % 32),
        g(lane / 4),
        q(lane % 4),
        warp(threadIdx.x / 32),
        units(static_cast<uint32_t>(p.in_features / kUnit)),
        chunks((units + kUnitsInChunk - 1) / kUnitsInChunk),
        tiles(static_cast<uint32_t>((p.out_features + kRows - 1) / kRows)),
        group_shift(unit_shift(p)) {
    groups = group_shift == 31 ? 1 : units >> group_shift;
    counts = planes + chunks * kTokens * kPlaneBytes;
    act_scales = counts + chunks * kTokens * kCountBytes;
    start_tile(static_cast<uint32_t>(warp) < chunks ? blockIdx.x : tiles);
  }

  // Rows 128 bytes apart would meet in the same banks: odd rows swap their halves.
  W2A4_DEVICE static int weight_offset(int row, int byte) {
    return row * kRowBytes + (byte ^ (row & 1) * 64);
  }

  // ---- loading: this warp's chunks of the block's tiles, one after another, as if they were one
  // row, so that a tile's first weights are on their way before the one before it is done

  W2A4_DEVICE void start_tile(uint32_t tile) {
    next_tile = tile;
    next_unit = warp * kUnitsInChunk + lane % 4;
    const int row_bytes = static_cast<int>(p.in_features / 4);
    const int first_byte = warp * kRowBytes + lane % 4 * 16;
    const uint32_t last_row = static_cast<uint32_t>(p.out_features - 1);
    W2A4_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32_t wanted = tile * kRows + lane / 4 + 8 * i;
      const uint32_t row = wanted < last_row ? wanted : last_row;
      weights[i] = row_of(p.weight, row, row_bytes) + first_byte;
      first_group[i] = row * groups;
    }
    weights_left = row_bytes - first_byte;
  }

  W2A4_DEVICE void load_stage(unsigned char* slot) {
    if (next_tile >= tiles) return;
    W2A4_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, byte = lane % 4 * 16 + i % 2 * 64;
      cp_async_16(slot + weight_offset(row, byte), weights[i / 2] + i % 2 * 64,
                  weights_left > i % 2 * 64 ? 16 : 0);
    }
    const bool there = next_unit < units;
    W2A4_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32_t group = first_group[i] + (there ? next_unit >> group_shift : 0);
      const int at = (lane % 4 * kRows + lane / 4 + 8 * i) * 4;
      cp_async_4(slot + kLevels + at, row_of(levels(), group, 4), there ? 4 : 0);
      cp_async_4(slot + kScales + at, row_of(scales(), group / 2, 4), there ? 4 : 0);
    }
    W2A4_UNROLL
    for (int i = 0; i < 2; ++i) weights[i] += kWarps * kRowBytes;
    weights_left -= kWarps * kRowBytes;
    next_unit += kWarps * kUnitsInChunk;
    if (next_unit - lane % 4 >= units) start_tile(next_tile + gridDim.x);
  }

  W2A4_DEVICE const uint8_t* levels() const { return reinterpret_cast<const uint8_t*>(p.levels); }
  W2A4_DEVICE const uint8_t* scales() const { return reinterpret_cast<const uint8_t*>(p.scale); }

  // Bit-planes of this warp's chunks, and how many bits are set in each unit of them. Four lanes in
  // a row take the four words of a unit.
  W2A4_DEVICE void make_planes() {
    const int mine = (static_cast<int>(chunks) - warp + kWarps - 1) / kWarps;
    for (int first = 0; first < mine * kTokens * 16; first += 32) {
      const int i = first + lane, word = i % 16, token = i / 16 % kTokens,
                chunk = warp + i / 16 / kTokens * kWarps;
      const int64_t input = (int64_t{chunk} * 16 + word) * 32;
      const bool there =
          i < mine * kTokens * 16 && first_token + token < p.tokens && input < p.in_features;
      U32x4 x = {0, 0, 0, 0};
      if (there)
        x = load_u32x4(p.a_codes + (first_token + token) * (p.in_features / 2) + input / 2);
      uint32_t bits[4], set = 0;
      activation_planes(x, bits);
      W2A4_UNROLL
      for (int plane = 0; plane < 4; ++plane) set |= popc(bits[plane]) << 8 * plane;
      set += shfl_xor(set, 1);  // at most 128 in each byte
      set += shfl_xor(set, 2);
      if (i >= mine * kTokens * 16) continue;
      // The words of a lane (step, q) are two, next to each other for each plane.
      uint32_t* to = reinterpret_cast<uint32_t*>(planes + (chunk * kTokens + token) * kPlaneBytes);
      W2A4_UNROLL
      for (int plane = 0; plane < 4; ++plane)
        to[(word / 2 * 4 + plane) * 2 + word % 2] = bits[plane];
      if (word % 4) continue;
      int32_t* count = reinterpret_cast<int32_t*>(counts + (chunk * kTokens + token) * kCountBytes);
      W2A4_UNROLL
      for (int plane = 0; plane < 4; ++plane) count[word / 4 * 4 + plane] = set >> 8 * plane & 255;
      if constexpr (kGrouped) {
        float* scale =
            reinterpret_cast<float*>(act_scales + (chunk * kTokens + token) * kActScaleBytes);
        const int64_t group =
            (first_token + token) * (p.in_features / p.act_group) + (input >> act_input_shift(p));
        scale[word / 4] = there ? p.a_scale[group] : 0.0f;
      }
    }
  }

  // ---- computing

  // Sum of this lane's two planes for one row: the numbers of set activation bits under low weight
  // bits, high ones, and both, and under any, become those under each code.
  W2A4_DEVICE int32_t sum_planes(const int32_t (&low)[4], const int32_t (&high)[4],
                                 const int32_t (&both)[4], const U32x2& any, uint32_t levels,
                                 int half, int32_t weight0, int32_t weight1) const {
    // Bytes any - low - high + both, low - both, high - both, both.
    const auto bytes = [&](int column, uint32_t all) {
      return all + static_cast<uint32_t>(low[2 * half + column]) * 0xffu +
             static_cast<uint32_t>(high[2 * half + column]) * 0xffffu +
             static_cast<uint32_t>(both[2 * half + column]) * 0x00feff01u;
    };
    const int32_t first = dp4a_s8_u8(levels, bytes(0, any.x), 0);
    const int32_t second = dp4a_s8_u8(levels, bytes(1, any.y), 0);
    return first * weight0 + second * weight1;
  }

  // `bits` and `any` are this lane's planes and counts of the chunk that starts at `first_unit`,
  // `act_scale` are the chunk's, `slot` is the stage's.
  W2A4_DEVICE void compute_step(const unsigned char* slot, const unsigned char* bits,
                                const unsigned char* any, const unsigned char* act_scale,
                                uint32_t first_unit, int step) {
    uint32_t low[4], high[4], both[4];
    W2A4_UNROLL
    for (int half = 0; half < 2; ++half) {
      const U32x4 codes =
          read_u32x4(slot + weight_offset(g, (step * 4 + q) * 16) + half * 8 * kRowBytes);
      split_planes(codes.x, codes.y, low[half], high[half]);
      split_planes(codes.z, codes.w, low[half + 2], high[half + 2]);
    }
    W2A4_UNROLL
    for (int i = 0; i < 4; ++i) both[i] = low[i] & high[i];

    // Of the two scales, that of this unit's group, which may be odd because its row's first is.
    const int unit = step * 2 + q / 2, entry = (unit * kRows + g) * 4;
    const uint32_t levels0 = read_u32(slot + kLevels + entry),
                   levels1 = read_u32(slot + kLevels + entry + 8 * 4),
                   pair = read_u32(slot + kScales + entry + (q & 1) * 8 * 4),
                   odd = ((first_unit + unit) >> group_shift ^ (g & groups)) & 1;
    const float scale = float_from_half(static_cast<uint16_t>(pair >> 16 * odd));
    const int32_t weight0 = q & 1 ? 4 : 1, weight1 = q & 1 ? -8 : 2;
    const int32_t zero[4] = {0, 0, 0, 0};
    W2A4_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const U32x2 word = read_u32x2(bits + t * kPlaneBytes + step * 128);
      const uint32_t b[2] = {word.x, word.y};
      int32_t n_low[4], n_high[4], n_both[4];
      mma_b1_16x8x256(n_low, low, b, zero);
      mma_b1_16x8x256(n_high, high, b, zero);
      mma_b1_16x8x256(n_both, both, b, zero);
      const U32x2 all = read_u32x2(any + t * kCountBytes + step * 32);
      const int32_t sum0 = sum_planes(n_low, n_high, n_both, all, levels0, 0, weight0, weight1);
      const int32_t sum1 = sum_planes(n_low, n_high, n_both, all, levels1, 1, weight0, weight1);
      // The even lane of a pair keeps row g, the odd one row g + 8.
      const int32_t keep = q & 1 ? sum1 : sum0, give = q & 1 ? sum0 : sum1;
      const int32_t got = static_cast<int32_t>(shfl_xor(static_cast<uint32_t>(give), 1));
      float factor = scale;
      if constexpr (kGrouped)
        factor = mul_rn(factor, as_float(read_u32(act_scale + t * kActScaleBytes + unit * 4)));
      acc[t] = fma_rn(exact_float(keep + got + kMagic), factor, acc[t]);
    }
  }

  W2A4_DEVICE void run() {
    const int stages = (static_cast<int>(chunks) - warp + kWarps - 1) / kWarps;  // of a tile
    // A ring of kStages slots: while one is computed, the others are on their way.
    W2A4_UNROLL
    for (int i = 0; i < kStages - 1; ++i) {
      load_stage(ring + i * kSlotBytes);
      cp_async_commit();
    }
    wait_for_previous_kernel();  // all so far were weights
    unsigned char* zeros = act_scales + chunks * kTokens * kActScaleBytes;
    for (int i = threadIdx.x; i < kTokens * kPlaneBytes / 4; i += kThreads)
      reinterpret_cast<uint32_t*>(zeros)[i] = 0;
    make_planes();
    sync_block();

    // Columns 0..3 of B are the even unit, which lanes with q < 2 hold; 4..7 the odd one.
    const bool mine = g / 4 == q / 2;
    const unsigned char* first_bits =
        mine ? planes + warp * kTokens * kPlaneBytes + (q * 4 + g % 4) * 8 : zeros;
    const int bits_step = mine ? kWarps * kTokens * kPlaneBytes : 0;
    const unsigned char* first_any = counts + warp * kTokens * kCountBytes + q / 2 * 16 + q % 2 * 8;
    uint32_t slot = 0;
    // The sums of two tiles in a row lie apart, so that one barrier a tile is enough: who comes to
    // the next one has read those of the tile before.
    unsigned char* sums = shared_memory() + kSums;
    int writer = 0, other_sums = kWarps * kSumBytes;
    W2A4_NO_UNROLL
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      W2A4_UNROLL
      for (int t = 0; t < kTokens; ++t) acc[t] = 0.0f;
      const unsigned char *bits = first_bits, *any = first_any,
                          *act_scale = act_scales + warp * kTokens * kActScaleBytes;
      uint32_t unit = warp * kUnitsInChunk;
      W2A4_NO_UNROLL
      for (int i = stages; i > 0; --i) {
        cp_async_wait<kStages - 2>();
        sync_warp();  // everyone's part of this stage is there, and the slot before it is free
        load_stage(ring + (slot ? slot - kSlotBytes : kLastSlot));
        cp_async_commit();
        W2A4_UNROLL
        for (int step = 0; step < kSteps; ++step)
          compute_step(ring + slot, bits, any, act_scale, unit, step);
        slot = slot < kLastSlot ? slot + kSlotBytes : 0;
        bits += bits_step;
        any += kWarps * kTokens * kCountBytes;
        act_scale += kWarps * kTokens * kActScaleBytes;
        unit += kWarps * kUnitsInChunk;
      }
      W2A4_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const float sum = add_rn(acc[t], shfl_xor(acc[t], 2));
        if (q < 2) reinterpret_cast<float*>(sums + warp * kSumBytes)[t * kRows + g + 8 * q] = sum;
      }
      sync_block();
      if (warp == writer)
        finish_rows<kRows, kTokens, !kGrouped>(p, sums, kSumBytes, int64_t{tile} * kRows,
                                               first_token, lane, 32);
      writer = (writer + 1) % kWarps;
      sums += other_sums;
      other_sums = -other_sums;
    }
  }
};

template <int kTokens, bool kGrouped>
__global__ void __launch_bounds__(kThreads, kTokens == 1 ? 3 : 2)
    gemv_bmma_kernel(const __grid_constant__ LinearA4Params p) {
  Bmma<kTokens, kGrouped>(p).run();
}

}  // namespace w2a4::cuda
