// The gradient of the kept weights.
//
// For kernel (o, i) with pattern p: dvalues[entry] = sum over blocks, pixels and lanes of x[i, pixel + tap] * dy[o].
// Kernels are grouped in runs of one channel and one pattern, so that the shifted inputs of several filters are the
// same vectors: 3 filters x 4 taps are 12 sums in registers for 7 loads a pixel, and AVX-512 holds twice as many.
// The accumulators here take any pattern; accumulators.py writes faster ones for a pool.
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

constexpr int kMaxTaps = 9, kMaxFilters = 8;
constexpr int kSums = CLICKTRAIN_VECTOR_BITS >= 512 ? 24 : 12;  // sums that stay in registers

// As many filters at once as leave the sums in registers.
constexpr int most_filters(int taps) { return std::max(1, std::min(kMaxFilters, kSums / taps)); }

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

// Kernels [first, last) in equal groups of at most `most`: a lone filter has too few sums to hide how long an
// addition takes. Calls f(kernel, count).
template <class F>
void for_groups(int first, int last, int most, F f) {
  for (int groups = (last - first + most - 1) / most, count; groups; --groups, first += count) {
    count = (last - first) / groups;
    f(first, count);
  }
}

class GradientTask {
 public:
  GradientTask(const Gradient& g, const float* x, const float* dy, float* dvalues)
      : g_(g), x_(x), dy_(dy), dvalues_(dvalues) {
    window_h_ = (g.chunk_rows - 1) * g.stride_h + g.kernel_size;
    window_w_ = (g.out_w - 1) * g.stride_w + g.kernel_size;
    window_block_ = int64_t(window_h_) * window_w_ * kLanes;
    dy_row_ = int64_t(g.out_w) * kLanes;
    dy_block_ = int64_t(g.filters) * g.out_h * dy_row_;
  }

  // Floats of scratch that task `t` needs.
  size_t floats(int t) const { return sums_floats(t) + (g_.accumulators ? 0 : size_t(window_block_) * g_.chunk_blocks); }

  // Compute all kernels of the task's channels.
  void run(int t, float* scratch) {
    window_ = scratch + sums_floats(t);
    for (int block = 0; block < g_.blocks; block += g_.chunk_blocks)
      for (int row = 0; row < g_.out_h; row += g_.chunk_rows) add_chunk(t, block, row, scratch);
    if (!g_.accumulators) reduce_lanes(first_kernel(t), first_kernel(t + 1), scratch);
  }

 private:
  size_t sums_floats(int t) const {
    return (size_t(first_kernel(t + 1) - first_kernel(t)) * g_.entries + kLanes) * kLanes;  // see reduce_lanes
  }

  int first_kernel(int t) const { return g_.run_starts[g_.task_starts[t]]; }

  // The sums of a run in those of its task.
  float* sums_of(int run, int t, float* sums) const {
    return sums + int64_t(g_.run_starts[run] - first_kernel(t)) * g_.entries * kLanes;
  }

  void add_chunk(int t, int block, int row, float* sums) {
    const int blocks = std::min(g_.chunk_blocks, g_.blocks - block), rows = std::min(g_.chunk_rows, g_.out_h - row);
    if (g_.accumulators) return add_specialised(t, block, blocks, row, rows, sums);
    if (block == 0 && row == 0) std::fill(sums, sums + sums_floats(t), 0.0f);
    add_generic(t, block, blocks, row, rows, sums);
  }

  void add_specialised(int t, int block, int blocks, int row, int rows, float* sums) {
    const bool first = block == 0 && row == 0, last = block + blocks == g_.blocks && row + rows == g_.out_h;
    const int64_t plane = int64_t(g_.in_h) * g_.in_w * kLanes, padding = int64_t(g_.pad_h) * g_.in_w + g_.pad_w;
    const float* planes[kMaxFilters];
    Accumulation a;
    a.x_row = int64_t(g_.in_w) * kLanes;
    a.x_block = g_.channels * plane;
    a.dy = planes;
    a.dy_block = dy_block_;
    a.dy_row = dy_row_;
    a.blocks = blocks;
    a.row = row;
    a.rows = rows;
    a.row_ends = g_.row_ends;
    a.column_ends = g_.column_ends;
    for (int run = g_.task_starts[t]; run < g_.task_starts[t + 1]; ++run) {
      a.x = x_ + (int64_t(block) * g_.channels + g_.run_channels[run]) * plane - padding * kLanes;
      a.sums_out = sums_of(run, t, sums);
      const AccumulateFunction* functions = g_.accumulators + g_.run_patterns[run] * g_.most_filters;
      for_groups(g_.run_starts[run], g_.run_starts[run + 1], g_.most_filters, [&](int kernel, int count) {
        for (int f = 0; f < count; ++f) {
          planes[f] = dy_of(block, kernel + f);
          if (last) __builtin_prefetch(values_of(kernel + f), 1);
        }
        a.sums_in = first ? nullptr : a.sums_out;
        functions[count - 1](&a);
        if (last) reduce_lanes(kernel, kernel + count, a.sums_out);
        if (!(first && last)) a.sums_out += int64_t(count) * g_.entries * kLanes;
      });
    }
  }

  // The output gradient of a kernel's filter in a block.
  const float* dy_of(int block, int kernel) const {
    return dy_ + block * dy_block_ + int64_t(g_.kernel_filters[kernel]) * g_.out_h * dy_row_;
  }

  float* values_of(int kernel) const { return dvalues_ + int64_t(g_.kernel_ids[kernel]) * g_.entries; }

  void add_generic(int t, int block, int blocks, int row, int rows, float* sums) {
    Chunk k;
    k.blocks = blocks;
    k.rows = rows;
    k.columns = g_.out_w;
    k.window = window_;
    k.window_block = window_block_;
    k.window_row = int64_t(g_.stride_h) * window_w_ * kLanes;
    k.window_pixel = int64_t(g_.stride_w) * kLanes;
    k.dy_row = dy_row_;
    k.dy_block = dy_block_;
    int channel = -1;
    for (int run = g_.task_starts[t]; run < g_.task_starts[t + 1]; ++run) {
      if (g_.run_channels[run] != channel) {
        channel = g_.run_channels[run];
        copy_channel(channel, block, blocks, row);
      }
      add_run(run, k, block, row, sums_of(run, t, sums));
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
        const float* line = from + (inside ? int64_t(r) * g_.in_w * kLanes : 0);
        copy_row(line, -g_.pad_w, inside ? g_.in_w : 0, window_w_, to, kLanes);
      }
    }
  }

  void add_run(int run, const Chunk& k, int block, int row, float* sums) {
    const int32_t* positions = g_.positions + int64_t(g_.run_patterns[run]) * g_.entries;
    const int64_t stride = int64_t(g_.entries) * kLanes;
    for (int first_tap = 0; first_tap < g_.entries; first_tap += kMaxTaps) {
      const int taps = std::min(kMaxTaps, g_.entries - first_tap);
      int64_t offsets[kMaxTaps];
      for (int i = 0; i < taps; ++i) {
        const int position = positions[first_tap + i];
        offsets[i] = (int64_t(position / g_.kernel_size) * window_w_ + position % g_.kernel_size) * kLanes;
      }
      float* to = sums + first_tap * kLanes;
      for_groups(g_.run_starts[run], g_.run_starts[run + 1], most_filters(taps), [&](int kernel, int count) {
        const float* planes[kMaxFilters];
        for (int f = 0; f < count; ++f) planes[f] = dy_of(block, kernel + f) + row * dy_row_;
        find_accumulate(taps, count)(k, planes, offsets, to, stride);
        to += count * stride;
      });
    }
  }

  // Add up the lanes of the sums of kernels [begin, end): eight at once, in the order of `sum`. May read eight more.
  void reduce_lanes(int begin, int end, const float* sums) {
    const int64_t count = int64_t(end - begin) * g_.entries;
    for (int64_t i = 0; i < count; i += kLanes) {
      Vec v[kLanes];
      for (int l = 0; l < kLanes; ++l) v[l] = load(sums + (i + l) * kLanes);
      transpose(v);
      float totals[kLanes];
      store(totals, ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])));
      if (g_.entries == 4) {  // two whole kernels
        const int kernel = begin + int(i / 4);
        std::memcpy(values_of(kernel), totals, 4 * sizeof(float));
        if (kernel + 1 < end) std::memcpy(values_of(kernel + 1), totals + 4, 4 * sizeof(float));
      } else {
        for (int l = 0; l < kLanes && i + l < count; ++l)
          values_of(begin + int((i + l) / g_.entries))[(i + l) % g_.entries] = totals[l];
      }
    }
  }

  const Gradient& g_;
  const float* x_;
  const float* dy_;
  float* dvalues_;
  float* window_ = nullptr;
  int window_h_, window_w_;
  int64_t window_block_, dy_row_, dy_block_;
};

inline void gradient(const Gradient& g, const float* x, const float* dy, float* dvalues, int threads) {
  clicktrain::Shares shares(g.tasks, threads);
#pragma omp parallel num_threads(threads)
  {
    thread_local clicktrain::Scratch scratch;
    GradientTask task(g, x, dy, dvalues);
    shares.work([&](int64_t t) { task.run(int(t), scratch.floats(task.floats(int(t)))); });
  }
}

}  // namespace CLICKTRAIN_ISA
