#include "arch.h"

#include <cstdlib>
#include <string>

namespace w2a4::cpu {
namespace {

Isa detect() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const char* asked = std::getenv("W2A4_CPU_ISA");
  const std::string limit = asked ? asked : "avx512";
  if (avx512 && limit == "avx512") return Isa::kAvx512;
  if (avx2 && limit != "base") return Isa::kAvx2;
#endif
  return Isa::kBase;
}

}  // namespace

Isa isa() {
  static const Isa best = detect();
  return best;
}

}  // namespace w2a4::cpu
