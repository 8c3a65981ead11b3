// Runs a network: a list of steps on memory that was laid out beforehand.
//
// Inference only, and so simpler than blocked_ops.h: no gradients, and lanes beyond the batch may hold anything, for
// no step mixes images. Where lanes are strips of an image, pixels of a strip outside the image are zero in every
// activation (`clear_outside` sees to it), and a step that reads around a strip finds its neighbours in other lanes.
#pragma once

#include "blocked_ops.h"
#include "convolution.h"
#include "layout.h"

namespace CLICKTRAIN_ISA {

// Where the lanes of an activation lie in their images.
struct LanePlaces {
  Mask row, column;  // of the strip in the grid

  explicit LanePlaces(const Strips& s) : row{}, column{} {
    if (s.grid_h * s.grid_w == 1) return;
    for (int l = 0; l < kLanes; ++l) row[l] = l / s.grid_w, column[l] = l % s.grid_w;
  }

  // All ones in the lanes whose image has pixel (r, c) of the strip.
  Mask inside(const Strips& s, int r, int c) const {
    const Mask y = row * s.height + r, x = column * s.width + c;
    return (y >= 0) & (y < s.image_h) & (x >= 0) & (x < s.image_w);
  }

  // For each lane, the one that is so many strips away; any other where there is none.
  Shuffle neighbours(const Strips& s, int down, int right) const {
    return (Mask{0, 1, 2, 3, 4, 5, 6, 7} + (down * s.grid_w + right)) & (kLanes - 1);
  }
};

// Make zero what lies outside of the images.
inline void clear_outside(const Strips& s, float* y, int threads) {
  const LanePlaces places(s);
  const int rows = s.image_h - (s.grid_h - 1) * s.height, columns = s.image_w - (s.grid_w - 1) * s.width;
  const int64_t planes = int64_t(s.blocks) * s.channels;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < planes; ++p)
    for (int r = 0; r < s.height; ++r)
      for (int c = r < rows ? std::max(0, columns) : 0; c < s.width; ++c) {
        float* pixel = y + ((p * s.height + r) * s.width + c) * kLanes;
        store(pixel, keep(load(pixel), places.inside(s, r, c)));
      }
}

// One window of a pooling, anywhere.
template <bool average>
Vec pool_window(const Pooling& p, const LanePlaces& places, const float* plane, int top, int left) {
  const Strips& s = p.x;
  Vec result = broadcast(average ? 0.0f : -__builtin_inff());
  for (int r = top; r < top + p.size_h; ++r)
    for (int c = left; c < left + p.size_w; ++c) {
      const int down = floor_division(r, s.height), right = floor_division(c, s.width);
      const int64_t pixel = int64_t(r - down * s.height) * s.width + c - right * s.width;
      const Vec v = __builtin_shuffle(load(plane + pixel * kLanes), places.neighbours(s, down, right));
      const Mask inside = places.inside(s, r, c);
      if (average)
        result += keep(v, inside);
      else
        result = inside & ((v > result) | (v != v)) ? v : result;
    }
  return result;
}

template <bool average>
void pool(const Pooling& p, const float* x, float* y, int threads) {
  const Strips& s = p.x;
  const LanePlaces places(s);
  const int64_t planes = int64_t(s.blocks) * s.channels;
  const Vec share = broadcast(1.0f / float(p.size_h * p.size_w));
  const bool whole = s.grid_h * s.height == s.image_h && s.grid_w * s.width == s.image_w;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < planes; ++i) {
    const float* plane = x + i * s.height * s.width * kLanes;
    float* to = y + i * p.out_h * p.out_w * kLanes;
    for (int row = 0; row < p.out_h; ++row)
      for (int column = 0; column < p.out_w; ++column, to += kLanes) {
        const int top = row * p.stride_h - p.pad_h, left = column * p.stride_w - p.pad_w;
        Vec v;
        if (whole && top >= 0 && left >= 0 && top + p.size_h <= s.height && left + p.size_w <= s.width) {
          const float* corner = plane + (int64_t(top) * s.width + left) * kLanes;
          v = load(corner);
          for (int r = 0; r < p.size_h; ++r)
            for (int c = r ? 0 : 1; c < p.size_w; ++c) {
              const Vec w = load(corner + (int64_t(r) * s.width + c) * kLanes);
              v = average ? v + w : larger(v, w);
            }
        } else {
          v = pool_window<average>(p, places, plane, top, left);
        }
        store(to, average ? v * share : v);
      }
  }
}

// Mean over the pixels of each image: plain [images][channels].
inline void mean(const Strips& s, const float* x, float* y, int threads) {
  const int64_t planes = int64_t(s.blocks) * s.channels, pixels = int64_t(s.height) * s.width;
  const float share = 1.0f / float(s.image_h * s.image_w);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < planes; ++i) {
    const int64_t block = i / s.channels, channel = i % s.channels;
    Vec total = {};
    for (int64_t j = 0; j < pixels; ++j) total += load(x + (i * pixels + j) * kLanes);
    total *= broadcast(share);
    if (s.grid_h * s.grid_w > 1) {
      y[i] = sum(total);
      continue;
    }
    const int64_t lanes = std::min<int64_t>(kLanes, s.images - block * kLanes);
    for (int64_t l = 0; l < lanes; ++l) y[(block * kLanes + l) * s.channels + channel] = total[l];
  }
}

inline void adaptive_pool(const AdaptivePooling& p, const float* x, float* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int plane = 0; plane < p.planes; ++plane) {
    const float* from = x + int64_t(plane) * p.in_h * p.in_w;
    float* to = y + int64_t(plane) * p.out_h * p.out_w;
    for (int i = 0; i < p.out_h; ++i)
      for (int j = 0; j < p.out_w; ++j) {
        const int top = i * p.in_h / p.out_h, bottom = ((i + 1) * p.in_h + p.out_h - 1) / p.out_h;
        const int left = j * p.in_w / p.out_w, right = ((j + 1) * p.in_w + p.out_w - 1) / p.out_w;
        float total = 0;
        for (int r = top; r < bottom; ++r)
          for (int c = left; c < right; ++c) total += from[r * p.in_w + c];
        *to++ = total / float((bottom - top) * (right - left));
      }
  }
}

// Outputs [first, first + 16) of N images, summed in Chains independent parts.
template <int N, int Chains>
CLICKTRAIN_INLINE void linear_tile(
    const Linear& l, const float* x, const float* weights, const float* bias, bool with_relu, int count, float* y) {
  Vec sums[Chains][N][2];
  for (int n = 0; n < N; ++n)
    for (int h = 0; h < 2; ++h) {
      sums[0][n][h] = load(bias + h * kLanes);
      for (int chain = 1; chain < Chains; ++chain) sums[chain][n][h] = Vec{};
    }
  const auto add = [&](int chain, int k) {
    const Vec low = load(weights + int64_t(k) * 2 * kLanes), high = load(weights + int64_t(k) * 2 * kLanes + kLanes);
    for (int n = 0; n < N; ++n) {
      const Vec v = broadcast(x[int64_t(n) * l.inputs + k]);
      sums[chain][n][0] += v * low;
      sums[chain][n][1] += v * high;
    }
  };
  int k = 0;
  for (; k + Chains <= l.inputs; k += Chains)
    for (int chain = 0; chain < Chains; ++chain) add(chain, k + chain);
  for (; k < l.inputs; ++k) add(0, k);
  for (int n = 0; n < N; ++n)
    for (int h = 0; h < 2; ++h) {
      Vec v = sums[0][n][h];
      for (int chain = 1; chain < Chains; ++chain) v += sums[chain][n][h];
      if (with_relu) v = relu(v);
      float* to = y + int64_t(n) * l.outputs + h * kLanes;
      const int left = count - h * kLanes;
      if (left >= kLanes)
        store(to, v);
      else
        for (int i = 0; i < left; ++i) to[i] = v[i];
    }
}

inline void linear(
    const Linear& l, const float* x, const float* weights, const float* bias, bool with_relu, float* y, int threads) {
  constexpr int kImages = 4, kOutputs = 2 * kLanes;
  const int tiles = (l.outputs + kOutputs - 1) / kOutputs, groups = (l.images + kImages - 1) / kImages;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < int64_t(tiles) * groups; ++item) {
    const int first = int(item / groups) * kOutputs, image = int(item % groups) * kImages;
    const float* w = weights + int64_t(first) * l.inputs;
    const int count = std::min(kOutputs, l.outputs - first);
    const int images = std::min(kImages, l.images - image);
    const float* from = x + int64_t(image) * l.inputs;
    float* to = y + int64_t(image) * l.outputs + first;
    if (images == kImages)
      linear_tile<kImages, 1>(l, from, w, bias + first, with_relu, count, to);
    else
      for (int n = 0; n < images; ++n)
        linear_tile<1, 4>(l, from + int64_t(n) * l.inputs, w, bias + first, with_relu, count, to + int64_t(n) * l.outputs);
  }
}

// y = x (+ residual), then ReLU if asked for; any layout.
inline void add(int64_t floats, const float* x, const float* residual, bool with_relu, float* y, int threads) {
  const int64_t vectors = floats / kLanes;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < vectors; ++i) {
    Vec v = load(x + i * kLanes);
    if (residual) v += load(residual + i * kLanes);
    store(y + i * kLanes, with_relu ? relu(v) : v);
  }
  for (int64_t i = vectors * kLanes; i < floats; ++i) {
    const float v = residual ? x[i] + residual[i] : x[i];
    y[i] = with_relu && v < 0 ? 0 : v;
  }
}

// y = scale * x + shift by channel, then ReLU if asked for.
inline void scale(
    const Strips& s, const float* x, const float* scales, const float* shifts, bool with_relu, float* y, int threads) {
  const int64_t planes = int64_t(s.blocks) * s.channels, floats = int64_t(s.height) * s.width * kLanes;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < planes; ++p) {
    const Vec a = broadcast(scales[p % s.channels]), b = broadcast(shifts[p % s.channels]);
    for (int64_t i = p * floats; i < (p + 1) * floats; i += kLanes) {
      const Vec v = a * load(x + i) + b;
      store(y + i, with_relu ? relu(v) : v);
    }
  }
}

enum StepKind { kConvolve, kPack, kUnpack, kPool, kMean, kAdaptivePool, kLinear, kAdd, kScale, kClearOutside };

inline void run_step(const Step& s, float* const* buffers, int threads) {
  const float* x = buffers[s.x_buffer] + s.x;
  const float* residual = s.residual_buffer < 0 ? nullptr : buffers[s.residual_buffer] + s.residual;
  float* y = buffers[s.y_buffer] + s.y;
  switch (s.kind) {
    case kConvolve:
      return convolve_with(
          *static_cast<const Pass*>(s.geometry), x, s.weights, {s.bias, residual, s.relu}, y, threads);
    case kPack: return pack(*static_cast<const Lanes*>(s.geometry), x, y, threads);
    case kUnpack: return unpack(*static_cast<const Lanes*>(s.geometry), x, y, threads);
    case kPool: {
      const Pooling& p = *static_cast<const Pooling*>(s.geometry);
      return p.average ? pool<true>(p, x, y, threads) : pool<false>(p, x, y, threads);
    }
    case kMean: return mean(*static_cast<const Strips*>(s.geometry), x, y, threads);
    case kAdaptivePool: return adaptive_pool(*static_cast<const AdaptivePooling*>(s.geometry), x, y, threads);
    case kLinear: return linear(*static_cast<const Linear*>(s.geometry), x, s.weights, s.bias, s.relu, y, threads);
    case kAdd: return add(s.floats, x, residual, s.relu, y, threads);
    case kScale: return scale(*static_cast<const Strips*>(s.geometry), x, s.weights, s.bias, s.relu, y, threads);
    case kClearOutside: return clear_outside(*static_cast<const Strips*>(s.geometry), y, threads);
  }
}

// Seconds: null, or where the time of each step is added.
inline void run_steps(const Step* steps, int64_t count, float* const* buffers, double* seconds, int threads) {
  const auto now = [] {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  };
  for (int64_t i = 0; i < count; ++i) {
    const double start = seconds ? now() : 0;
    run_step(steps[i], buffers, threads);
    if (seconds) seconds[i] += now() - start;
  }
}

}  // namespace CLICKTRAIN_ISA
