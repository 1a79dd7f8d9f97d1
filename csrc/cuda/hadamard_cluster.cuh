// x @ H of whole tokens, and what may stand before and after: silu(x) * up, quantize_a4. A cluster
// of thread blocks does a token, see hadamard_cluster_plan.h for how and for the names.
//
// 1. A warp loads 256 numbers, prepares them, does the butterflies of S, which lie within it, and
//    sends each to the block that mixes its column, as three bfloat16 that add up to it exactly.
// 2. A warp multiplies 16 rows of R by t.at_once tiles of 8 columns. Its signs of R stay in
//    registers, a bit each, from before the first token on.
// 3. To quantise, blocks send each other their warps' maxima; codes come from registers.
#pragma once

#include "hadamard_cluster_plan.h"
#include "hadamard_mix.cuh"
#include "quantizer.cuh"

namespace w2a4::cuda {

struct ClusterArgs {
  const void *x, *up;  // [tokens, size]; up may be null
  void* y;             // x @ H, if that is asked for, else
  uint8_t* codes;      // [tokens, size / 2]
  float* scale;        // [tokens]
  const float* clip;
  ClusterTransform t;
};

// ---- R

// Bit f of word w, f = 4 * (step % 4) + r, and bit f + 16: signs of the two numbers in register r
// of the mma operand of 16 rows of the result and inputs 16 * step .. + 15; step / 4 = w. Rows and
// inputs beyond the last are taken for the last: such inputs are zeros.
W2A4_DEVICE void load_row_signs(const ClusterTransform& t, int tile, uint32_t (&signs)[4]) {
  const int g = threadIdx.x % 32 / 4, j = threadIdx.x % 4, last = t.rows - 1;
  const int copies = (1 << t.log_copies) - 1;
  const int in_stride = t.transpose ? 1 : t.k, out_stride = t.transpose ? t.k : 1;
  W2A4_ROLLED
  for (int i = 7; i >= 0; --i) {      // half a word
    const int half = fence_loads(i);  // or an address a load is kept over the loop
    uint32_t word = 0;
    if (2 * half < t.tiles) {
      W2A4_UNROLL
      for (int n = 0; n < 16; ++n) {  // loads that are under way together
        const int f = n / 2, high = n % 2;
        const int row = 16 * tile + 8 * (f % 2) + g;
        const int input = 32 * half + 16 * (f / 4) + 8 * (f % 4 / 2) + 2 * j + high;
        const int out = row < last ? row : last, in = input < last ? input : last;
        int sign = popc(in & out & copies);
        if (t.had_k)
          sign ^=
              t.had_k[(in >> t.log_copies) * in_stride + (out >> t.log_copies) * out_stride] >> 7;
        word |= static_cast<uint32_t>(sign & 1) << (f + 16 * high);
      }
    }
    if (half % 2)
      signs[3] = signs[2], signs[2] = signs[1], signs[1] = signs[0], signs[0] = word << 8;
    else
      signs[0] |= word;
  }
}

// y = R x of the warp's rows and its tiles of columns from `first` on.
template <int kTiles>
W2A4_DEVICE void mix_columns(const ClusterTransform& t, const unsigned char* staged,
                             const uint32_t (&signs)[4], int first, float (&y)[kTiles][4]) {
  float sums[kTiles][3][4];
  W2A4_UNROLL
  for (int i = 0; i < 12 * kTiles; ++i) sums[i / 12][i / 4 % 3][i % 4] = 0.0f;
  // Fences keep the compiler from making all operands and addresses ahead of the tokens' loop.
  const unsigned char* row = staged + fence_loads(first * t.tile_bytes + threadIdx.x % 32 * 16);
  W2A4_ROLLED
  for (int step = 0; step < t.tiles; step += 2) {
    uint32_t word = step < 8 ? step < 4 ? signs[0] : signs[1] : step < 12 ? signs[2] : signs[3];
    word >>= step % 4 * 4;
    uint32_t a[2][4];
    W2A4_UNROLL
    for (int i = 0; i < 8; ++i)
      a[i / 4][i % 4] = (word << (15 - i) & 0x80008000u) | BFloat16::kOnes;
    W2A4_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t w[3][4];  // loads and products of the terms are under way together
      W2A4_UNROLL
      for (int term = 0; term < 3; ++term)
        ldmatrix_x4_trans(w[term], row + (term * t.own + tile) * t.tile_bytes + step * 256);
      W2A4_UNROLL
      for (int term = 0; term < 3; ++term)
        BFloat16::mma(sums[tile][term], a[0], {w[term][0], w[term][1]});
      if (step + 1 >= t.tiles) continue;
      W2A4_UNROLL
      for (int term = 0; term < 3; ++term)
        BFloat16::mma(sums[tile][term], a[1], {w[term][2], w[term][3]});
    }
  }
  W2A4_UNROLL
  for (int i = 0; i < 4 * kTiles; ++i) {
    const auto& s = sums[i / 4];
    y[i / 4][i % 4] = mul_rn(add_rn(add_rn(s[2][i % 4], s[1][i % 4]), s[0][i % 4]), t.scale);
  }
}

// ---- S

// The butterflies of S on a warp's 256 numbers, of which a lane has eight neighbours.
W2A4_DEVICE void butterflies_in_warp(int log_columns, float (&v)[8]) {
  W2A4_UNROLL
  for (int bit = 1; bit < 8; bit *= 2) W2A4_UNROLL
  for (int i = 0; i < 8; ++i)
    if (!(i & bit)) {
      const float sum = add_rn(v[i], v[i + bit]);
      v[i + bit] = add_rn(v[i], -v[i + bit]);
      v[i] = sum;
    }
  W2A4_UNROLL
  for (int stage = 0; stage < 5; ++stage) {
    if (stage + 3 >= log_columns) break;
    const float sign = threadIdx.x >> stage & 1 ? -1.0f : 1.0f;
    W2A4_UNROLL
    for (int i = 0; i < 8; ++i) v[i] = fma_rn(v[i], sign, shfl_xor(v[i], 1 << stage));
  }
}

// Loads this block's pieces of a token and sends each number to the block that has its column.
template <class T>
W2A4_DEVICE void spread_token(const ClusterArgs& args, int64_t token, unsigned char* staged) {
  const ClusterTransform& t = args.t;
  const int columns = 1 << t.log_columns, log_share = t.log_columns - t.log_blocks;
  const int thread = fence_loads(threadIdx.x);
  const int first = ((thread / 32 << t.log_blocks) + cluster_rank()) * kPiece;
  for (int piece = first; piece < t.size; piece += t.warps * kPiece << t.log_blocks) {
    const int element = piece + thread % 32 * 8;
    float v[8];
    W2A4_UNROLL
    for (int i = 0; i < 8; ++i) v[i] = 0.0f;
    if (element < t.size) {
      if (args.up)
        Input<T, true>{args.x, args.up}.run(token * t.size + element, v);
      else
        Input<T, false>{args.x, nullptr}.run(token * t.size + element, v);
    }
    butterflies_in_warp(t.log_columns, v);
    if (element >= t.size) continue;
    const int row = element >> t.log_columns, column = element & (columns - 1);
    const int tile = (column & ((1 << log_share) - 1)) / 8;
    W2A4_UNROLL
    for (int term = 0; term < 3; ++term) {
      uint32_t words[4];
      W2A4_UNROLL
      for (int i = 0; i < 4; ++i) words[i] = take_term(v[2 * i], v[2 * i + 1]);
      store_peer_u32x4(staged + (term * t.own + tile) * t.tile_bytes + row * 16,
                       column >> log_share, {words[0], words[1], words[2], words[3]});
    }
  }
}

// ---- results

// Numbers of register r of `y` are in row 16 * tile + 8 * (r / 2) + lane / 4. Calls f(element,
// half, tile of y) for the rows that there are, with the first element of the tile's 8 columns
// there.
template <int kTiles, class F>
W2A4_DEVICE void for_each_octet(const ClusterTransform& t, int tile, int first, const F& f) {
  const int share = 1 << (t.log_columns - t.log_blocks);
  // Fences as in mix_columns.
  tile = fence_loads(tile), first = fence_loads(first);
  W2A4_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * tile + 8 * half + threadIdx.x % 32 / 4;
    W2A4_UNROLL
    for (int n = 0; n < kTiles; ++n)
      f((row << t.log_columns) + static_cast<int>(cluster_rank()) * share + 8 * (first + n), half,
        n, row < t.rows);
  }
}

// The largest of every warp's `distance_bits` goes to every block of the cluster.
template <int kTiles>
W2A4_DEVICE void send_maximum(const ClusterTransform& t, bool has_task, int tile,
                              const float (&y)[kTiles][4], uint32_t* maxima) {
  uint32_t most = 0;
  const int row = 16 * fence_loads(tile) + threadIdx.x % 32 / 4;
  W2A4_UNROLL
  for (int i = 0; i < 4 * kTiles; ++i)
    if (has_task && row + 8 * (i % 4 / 2) < t.rows)
      most = larger(most, distance_bits(y[i / 4][i % 4]));
  most = warp_max(most);
  const unsigned lane = threadIdx.x % 32;
  if (lane >> t.log_blocks == 0)
    store_peer_u32(maxima + cluster_rank() * kClusterWarps + threadIdx.x / 32, lane, most);
}

W2A4_DEVICE uint32_t largest_of_token(const uint32_t* maxima) {
  const U32x4 v = read_u32x4(maxima + threadIdx.x % 32 * 4);
  return warp_max(larger(larger(v.x, v.y), larger(v.z, v.w)));
}

template <int kTiles>
W2A4_DEVICE void write_token_codes(const ClusterTransform& t, const Quantizer& q, int tile,
                                   int first, const float (&y)[kTiles][4], uint8_t* codes) {
  const int j = threadIdx.x % 4;
  for_each_octet<kTiles>(t, tile, first, [&](int element, int half, int n, bool there) {
    const uint32_t byte = code_of(q, y[n][2 * half]) | code_of(q, y[n][2 * half + 1]) << 4;
    uint32_t word = byte << 8 * j;  // of four lanes, which have two columns each
    word |= shfl_xor(word, 1);
    word |= shfl_xor(word, 2);
    if (there && j == half) store_u32(codes + element / 2, word);
  });
}

// ---- the kernel

template <class T, bool kCodes, int kTiles>
__global__ void __launch_bounds__(kClusterWarps * 32, kTiles == 2 ? 1 : 2)
    hadamard_cluster_kernel(const __grid_constant__ ClusterArgs args) {
  const ClusterTransform& t = args.t;
  unsigned char* staged = shared_memory();
  const int staged_bytes = 3 * t.own * t.tile_bytes;
  auto* maxima = reinterpret_cast<uint32_t*>(staged + staged_bytes);
  const int groups = t.own / kTiles;  // of tiles of columns
  uint32_t signs[4] = {};
  load_row_signs(t, threadIdx.x / 32 / groups, signs);
  // Zeros where no row is, and no warp.
  for (int i = 16 * threadIdx.x; i < staged_bytes + 32 * kClusterWarps; i += 16 * blockDim.x)
    if (i >= staged_bytes || i % t.tile_bytes >= 16 * t.rows) store_u32x4(staged + i, {});
  sync_cluster();  // all blocks have begun, and have their zeros
  // The warp's task; not earlier: it takes registers.
  const int warp = fence_loads(threadIdx.x) / 32, tile = warp / groups;
  const int first = warp % groups * kTiles;
  const bool has_task = tile < t.tiles;
  wait_for_previous_kernel();
  const int step = gridDim.x >> t.log_blocks;
  for (int token = blockIdx.x >> t.log_blocks; token < t.tokens; token += step) {
    spread_token<T>(args, token, staged);
    sync_cluster();  // the block has all of its columns
    float y[kTiles][4];
    if (has_task) mix_columns<kTiles>(t, staged, signs, first, y);
    if (kCodes) send_maximum<kTiles>(t, has_task, tile, y, maxima);
    if (kCodes || token + step < t.tokens) sync_cluster();  // columns are read, maxima are there
    if constexpr (kCodes) {
      const float scale = scale_of(*args.clip, largest_of_token(maxima));
      if (threadIdx.x == 0 && cluster_rank() == 0) args.scale[token] = scale;
      if (has_task)
        write_token_codes<kTiles>(t, quantizer_of(scale), tile, first, y,
                                  args.codes + int64_t{token} * (t.size / 2));
    } else if (has_task) {
      const int64_t at = int64_t{token} * t.size + 2 * (threadIdx.x % 4);
      for_each_octet<kTiles>(t, tile, first, [&](int element, int half, int n, bool there) {
        const float v[2] = {y[n][2 * half], y[n][2 * half + 1]};
        if (there) store_run<T>(args.y, at + element, v);
      });
    }
  }
}

// ---- which kernel

using ClusterKernel = void (*)(ClusterArgs);

template <bool kCodes, int kTiles>
struct ClusterKernels {
  template <class T>
  using Of = std::integral_constant<ClusterKernel, hadamard_cluster_kernel<T, kCodes, kTiles>>;
};

// Calls run(kernel), kernel a std::integral_constant of the function.
template <bool kCodes, class Run>
void with_cluster_kernel(const char* op, ScalarType dtype, const ClusterTransform& t, Run&& run) {
  if (t.at_once == 1)
    with_format<ClusterKernels<kCodes, 1>::template Of>(op, dtype, run);
  else
    with_format<ClusterKernels<kCodes, 2>::template Of>(op, dtype, run);
}

}  // namespace w2a4::cuda
