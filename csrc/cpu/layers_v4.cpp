// The layers for x86-64-v4.
#include "cpu/layers.h"
#include "cpu/levels.h"

#ifdef FASTKFO_X86_PRAGMAS
#pragma GCC target("arch=x86-64-v4")
#define FASTKFO_LEVEL v4
#define FASTKFO_VECTOR_BYTES 64
#include "cpu/layers_level.h"
#endif
