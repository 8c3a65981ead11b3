// Working memory of a thread: grows, is kept between calls, and goes with the thread.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace clicktrain {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // Uninitialised floats on a cache line boundary, valid until the next call.
  float* floats(size_t count) {
    if (count > capacity_) {
      std::free(memory_);
      const size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
      memory_ = static_cast<float*>(std::aligned_alloc(64, bytes));
      capacity_ = memory_ ? count : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return memory_;
  }

 private:
  float* memory_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace clicktrain
