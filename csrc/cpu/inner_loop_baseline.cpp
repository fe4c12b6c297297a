// The fused inner loop for any processor.
#include "cpu/inner_loop_kernels.h"

#define FASTKFO_LEVEL baseline
#define FASTKFO_VECTOR_BYTES 16
#define FASTKFO_TILE_ROWS 4
#include "cpu/inner_loop_level.h"
