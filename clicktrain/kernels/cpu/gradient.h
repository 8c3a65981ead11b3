// The gradient of the kept weights.
//
// For kernel (o, i) with pattern p: dvalues[entry] = sum over blocks, pixels and lanes of x[i, pixel + tap] * dy[o].
// Kernels are grouped in runs of one channel and one pattern, so that the shifted inputs of several filters are the
// same vectors: 3 filters x 4 taps are 12 sums in registers for 7 loads a pixel, and AVX-512 holds twice as many.
//
// Pixels are cut into chunks, so that dy stays in the cache while the channels pass by; between chunks
// the eight lanes of each sum wait in memory. Threads share out channels, so nothing is reduced across threads.
#pragma once


#include "convolution.h"
#include "lanes.h"

namespace CLICKTRAIN_ISA {

// A chunk of pixels as the innermost loops see it; strides in floats.
struct Chunk {
  int blocks, rows, columns;
  const float* window;                         // one channel of x, padding included
  int64_t window_block, window_row, window_pixel;
  int64_t dy_block, dy_row;
};

// Add one chunk to the sums [Filters][stride] of `Taps` taps of `Filters` kernels that share channel and pattern.
template <int Filters, int Taps>
void accumulate(const Chunk& k, const float* const* dy, const int64_t* taps, float* sums, int64_t stride) {
  Vec total[Filters][Taps];
  for (int f = 0; f < Filters; ++f)
    for (int t = 0; t < Taps; ++t) total[f][t] = load(sums + f * stride + t * kLanes);
  for (int b = 0; b < k.blocks; ++b)
    for (int r = 0; r < k.rows; ++r) {
      const float* x = k.window + b * k.window_block + r * k.window_row;
      const int64_t row = b * k.dy_block + r * k.dy_row;
      for (int c = 0; c < k.columns; ++c, x += k.window_pixel) {
        Vec shifted[Taps];
        for (int t = 0; t < Taps; ++t) shifted[t] = load(x + taps[t]);
        for (int f = 0; f < Filters; ++f) {
          const Vec g = load(dy[f] + row + c * kLanes);
          for (int t = 0; t < Taps; ++t) total[f][t] += shifted[t] * g;
        }
      }
    }
  for (int f = 0; f < Filters; ++f)
    for (int t = 0; t < Taps; ++t) store(sums + f * stride + t * kLanes, total[f][t]);
}

using Accumulate = void (*)(const Chunk&, const float* const*, const int64_t*, float*, int64_t);

constexpr int kMaxTaps = 9;
constexpr int kSums = CLICKTRAIN_VECTOR_BITS >= 512 ? 24 : 12;  // sums that stay in registers

// As many filters at once as leave the sums in registers.
constexpr int most_filters(int taps) { return std::max(1, std::min(8, kSums / taps)); }

template <int Taps, int Filters = most_filters(Taps)>
Accumulate accumulate_for(int filters) {
  if (filters == Filters) return accumulate<Filters, Taps>;
  if constexpr (Filters > 1) return accumulate_for<Taps, Filters - 1>(filters);
  return nullptr;
}

template <int Taps = kMaxTaps>
Accumulate find_accumulate(int taps, int filters) {
  if (taps == Taps) return accumulate_for<Taps>(filters);
  if constexpr (Taps > 1) return find_accumulate<Taps - 1>(taps, filters);
  return nullptr;
}

class GradientTask {
 public:
  GradientTask(const Gradient& g, const float* x, const float* dy, float* dvalues)
      : g_(g), x_(x), dy_(dy), dvalues_(dvalues) {
    window_h_ = (g.chunk_rows - 1) * g.stride_h + g.kernel_size;
    window_w_ = (g.out_w - 1) * g.stride_w + g.kernel_size;
    window_block_ = int64_t(window_h_) * window_w_ * kLanes;
  }

  // Floats of scratch that task `t` needs.
  size_t floats(int t) const { return size_t(window_block_) * g_.chunk_blocks + sums_floats(t); }

  // Compute all kernels of the task's channels.
  void run(int t, float* scratch) {
    window_ = scratch + sums_floats(t);
    std::fill(scratch, window_, 0.0f);
    for (int block = 0; block < g_.blocks; block += g_.chunk_blocks)
      for (int row = 0; row < g_.out_h; row += g_.chunk_rows) add_chunk(t, block, row, scratch);
    reduce_lanes(t, scratch);
  }

 private:
  size_t sums_floats(int t) const {
    return size_t(first_kernel(t + 1) - first_kernel(t)) * g_.entries * kLanes;
  }

  int first_kernel(int t) const { return g_.run_starts[g_.task_starts[t]]; }

  void add_chunk(int t, int block, int row, float* sums) {
    Chunk k;
    k.blocks = std::min(g_.chunk_blocks, g_.blocks - block);
    k.rows = std::min(g_.chunk_rows, g_.out_h - row);
    k.columns = g_.out_w;
    k.window = window_;
    k.window_block = window_block_;
    k.window_row = int64_t(g_.stride_h) * window_w_ * kLanes;
    k.window_pixel = int64_t(g_.stride_w) * kLanes;
    k.dy_row = int64_t(g_.out_w) * kLanes;
    k.dy_block = int64_t(g_.filters) * g_.out_h * k.dy_row;
    const float* dy = dy_ + block * k.dy_block + row * k.dy_row;

    int channel = -1;
    for (int run = g_.task_starts[t]; run < g_.task_starts[t + 1]; ++run) {
      if (g_.run_channels[run] != channel) {
        channel = g_.run_channels[run];
        copy_channel(channel, block, k.blocks, row);
      }
      add_run(run, k, dy, sums + int64_t(g_.run_starts[run] - first_kernel(t)) * g_.entries * kLanes);
    }
  }

  // Copy what the chunk's rows see of a channel, with the padding as zeros.
  void copy_channel(int channel, int block, int blocks, int row) {
    const int64_t plane = int64_t(g_.in_h) * g_.in_w * kLanes;
    float* to = window_;
    for (int b = block; b < block + blocks; ++b) {
      const float* from = x_ + (int64_t(b) * g_.channels + channel) * plane;
      const int top = row * g_.stride_h - g_.pad_h;
      for (int r = top; r < top + window_h_; ++r, to += window_w_ * kLanes) {
        const bool inside = r >= 0 && r < g_.in_h;
        copy_row(from + (inside ? int64_t(r) * g_.in_w * kLanes : 0), -g_.pad_w, inside ? g_.in_w : 0, window_w_, to);
      }
    }
  }

  void add_run(int run, const Chunk& k, const float* dy, float* sums) {
    const int32_t* positions = g_.positions + int64_t(g_.run_patterns[run]) * g_.entries;
    const int64_t stride = int64_t(g_.entries) * kLanes, plane = int64_t(g_.out_h) * g_.out_w * kLanes;
    const int end = g_.run_starts[run + 1];
    for (int first_tap = 0; first_tap < g_.entries; first_tap += kMaxTaps) {
      const int taps = std::min(kMaxTaps, g_.entries - first_tap);
      int64_t offsets[kMaxTaps];
      for (int i = 0; i < taps; ++i) {
        const int position = positions[first_tap + i];
        offsets[i] = (int64_t(position / g_.kernel_size) * window_w_ + position % g_.kernel_size) * kLanes;
      }
      float* to = sums + first_tap * kLanes;
      // Groups of about equal size: a lone filter has too few sums to hide how long an addition takes.
      int groups = (end - g_.run_starts[run] + most_filters(taps) - 1) / most_filters(taps);
      for (int kernel = g_.run_starts[run], count; groups; --groups, kernel += count, to += count * stride) {
        count = (end - kernel) / groups;
        const float* planes[8];
        for (int f = 0; f < count; ++f) planes[f] = dy + g_.kernel_filters[kernel + f] * plane;
        find_accumulate(taps, count)(k, planes, offsets, to, stride);
      }
    }
  }

  void reduce_lanes(int t, const float* sums) {
    for (int kernel = first_kernel(t); kernel < first_kernel(t + 1); ++kernel) {
      float* to = dvalues_ + int64_t(g_.kernel_ids[kernel]) * g_.entries;
      for (int e = 0; e < g_.entries; ++e, sums += kLanes) to[e] = sum(load(sums));
    }
  }

  const Gradient& g_;
  const float* x_;
  const float* dy_;
  float* dvalues_;
  float* window_ = nullptr;
  int window_h_, window_w_;
  int64_t window_block_;
};

inline void gradient(const Gradient& g, const float* x, const float* dy, float* dvalues, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int t = 0; t < g.tasks; ++t) {
    thread_local clicktrain::Scratch scratch;
    GradientTask task(g, x, dy, dvalues);
    task.run(t, scratch.floats(task.floats(t)));
  }
}

}  // namespace CLICKTRAIN_ISA
