// Number formats of activations: how a kernel that computes in float32 loads and stores them.
#pragma once

#include <stdexcept>
#include <string>

#include "../params.h"
#include "ptx_mma.cuh"

#ifdef __CUDACC__
#define W2A4_ROLLED _Pragma("unroll 1")
#else
#define W2A4_ROLLED
#endif

namespace w2a4::cuda {

struct Float16 {
  static constexpr int kBytes = 2;
  static W2A4_DEVICE float widen(uint16_t bits) { return float_from_half(bits); }
  static W2A4_DEVICE uint32_t narrow(float low, float high) {
    return halves_from_floats(low, high);
  }
  static constexpr uint32_t kOnes = 0x3c003c00;
  static W2A4_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4],
                              const uint32_t (&b)[2] W2A4_SITE) {
    mma_f16_16x8x16(d, a, b W2A4_SAME_SITE);
  }
};

struct BFloat16 {
  static constexpr int kBytes = 2;
  static W2A4_DEVICE float widen(uint16_t bits) { return float_from_bfloat16(bits); }
  static W2A4_DEVICE uint32_t narrow(float low, float high) {
    return bfloat16s_from_floats(low, high);
  }
  static constexpr uint32_t kOnes = 0x3f803f80;
  static W2A4_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4],
                              const uint32_t (&b)[2] W2A4_SITE) {
    mma_bf16_16x8x16(d, a, b W2A4_SAME_SITE);
  }
};

struct Float32 {
  static constexpr int kBytes = 4;
};

template <class T>
W2A4_DEVICE float load_one(const void* x, int64_t at) {
  if constexpr (T::kBytes == 4)
    return as_float(load_u32(static_cast<const uint32_t*>(x) + at));
  else
    return T::widen(load_u16(static_cast<const uint16_t*>(x) + at));
}

// kCount = 2, 4 or 8 numbers from `at` on, aligned as a whole, to at most 16 bytes.
template <class T, int kCount>
W2A4_DEVICE void load_run(const void* x, int64_t at, float (&v)[kCount]) {
  const char* p = static_cast<const char*>(x) + at * T::kBytes;
  uint32_t words[kCount * T::kBytes / 4];
  if constexpr (kCount * T::kBytes == 4) {
    words[0] = load_u32(p);
  } else if constexpr (kCount * T::kBytes == 8) {
    const U32x2 w = load_u32x2(p);
    words[0] = w.x, words[1] = w.y;
  } else {
    W2A4_UNROLL
    for (int i = 0; i < kCount * T::kBytes / 16; ++i) {
      const U32x4 w = load_u32x4(p + 16 * i);
      words[4 * i] = w.x, words[4 * i + 1] = w.y, words[4 * i + 2] = w.z, words[4 * i + 3] = w.w;
    }
  }
  W2A4_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if constexpr (T::kBytes == 4)
      v[i] = as_float(words[i]);
    else
      v[i] = T::widen(static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2)));
  }
}

template <class T>
W2A4_DEVICE void store_one(void* y, int64_t at, float v) {
  if constexpr (T::kBytes == 4)
    static_cast<float*>(y)[at] = v;
  else
    static_cast<uint16_t*>(y)[at] = static_cast<uint16_t>(T::narrow(v, 0.0f));
}

// kCount = 2 or 8 numbers, aligned as a whole, to at most 16 bytes.
template <class T, int kCount>
W2A4_DEVICE void store_run(void* y, int64_t at, const float (&v)[kCount]) {
  char* p = static_cast<char*>(y) + at * T::kBytes;
  uint32_t words[kCount * T::kBytes / 4];
  W2A4_UNROLL
  for (int i = 0; i < kCount * T::kBytes / 4; ++i) {
    if constexpr (T::kBytes == 4)
      words[i] = as_bits(v[i]);
    else
      words[i] = T::narrow(v[2 * i], v[2 * i + 1]);
  }
  if constexpr (kCount * T::kBytes == 4) {
    store_u32(p, words[0]);
  } else if constexpr (kCount * T::kBytes == 8) {
    store_u32x2(p, {words[0], words[1]});
  } else {
    W2A4_UNROLL
    for (int i = 0; i < kCount * T::kBytes / 16; ++i)
      store_u32x4(p + 16 * i, {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]});
  }
}

// Element `at` of a tensor whose dtype is known at run time only.
W2A4_DEVICE float load_number(const void* data, ScalarType dtype, int64_t at) {
  switch (dtype) {
    case ScalarType::Half:
      return float_from_half(static_cast<const uint16_t*>(data)[at]);
    case ScalarType::BFloat16:
      return float_from_bfloat16(static_cast<const uint16_t*>(data)[at]);
    case ScalarType::Double:
      return static_cast<float>(static_cast<const double*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

W2A4_DEVICE void store_number(void* data, ScalarType dtype, int64_t at, float x) {
  switch (dtype) {
    case ScalarType::Half:
      static_cast<uint16_t*>(data)[at] = half_from_float(x);
      break;
    case ScalarType::BFloat16:
      static_cast<uint16_t*>(data)[at] = bfloat16_from_float(x);
      break;
    case ScalarType::Double:
      static_cast<double*>(data)[at] = x;
      break;
    default:
      static_cast<float*>(data)[at] = x;
  }
}

// x as the dtype holds it.
W2A4_DEVICE float round_number(ScalarType dtype, float x) {
  switch (dtype) {
    case ScalarType::Half:
      return float_from_half(half_from_float(x));
    case ScalarType::BFloat16:
      return float_from_bfloat16(bfloat16_from_float(x));
    default:
      return x;
  }
}

W2A4_DEVICE int64_t offset_of(const Strided4& t, int64_t batch, int64_t head, int64_t token) {
  return batch * t.batch + head * t.head + token * t.token;
}

// Calls run(Kernel<T>{}) with the format of a dtype; Kernel is a std::integral_constant of a
// kernel.
template <template <class T> class Kernel, class Run>
void with_format(const char* op, ScalarType dtype, Run&& run) {
  switch (dtype) {
    case ScalarType::Float:
      return run(Kernel<Float32>{});
    case ScalarType::Half:
      return run(Kernel<Float16>{});
    case ScalarType::BFloat16:
      return run(Kernel<BFloat16>{});
    default:
      throw std::runtime_error(
          std::string("w2a4.") + op +
          ": the CUDA kernels take float32, float16 and bfloat16, not float64; "
          "convert with x.float()");
  }
}

}  // namespace w2a4::cuda
