// Between NCHW and blocked activations: eight rows from eight lanes are transposed in registers.
#pragma once


#include "lanes.h"

namespace CLICKTRAIN_ISA {

// One lane of a block: which image, and where its strip starts there.
struct Lane {
  int image, top, left;
};

inline Lane lane_of(const Lanes& g, int block, int lane) {
  if (g.grid_h * g.grid_w == 1) return {block * kLanes + lane, g.start_h, g.start_w};
  return {block, g.start_h + lane / g.grid_w * g.step_h, g.start_w + lane % g.grid_w * g.step_w};
}

// The columns [begin, end) of a lane's row that lie inside the image; column i is row[i].
struct Span {
  int64_t row;
  int begin, end;
};

inline Span span_of(const Lanes& g, const Lane& lane, int row) {
  if (lane.image >= g.images || row < 0 || row >= g.image_h) return {0, 0, 0};
  const int begin = std::min(g.lane_w, std::max(0, -lane.left));
  const int end = std::max(begin, std::min(g.lane_w, g.image_w - lane.left));
  return {(int64_t(lane.image) * g.channels * g.image_h + row) * g.image_w + lane.left, begin, end};
}

// The spans of all lanes in one row of the first channel, and the columns that all of them have.
struct Row {
  Span spans[kLanes];
  int begin = 0, end = 0;

  Row() = default;
  Row(const Lanes& g, int block, int r) : end(g.lane_w) {
    for (int l = 0; l < kLanes; ++l) {
      const Lane lane = lane_of(g, block, l);
      spans[l] = span_of(g, lane, lane.top + r);
      begin = std::max(begin, spans[l].begin);
      end = std::min(end, spans[l].end);
    }
    begin = std::min(begin, g.lane_w);
    end = std::max(begin, end);
  }
};

// Call body(row, plane, pixels) for every row of lanes: so many floats after the spans lies its channel in the NCHW
// tensor, and `pixels` is where it lies in the blocked one. A few rows of all channels go before the next rows, for
// the tiles of a convolution are dealt out to threads by rows, too.
template <class F>
CLICKTRAIN_INLINE void for_each_row(const Lanes& g, int threads, F body) {
  constexpr int kRows = 4;
  const int64_t groups = (g.lane_h + kRows - 1) / kRows;
#pragma omp parallel num_threads(threads)
  {
    Row rows[kRows];
    int64_t current = -1;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < g.blocks * groups * g.channels; ++item) {
      const int64_t group = item / g.channels, channel = item % g.channels, block = group / groups;
      const int top = int(group % groups) * kRows, count = std::min(kRows, g.lane_h - top);
      if (group != current)
        for (int r = 0; r < count; ++r) rows[r] = Row(g, int(block), top + r);
      current = group;
      for (int r = 0; r < count; ++r) {
        const int64_t pixels = ((block * g.channels + channel) * g.lane_h + top + r) * g.lane_w;
        body(rows[r], channel * g.image_h * g.image_w, pixels * kLanes);
      }
    }
  }
}

// Call columns(i) for groups of eight columns that all lanes have (the last may overlap the one before), and
// column(i) for each of the others.
template <class F, class G>
CLICKTRAIN_INLINE void for_each_column(const Lanes& g, const Row& row, F columns, G column) {
  const bool wide = row.end - row.begin >= kLanes;
  const int begin = wide ? row.begin : g.lane_w;
  for (int i = 0; i < begin; ++i) column(i);
  if (!wide) return;
  for (int i = row.begin; i < row.end; i += kLanes) columns(std::min(i, row.end - kLanes));
  for (int i = row.end; i < g.lane_w; ++i) column(i);
}

// x (images, channels, image_h, image_w) -> (blocks, channels, lane_h, lane_w, 8); a lane is zero outside its image.
inline void pack(const Lanes& g, const float* x, float* blocked, int threads) {
  for_each_row(g, threads, [&](const Row& row, int64_t plane, int64_t pixels) {
    const float* from = x + plane;
    float* to = blocked + pixels;
    for_each_column(
        g, row,
        [&](int i) {
          Vec v[kLanes];
          for (int l = 0; l < kLanes; ++l) v[l] = load(from + row.spans[l].row + i);
          transpose(v);
          for (int l = 0; l < kLanes; ++l) store(to + (i + l) * kLanes, v[l]);
        },
        [&](int i) {
          for (int l = 0; l < kLanes; ++l) {
            const Span& span = row.spans[l];
            to[i * kLanes + l] = i >= span.begin && i < span.end ? from[span.row + i] : 0.0f;
          }
        });
  });
}

// The inverse of pack: every image pixel that a lane holds is written.
inline void unpack(const Lanes& g, const float* blocked, float* x, int threads) {
  for_each_row(g, threads, [&](const Row& row, int64_t plane, int64_t pixels) {
    const float* from = blocked + pixels;
    float* to = x + plane;
    for_each_column(
        g, row,
        [&](int i) {
          Vec v[kLanes];
          for (int l = 0; l < kLanes; ++l) v[l] = load(from + (i + l) * kLanes);
          transpose(v);
          for (int l = 0; l < kLanes; ++l) store(to + row.spans[l].row + i, v[l]);
        },
        [&](int i) {
          for (int l = 0; l < kLanes; ++l) {
            const Span& span = row.spans[l];
            if (i >= span.begin && i < span.end) to[span.row + i] = from[i * kLanes + l];
          }
        });
  });
}

}  // namespace CLICKTRAIN_ISA
