// Work dealt out to threads so that each finds in its own caches what it wrote in the step before.
//
// Cores may be far from each other: where they do not share a cache, to write a line that another core has read costs
// as much as ten lines of one's own. Every step of a network therefore gives the first part of its items to the first
// thread, and so on, as `schedule(static)` does. Here, who is done helps the others, item by item.
#pragma once

#include <atomic>
#include <memory>

#include <omp.h>

namespace clicktrain {

class Shares {
 public:
  Shares(int64_t items, int threads) : threads_(threads), next_(new Next[threads]) {
    for (int t = 0; t < threads; ++t) next_[t].item = items * t / threads, next_[t].end = items * (t + 1) / threads;
  }

  // To be called by every thread of the team; calls f(item).
  template <class F>
  void work(F f) {
    for (int i = 0; i < threads_; ++i) {
      Next& next = next_[(omp_get_thread_num() + i) % threads_];
      for (int64_t item; (item = next.item.fetch_add(1, std::memory_order_relaxed)) < next.end;) f(item);
    }
  }

 private:
  struct alignas(64) Next {
    std::atomic<int64_t> item;
    int64_t end;
  };

  const int threads_;
  const std::unique_ptr<Next[]> next_;
};

}  // namespace clicktrain
