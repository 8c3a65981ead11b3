// What this library was made from and what this machine can run.
#include <algorithm>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <unistd.h>

#ifndef CLICKTRAIN_DIGEST
#define CLICKTRAIN_DIGEST ""
#endif

extern "C" {

// Bytes of a core's data cache of the first or second level; 0 where the C library does not tell.
int64_t clicktrain_cache_bytes(int level) {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  return std::max<int64_t>(0, sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : _SC_LEVEL2_CACHE_SIZE));
#else
  return 0;
#endif
}

const char* clicktrain_digest() { return CLICKTRAIN_DIGEST; }

#if defined(__x86_64__)
// Whether 512 bits are computed at once. The only processors that split them are AMD's family 19h (Zen 4).
int clicktrain_wide_registers() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  return (a >> 8 & 0xf) + (a >> 20 & 0xff) != 0x19;
}

int clicktrain_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

int clicktrain_has_avx512() {
  return clicktrain_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}
#else
int clicktrain_wide_registers() { return 0; }
int clicktrain_has_avx2() { return 0; }
int clicktrain_has_avx512() { return 0; }
#endif

}
