// The kernels for any machine: nothing beyond the compiler's default instruction set.
#define CLICKTRAIN_ISA portable
#include "standard.h"
#include "kernels.inc"
