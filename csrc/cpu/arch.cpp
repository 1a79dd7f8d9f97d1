#include "arch.h"

#include <cstdlib>
#include <string>

#ifdef W2A4_X86
#include <cpuid.h>
#endif

namespace w2a4::cpu {
namespace {

#ifdef W2A4_X86
// Asked of the processor, since older compilers' __builtin_cpu_supports does not know the name.
bool has_avxvnni() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 4));
}
#endif

Isa detect() {
#ifdef W2A4_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool avx512vnni = avx512 && __builtin_cpu_supports("avx512vnni");
#ifdef W2A4_AVXVNNI
  const bool avxvnni = avx2 && has_avxvnni();
#else
  const bool avxvnni = false;
#endif
  const char* asked = std::getenv("W2A4_CPU_ISA");
  const std::string limit = asked ? asked : "";
  const bool any = limit != "base" && limit != "avx2" && limit != "avxvnni" && limit != "avx512";
  if (avx512vnni && any) return Isa::kAvx512Vnni;
  if (avx512 && (any || limit == "avx512")) return Isa::kAvx512;
  if (avxvnni && (any || limit == "avxvnni")) return Isa::kAvxVnni;
  if (avx2 && limit != "base") return Isa::kAvx2;
#endif
  return Isa::kBase;
}

}  // namespace

Isa isa() {
  static const Isa best = detect();
  return best;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::kBase:
      return "base";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvxVnni:
      return "avxvnni";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Vnni:
      return "avx512vnni";
  }
  return "";
}

}  // namespace w2a4::cpu
