// The kernels for AVX-512: vectors of 256 bits as under AVX2, but 32 registers.
#if defined(__x86_64__)
#define CLICKTRAIN_ISA avx512
#define CLICKTRAIN_VECTOR_BITS 512
#include "standard.h"
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
#include "kernels.inc"
#endif
