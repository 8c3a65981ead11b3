// The generic sweep: any pattern, any kernel size, any stride.
//
// A record is one kept tap: where its first input pixel lies in the window, and its weight. The sums of a tile
// (Rows x Cols pixels of one phase) stay in registers while all records of a filter pass by:
//
//     for each filter: for each record: for each pixel: sums[pixel] += weight * window[offset + pixel]
//
// One load feeds one multiply-add; the specialised sweeps (filter_sweeps.py, channel_sweeps.py) share loads between the
// taps of a kernel.
// Both add the taps of a filter one after the other in the order of the plan, so their results are bitwise equal.
#pragma once

#include "lanes.h"

namespace CLICKTRAIN_ISA {

// Step: input pixels from one output pixel to the next (the stride; 1 for input gradients), 0 = known at run time.
template <int Rows, int Cols, int Step>
void sweep_taps(const Sweep* s) {
  const int64_t pixel = Step ? Step * kLanes : s->window_pixel;
  for (int f = s->begin; f < s->end; ++f) {
    const int64_t filter = s->order[f];
    const Vec start = s->bias ? broadcast(s->bias[filter]) : Vec{};
    Vec sums[Rows][Cols];
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Cols; ++c)
        sums[r][c] = s->sums_in ? load(s->sums_in + filter * s->in_filter + r * s->in_row + c * s->in_pixel) : start;

    for (int64_t i = s->starts[f]; i < s->starts[f + 1]; ++i) {
      const float* row = s->window + s->offsets[i];
      const Vec weight = broadcast(s->weights[i]);
      for (int r = 0; r < Rows; ++r, row += s->window_row)
        for (int c = 0; c < Cols; ++c) sums[r][c] += weight * load(row + c * pixel);
    }

    if (s->residual) {
      const float* residual = s->residual + filter * s->out_filter;
      for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < Cols; ++c) sums[r][c] += load(residual + r * s->out_row + c * s->out_pixel);
    }
    float* out = s->sums_out + filter * s->out_filter;
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Cols; ++c)
        store(out + r * s->out_row + c * s->out_pixel, s->relu ? relu(sums[r][c]) : sums[r][c]);
  }
}

// The compiled tiles; null if there is none of this shape.
inline SweepFunction find_sweep_taps(int rows, int columns, int step) {
#define CLICKTRAIN_TILE(R, C)                                                                      \
  if (rows == R && columns == C)                                                                   \
    return step == 1 ? sweep_taps<R, C, 1> : step == 2 ? sweep_taps<R, C, 2> : sweep_taps<R, C, 0>;
  CLICKTRAIN_TILE(3, 4)
  CLICKTRAIN_TILE(2, 5)
  CLICKTRAIN_TILE(2, 4)
  CLICKTRAIN_TILE(2, 2)
  CLICKTRAIN_TILE(1, 8)
  CLICKTRAIN_TILE(1, 7)
  CLICKTRAIN_TILE(1, 4)
  CLICKTRAIN_TILE(1, 1)
#undef CLICKTRAIN_TILE
  return nullptr;
}

}  // namespace CLICKTRAIN_ISA
