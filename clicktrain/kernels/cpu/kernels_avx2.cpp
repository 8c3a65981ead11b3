// The kernels for AVX2 and FMA.
#if defined(__x86_64__)
#define CLICKTRAIN_ISA avx2
#define CLICKTRAIN_VECTOR_BITS 256
#include "standard.h"
#pragma GCC target("avx2,fma")
#include "kernels.inc"
#endif
