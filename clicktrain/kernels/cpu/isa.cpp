// What this library was made from and what this machine can run.
#ifndef CLICKTRAIN_DIGEST
#define CLICKTRAIN_DIGEST ""
#endif

extern "C" {

const char* clicktrain_digest() { return CLICKTRAIN_DIGEST; }

#if defined(__x86_64__)
int clicktrain_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

int clicktrain_has_avx512() {
  return clicktrain_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}
#else
int clicktrain_has_avx2() { return 0; }
int clicktrain_has_avx512() { return 0; }
#endif

}
