// What a network does between its convolutions, on blocked activations: normalisation, addition, ReLU, pooling.
//
// Memory sets the pace here, so each function passes over it as seldom as it can. Threads share out channels (in
// pooling, planes); sums run in a fixed order inside a channel, so results do not depend on the thread count. The
// lanes of the last block beyond the batch hold zeros on entry, and keep them.
#pragma once

#include "lanes.h"

namespace CLICKTRAIN_ISA {

typedef int32_t Mask __attribute__((vector_size(32)));
typedef uint8_t Places __attribute__((vector_size(8), aligned(1), may_alias));  // a place in a window for each lane

constexpr int64_t kTile = 512;  // pixels that are summed in float32: 16 KB, half of a first-level cache
constexpr int64_t kStreamedBytes = 2 << 20;  // results from this size on bypass the caches, as those of convolutions do

// A blocked activation [blocks][channels][pixels][8] of a number of images.
struct Batch {
  int64_t images, channels, pixels;

  int64_t blocks() const { return (images + kLanes - 1) / kLanes; }
  int64_t lanes(int64_t block) const { return std::min<int64_t>(kLanes, images - block * kLanes); }
  int64_t plane(int64_t block, int64_t channel) const { return (block * channels + channel) * pixels * kLanes; }

  // All ones in the lanes of a block that hold an image.
  Mask mask(int64_t block) const {
    const Mask lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return lane < static_cast<int32_t>(lanes(block));
  }
};

// Writes a result; a large one past the caches, which saves reading each line before it is written: 1.00 to 1.03x of a
// training step of VGG-13 with 64 images on a family 25, model 17 EPYC.
class Writer {
 public:
  // Whole lines: two neighbouring pixels follow one another.
  explicit Writer(const Batch& batch, bool whole_lines = true)
      : streams_(
            whole_lines && batch.blocks() * batch.channels * batch.pixels * int64_t(sizeof(Vec)) >= kStreamedBytes) {}
  ~Writer() {
    if (streams_) drain();
  }

  CLICKTRAIN_INLINE void operator()(float* p, Vec v) const {
    if (streams_)
      stream(p, v);
    else
      store(p, v);
  }

 private:
  const bool streams_;
};

CLICKTRAIN_INLINE Vec keep(Vec v, Mask mask) { return (Vec)((Mask)v & mask); }

// What a ReLU with output y lets through of a gradient; NaN lets it through, as in torch.
CLICKTRAIN_INLINE Vec relu_gradient(Vec g, Vec y) { return y <= 0.0f ? Vec{} : g; }

// Call f(block, offset of the tile, pixels in it) for every tile of a channel, in order.
template <typename F>
CLICKTRAIN_INLINE void for_tiles(const Batch& batch, int64_t channel, const F& f) {
  for (int64_t b = 0; b < batch.blocks(); ++b)
    for (int64_t start = 0; start < batch.pixels; start += kTile)
      f(b, batch.plane(b, channel) + start * kLanes, std::min(kTile, batch.pixels - start));
}

// Sum of f(pixel) over the pixels of a tile, in four independent chains.
template <typename F>
CLICKTRAIN_INLINE float sum_pixels(int64_t pixels, const F& f) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= pixels; i += 4)
    for (int k = 0; k < 4; ++k) sums[k] += f(i + k);
  for (; i < pixels; ++i) sums[0] += f(i);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Mean and sum of squared deviations of a channel. Each tile is read twice while it is in cache, for its mean and
// for the deviations from it; tiles are combined in double precision. So nothing cancels, in one pass over memory.
inline void statistics(const Batch& batch, const float* x, int64_t c, double& mean, double& squares) {
  double count = 0;
  mean = squares = 0;
  for_tiles(batch, c, [&](int64_t block, int64_t at, int64_t pixels) {
    const Mask mask = batch.mask(block);
    const double n = static_cast<double>(pixels * batch.lanes(block));
    const double tile_mean = sum_pixels(pixels, [&](int64_t i) { return load(x + at + i * kLanes); }) / n;
    const Vec centre = broadcast(static_cast<float>(tile_mean));
    const double tile_squares = sum_pixels(pixels, [&](int64_t i) {
      const Vec d = keep(load(x + at + i * kLanes) - centre, mask);
      return d * d;
    });
    const double shift = tile_mean - mean;
    squares += tile_squares + shift * shift * count * n / (count + n);
    mean += shift * n / (count + n);
    count += n;
  });
}

// Batch statistics of x; the running ones (null: none) move towards them, with the unbiased variance as in torch.
inline void batch_statistics(
    const Batch& batch, const float* x, double eps, double momentum, float* running_mean, float* running_variance,
    float* mean, float* invstd, int threads) {
  const double n = static_cast<double>(batch.images * batch.pixels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < batch.channels; ++c) {
    double average, squares;
    statistics(batch, x, c, average, squares);
    mean[c] = static_cast<float>(average);
    invstd[c] = static_cast<float>(1 / __builtin_sqrt(squares / n + eps));
    if (!running_mean) continue;
    running_mean[c] = static_cast<float>(momentum * average + (1 - momentum) * running_mean[c]);
    running_variance[c] = static_cast<float>(momentum * squares / (n - 1) + (1 - momentum) * running_variance[c]);
  }
}

// y = scale * x + shift (+ residual), then ReLU if asked for.
template <bool with_residual, bool with_relu>
void affine(
    const Batch& batch, const float* x, const float* scale, const float* shift, const float* residual, float* y,
    int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < batch.channels; ++c) {
    const Vec a = broadcast(scale[c]), b = broadcast(shift[c]);
    const Writer write(batch);
    for (int64_t block = 0; block < batch.blocks(); ++block) {
      const Mask mask = batch.mask(block);
      const int64_t begin = batch.plane(block, c), end = begin + batch.pixels * kLanes;
      for (int64_t i = begin; i < end; i += kLanes) {
        Vec v = a * load(x + i) + b;
        if (with_residual) v += load(residual + i);
        if (with_relu) v = relu(v);
        write(y + i, keep(v, mask));
      }
    }
  }
}

// What the backward of a normalisation is made of.
struct Normalisation {
  const float *dy, *x, *mean, *invstd;
  const float* weight;  // null: 1
  bool training;        // else the statistics are constants
  // A ReLU behind the normalisation, if any, is given by its output y, or by the scale and shift that its input was
  // computed with; then it is computed once more from x, which saves reading y.
  const float *y, *scale, *shift;
  // Places of the maxima of 2 x 2, if that ReLU (of scale and shift) was pooled: dy then is the pooling's gradient.
  const uint8_t* places;
  int64_t width;  // of x
  float* dx;      // null: not needed
  float *dweight, *dbias;
};

enum class Relu { none, output, affine };

// dx of a channel, once the sums are known:
// weight * invstd * (g - sum_g / count - (x - mean) * invstd^2 * sum_gx / count)
struct InputGradient {
  Vec factor, offset, slope, centre;

  InputGradient(const Batch& batch, const Normalisation& n, int64_t c, double sum_g, double sum_gx) {
    const double invstd = n.invstd[c], count = static_cast<double>(batch.images * batch.pixels);
    factor = broadcast(static_cast<float>((n.weight ? n.weight[c] : 1) * invstd));
    offset = broadcast(static_cast<float>(n.training ? sum_g / count : 0));
    slope = broadcast(static_cast<float>(n.training ? sum_gx / count * invstd * invstd : 0));
    centre = broadcast(n.mean[c]);
  }

  CLICKTRAIN_INLINE Vec of(Vec g, Vec x) const { return factor * (g - offset - slope * (x - centre)); }
};

CLICKTRAIN_INLINE void store_sums(const Normalisation& n, int64_t c, double sum_g, double sum_gx) {
  n.dbias[c] = static_cast<float>(sum_g);
  n.dweight[c] = static_cast<float>(sum_gx * n.invstd[c]);
}

// Backward of one channel: one pass for the sums, and one back for dx, so that it starts with what is in cache.
template <Relu relu_by>
CLICKTRAIN_INLINE void normalisation_backward(const Batch& batch, const Normalisation& n, int64_t c) {
  const Vec scale = broadcast(n.scale ? n.scale[c] : 0), shift = broadcast(n.shift ? n.shift[c] : 0);
  const auto gradient = [&](int64_t at, Vec x) {
    const Vec g = load(n.dy + at);
    if (relu_by == Relu::output) return relu_gradient(g, load(n.y + at));
    return relu_by == Relu::affine ? relu_gradient(g, scale * x + shift) : g;
  };
  const Vec centre = broadcast(n.mean[c]);
  double sum_g = 0, sum_gx = 0;
  for_tiles(batch, c, [&](int64_t, int64_t at, int64_t pixels) {
    Vec sums[2] = {}, products[2] = {};
    const auto add = [&](int chain, int64_t i) {
      const Vec x = load(n.x + i), g = gradient(i, x);
      sums[chain] += g;
      products[chain] += g * (x - centre);
    };
    const int64_t end = at + pixels * kLanes;
    for (; at + kLanes < end; at += 2 * kLanes) add(0, at), add(1, at + kLanes);
    if (at < end) add(0, at);
    sum_g += sum(sums[0] + sums[1]);
    sum_gx += sum(products[0] + products[1]);
  });
  store_sums(n, c, sum_g, sum_gx);
  if (!n.dx) return;
  const InputGradient input(batch, n, c, sum_g, sum_gx);
  const Writer write(batch);
  for (int64_t block = batch.blocks() - 1; block >= 0; --block) {
    const Mask mask = batch.mask(block);
    const int64_t begin = batch.plane(block, c);
    for (int64_t i = begin + (batch.pixels - 1) * kLanes; i >= begin; i -= kLanes) {
      const Vec x = load(n.x + i);
      write(n.dx + i, keep(input.of(gradient(i, x), x), mask));
    }
  }
}

// The windows of 2 x 2 pixels of a plane, of which a last odd row or column is in none.
class Quarters {
 public:
  Quarters(const Batch& batch, int64_t width)
      : width_(width), height_(batch.pixels / width), columns_(width / 2), rows_(height_ / 2) {}

  int64_t count() const { return rows_ * columns_; }
  int64_t rows_of_a_tile() const { return std::max<int64_t>(1, kTile / std::max<int64_t>(1, columns_)); }

  // Call f(window, offset of its first pixel) for the windows of rows [begin, end).
  template <typename F>
  CLICKTRAIN_INLINE void for_windows(int64_t begin, int64_t end, const F& f) const {
    for (int64_t row = begin; row < std::min(end, rows_); ++row)
      for (int64_t column = 0; column < columns_; ++column)
        f((row * columns_ + column) * kLanes, (2 * row * width_ + 2 * column) * kLanes);
  }

  // Call f(offset) for the pixels in no window.
  template <typename F>
  CLICKTRAIN_INLINE void for_rest(const F& f) const {
    for (int64_t row = 0; row < height_; ++row)
      for (int64_t column = row < 2 * rows_ ? 2 * columns_ : 0; column < width_; ++column)
        f((row * width_ + column) * kLanes);
  }

  int64_t rows() const { return rows_; }
  // Offset of pixel i of a window from its first one.
  CLICKTRAIN_INLINE int64_t pixel(int i) const { return (i / 2 * width_ + i % 2) * kLanes; }

 private:
  const int64_t width_, height_, columns_, rows_;
};

// The same behind a ReLU and a max pooling: what these let through of a window's gradient goes to one of its pixels.
inline void pooled_normalisation_backward(const Batch& batch, const Normalisation& n, int64_t c) {
  const Quarters quarters(batch, n.width);
  const Vec scale = broadcast(n.scale[c]), shift = broadcast(n.shift[c]), centre = broadcast(n.mean[c]);
  const auto plane = [&](int64_t block) { return (block * batch.channels + c) * quarters.count() * kLanes; };
  const auto place_of = [&](int64_t window) {
    return __builtin_convertvector(*reinterpret_cast<const Places*>(n.places + window), Mask);
  };
  const auto gradient = [&](int64_t window, Vec x) { return relu_gradient(load(n.dy + window), scale * x + shift); };
  double sum_g = 0, sum_gx = 0;
  for (int64_t block = 0; block < batch.blocks(); ++block) {
    const float* const x = n.x + batch.plane(block, c);
    for (int64_t row = 0; row < quarters.rows(); row += quarters.rows_of_a_tile()) {
      Vec sums = {}, products = {};
      quarters.for_windows(row, row + quarters.rows_of_a_tile(), [&](int64_t window, int64_t at) {
        const Mask place = place_of(plane(block) + window);
        Vec largest = load(x + at);
        for (int i = 1; i < 4; ++i) largest = place == i ? load(x + at + quarters.pixel(i)) : largest;
        const Vec g = gradient(plane(block) + window, largest);
        sums += g;
        products += g * (largest - centre);
      });
      sum_g += sum(sums);
      sum_gx += sum(products);
    }
  }
  store_sums(n, c, sum_g, sum_gx);
  if (!n.dx) return;
  const InputGradient input(batch, n, c, sum_g, sum_gx);
  const Writer write(batch, n.width % 2 == 0);
  for (int64_t block = batch.blocks() - 1; block >= 0; --block) {
    const Mask mask = batch.mask(block);
    const float* const x = n.x + batch.plane(block, c);
    float* const dx = n.dx + batch.plane(block, c);
    quarters.for_windows(0, quarters.rows(), [&](int64_t window, int64_t at) {
      const Mask place = place_of(plane(block) + window);
      for (int i = 0; i < 4; ++i) {
        const Vec v = load(x + at + quarters.pixel(i));
        const Vec g = keep(gradient(plane(block) + window, v), place == i);
        write(dx + at + quarters.pixel(i), keep(input.of(g, v), mask));
      }
    });
    quarters.for_rest([&](int64_t at) { write(dx + at, keep(input.of(Vec{}, load(x + at)), mask)); });
  }
}

inline void normalisation_backward(const Batch& batch, const Normalisation& n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < batch.channels; ++c) {
    if (n.places)
      pooled_normalisation_backward(batch, n, c);
    else if (n.scale)
      normalisation_backward<Relu::affine>(batch, n, c);
    else if (n.y)
      normalisation_backward<Relu::output>(batch, n, c);
    else
      normalisation_backward<Relu::none>(batch, n, c);
  }
}

inline void channel_sums(const Batch& batch, const float* x, float* sums, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < batch.channels; ++c) {
    double total = 0;
    for_tiles(batch, c, [&](int64_t, int64_t at, int64_t pixels) {
      total += sum_pixels(pixels, [&](int64_t i) { return load(x + at + i * kLanes); });
    });
    sums[c] = static_cast<float>(total);
  }
}

// Geometry of a pooling, in pixels; mirrored by `Window` in blocked_ops.py.
struct Window {
  int64_t height, width, out_height, out_width;
  int64_t size_h, size_w, stride_h, stride_w, pad_h, pad_w;

  // Call f(place in the window, offset in the input plane) for every pixel of a window that lies in the image.
  // Size: that of a square window, known to the compiler; 0 takes any.
  template <int Size, typename F>
  CLICKTRAIN_INLINE void for_pixels(int64_t row, int64_t column, const F& f) const {
    const int64_t top = row * stride_h - pad_h, left = column * stride_w - pad_w;
    if (Size && top >= 0 && left >= 0 && top + Size <= height && left + Size <= width) {
      for (int i = 0; i < Size; ++i)
        for (int j = 0; j < Size; ++j) f(i * Size + j, ((top + i) * width + left + j) * kLanes);
      return;
    }
    const int64_t end_h = std::min(size_h, height - top), end_w = std::min(size_w, width - left);
    for (int64_t i = std::max<int64_t>(0, -top); i < end_h; ++i)
      for (int64_t j = std::max<int64_t>(0, -left); j < end_w; ++j)
        f(static_cast<int32_t>(i * size_w + j), ((top + i) * width + left + j) * kLanes);
  }

  int square() const { return size_h == size_w && (size_h == 2 || size_h == 3) ? static_cast<int>(size_h) : 0; }
  int64_t input() const { return height * width * kLanes; }
  int64_t output() const { return out_height * out_width * kLanes; }
};

// One plane (a channel of a block): the maximum of f(x) over each window and its place there. The first of equal values
// wins and NaN counts as the largest, as in torch.
template <int Size, typename F>
CLICKTRAIN_INLINE void max_pool_plane(const Window& w, const float* x, const F& f, float* y, uint8_t* places) {
  for (int64_t row = 0; row < w.out_height; ++row)
    for (int64_t column = 0; column < w.out_width; ++column, y += kLanes, places += kLanes) {
      Vec best = broadcast(-__builtin_inff());
      Mask place = Mask{} - 1;
      w.for_pixels<Size>(row, column, [&](int32_t index, int64_t at) {
        const Vec v = f(load(x + at));
        const Mask larger = (v > best) | (v != v) | (place < 0);
        best = larger ? v : best;
        place = larger ? Mask{} + index : place;
      });
      store(y, best);
      *reinterpret_cast<Places*>(places) = __builtin_convertvector(place, Places);
    }
}

// One plane of its backward: send each gradient to the place that its maximum came from.
template <int Size>
void max_pool_backward_plane(const Window& w, const float* dy, const uint8_t* places, float* dx) {
  std::fill(dx, dx + w.input(), 0.0f);
  for (int64_t row = 0; row < w.out_height; ++row)
    for (int64_t column = 0; column < w.out_width; ++column, dy += kLanes, places += kLanes) {
      const Vec g = load(dy);
      const Mask place = __builtin_convertvector(*reinterpret_cast<const Places*>(places), Mask);
      w.for_pixels<Size>(row, column, [&](int32_t index, int64_t at) {
        store(dx + at, load(dx + at) + keep(g, place == index));
      });
    }
}

// Of x or, if there is a scale, of scale * x + shift, with a ReLU behind it if asked for.
struct Argument {
  const float *x, *scale, *shift;
  bool relu;
};

template <int Size>
void max_pool_plane(const Window& w, const Batch& batch, const Argument& of, int64_t p, float* y, uint8_t* places) {
  const float* const x = of.x + p * w.input();
  y += p * w.output();
  places += p * w.output();
  if (!of.scale) return max_pool_plane<Size>(w, x, [](Vec v) { return v; }, y, places);
  const Vec scale = broadcast(of.scale[p % batch.channels]), shift = broadcast(of.shift[p % batch.channels]);
  const Vec least = broadcast(of.relu ? 0.0f : -__builtin_inff());
  const Mask mask = batch.mask(p / batch.channels);
  const auto affine = [&](Vec v) {
    const Vec result = scale * v + shift;
    return keep(result < least ? least : result, mask);
  };
  max_pool_plane<Size>(w, x, affine, y, places);
}

inline void max_pool(
    const Window& w, const Batch& batch, const Argument& of, float* y, uint8_t* places, int threads) {
  const auto plane = w.square() == 2 ? max_pool_plane<2> : w.square() == 3 ? max_pool_plane<3> : max_pool_plane<0>;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < batch.blocks() * batch.channels; ++p) plane(w, batch, of, p, y, places);
}

inline void max_pool_backward(
    const Window& w, int64_t planes, const float* dy, const uint8_t* places, float* dx, int threads) {
  const auto plane = w.square() == 2   ? max_pool_backward_plane<2>
                     : w.square() == 3 ? max_pool_backward_plane<3>
                                       : max_pool_backward_plane<0>;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < planes; ++p) plane(w, dy + p * w.output(), places + p * w.output(), dx + p * w.input());
}

}  // namespace CLICKTRAIN_ISA
