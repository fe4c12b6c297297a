// The layers for any processor.
#include "cpu/layers.h"

#define FASTKFO_LEVEL baseline
#define FASTKFO_VECTOR_BYTES 16
#include "cpu/layers_level.h"
