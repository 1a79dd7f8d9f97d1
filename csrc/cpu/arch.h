// One body, several instruction sets, chosen at run time: a kernel is a template
//
//     template <class Arch> W2A4_INLINE void scale_rows(const Params& p, int64_t begin, int64_t
//     end); W2A4_DISPATCH(scale_rows, Params)   // defines scale_rows_dispatch(p, begin, end)
//
// of plain loops and vector types, compiled once for each instruction set. Everything it calls in
// a hot loop must be W2A4_INLINE, so that it is compiled for the same set (a lambda is not).
// All sets give the same bits: lanes and the order of operations do not depend on Arch.
#pragma once

#include <cstdint>

#include "team.h"

#define W2A4_INLINE inline __attribute__((always_inline))

// Only gcc has a byte shuffle by a variable without intrinsics.
#if defined(__GNUC__) && !defined(__clang__)
#define W2A4_BYTE_SHUFFLE
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define W2A4_X86
#if __GNUC__ >= 11 || (defined(__clang_major__) && __clang_major__ >= 12)
#define W2A4_AVXVNNI
#endif
#endif

namespace w2a4::cpu {

enum class Isa { kBase, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni };

// The best instruction set of this machine. The environment variable
// W2A4_CPU_ISA=base|avx2|avxvnni|avx512|avx512vnni asks for a lesser one; if the machine lacks it,
// the best it has of those that it contains. Kernels of W2A4_DISPATCH do not tell sets with VNNI
// from those without. AMX is left alone: a virtual machine may show its flag and yet fault at its
// instructions, so that it would have to stand behind the kernel's permission and a self-test.
Isa isa();

// Its name, as the environment variable has it.
const char* isa_name();

// kLanes: floats in a vector register; kVectors: registers' worth of columns that a tile of sums
// spans.
struct Base {
  static constexpr int kLanes = 4, kVectors = 2;
};
struct Avx2 {
  static constexpr int kLanes = 8, kVectors = 2;
};
struct Avx512 {
  static constexpr int kLanes = 16, kVectors = 4;
};

// Threads of a team are awake: for them a grain may be so many times smaller.
constexpr int64_t kTeamGrain = 8;

// Runs task(p, begin, end) over [0, count) on torch's threads, `grain` or more of it at a time.
template <class Params>
void parallel(int64_t count, int64_t grain, const Params& p,
              void (*task)(const Params&, int64_t, int64_t)) {
  if (count <= 0) return;
  if (Team* team = Team::led()) return team->share(count, 1 + (grain - 1) / kTeamGrain, p, task);
  if (count <= grain) return task(p, 0, count);
  Team::run([&] { Team::led()->share(count, grain, p, task); }, 1 + (count - 1) / grain);
}

// The same for tasks that are long, and of unequal length.
template <class Params>
void parallel_dynamic(int64_t count, const Params& p,
                      void (*task)(const Params&, int64_t, int64_t)) {
  if (count <= 0) return;
  Team::run([&] { Team::led()->share_singly(count, p, task); }, count);
}

}  // namespace w2a4::cpu

#ifdef W2A4_X86
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
      case Isa::kAvx512Vnni:                                                                       \
        return name##_avx512(p, begin, end);                                                       \
      case Isa::kAvx2:                                                                             \
      case Isa::kAvxVnni:                                                                          \
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
