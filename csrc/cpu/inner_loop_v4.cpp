// The fused inner loop for x86-64-v4.
#include "cpu/inner_loop_kernels.h"
#include "cpu/levels.h"

#ifdef FASTKFO_X86_PRAGMAS
#pragma GCC target("arch=x86-64-v4")
#define FASTKFO_LEVEL v4
#define FASTKFO_VECTOR_BYTES 64
#define FASTKFO_TILE_ROWS 8
#include "cpu/inner_loop_level.h"
#endif
