// Maxima of windows of 2 x 2 pixels that share none, of the ReLU of scale * x + shift, and the gradient back to x.
//
// A thread has VECTOR columns of two rows: VECTOR / 2 windows. The place of a maximum in its window is one byte, where
// torch stores eight; the function of x before the pooling is never stored.

constexpr int WINDOWS = VECTOR / 2;

// A thread's pixels, in packs of a plane, and its windows.
struct Tile {
  int channel, top, bottom, windows;
};

// `row_units` packs make a row; a plane has `rows` rows of windows.
__device__ __forceinline__ Tile tile_of(int i, int channels, int rows, int row_units) {
  const int row = i / row_units, column = i % row_units, top = (2 * row * row_units + column) * VECTOR;
  return {row / rows % channels, top, top + row_units * VECTOR, i * WINDOWS};
}

extern "C" __global__ void __launch_bounds__(THREADS)
    max_pool(const float* x, const float* scale, const float* shift, float* y, unsigned char* places, int channels,
             int rows, int row_units, int count, int blocks, int relu) {
  const int i = backwards(blocks) * THREADS + threadIdx.x;
  if (i >= count) return;
  const Tile tile = tile_of(i, channels, rows, row_units);
  const float factor = scale ? scale[tile.channel] : 1.0f, summand = shift ? shift[tile.channel] : 0.0f;
  const Pack above = load_packed<VECTOR>(x + tile.top), below = load_packed<VECTOR>(x + tile.bottom);
  Packed<float, WINDOWS> maxima;
  Packed<unsigned char, WINDOWS> found;
#pragma unroll
  for (int window = 0; window < WINDOWS; ++window) {
    float most = 0.0f;
    int place = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float argument = (k < 2 ? above : below).items[2 * window + k % 2] * factor + summand;
      const float value = relu ? relu_of(argument) : argument;
      if (k == 0 || value > most || value != value) most = value, place = k;  // as in torch, the last NaN
    }
    maxima.items[window] = most, found.items[window] = (unsigned char)place;
  }
  store_packed(y + tile.windows, maxima);
  store_packed(places + tile.windows, found);
}

// The gradients of a thread's pixels: dy where the maximum was and, with a `scale`, the ReLU let it through.
struct Pixels {
  Pack above, below;
};

__device__ __forceinline__ Pixels gradient_of(const Pixels& x, const float* dy, const unsigned char* places, Tile tile,
                                              const float* scale, const float* shift) {
  const auto dy_of = load_packed<WINDOWS>(dy + tile.windows);
  const auto place_of = load_packed<WINDOWS>(places + tile.windows);
  const float factor = scale ? scale[tile.channel] : 0.0f, summand = scale ? shift[tile.channel] : 1.0f;
  Pixels found;
#pragma unroll
  for (int column = 0; column < VECTOR; ++column) {
    const int window = column / 2, place = place_of.items[window];
    const bool is_above = place == column % 2 && passes(x.above.items[column] * factor + summand);
    const bool is_below = place == 2 + column % 2 && passes(x.below.items[column] * factor + summand);
    found.above.items[column] = is_above ? dy_of.items[window] : 0.0f;
    found.below.items[column] = is_below ? dy_of.items[window] : 0.0f;
  }
  return found;
}

__device__ __forceinline__ Pixels load_pixels(const float* x, Tile tile) {
  return {load_packed<VECTOR>(x + tile.top), load_packed<VECTOR>(x + tile.bottom)};
}

__device__ __forceinline__ void store_pixels(float* x, Tile tile, const Pixels& pixels) {
  store_packed(x + tile.top, pixels.above);
  store_packed(x + tile.bottom, pixels.below);
}

// The gradient of what was pooled.
extern "C" __global__ void __launch_bounds__(THREADS)
    max_pool_gradient(const float* dy, const unsigned char* places, float* dx, int channels, int rows, int row_units,
                      int count) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= count) return;
  const Tile tile = tile_of(i, channels, rows, row_units);
  store_pixels(dx, tile, gradient_of(Pixels{}, dy, places, tile, nullptr, nullptr));
}

// As `norm_gradient_sums`, from the gradient of the maxima; `units` tiles make a plane.
extern "C" __global__ void __launch_bounds__(THREADS)
    pooled_norm_gradient_sums(const float* x, const float* dy, const unsigned char* places, const float* scale,
                              const float* shift, const float* mean, float* partial, int images, int channels, int rows,
                              int row_units, int splits) {
  const Work work = work_of(blockIdx.x, images, channels, splits);
  const float middle = mean[work.channel];
  const int units = rows * row_units;
  float sum = 0.0f, products = 0.0f;
#pragma unroll 2
  for (int i = threadIdx.x; i < work.images * units; i += THREADS) {
    const int plane = (work.first_image + i / units) * channels + work.channel;
    const Tile tile = tile_of(plane * units + i % units, channels, rows, row_units);
    const Pixels values = load_pixels(x, tile), found = gradient_of(values, dy, places, tile, scale, shift);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      sum += found.above.items[k] + found.below.items[k];
      products += found.above.items[k] * (values.above.items[k] - middle);
      products += found.below.items[k] * (values.below.items[k] - middle);
    }
  }
  store_sums(sum, products, partial, blockIdx.x);
}

// As `norm_gradient`, from the gradient of the maxima.
extern "C" __global__ void __launch_bounds__(THREADS)
    pooled_norm_gradient(const float* x, const float* dy, const unsigned char* places, const float* scale,
                         const float* shift, const float* mean, const float* invstd, const float* weight,
                         const float* dweight, const float* dbias, float* dx, int channels, int rows, int row_units,
                         int count, int blocks, float share) {
  const int i = backwards(blocks) * THREADS + threadIdx.x;
  if (i >= count) return;
  const Tile tile = tile_of(i, channels, rows, row_units);
  const Normalisation normalisation = normalisation_of(tile.channel, mean, invstd, weight, dweight, dbias, share);
  const Pixels values = load_pixels(x, tile);
  Pixels found = gradient_of(values, dy, places, tile, scale, shift);
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) {
    found.above.items[k] = normalisation.backward(found.above.items[k], values.above.items[k]);
    found.below.items[k] = normalisation.backward(found.below.items[k], values.below.items[k]);
  }
  store_pixels(dx, tile, found);
}
