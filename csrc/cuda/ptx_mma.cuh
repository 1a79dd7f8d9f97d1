// Named tensor-core instructions, see ptx.cuh. Fragment layouts are those of the PTX ISA, "Matrix
// multiply-accumulate operation using mma instruction".
#pragma once

#include "ptx.cuh"
#include "ptx_numbers.cuh"

namespace w2a4::cuda {

#ifndef __CUDACC__
namespace twin {
template <class Sum>
struct Fragments {
  uint32_t a[4], b[2];
  Sum c[4];
};
template <class Sum>
struct Sums {
  Sum d[4];
};
// Element (row, column) of a 16 x 8 result is register `r` of lane `lane`.
inline int result_lane(int row, int column) {
  return row % 8 * 4 + column / 2;
}
inline int result_register(int row, int column) {
  return row / 8 * 2 + column % 2;
}

inline void mma_b1(const Fragments<int32_t>* in, Sums<int32_t>* out) {
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

inline void mma_s8(const Fragments<int32_t>* in, Sums<int32_t>* out) {
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

// One lane's part of `multiply`, which sees the fragments of all 32.
template <class Sum, void (*multiply)(const Fragments<Sum>*, Sums<Sum>*)>
void warp_mma(const char* name, simt::Site site, Sum (&d)[4], const uint32_t (&a)[4],
              const uint32_t (&b)[2], const Sum (&c)[4]) {
  const Fragments<Sum> mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
  const auto sums = simt::warp_collective<Fragments<Sum>, Sums<Sum>, multiply>(name, site, mine);
  for (int i = 0; i < 4; ++i) d[i] = sums.d[i];
}
}  // namespace twin
#endif

// d = a & b, counted, + c: 16 rows x 256 bits times 256 bits x 8 columns.
W2A4_DEVICE void mma_b1_16x8x256(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 const int32_t (&c)[4] W2A4_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]),
        "r"(c[2]), "r"(c[3]));
#else
  twin::warp_mma<int32_t, twin::mma_b1>("mma_b1", site, d, a, b, c);
#endif
}

// d = a * b + c on signed bytes: 16 rows x 32 times 32 x 8 columns.
W2A4_DEVICE void mma_s8_16x8x32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                const int32_t (&c)[4] W2A4_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]),
        "r"(c[2]), "r"(c[3]));
#else
  twin::warp_mma<int32_t, twin::mma_s8>("mma_s8", site, d, a, b, c);
#endif
}

// An int32 sum x with |x| < 2**22, added to kMagic, is the bits of the float 1.5 * 2**23 + x: the
// tensor core counts from kMagic on, and one subtraction makes the float, without a conversion.
constexpr int32_t kMagic = 0x4b400000;
constexpr float kMagicFloat = 12582912.0f;

W2A4_DEVICE float exact_float(int32_t sum_from_magic) {
  return add_rn(as_float(static_cast<uint32_t>(sum_from_magic)), -kMagicFloat);
}

#ifndef __CUDACC__
namespace twin {
template <float (*kWiden)(uint16_t)>
void mma_16bit(const Fragments<float>* in, Sums<float>* out) {
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
W2A4_DEVICE void mma_f16_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                 const uint32_t (&b)[2] W2A4_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  twin::warp_mma<float, twin::mma_16bit<float_from_half> >("mma_f16", site, d, a, b, d);
#endif
}

// The same on bfloat16.
W2A4_DEVICE void mma_bf16_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                  const uint32_t (&b)[2] W2A4_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  twin::warp_mma<float, twin::mma_16bit<float_from_bfloat16> >("mma_bf16", site, d, a, b, d);
#endif
}

#ifndef __CUDACC__
namespace twin {
struct RowPointer {
  const unsigned char* p;
};
template <int kCount>
struct RowPointers {
  RowPointer rows[kCount];
};
// Matrix m has 8 rows of 16 bytes, at the pointers of lanes 8m .. 8m + 7. A lane gets those of the
// rows that it has a share of, and reads it itself, since nothing orders it with what other lanes
// do next.
inline void rows_of(const RowPointer* in, RowPointers<4>* out) {
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < 4; ++m) out[lane].rows[m] = in[8 * m + lane / 4];
}
inline void row_pairs_of(const RowPointer* in, RowPointers<8>* out) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 8; ++i) out[lane].rows[i] = in[8 * (i / 2) + lane % 4 * 2 + i % 2];
}
}  // namespace twin
#endif

// Four matrices of 8 rows x 16 bytes from shared memory; lane 8m + r names row r of matrix m, which
// is aligned to 16 bytes. Lane 4g + j gets bytes 4j .. 4j + 3 of row g of matrix m in w[m].
W2A4_DEVICE void ldmatrix_x4(uint32_t (&w)[4], const unsigned char* row W2A4_SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  simt::check_aligned(row, 16);
  const auto mine = simt::warp_collective<twin::RowPointer, twin::RowPointers<4>, twin::rows_of>(
      "ldmatrix", site, {row});
  for (int m = 0; m < 4; ++m) w[m] = simt::load<uint32_t>(mine.rows[m].p + simt::lane() % 4 * 4);
#endif
}

// The same transposed by pairs of bytes: bytes 2g, 2g + 1 of row 2j, then of row 2j + 1.
W2A4_DEVICE void ldmatrix_x4_trans(uint32_t (&w)[4], const unsigned char* row W2A4_SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  simt::check_aligned(row, 16);
  const auto mine =
      simt::warp_collective<twin::RowPointer, twin::RowPointers<8>, twin::row_pairs_of>(
          "ldmatrix_trans", site, {row});
  const auto pair = [&](int i) {
    return uint32_t{simt::load<uint16_t>(mine.rows[i].p + simt::lane() / 4 * 2)};
  };
  for (int m = 0; m < 4; ++m) w[m] = pair(2 * m) | pair(2 * m + 1) << 16;
#endif
}

}  // namespace w2a4::cuda
