// Strips of an image with a copy of what lies around them, which a convolution reads.
//
// A network keeps strips without such copies. Each thread makes its own, of the rows that its tiles read: to write a
// line that another core has read would cost more than to copy the few rows twice that two threads need.
#pragma once

#include "lanes.h"

namespace CLICKTRAIN_ISA {

inline int floor_division(int a, int b) { return (a >= 0 ? a : a - b + 1) / b; }

// One thread's wide strips: those of the blocks of one tile.
class WideStrips {
 public:
  // Floats of memory, whole cache lines; none where a pass reads x itself.
  static size_t floats(const Pass& p) { return p.grid_h ? (p.tile_blocks * p.channels * plane(p) + 15) / 16 * 16 : 0; }

  WideStrips(const Pass& p, const float* x, float* wide)
      : p_(p), x_(x), wide_(wide), is_there_(p.grid_h ? p.in_h : 0) {}

  // Return wide strips from a block on, with at least rows [first, last) of all channels.
  const float* rows(int block, int blocks, int first, int last) {
    if (block != block_) std::fill(is_there_.begin(), is_there_.end(), 0);
    block_ = block;
    last = std::min(last, p_.in_h);
    for (int row = std::max(first, 0), end; row < last; row = end + 1) {
      for (end = row; end < last && !is_there_[end]; ++end) is_there_[end] = 1;
      if (row < end) copy(row, end, blocks);
    }
    return wide_;
  }

 private:
  // Pixels of a row that come from the same strip.
  struct Segment {
    int64_t from, to;  // floats from the start of the planes
    int floats;
    const int32_t* lanes;  // null: its own; else of `neighbours`
  };

  static size_t plane(const Pass& p) { return size_t(p.in_h) * p.in_w * kLanes; }

  void copy(int first, int last, int blocks) {
    find_segments(first, last);
    const int64_t strip = int64_t(p_.strip_h) * p_.strip_w * kLanes;
    const float* from = x_ + block_ * p_.channels * strip;
    float* to = wide_;
    for (int i = 0; i < blocks * p_.channels; ++i, from += strip, to += plane(p_)) copy_segments(from, to);
  }

  // They are the same for all channels.
  void find_segments(int first, int last) {
    segments_.clear();
    for (int row = first; row < last; ++row) {
      const int down = floor_division(row - p_.before_h, p_.strip_h), from = row - p_.before_h - down * p_.strip_h;
      for (int i = 0, pixels; i < p_.in_w; i += pixels) {
        const int right = floor_division(i - p_.before_w, p_.strip_w), column = i - p_.before_w - right * p_.strip_w;
        pixels = std::min(p_.strip_w - column, p_.in_w - i);
        segments_.push_back({(int64_t(from) * p_.strip_w + column) * kLanes, (int64_t(row) * p_.in_w + i) * kLanes,
                             pixels * kLanes, down || right ? neighbours(down, right) : nullptr});
      }
    }
  }

  void copy_segments(const float* plane, float* wide) const {
    for (const Segment& s : segments_) {
      const float* from = plane + s.from;
      float* to = wide + s.to;
      if (!s.lanes) {
        for (int i = 0; i < s.floats; i += kLanes) store(to + i, load(from + i));
        continue;
      }
      const Shuffle lanes = (Shuffle)load(reinterpret_cast<const float*>(s.lanes));
      for (int i = 0; i < s.floats; i += kLanes) store(to + i, __builtin_shuffle(load(from + i), Vec{}, lanes));
    }
  }

  // For each lane, the one that is so many strips away.
  const int32_t* neighbours(int down, int right) const {
    const int row = std::max(-p_.grid_h, std::min(p_.grid_h, down)) + p_.grid_h;
    const int column = std::max(-p_.grid_w, std::min(p_.grid_w, right)) + p_.grid_w;
    return p_.neighbours + (row * (2 * p_.grid_w + 1) + column) * kLanes;
  }

  const Pass& p_;
  const float* x_;
  float* wide_;
  int64_t block_ = -1;
  std::vector<char> is_there_;
  std::vector<Segment> segments_;
};

}  // namespace CLICKTRAIN_ISA
