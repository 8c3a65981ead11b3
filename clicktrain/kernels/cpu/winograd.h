// Convolutions of 3 x 3 taps by Winograd's transform, F(4 x 4, 3 x 3) of Lavin & Gray (arXiv 1509.09308).
//
// Where patterns leave four taps, an output pixel takes four multiply-adds for each kernel. Transformed, a tile of 4 x 4
// pixels takes one for each of 36 points, 2.25 a pixel, whatever the taps are: a kernel that stays is dense there, one
// that was removed is not there at all. At each point there is a sparse matrix of filters and channels, the same places
// for all points. It is multiplied four filters at a time: the channels of four filters are listed by which of the four
// keep them, so that a value of the input, once loaded, serves all that do, and no loop holds a branch.
//
// Rounding errors are some times those of a sum, about 1e-6 of the result; infinite values and NaN spread over a tile.
#pragma once

#include "lanes.h"

namespace CLICKTRAIN_ISA {

constexpr int kSide = 4, kWindow = 6, kPoints = kWindow * kWindow;

#if CLICKTRAIN_VECTOR_BITS >= 512
typedef Pair Columns;
constexpr int kRegisters = 4;
CLICKTRAIN_INLINE Columns load_columns(const float* p) { return load_pair(p); }
CLICKTRAIN_INLINE Columns all_columns(float f) { return broadcast_pair(f); }
#else
typedef Vec Columns;
constexpr int kRegisters = 2;
CLICKTRAIN_INLINE Columns load_columns(const float* p) { return load(p); }
CLICKTRAIN_INLINE Columns all_columns(float f) { return broadcast(f); }
#endif

// Tiles of a matrix product: the sums of four filters, what they read and a weight fit into the registers.
constexpr int kRegisterFloats = sizeof(Columns) / sizeof(float), kColumnFloats = kRegisters * kRegisterFloats;
constexpr int kColumns = kColumnFloats / kLanes;

// The values of a window at the points, of one axis: B^T d.
CLICKTRAIN_INLINE void to_points(const Vec (&d)[kWindow], Vec (&points)[kWindow]) {
  const Vec even = d[4] - 4.0f * d[2], odd = d[3] - 4.0f * d[1], near = d[4] - d[2], far = d[3] - d[1];
  points[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
  points[1] = even + odd;
  points[2] = even - odd;
  points[3] = near + 2.0f * far;
  points[4] = near - 2.0f * far;
  points[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}

// The pixels of a tile from the values at the points, of one axis: A^T m.
CLICKTRAIN_INLINE void from_points(const Vec (&m)[kWindow], Vec (&pixels)[kSide]) {
  const Vec sum = m[1] + m[2], difference = m[1] - m[2], far_sum = m[3] + m[4], far_difference = m[3] - m[4];
  pixels[0] = m[0] + sum + far_sum;
  pixels[1] = difference + 2.0f * far_difference;
  pixels[2] = sum + 4.0f * far_sum;
  pixels[3] = difference + 8.0f * far_difference + m[5];
}

// One thread's work on a pass.
class Winograd {
 public:
  // Tiles of all blocks, and groups of them that are computed at once.
  static int64_t tiles(const Pass& p) { return int64_t(p.blocks) * tile_rows(p) * tile_columns(p); }
  static int64_t items(const Pass& p) { return (tiles(p) + kColumns - 1) / kColumns; }

  // Floats of scratch.
  static size_t floats(const Pass& p) { return size_t(kPoints) * (pitch(p.channels) + pitch(p.part)); }

  Winograd(const Pass& p, const float* x, const float* weights, const Epilogue& epilogue, float* y, float* scratch)
      : p_(p), epilogue_(epilogue), x_(x), weights_(weights), y_(y), input_(scratch),
        products_(scratch + kPoints * pitch(p.channels)) {}

  void run(int64_t item) {
    const int64_t first = item * kColumns;
    const int count = int(std::min<int64_t>(kColumns, tiles(p_) - first));
    Place places[kColumns];
    for (int i = 0; i < count; ++i) places[i] = place(first + i);
    transform_input(places, count);
    for (int begin = 0; begin < p_.filters; begin += p_.part) {
      const int end = std::min(begin + p_.part, p_.filters);
      for (int point = 0; point < kPoints; ++point)
        for (int cb = 0; cb < p_.channel_blocks; ++cb) multiply(point, cb, begin, end);
      for (int f = begin; f < end; ++f)
        for (int i = 0; i < count; ++i)
          transform_output(f, places[i], products_ + (int64_t(f - begin) * kColumns + i) * kLanes);
    }
  }

 private:
  struct Place {
    int block, top, left;  // of its output pixels
  };

  static int tile_rows(const Pass& p) { return (p.out_h + kSide - 1) / kSide; }
  static int tile_columns(const Pass& p) { return (p.out_w + kSide - 1) / kSide; }

  // Floats from one point to the next: three lines more than there are, or all points would share a set of the cache.
  static int64_t pitch(int rows) { return int64_t((rows + 3) / 4 * 4) * kColumnFloats + 48; }

  Place place(int64_t tile) const {
    const int rows = tile_rows(p_), columns = tile_columns(p_);
    return {int(tile / (rows * columns)), int(tile / columns % rows) * kSide, int(tile % columns) * kSide};
  }

  // [point][channel][column]
  void transform_input(const Place* places, int count) {
    const int64_t plane = int64_t(p_.in_h) * p_.in_w * kLanes;
    for (int c = 0; c < p_.channels; ++c) {
      float* to = input_ + int64_t(c) * kColumnFloats;
      for (int i = 0; i < count; ++i, to += kLanes) {
        const int top = places[i].top + p_.start_h, left = places[i].left + p_.start_w;
        const float* from = x_ + (int64_t(places[i].block) * p_.channels + c) * plane;
        if (c + 1 < p_.channels) fetch_ahead(from + plane + ((int64_t(top) + 1) * p_.in_w + left + 1) * kLanes);
        if (top >= 0 && left >= 0 && top + kWindow <= p_.in_h && left + kWindow <= p_.in_w)
          transform_window<true>(from, top, left, to);
        else
          transform_window<false>(from, top, left, to);
      }
      for (int i = count; i < kColumns; ++i, to += kLanes)
        for (int point = 0; point < kPoints; ++point) store(to + point * pitch(p_.channels), Vec{});
    }
  }

  // Bring the middle of a window of the next channel to the nearest cache: its edges are the middles of other tiles.
  void fetch_ahead(const float* middle) const {
    for (int row = 0; row < kSide; ++row, middle += int64_t(p_.in_w) * kLanes) {
      __builtin_prefetch(middle);
      __builtin_prefetch(middle + kSide / 2 * kLanes);
    }
  }

  template <bool Inside>
  void transform_window(const float* plane, int top, int left, float* to) const {
    const int height = p_.in_h, width = p_.in_w;
    const int64_t step = pitch(p_.channels);
    Vec half[kWindow][kWindow];
    for (int j = 0; j < kWindow; ++j) {
      Vec d[kWindow], points[kWindow];
      const bool exists = Inside || (left + j >= 0 && left + j < width);
      for (int i = 0; i < kWindow; ++i) {
        const bool there = Inside || (exists && top + i >= 0 && top + i < height);
        d[i] = there ? load(plane + (int64_t(top + i) * width + left + j) * kLanes) : Vec{};
      }
      to_points(d, points);
      for (int i = 0; i < kWindow; ++i) half[i][j] = points[i];
    }
    for (int i = 0; i < kWindow; ++i) {
      Vec points[kWindow];
      to_points(half[i], points);
      for (int j = 0; j < kWindow; ++j) store(to + (i * kWindow + j) * step, points[j]);
    }
  }

  // [point][filter][column], of the channels of a block: their values at a point are to stay in the nearest cache.
  void multiply(int point, int cb, int begin, int end) {
    const float* input = input_ + point * pitch(p_.channels) + int64_t(cb) * p_.channel_block * kColumnFloats;
    float* to = products_ + point * pitch(p_.part);
    const int64_t list = int64_t(cb) * ((p_.filters + 3) / 4) + begin / 4;
    const int32_t* channel = p_.offsets + p_.starts[2 * list];
    const float* weight = weights_ + point * p_.records + p_.starts[2 * list + 1];
    const uint16_t* run = p_.runs + list * 15;
    for (int f = begin; f < end; f += 4, run += 15, to += 4 * kColumnFloats) {
      Columns sums[4][kRegisters];
      for (int i = 0; i < 4 * kRegisters; ++i)
        sums[i / kRegisters][i % kRegisters] = cb ? load_columns(to + i * kRegisterFloats) : Columns{};
      add<1>(run, input, channel, weight, sums);
      for (int i = 0; i < 4 * kRegisters; ++i) store(to + i * kRegisterFloats, sums[i / kRegisters][i % kRegisters]);
    }
  }

  // Add the channels that exactly the filters of `Kept` keep, then those of the next set.
  template <int Kept>
  static CLICKTRAIN_INLINE void add(const uint16_t* run, const float* input, const int32_t*& channel,
                                    const float*& weight, Columns (&sums)[4][kRegisters]) {
    for (int n = run[Kept - 1]; n; --n) {
      const float* from = input + int64_t(*channel++) * kColumnFloats;
      Columns values[kRegisters];
      for (int r = 0; r < kRegisters; ++r) {
        values[r] = load_columns(from + r * kRegisterFloats);
        if (Kept & (Kept - 1)) pin(values[r]);
      }
      for (int i = 0; i < 4; ++i) {
        if (!(Kept >> i & 1)) continue;
        const Columns w = all_columns(*weight++);
        for (int r = 0; r < kRegisters; ++r) sums[i][r] += w * values[r];
      }
    }
    if constexpr (Kept < 15) add<Kept + 1>(run, input, channel, weight, sums);
  }

  void transform_output(int filter, const Place& place, const float* from) const {
    const int64_t step = pitch(p_.part);
    Vec half[kSide][kWindow], pixels[kSide][kSide];
    for (int j = 0; j < kWindow; ++j) {
      Vec m[kWindow], column[kSide];
      for (int i = 0; i < kWindow; ++i) m[i] = load(from + (i * kWindow + j) * step);
      from_points(m, column);
      for (int i = 0; i < kSide; ++i) half[i][j] = column[i];
    }
    const Vec bias = broadcast(epilogue_.bias ? epilogue_.bias[filter] : 0.0f);
    for (int i = 0; i < kSide; ++i) {
      from_points(half[i], pixels[i]);
      for (Vec& pixel : pixels[i]) pixel += bias;
    }
    const int less = p_.max_pool ? 2 : 1, width = p_.out_w / less;
    const int64_t plane = int64_t(place.block) * p_.filters + filter;
    float* to = y_ + ((plane * (p_.out_h / less) + place.top / less) * width + place.left / less) * kLanes;
    const int rows = std::min(kSide, p_.out_h - place.top), columns = std::min(kSide, p_.out_w - place.left);
    if (p_.max_pool)
      write_largest(pixels, rows, columns, to, width);
    else
      write(pixels, rows, columns, to, width);
  }

  void write(const Vec (&pixels)[kSide][kSide], int rows, int columns, float* to, int width) const {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) {
        float* pixel = to + (int64_t(i) * width + j) * kLanes;
        Vec v = pixels[i][j];
        if (epilogue_.residual) v += load(epilogue_.residual + (pixel - y_));
        if (epilogue_.relu) v = relu(v);
        if (p_.streaming)
          stream(pixel, v);
        else
          store(pixel, v);
      }
  }

  void write_largest(const Vec (&pixels)[kSide][kSide], int rows, int columns, float* to, int width) const {
    for (int i = 0; i < rows; i += 2)
      for (int j = 0; j < columns; j += 2) {
        const Vec v = larger(larger(pixels[i][j], pixels[i][j + 1]), larger(pixels[i + 1][j], pixels[i + 1][j + 1]));
        store(to + (int64_t(i / 2) * width + j / 2) * kLanes, epilogue_.relu ? relu(v) : v);
      }
  }

  const Pass& p_;
  const Epilogue epilogue_;
  const float *x_, *weights_;
  float *y_, *input_, *products_;
};

// Transform the kernels: [point][record].
inline void transform_weights(const Pass& p, const float* values, float* weights, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (p.records > 4096)
  for (int64_t i = 0; i < p.records; ++i) {
    const float* transform = p.transforms + int64_t(p.patterns[i]) * p.entries * kPoints;
    float points[kPoints] = {};
    for (int e = 0; e < p.entries; ++e)
      for (int point = 0; point < kPoints; ++point)
        points[point] += values[p.gather[i] + e] * transform[e * kPoints + point];
    for (int point = 0; point < kPoints; ++point) weights[point * p.records + i] = points[point];
  }
}

inline void convolve_transformed(
    const Pass& p, const float* x, const float* weights, const Epilogue& epilogue, float* y, int threads) {
  clicktrain::Shares shares(Winograd::items(p), threads);
#pragma omp parallel num_threads(threads)
  {
    thread_local clicktrain::Scratch scratch;
    Winograd work(p, x, weights, epilogue, y, scratch.floats(Winograd::floats(p)));
    shares.work([&](int64_t item) { work.run(item); });
    if (p.streaming) drain();
  }
}

}  // namespace CLICKTRAIN_ISA
