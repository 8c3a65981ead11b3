// The kernels for any machine: nothing beyond the compiler's default instruction set.
#define CLICKTRAIN_ISA portable
#define CLICKTRAIN_VECTOR_BITS 128
#include "standard.h"
#include "kernels.inc"
