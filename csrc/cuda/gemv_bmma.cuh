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

template <int kTokens>
struct Bmma {
  static constexpr int kRows = 16;
  static constexpr int kRowBytes = 128;  // of a stage, which is a chunk
  static constexpr int kStages = 4;
  static constexpr int kSteps = 2;  // of 256 inputs, two units, in a stage

  // Shared memory of a warp, from its start on.
  static constexpr int kSlotBytes = kRows * kRowBytes;           // weights [kStages, kRows, 128]
  static constexpr int kTable = kStages * kSlotBytes;            // a power of two
  static constexpr int kTableBytes = kUnitsInChunk * kRows * 8;  // levels, and the scale as a float
  static constexpr int kWarpBytes = kTable + 2 * kTableBytes;
  // Then, of the block: bit-planes [chunks, kTokens, step, q, plane, 2], counts of set bits
  // [chunks, kTokens, unit, plane], and zeros for the lanes whose columns are another unit's.
  static constexpr int kPlanes = kWarps * kWarpBytes;
  static constexpr int kPlaneBytes = 256, kCountBytes = 64;  // of a chunk and token

  W2A4_HOST static size_t shared_bytes(int64_t in_features) {
    const int64_t chunks = (in_features + kUnit * kUnitsInChunk - 1) / (kUnit * kUnitsInChunk);
    return static_cast<size_t>(kPlanes +
                               (chunks * (kPlaneBytes + kCountBytes) + kPlaneBytes) * kTokens);
  }

  const LinearA4Params& p;
  unsigned char *shared, *planes, *counts;  // shared is this warp's
  int64_t first_row, first_token;
  int lane, g, q, warp;
  uint32_t units, chunks;
  int group_shift;  // unit >> group_shift is its group
  // What this lane loads next: 64 bytes apart, of rows lane / 4 and lane / 4 + 8; weights_left
  // bytes of the row are still to come. And the entries of row lane % 16, units entry_unit and + 2.
  const uint8_t* weights[2];
  int weights_left;
  uint32_t first_group;
  uint32_t entry_unit;
  U32x2 entries[kUnitsInChunk / 2];
  float acc[kTokens];  // of row g + 8 * (q % 2), units of parity q / 2

  W2A4_DEVICE explicit Bmma(const LinearA4Params& p)
      : p(p),
        shared(shared_memory() + threadIdx.x / 32 * kWarpBytes),
        planes(shared_memory() + kPlanes),
        first_row(int64_t{blockIdx.x} * kRows),
        first_token((int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * kTokens),
        lane(threadIdx.x % 32),
        g(lane / 4),
        q(lane % 4),
        warp(threadIdx.x / 32),
        units(static_cast<uint32_t>(p.in_features / kUnit)),
        chunks((units + kUnitsInChunk - 1) / kUnitsInChunk),
        group_shift(unit_shift(p)),
        entry_unit(warp * kUnitsInChunk + lane / kRows) {
    counts = planes + chunks * kTokens * kPlaneBytes;
    const int row_bytes = static_cast<int>(p.in_features / 4);
    const int first_byte = warp * kRowBytes + lane % 4 * 16;
    W2A4_UNROLL
    for (int i = 0; i < 2; ++i)
      weights[i] = p.weight + clamp_row(first_row + lane / 4 + 8 * i) * row_bytes + first_byte;
    weights_left = row_bytes - first_byte;
    first_group =
        static_cast<uint32_t>(clamp_row(first_row + lane % kRows) * (p.in_features / p.group_size));
    W2A4_UNROLL
    for (int t = 0; t < kTokens; ++t) acc[t] = 0.0f;
  }

  W2A4_DEVICE int64_t clamp_row(int64_t row) const {
    return row < p.out_features ? row : p.out_features - 1;
  }

  // Rows 128 bytes apart would meet in the same banks: odd rows swap their halves.
  W2A4_DEVICE static int weight_offset(int row, int byte) {
    return row * kRowBytes + (byte ^ (row & 1) * 64);
  }

  // ---- loading: the warp's next chunk; past its last one nothing is read

  W2A4_DEVICE void load_stage(unsigned char* slot) {
    W2A4_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, byte = lane % 4 * 16 + i % 2 * 64;
      cp_async_16(slot + weight_offset(row, byte), weights[i / 2] + i % 2 * 64,
                  weights_left > i % 2 * 64 ? 16 : 0);
    }
    W2A4_UNROLL
    for (int i = 0; i < 2; ++i) weights[i] += kWarps * kRowBytes;
    weights_left -= kWarps * kRowBytes;
  }

  W2A4_DEVICE void load_entries() {
    W2A4_UNROLL
    for (int e = 0; e < kUnitsInChunk / 2; ++e) {
      const uint32_t unit = entry_unit + 2 * e, group = first_group + (unit >> group_shift);
      entries[e].x = unit < units ? load_u32(p.levels + 4 * size_t{group}) : 0;
      entries[e].y = unit < units ? load_u16(p.scale + group) : 0;
    }
    entry_unit += kWarps * kUnitsInChunk;
  }

  W2A4_DEVICE void store_entries(unsigned char* table) {
    W2A4_UNROLL
    for (int e = 0; e < kUnitsInChunk / 2; ++e)
      store_u32x2(table + (e * 32 + lane) * 8,
                  {entries[e].x, as_bits(float_from_half(static_cast<uint16_t>(entries[e].y)))});
  }

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

  // `bits` and `any` are this lane's planes and counts of the chunk, `slot` and `table` the
  // stage's.
  W2A4_DEVICE void compute_step(const unsigned char* slot, const unsigned char* table,
                                const unsigned char* bits, const unsigned char* any, int step) {
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

    const unsigned char* entry = table + ((step * 2 + q / 2) * kRows + g) * 8;
    const U32x2 entry0 = read_u32x2(entry), entry1 = read_u32x2(entry + 8 * 8);
    const float scale = as_float(q & 1 ? entry1.y : entry0.y);
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
      const int32_t sum0 = sum_planes(n_low, n_high, n_both, all, entry0.x, 0, weight0, weight1);
      const int32_t sum1 = sum_planes(n_low, n_high, n_both, all, entry1.x, 1, weight0, weight1);
      // The even lane of a pair keeps row g, the odd one row g + 8.
      const int32_t keep = q & 1 ? sum1 : sum0, give = q & 1 ? sum0 : sum1;
      const int32_t got = static_cast<int32_t>(shfl_xor(static_cast<uint32_t>(give), 1));
      acc[t] = fma_rn(exact_float(keep + got + kMagic), scale, acc[t]);
    }
  }

  W2A4_DEVICE void run() {
    const int stages = (static_cast<int>(chunks) - warp + kWarps - 1) / kWarps;
    // A ring of kStages slots: while one is computed, the others are on their way.
    W2A4_UNROLL
    for (int i = 0; i < kStages - 1; ++i) {
      load_stage(shared + i * kSlotBytes);
      cp_async_commit();
    }
    load_entries();
    unsigned char* zeros = counts + chunks * kTokens * kCountBytes;
    for (int i = threadIdx.x; i < kTokens * kPlaneBytes / 4; i += kThreads)
      reinterpret_cast<uint32_t*>(zeros)[i] = 0;
    make_planes();  // while the first weights are on their way
    sync_block();

    // Columns 0..3 of B are the even unit, which lanes with q < 2 hold; 4..7 the odd one.
    const bool mine = g / 4 == q / 2;
    const unsigned char* bits =
        mine ? planes + warp * kTokens * kPlaneBytes + (q * 4 + g % 4) * 8 : zeros;
    const int bits_step = mine ? kWarps * kTokens * kPlaneBytes : 0;
    const unsigned char* any = counts + warp * kTokens * kCountBytes + q / 2 * 16 + q % 2 * 8;
    uint32_t slot = 0, table_slot = 0;
    for (int i = stages; i > 0; --i) {
      unsigned char* table = shared + kTable + table_slot;
      cp_async_wait<kStages - 2>();
      store_entries(table);
      sync_warp();  // everyone's part of this stage is there, and the slot before it is free
      load_entries();
      load_stage(shared + ((slot + (kStages - 1) * kSlotBytes) & (kTable - 1)));
      cp_async_commit();
      W2A4_UNROLL
      for (int step = 0; step < kSteps; ++step) compute_step(shared + slot, table, bits, any, step);
      slot = (slot + kSlotBytes) & (kTable - 1);
      table_slot ^= kTableBytes;
      bits += bits_step;
      any += kWarps * kTokens * kCountBytes;
    }
    cp_async_wait<0>();
    sync_warp();  // the ring is free for the sums
    W2A4_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const float sum = add_rn(acc[t], shfl_xor(acc[t], 2));
      if (q < 2) reinterpret_cast<float*>(shared)[t * kRows + g + 8 * q] = sum;
    }
    sync_block();
    finish_rows<kRows, kTokens, true>(p, shared_memory(), kWarpBytes, first_row, first_token);
  }
};

template <int kTokens>
__global__ void __launch_bounds__(kThreads, 2)
    gemv_bmma_kernel(const __grid_constant__ LinearA4Params p) {
  wait_for_previous_kernel();
  Bmma<kTokens>(p).run();
}

}  // namespace w2a4::cuda
