// One body, several instruction sets, chosen at run time: a kernel is a template
//
//     template <class Arch> W2A4_INLINE void scale_rows(const Params& p, int64_t begin, int64_t
//     end); W2A4_DISPATCH(scale_rows, Params)   // defines scale_rows_dispatch(p, begin, end)
//
// of plain loops and vector types, compiled once for each instruction set. Everything it calls in
// a hot loop must be W2A4_INLINE, so that it is compiled for the same set (a lambda is not).
// All sets give the same bits: lanes and the order of operations do not depend on Arch.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

#define W2A4_INLINE inline __attribute__((always_inline))

// Only gcc has a byte shuffle by a variable without intrinsics.
#if defined(__GNUC__) && !defined(__clang__)
#define W2A4_BYTE_SHUFFLE
#endif

namespace w2a4::cpu {

enum class Isa { kBase, kAvx2, kAvx512 };

// The best instruction set of this machine; the environment variable W2A4_CPU_ISA=base|avx2|avx512
// asks for a lesser one.
Isa isa();

// kLanes: floats in a vector register; kVectors: registers' worth of columns that a tile of sums
// spans; kByteShuffle: bytes can be looked up in a register.
struct Base {
  static constexpr int kLanes = 4, kVectors = 2;
#ifdef __aarch64__
  static constexpr bool kByteShuffle = true;
#else
  static constexpr bool kByteShuffle = false;
#endif
};
struct Avx2 {
  static constexpr int kLanes = 8, kVectors = 2;
  static constexpr bool kByteShuffle = true;
};
struct Avx512 {
  static constexpr int kLanes = 16, kVectors = 4;
  static constexpr bool kByteShuffle = true;
};

// Runs task(p, begin, end) over [0, count) on torch's threads.
template <class Params>
void parallel(int64_t count, int64_t grain, const Params& p,
              void (*task)(const Params&, int64_t, int64_t)) {
  if (count <= 0) return;
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { task(p, begin, end); });
}

// The same for tasks of unequal length: a thread takes the next one when it is done.
template <class Params>
void parallel_dynamic(int64_t count, const Params& p,
                      void (*task)(const Params&, int64_t, int64_t)) {
  std::atomic<int64_t> next{0};
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads < count ? threads : count, 1,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i; (i = next.fetch_add(1)) < count;) task(p, i, i + 1);
                              });
}

}  // namespace w2a4::cpu

#if defined(__x86_64__) && defined(__GNUC__)
#define W2A4_DISPATCH(name, Params)                                                                \
  __attribute__((target("avx2,fma,bmi,bmi2,f16c"))) static void name##_avx2(                       \
      const Params& p, int64_t begin, int64_t end) {                                               \
    name<Avx2>(p, begin, end);                                                                     \
  }                                                                                                \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,f16c"))) static void \
  name##_avx512(const Params& p, int64_t begin, int64_t end) {                                     \
    name<Avx512>(p, begin, end);                                                                   \
  }                                                                                                \
  static void name##_dispatch(const Params& p, int64_t begin, int64_t end) {                       \
    switch (isa()) {                                                                               \
      case Isa::kAvx512:                                                                           \
        return name##_avx512(p, begin, end);                                                       \
      case Isa::kAvx2:                                                                             \
        return name##_avx2(p, begin, end);                                                         \
      default:                                                                                     \
        return name<Base>(p, begin, end);                                                          \
    }                                                                                              \
  }
#else
#define W2A4_DISPATCH(name, Params)                                          \
  static void name##_dispatch(const Params& p, int64_t begin, int64_t end) { \
    name<Base>(p, begin, end);                                               \
  }
#endif
