// The machine's rate of multiply-adds: what a compute kernel's speed is compared with. And how far its cores are apart.
#pragma once

#include "standard.h"

namespace CLICKTRAIN_ISA {

constexpr int kWidth = CLICKTRAIN_VECTOR_BITS / 32;
typedef float Wide __attribute__((vector_size(kWidth * sizeof(float))));

constexpr int kChains = 12;  // independent sums: two units with a latency of four or five cycles, and some spare

// Every thread does `rounds` times kChains * kWidth multiply-adds on registers; returns how many that is for one.
inline int multiply_adds(int64_t rounds, float factor, float summand, float* result, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Wide sums[kChains];
    for (int i = 0; i < kChains; ++i) sums[i] = Wide{} + static_cast<float>(i);
    const Wide a = Wide{} + factor, b = Wide{} + summand;
    for (int64_t round = 0; round < rounds; ++round)
      for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * a + b;
    for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
    // The result depends on every sum, so none can be left out.
#pragma omp critical
    *result = sums[0][0];
  }
  return kChains * kWidth;
}

// Two threads hand a number to and fro so many times.
inline void round_trips(int64_t rounds) {
  alignas(64) std::atomic<int64_t> turn{0};
#pragma omp parallel num_threads(2)
  if (omp_get_num_threads() == 2)
    for (int64_t mine = omp_get_thread_num(); mine < 2 * rounds; mine += 2) {
      while (turn.load(std::memory_order_acquire) != mine) {
      }
      turn.store(mine + 1, std::memory_order_release);
    }
}

}  // namespace CLICKTRAIN_ISA
