// The layers for x86-64-v3.
#include "cpu/layers.h"
#include "cpu/levels.h"

#ifdef FASTKFO_X86_PRAGMAS
#pragma GCC target("arch=x86-64-v3")
#define FASTKFO_LEVEL v3
#define FASTKFO_VECTOR_BYTES 32
#include "cpu/layers_level.h"
#endif
