// Every PTX instruction the kernels use, once: a named function with the instruction for nvcc and
// a twin in C++ for the tests, which run the same kernel bodies on a CPU (simt/simt.h). Fragment
// layouts are those of the PTX ISA, "Matrix multiply-accumulate operation using mma instruction".
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define W2A4_DEVICE __device__ __forceinline__
#define W2A4_HOST __host__
#define W2A4_UNROLL _Pragma("unroll")
#define W2A4_NO_UNROLL _Pragma("unroll 1")
#else
#include <cmath>

#include "../simt/simt.h"
#define W2A4_DEVICE inline
#define W2A4_HOST
#define W2A4_UNROLL
#define W2A4_NO_UNROLL
#endif

namespace w2a4::cuda {

struct alignas(8) U32x2 {
  uint32_t x, y;
};
struct alignas(16) U32x4 {
  uint32_t x, y, z, w;
};

// ---- lanes and barriers

W2A4_DEVICE unsigned char* shared_memory() {  // dynamic, aligned to 16 bytes
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char w2a4_shared[];
  return w2a4_shared;
#else
  return simt::block->shared();
#endif
}

W2A4_DEVICE void sync_block() {
#ifdef __CUDACC__
  __syncthreads();
#else
  simt::sync_block();
#endif
}

W2A4_DEVICE void sync_warp() {
#ifdef __CUDACC__
  __syncwarp();
#else
  simt::sync_warp();
#endif
}

#ifndef __CUDACC__
namespace twin {
struct Shuffle {
  uint32_t value;
  int from;
};
inline void shuffle(const Shuffle* in, uint32_t* out) {
  for (int i = 0; i < 32; ++i) out[i] = in[in[i].from & 31].value;
}
inline void ballot(const bool* in, uint32_t* out) {
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= uint32_t{in[i]} << i;
  for (int i = 0; i < 32; ++i) out[i] = bits;
}
}  // namespace twin
#endif

// The value of the lane whose number differs by `mask`.
W2A4_DEVICE uint32_t shfl_xor(uint32_t value, int mask) {
#ifdef __CUDACC__
  return __shfl_xor_sync(0xffffffffu, value, mask);
#else
  return simt::warp_collective<twin::Shuffle, uint32_t, twin::shuffle>(
      "shfl_xor", {value, simt::lane() ^ mask});
#endif
}

W2A4_DEVICE uint32_t shfl(uint32_t value, int from) {
#ifdef __CUDACC__
  return __shfl_sync(0xffffffffu, value, from);
#else
  return simt::warp_collective<twin::Shuffle, uint32_t, twin::shuffle>("shfl", {value, from});
#endif
}

// Bit i of the result is lane i's predicate.
W2A4_DEVICE uint32_t ballot(bool predicate) {
#ifdef __CUDACC__
  return __ballot_sync(0xffffffffu, predicate);
#else
  return simt::warp_collective<bool, uint32_t, twin::ballot>("ballot", predicate);
#endif
}

// ---- bits and numbers

W2A4_DEVICE float as_float(uint32_t x) {
#ifdef __CUDACC__
  return __uint_as_float(x);
#else
  float f;
  std::memcpy(&f, &x, sizeof(f));
  return f;
#endif
}

W2A4_DEVICE uint32_t as_bits(float x) {
#ifdef __CUDACC__
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, sizeof(u));
  return u;
#endif
}

W2A4_DEVICE float shfl_xor(float value, int mask) {
  return as_float(shfl_xor(as_bits(value), mask));
}

// a * b + c, rounded once.
W2A4_DEVICE float fma_rn(float a, float b, float c) {
#ifdef __CUDACC__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// Rounded products and sums that the compiler does not contract.
W2A4_DEVICE float mul_rn(float a, float b) {
#ifdef __CUDACC__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
W2A4_DEVICE float add_rn(float a, float b) {
#ifdef __CUDACC__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

W2A4_DEVICE float float_from_half(uint16_t bits) {
#ifdef __CUDACC__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#else
  _Float16 h;
  std::memcpy(&h, &bits, sizeof(h));
  return static_cast<float>(h);
#endif
}

W2A4_DEVICE uint16_t half_from_float(float x) {
#ifdef __CUDACC__
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const auto h = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &h, sizeof(bits));
  return bits;
#endif
}

W2A4_DEVICE float float_from_bfloat16(uint16_t bits) {
  return as_float(static_cast<uint32_t>(bits) << 16);
}

W2A4_DEVICE uint16_t bfloat16_from_float(float x) {
#ifdef __CUDACC__
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const uint32_t u = as_bits(x);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
#endif
}

// Bits of a where the mask is set, of b elsewhere: one LOP3.
W2A4_DEVICE uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
#else
  return (a & mask) | (b & ~mask);
#endif
}

// Bytes 0..3 are a's, 4..7 are b's; byte i of the result is the one that bits 4i..4i+2 of the
// selector name. Bit 4i+3 must be 0.
W2A4_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDACC__
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
#else
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (nibble & 7)) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;  // the sign, replicated
    d |= byte << 8 * i;
  }
  return d;
#endif
}

// c + the dot product of four signed bytes and four unsigned ones.
W2A4_DEVICE int32_t dp4a_s8_u8(uint32_t s8, uint32_t u8, int32_t c) {
#ifdef __CUDACC__
  int32_t d;
  asm("dp4a.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(s8), "r"(u8), "r"(c));
  return d;
#else
  for (int i = 0; i < 4; ++i)
    c += static_cast<int8_t>(s8 >> 8 * i) * static_cast<int>(u8 >> 8 * i & 255);
  return c;
#endif
}

W2A4_DEVICE int popc(uint32_t x) {
#ifdef __CUDACC__
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}

// ---- tensor cores

#ifndef __CUDACC__
namespace twin {
struct Fragments {
  uint32_t a[4], b[2];
  int32_t c[4];
};
struct Sums {
  int32_t d[4];
};
// Element (row, column) of a 16 x 8 result is register `r` of lane `lane`.
inline int result_lane(int row, int column) {
  return row % 8 * 4 + column / 2;
}
inline int result_register(int row, int column) {
  return row / 8 * 2 + column % 2;
}

inline void mma_b1(const Fragments* in, Sums* out) {
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      int sum = 0;
      for (int k = 0; k < 8; ++k)  // words of 32 bits
        sum += __builtin_popcount(in[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2] &
                                  in[column * 4 + k % 4].b[k / 4]);
      const int lane = result_lane(row, column), r = result_register(row, column);
      out[lane].d[r] = in[lane].c[r] + sum;
    }
}

inline void mma_s8(const Fragments* in, Sums* out) {
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      int sum = 0;
      for (int k = 0; k < 32; ++k) {
        const uint32_t a = in[row % 8 * 4 + k % 16 / 4].a[row / 8 + k / 16 * 2];
        const uint32_t b = in[column * 4 + k % 16 / 4].b[k / 16];
        sum += static_cast<int8_t>(a >> 8 * (k % 4)) * static_cast<int8_t>(b >> 8 * (k % 4));
      }
      const int lane = result_lane(row, column), r = result_register(row, column);
      out[lane].d[r] = in[lane].c[r] + sum;
    }
}
}  // namespace twin
#endif

// d = a & b, counted, + c: 16 rows x 256 bits times 256 bits x 8 columns.
W2A4_DEVICE void mma_b1_16x8x256(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 const int32_t (&c)[4]) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]),
        "r"(c[2]), "r"(c[3]));
#else
  twin::Fragments mine;
  for (int i = 0; i < 4; ++i) mine.a[i] = a[i], mine.c[i] = c[i];
  for (int i = 0; i < 2; ++i) mine.b[i] = b[i];
  const auto sums =
      simt::warp_collective<twin::Fragments, twin::Sums, twin::mma_b1>("mma_b1", mine);
  for (int i = 0; i < 4; ++i) d[i] = sums.d[i];
#endif
}

// d = a * b + c on signed bytes: 16 rows x 32 times 32 x 8 columns.
W2A4_DEVICE void mma_s8_16x8x32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                const int32_t (&c)[4]) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]),
        "r"(c[2]), "r"(c[3]));
#else
  twin::Fragments mine;
  for (int i = 0; i < 4; ++i) mine.a[i] = a[i], mine.c[i] = c[i];
  for (int i = 0; i < 2; ++i) mine.b[i] = b[i];
  const auto sums =
      simt::warp_collective<twin::Fragments, twin::Sums, twin::mma_s8>("mma_s8", mine);
  for (int i = 0; i < 4; ++i) d[i] = sums.d[i];
#endif
}

// ---- memory

// base + row * stride in one instruction, which the compiler does not take apart.
W2A4_DEVICE const uint8_t* row_of(const uint8_t* base, uint32_t row, uint32_t stride) {
#ifdef __CUDACC__
  uint64_t address;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(row), "r"(stride), "l"(base));
  return reinterpret_cast<const uint8_t*>(address);
#else
  return base + size_t{row} * stride;
#endif
}

// Asynchronous copy of 16 bytes from global to shared memory, past L1; the bytes from `from_bytes`
// (0 or 16) on are zero.
W2A4_DEVICE void cp_async_16(void* to, const void* from, int from_bytes) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(from_bytes)
               : "memory");
#else
  simt::block->copy_async(to, from, 16, from_bytes);
#endif
}

W2A4_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::block->commit_copies();
#endif
}

// Waits until at most kPending of this lane's committed groups are under way.
template <int kPending>
W2A4_DEVICE void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  simt::block->wait_copies(kPending);
#endif
}

// Reads through the read-only path; what lies there does not change while the kernel runs.
W2A4_DEVICE uint32_t load_u32(const void* p) {
#ifdef __CUDACC__
  return __ldg(static_cast<const uint32_t*>(p));
#else
  uint32_t x;
  std::memcpy(&x, p, sizeof(x));
  return x;
#endif
}
W2A4_DEVICE uint16_t load_u16(const void* p) {
#ifdef __CUDACC__
  return __ldg(static_cast<const uint16_t*>(p));
#else
  uint16_t x;
  std::memcpy(&x, p, sizeof(x));
  return x;
#endif
}
W2A4_DEVICE U32x4 load_u32x4(const void* p) {
#ifdef __CUDACC__
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return {v.x, v.y, v.z, v.w};
#else
  U32x4 x;
  std::memcpy(&x, p, sizeof(x));
  return x;
#endif
}

// ---- floating-point tensor cores

#ifndef __CUDACC__
namespace twin {
struct HalfFragments {
  uint32_t a[4], b[2];
  float c[4];
};
struct FloatSums {
  float d[4];
};
template <float (*kWiden)(uint16_t)>
void mma_16bit(const HalfFragments* in, FloatSums* out) {
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      const int lane = result_lane(row, column), r = result_register(row, column);
      float sum = in[lane].c[r];
      for (int k = 0; k < 16; ++k) {
        const uint32_t a = in[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2] >> 16 * (k % 2);
        const uint32_t b = in[column * 4 + k % 8 / 2].b[k / 8] >> 16 * (k % 2);
        sum += kWiden(static_cast<uint16_t>(a)) * kWiden(static_cast<uint16_t>(b));
      }
      out[lane].d[r] = sum;
    }
}
}  // namespace twin
#endif

// d += a * b on float16, summed in float32: 16 rows x 16 times 16 x 8 columns.
W2A4_DEVICE void mma_f16_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  const twin::HalfFragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  const auto sums = simt::warp_collective<twin::HalfFragments, twin::FloatSums,
                                          twin::mma_16bit<float_from_half> >("mma_f16", mine);
  for (int i = 0; i < 4; ++i) d[i] = sums.d[i];
#endif
}

// The same on bfloat16.
W2A4_DEVICE void mma_bf16_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  const twin::HalfFragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  const auto sums = simt::warp_collective<twin::HalfFragments, twin::FloatSums,
                                          twin::mma_16bit<float_from_bfloat16> >("mma_bf16", mine);
  for (int i = 0; i < 4; ++i) d[i] = sums.d[i];
#endif
}

// x, which the compiler takes for new: loads that depend on it stay below the mma above.
W2A4_DEVICE int fence_loads(int x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// ---- more numbers

// Two float16 in a word, `low` in its low half.
W2A4_DEVICE uint32_t halves_from_floats(float low, float high) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return half_from_float(low) | static_cast<uint32_t>(half_from_float(high)) << 16;
#endif
}
W2A4_DEVICE uint32_t bfloat16s_from_floats(float low, float high) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return bfloat16_from_float(low) | static_cast<uint32_t>(bfloat16_from_float(high)) << 16;
#endif
}

// The larger or smaller of two; a NaN loses.
W2A4_DEVICE float max_f32(float a, float b) {
  return fmaxf(a, b);
}
W2A4_DEVICE float min_f32(float a, float b) {
  return fminf(a, b);
}

// The upper 32 bits of the product.
W2A4_DEVICE uint32_t mul_high(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
#endif
}

// Reciprocal, correctly rounded; x is positive and in [2**-120, 2**120].
W2A4_DEVICE float rcp_rn_mid(float x) {
#ifdef __CUDACC__
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return __fmaf_rn(__fmaf_rn(-x, r, 1.0f), r, r);
#else
  return 1.0f / x;
#endif
}

// x / 7, correctly rounded. The product's error, 2**-52 of it, is far less than the distance of any
// float32 divided by 7 from the middle between two float32.
W2A4_DEVICE float seventh_rn(float x) {
  return static_cast<float>(static_cast<double>(x) * (1.0 / 7.0));
}

// 1 / sqrt(x), within 2 units in the last place.
W2A4_DEVICE float rsqrt_approx(float x) {
#ifdef __CUDACC__
  return rsqrtf(x);
#else
  return 1.0f / std::sqrt(x);
#endif
}

// Within 2 units in the last place; |b| in [2**-126, 2**126].
W2A4_DEVICE float div_approx(float a, float b) {
#ifdef __CUDACC__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
W2A4_DEVICE float exp_f32(float x) {
#ifdef __CUDACC__
  return expf(x);
#else
  return std::exp(x);
#endif
}

// ---- across lanes

#ifndef __CUDACC__
namespace twin {
inline void max_u32(const uint32_t* in, uint32_t* out) {
  uint32_t most = 0;
  for (int i = 0; i < 32; ++i) most = in[i] > most ? in[i] : most;
  for (int i = 0; i < 32; ++i) out[i] = most;
}
// What a vector access needs; hardware stops the kernel.
inline void check_aligned(const void* p, int bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    simt::block->stop("an access of " + std::to_string(bytes) + " bytes that is not aligned");
}
}  // namespace twin
#endif

// The largest value of the warp's lanes.
W2A4_DEVICE uint32_t warp_max(uint32_t value) {
#ifdef __CUDACC__
  uint32_t most;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(most) : "r"(value));
  return most;
#else
  return simt::warp_collective<uint32_t, uint32_t, twin::max_u32>("warp_max", value);
#endif
}

// *p = max(*p, value), also when other lanes do so at once.
W2A4_DEVICE void atomic_max(uint32_t* p, uint32_t value) {
#ifdef __CUDACC__
  atomicMax(p, value);
#else
  if (value > *p) *p = value;
#endif
}

// ---- more memory

W2A4_DEVICE U32x2 load_u32x2(const void* p) {  // as load_u32x4
#ifdef __CUDACC__
  const uint2 v = __ldg(static_cast<const uint2*>(p));
  return {v.x, v.y};
#else
  twin::check_aligned(p, 8);
  U32x2 x;
  std::memcpy(&x, p, sizeof(x));
  return x;
#endif
}

// Reads what this kernel may have written.
W2A4_DEVICE U32x4 read_u32x4(const void* p) {
#ifdef __CUDACC__
  const uint4 v = *static_cast<const uint4*>(p);
  return {v.x, v.y, v.z, v.w};
#else
  twin::check_aligned(p, 16);
  U32x4 x;
  std::memcpy(&x, p, sizeof(x));
  return x;
#endif
}
W2A4_DEVICE U32x2 read_u32x2(const void* p) {
#ifdef __CUDACC__
  const uint2 v = *static_cast<const uint2*>(p);
  return {v.x, v.y};
#else
  twin::check_aligned(p, 8);
  U32x2 x;
  std::memcpy(&x, p, sizeof(x));
  return x;
#endif
}

W2A4_DEVICE void store_u32x4(void* p, const U32x4& x) {
#ifdef __CUDACC__
  *static_cast<uint4*>(p) = make_uint4(x.x, x.y, x.z, x.w);
#else
  twin::check_aligned(p, 16);
  std::memcpy(p, &x, sizeof(x));
#endif
}
W2A4_DEVICE void store_u32x2(void* p, const U32x2& x) {
#ifdef __CUDACC__
  *static_cast<uint2*>(p) = make_uint2(x.x, x.y);
#else
  twin::check_aligned(p, 8);
  std::memcpy(p, &x, sizeof(x));
#endif
}
W2A4_DEVICE void store_u32(void* p, uint32_t x) {
#ifdef __CUDACC__
  *static_cast<uint32_t*>(p) = x;
#else
  twin::check_aligned(p, 4);
  std::memcpy(p, &x, sizeof(x));
#endif
}

}  // namespace w2a4::cuda
