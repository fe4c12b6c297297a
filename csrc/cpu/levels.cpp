#include "cpu/levels.h"

#include <cstdlib>

namespace fastkfo::cpu {

int cpu_level() {
  const char* wanted = std::getenv("FASTKFO_CPU_LEVEL");
  const int limit = wanted && *wanted ? std::atoi(wanted) : 4;
#ifdef FASTKFO_X86_TARGETS
  if (limit >= 4 && __builtin_cpu_supports("x86-64-v4")) return 4;
  if (limit >= 3 && __builtin_cpu_supports("x86-64-v3")) return 3;
#endif
  return 0;
}

}  // namespace fastkfo::cpu
