// The fused inner loop for x86-64-v3.
#include "cpu/inner_loop_kernels.h"
#include "cpu/levels.h"

#ifdef FASTKFO_X86_PRAGMAS
#pragma GCC target("arch=x86-64-v3")
#define FASTKFO_LEVEL v3
#define FASTKFO_VECTOR_BYTES 32
#define FASTKFO_TILE_ROWS 4
#include "cpu/inner_loop_level.h"
#endif
