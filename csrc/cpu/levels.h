// Instruction sets that code is compiled for, and which of them the processor has.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && defined(__gnu_linux__) && \
    !defined(FASTKFO_NO_TARGET_CLONES)
#define FASTKFO_X86_TARGETS 1
#if !defined(__clang__)
#define FASTKFO_X86_PRAGMAS 1  // whole files for one instruction set
#endif
#endif

namespace fastkfo::cpu {

// 0, 3 or 4: the widest that the processor has and FASTKFO_CPU_LEVEL allows.
int cpu_level();

// What one of three functions gives: for any processor, for level 3, for level 4.
template <class K>
K of_level(K (*plain)(), K (*newer)(), K (*newest)()) {
  const int level = cpu_level();
  return level == 4 ? newest() : level == 3 ? newer() : plain();
}
#ifdef FASTKFO_X86_PRAGMAS
#define FASTKFO_LEVELS(f) baseline::f, v3::f, v4::f
#else
#define FASTKFO_LEVELS(f) baseline::f, baseline::f, baseline::f
#endif

}  // namespace fastkfo::cpu
