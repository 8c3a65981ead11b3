// The driver of a convolution pass: cuts the work into items, copies windows, lets a sweep do the arithmetic.
//
// An item is one tile of output pixels (and, when there are few tiles, a part of the filters). For each block of
// input channels the tile's window is copied to thread-local memory: there its rows have a fixed width and the
// padding is real zeros, so that a sweep meets no branch and no stride. Then all filters sweep the window. Sums wait
// in thread-local memory between channel blocks; the last block writes to y. (Sweeps by channel read a window only
// once, and therefore where it is.)
//
// Each output is summed by one thread in the order of the plan, whatever the number of threads and items.
#pragma once

#include "lanes.h"
#include "wide_strips.h"
#include "winograd.h"

namespace CLICKTRAIN_ISA {

// A range of output pixels cut into tiles whose sizes differ by at most one (one phase pixel, that is).
struct Cuts {
  int size, spread, count;

  Cuts(int size, int tile, int spread) : size(size), spread(spread), count((size + tile - 1) / tile) {}

  int start(int i) const {
    const int64_t units = (size + spread - 1) / spread;
    return std::min(size, int(i * units / count) * spread);
  }
  int length(int i) const { return start(i + 1) - start(i); }
};

// A tile's place in the output and its size there.
struct TilePlace {
  int block, top, left;
  int blocks, rows, columns;
  int64_t number;
};

// The tiles of a pass, and how they are grouped into bands: neighbours in a row, which share a window.
class Tiles {
 public:
  explicit Tiles(const Pass& p)
      : blocks_(p.blocks, p.tile_blocks, 1),
        rows_(p.out_h, p.tile_h, p.spread_h),
        columns_(p.out_w, p.tile_w, p.spread_w),
        bands_(columns_.count, p.band, 1) {}

  int64_t count() const { return int64_t(blocks_.count) * rows_.count * columns_.count; }
  int64_t bands() const { return int64_t(blocks_.count) * rows_.count * bands_.count; }
  int band_size(int64_t band) const { return bands_.length(int(band % bands_.count)); }

  // Tile i of a band.
  TilePlace tile(int64_t band, int i) const {
    const int64_t line = band / bands_.count;
    const int column = bands_.start(int(band % bands_.count)) + i;
    const int row = int(line % rows_.count), block = int(line / rows_.count);
    return {blocks_.start(block),  rows_.start(row),  columns_.start(column),
            blocks_.length(block), rows_.length(row), columns_.length(column),
            line * columns_.count + column};
  }

 private:
  Cuts blocks_, rows_, columns_, bands_;
};

// Copy `count` pixels of an input row, starting at column `from`, to every `step` floats; columns outside [0, width)
// become zero.
CLICKTRAIN_INLINE void copy_row(const float* row, int from, int width, int count, float* to, int step) {
  const int begin = std::min(count, std::max(0, -from)), end = std::max(begin, std::min(count, width - from));
  for (int i = 0; i < begin; ++i) store(to + i * step, Vec{});
  for (int i = begin; i < end; ++i) store(to + i * step, load(row + (from + i) * kLanes));
  for (int i = end; i < count; ++i) store(to + i * step, Vec{});
}

// One thread's work on a pass.
class Convolution {
 public:
  // Floats of scratch.
  static size_t floats(const Pass& p) {
    return WideStrips::floats(p) + window_floats(p) + size_t(p.part) * p.band * tile_floats(p);
  }

  Convolution(const Pass& p, const float* x, const float* weights, const Epilogue& epilogue, float* y, float* scratch)
      : p_(p), epilogue_(epilogue), wide_(p, x, scratch), x_(x), weights_(weights), y_(y),
        window_(scratch + WideStrips::floats(p)), sums_(window_ + window_floats(p)) {}

  // Compute filters [begin, end) of the tiles of a band.
  void run(const Tiles& tiles, int64_t band, int begin, int end) {
    const TilePlace corner = tiles.tile(band, 0);
    if (p_.grid_h) read_wide_strips(corner);
    if (p_.keeps_sums) return run_kept(corner, begin, end);
    const int count = tiles.band_size(band);
    for (int cb = 0; cb < p_.channel_blocks; ++cb) {
      copy_window(corner, cb);
      for (int i = 0; i < count; ++i) {
        const TilePlace t = tiles.tile(band, i);
        const float* window = window_ + int64_t(t.left - corner.left) * p_.stride_w / p_.spread_w * window_step();
        float* sums = sums_ + (int64_t(i) * (end - begin) - begin) * tile_floats(p_);
        for (int group = 0; group < p_.groups; ++group) {
          const SweepFunction sweep = p_.sweeps[group * tiles.count() + t.number];
          const int list = cb * p_.groups + group;
          const bool last = list == p_.channel_blocks * p_.groups - 1;
          for (int phase = 0; phase < p_.phases; ++phase) {
            Sweep s = sweep_of(list, phase, window, sums, begin, end);
            if (last && direct(t)) write_to_output(s, t, phase);
            sweep(&s);
          }
        }
      }
    }
    for (int i = 0; i < count; ++i) {
      const TilePlace t = tiles.tile(band, i);
      if (!direct(t)) store_tile(t, sums_ + int64_t(i) * (end - begin) * tile_floats(p_), begin, end);
    }
  }

 private:
  // Compute filters of one tile whose sums stay in memory until all channels are done.
  void run_kept(const TilePlace& t, int begin, int end) {
    for (int cb = 0; cb < p_.channel_blocks; ++cb) {
      Sweep s = sweep_of(cb, 0, place(t, cb), sums_ - begin * tile_floats(p_), begin, end);
      if (cb == p_.channel_blocks - 1) finish_to_output(s, t, begin);
      p_.sweeps[t.number](&s);
    }
  }

  static size_t window_floats(const Pass& p) {
    return p.keeps_sums ? 0 : size_t(p.channel_block) * p.tile_blocks * p.window_h * p.window_pitch * kLanes;
  }
  static int64_t tile_floats(const Pass& p) { return int64_t(p.tile_blocks) * p.tile_h * p.tile_w * kLanes; }

  // Whether the tile's sweep may write to the output.
  bool direct(const TilePlace& t) const {
    return !p_.whole_tiles || (t.rows == p_.tile_h && t.columns == p_.tile_w);
  }

  // Where the window of a tile lies in x; what is padding lies outside of its plane.
  const float* place(const TilePlace& t, int cb) const {
    const int64_t plane = int64_t(t.block - first_block_) * p_.channels + int64_t(cb) * p_.channel_block;
    return x_ + ((plane * p_.in_h + window_top(t)) * p_.in_w + window_left(t)) * kLanes;
  }

  // Let wide strips take the place of x.
  void read_wide_strips(const TilePlace& t) {
    const int top = window_top(t);
    x_ = wide_.rows(t.block, t.blocks, top, top + p_.window_h);
    first_block_ = t.block;
  }

  int window_top(const TilePlace& t) const { return p_.start_h + t.top * p_.stride_h / p_.spread_h; }
  int window_left(const TilePlace& t) const { return p_.start_w + t.left * p_.stride_w / p_.spread_w; }

  // Floats from one pixel of a window to the next.
  int window_step() const { return p_.woven ? p_.tile_blocks * kLanes : kLanes; }

  void copy_window(const TilePlace& corner, int cb) {
    if (p_.woven)
      copy_window(corner, cb, p_.tile_blocks * kLanes, kLanes);
    else
      copy_window(corner, cb, kLanes, int64_t(p_.window_h) * p_.window_pitch * kLanes);
  }

  // With so many floats from pixel to pixel and from block to block.
  CLICKTRAIN_INLINE void copy_window(const TilePlace& corner, int cb, int step, int64_t block_step) {
    const int first = cb * p_.channel_block, last = std::min(first + p_.channel_block, p_.channels);
    const int top = window_top(corner), left = window_left(corner);
    const int below = p_.tile_h * p_.stride_h / p_.spread_h;  // rows to the window of the tile below
    const int64_t row_floats = int64_t(p_.in_w) * kLanes, window_row = int64_t(p_.window_pitch) * step;
    const int64_t channel_step = int64_t(p_.tile_blocks) * p_.window_h * p_.window_pitch * kLanes;
    const float* const x = x_;  // a store to the window could change a member, for all that the compiler knows
    const int first_block = first_block_;
    for (int c = first; c < last; ++c)
      for (int b = 0; b < p_.tile_blocks; ++b) {
        float* to = window_ + (c - first) * channel_step + b * block_step;
        const int block = corner.block + std::min(b, corner.blocks - 1);
        const float* plane = x + (int64_t(block - first_block) * p_.channels + c) * p_.in_h * row_floats;
        for (int row = top; row < top + p_.window_h; ++row, to += window_row) {
          if (row < 0 || row >= p_.in_h)
            copy_row(plane, 0, 0, p_.window_w, to, step);
          else
            copy_row(plane + row * row_floats, left, p_.in_w, p_.window_w, to, step);
          if (row + below >= top + p_.window_h) fetch_ahead(plane + (row + below) * row_floats + left * kLanes);
        }
      }
  }

  // Bring a row of a window to the second-level cache.
  void fetch_ahead(const float* row) const {
    for (int i = 0; i < p_.window_w; i += 2) __builtin_prefetch(row + i * kLanes, 0, 2);
  }

  // The call for one list of records (channel block and group) and one phase, with the sums in scratch.
  Sweep sweep_of(int list, int phase, const float* window, float* sums, int begin, int end) {
    Sweep s;
    s.window = window;
    s.window_row = int64_t(p_.stride_h) * p_.window_pitch * window_step();
    s.window_pixel = int64_t(p_.stride_w) * window_step();
    s.order = p_.order + int64_t(list) * p_.filters;
    s.starts = p_.starts + (int64_t(list) * p_.phases + phase) * (p_.filters + 1);
    s.runs = p_.runs + int64_t(list) * p_.list_runs + int64_t(begin / p_.part) * p_.part_runs;
    s.offsets = p_.offsets;
    s.weights = weights_;
    s.gather = p_.gather;
    s.in_row = s.out_row = int64_t(pixel_rows()) * p_.tile_w * kLanes;
    s.in_pixel = s.out_pixel = int64_t(pixel_columns()) * kLanes;
    s.in_block = s.out_block = int64_t(p_.tile_h) * p_.tile_w * kLanes;
    s.in_filter = s.out_filter = p_.tile_blocks * s.in_block;
    s.sums_out = sums + first_pixel(phase, p_.tile_w);
    s.sums_in = list ? s.sums_out : nullptr;
    s.begin = begin;
    s.end = end;
    s.channels = std::min(p_.channel_block, p_.channels - list / p_.groups * p_.channel_block);
    s.streaming = 0;
    s.bias = epilogue_.bias;
    s.residual = nullptr;
    s.relu = 0;
    s.max_pool = 0;
    s.output = nullptr;
    return s;
  }

  void write_to_output(Sweep& s, const TilePlace& t, int phase) {
    const int less = p_.max_pool ? 2 : 1, width = p_.out_w / less;
    s.out_row = int64_t(pixel_rows()) * width * kLanes;
    s.out_filter = int64_t(p_.out_h / less) * width * kLanes;
    s.out_block = p_.filters * s.out_filter;
    s.max_pool = p_.max_pool;
    const int64_t corner = (int64_t(t.top / less) * width + t.left / less) * kLanes;
    s.sums_out = y_ + t.block * s.out_block + corner + first_pixel(phase, width);
    finish(s, s.sums_out);
  }

  // Let the last call of a sweep by channel write what becomes of the sums, from filter `begin` on.
  void finish_to_output(Sweep& s, const TilePlace& t, int begin) {
    const int less = p_.max_pool ? 2 : 1;
    s.out_pixel = kLanes;
    s.out_row = int64_t(p_.out_w / less) * kLanes;
    s.out_filter = p_.out_h / less * s.out_row;
    s.output = y_ + (int64_t(t.block) * p_.filters + begin) * s.out_filter + t.top / less * s.out_row + t.left / less * kLanes;
    s.max_pool = p_.max_pool;
    finish(s, s.output);
  }

  void finish(Sweep& s, const float* output) const {
    s.streaming = p_.streaming;
    if (epilogue_.residual) s.residual = epilogue_.residual + (output - y_);
    s.relu = epilogue_.relu;
  }

  // Rows and columns from one pixel of a sweep to the next.
  int pixel_rows() const { return p_.phases > 1 ? p_.spread_h : 1; }
  int pixel_columns() const { return p_.phases > 1 ? p_.spread_w : 1; }

  int64_t first_pixel(int phase, int width) const {
    return (int64_t(phase / p_.spread_w) * width + phase % p_.spread_w) * kLanes;
  }

  // Copy the part of a tile's sums that lies inside the output.
  void store_tile(const TilePlace& t, const float* from, int begin, int end) {
    for (int f = begin; f < end; ++f)
      for (int b = 0; b < p_.tile_blocks; ++b)
        for (int r = 0; r < p_.tile_h; ++r, from += p_.tile_w * kLanes) {
          if (b >= t.blocks || r >= t.rows) continue;
          float* plane = y_ + (int64_t(t.block + b) * p_.filters + f) * p_.out_h * p_.out_w * kLanes;
          float* to = plane + (int64_t(t.top + r) * p_.out_w + t.left) * kLanes;
          finish_row(from, epilogue_.residual ? epilogue_.residual + (to - y_) : nullptr, t.columns * kLanes, to);
        }
  }

  void finish_row(const float* sums, const float* residual, int floats, float* to) const {
    for (int i = 0; i < floats; i += kLanes) {
      Vec v = load(sums + i);
      if (residual) v += load(residual + i);
      if (epilogue_.relu) v = relu(v);
      store(to + i, v);
    }
  }

  const Pass& p_;
  const Epilogue epilogue_;
  WideStrips wide_;
  const float* x_;  // from first_block_ on
  int first_block_ = 0;
  const float* weights_;
  float *y_, *window_, *sums_;
};

// Bring the values into the order in which the sweeps read them.
template <int N, bool Reversed>
void gather_weights(const Pass& p, const float* values, float* weights, int threads) {
  constexpr int64_t kAhead = 32;  // values are far from caches after a step of an optimizer
  const int n = N ? N : p.record_weights;
#pragma omp parallel for num_threads(threads) schedule(static) if (p.records * n > 16384)
  for (int64_t i = 0; i < p.records; ++i) {
    __builtin_prefetch(values + p.gather[std::min(i + kAhead, p.records - 1)]);
    const float* from = values + p.gather[i];
    float* to = weights + i * n;
    for (int e = 0; e < n; ++e) to[e] = from[Reversed ? n - 1 - e : e];
  }
}

inline void gather_weights(const Pass& p, const float* values, float* weights, int threads) {
  if (p.transforms) return transform_weights(p, values, weights, threads);
  if (p.record_weights == 1) return gather_weights<1, false>(p, values, weights, threads);
  if (p.record_weights == 4)
    return p.reversed ? gather_weights<4, true>(p, values, weights, threads)
                      : gather_weights<4, false>(p, values, weights, threads);
  return p.reversed ? gather_weights<0, true>(p, values, weights, threads)
                    : gather_weights<0, false>(p, values, weights, threads);
}

// With weights as the sweeps read them.
inline void convolve_with(
    const Pass& p, const float* x, const float* weights, const Epilogue& epilogue, float* y, int threads) {
  if (p.transforms) return convolve_transformed(p, x, weights, epilogue, y, threads);
  const Tiles tiles(p);
  const int parts = (p.filters + p.part - 1) / p.part;
  clicktrain::Shares shares(tiles.bands() * parts, threads);
#pragma omp parallel num_threads(threads)
  {
    thread_local clicktrain::Scratch scratch;
    Convolution work(p, x, weights, epilogue, y, scratch.floats(Convolution::floats(p)));
    shares.work([&](int64_t item) {
      const int begin = int(item % parts) * p.part, end = std::min(begin + p.part, p.filters);
      work.run(tiles, item / parts, begin, end);
    });
    if (p.streaming) drain();
  }
}

inline void convolve(const Pass& p, const float* x, const float* values, float* y, int threads) {
  if (p.reads_values) return convolve_with(p, x, values, {nullptr, nullptr, 0}, y, threads);
  thread_local clicktrain::Scratch gathered;
  float* weights = gathered.floats(size_t(p.records) * p.record_weights + 1);
  gather_weights(p, values, weights, threads);
  convolve_with(p, x, weights, {nullptr, nullptr, 0}, y, threads);
}

}  // namespace CLICKTRAIN_ISA
