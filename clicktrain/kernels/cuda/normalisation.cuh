// Batch normalisation with the addition and the ReLU behind it, forward and backward, on images in NCHW.
//
// Where the limit is: memory. Forward, x is read twice and the result written once; backward, x and dy are read twice
// and dx is written once. Nothing else is stored: whether the ReLU let a gradient through is computed from x again. The
// second pass of either direction goes through memory backwards, for what the first one read last is still in the
// second-level cache.
//
// Sums of a channel have a fixed order: each block adds up some images of one channel, in `finish_*` a warp adds up the
// blocks. Those for the variance are of differences from the channel's first value, so that a large mean does not
// cancel.

using Pack = Packed<float, VECTOR>;

// Some images of one channel. Neighbouring blocks take neighbouring channels of the same images.
struct Work {
  int channel, split, first_image, images;
};

__device__ __forceinline__ Work work_of(int block, int images, int channels, int splits) {
  const int split = block / channels, most = (images + splits - 1) / splits, first = split * most;
  const int left = images - first;
  return {block % channels, split, first, left < 0 ? 0 : left < most ? left : most};
}

// Write the sums of a block, (splits, channels, 2).
__device__ __forceinline__ void store_sums(float one, float two, float* partial, int place) {
  float* const space = reinterpret_cast<float*>(shared_memory());
  const int warp = threadIdx.x / 32;
  one = sum_of_warp(one), two = sum_of_warp(two);
  if (threadIdx.x % 32 == 0) space[2 * warp] = one, space[2 * warp + 1] = two;
  __syncthreads();
  if (threadIdx.x >= 2) return;
  float total = 0.0f;
  for (int i = 0; i < THREADS / 32; ++i) total += space[2 * i + threadIdx.x];
  partial[2 * place + threadIdx.x] = total;
}

// A warp adds up what the blocks of a channel found; all lanes know it.
__device__ __forceinline__ float sum_of_splits(const float* partial, int channel, int channels, int splits, int which) {
  float total = 0.0f;
  for (int split = threadIdx.x % 32; split < splits; split += 32)
    total += partial[2 * (split * channels + channel) + which];
  return sum_of_warp(total);
}

// The last block first.
__device__ __forceinline__ int backwards(int blocks) { return blocks - 1 - int(blockIdx.x); }

// Sums of x - x[0] and of its square; `units` packs make a plane.
extern "C" __global__ void __launch_bounds__(THREADS)
    statistics(const float* x, float* partial, int images, int channels, int units, int splits) {
  const Work work = work_of(blockIdx.x, images, channels, splits);
  const float origin = x[work.channel * units * VECTOR];
  float sum = 0.0f, squares = 0.0f;
#pragma unroll 4
  for (int i = threadIdx.x; i < work.images * units; i += THREADS) {
    const int plane = (work.first_image + i / units) * channels + work.channel;
    const Pack values = load_packed<VECTOR>(x + (plane * units + i % units) * VECTOR);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      const float difference = values.items[k] - origin;
      sum += difference, squares += difference * difference;
    }
  }
  store_sums(sum, squares, partial, blockIdx.x);
}

// What the sums say, and the function scale * x + shift that normalises; running statistics move towards the batch's.
extern "C" __global__ void __launch_bounds__(THREADS)
    finish_statistics(const float* x, const float* partial, const float* weight, const float* bias, float* running_mean,
                      float* running_var, float* mean, float* invstd, float* scale, float* shift, int channels,
                      int plane, int splits, int count, float eps, float momentum) {
  const int channel = (blockIdx.x * THREADS + threadIdx.x) / 32;
  if (channel >= channels) return;
  const double n = count, sum = sum_of_splits(partial, channel, channels, splits, 0);
  const double squares = sum_of_splits(partial, channel, channels, splits, 1) - sum * sum / n;
  if (threadIdx.x % 32) return;
  const double variance = squares < 0.0 ? 0.0 : squares / n, middle = x[channel * plane] + sum / n;
  const double inverse = 1.0 / sqrt(variance + eps);
  const double factor = weight ? weight[channel] * inverse : inverse;
  mean[channel] = float(middle), invstd[channel] = float(inverse);
  scale[channel] = float(factor), shift[channel] = float((bias ? bias[channel] : 0.0) - middle * factor);
  if (running_mean) running_mean[channel] += momentum * (float(middle) - running_mean[channel]);
  if (running_var)
    running_var[channel] += momentum * (float(squares < 0.0 ? 0.0 : squares / (n - 1.0)) - running_var[channel]);
}

__device__ __forceinline__ float relu_of(float value) { return value < 0.0f ? 0.0f : value; }  // a NaN stays

// y = scale * x + shift (+ residual), then the ReLU if asked for; `count` packs.
extern "C" __global__ void __launch_bounds__(THREADS)
    affine(const float* x, const float* scale, const float* shift, const float* residual, float* y, int channels,
           int units, int count, int blocks, int relu) {
  const int i = backwards(blocks) * THREADS + threadIdx.x;
  if (i >= count) return;
  const int channel = i / units % channels;
  const float factor = scale[channel], summand = shift[channel];
  Pack values = load_packed<VECTOR>(x + i * VECTOR), more = {};
  if (residual) more = load_packed<VECTOR>(residual + i * VECTOR);
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) {
    const float value = values.items[k] * factor + summand + more.items[k];
    values.items[k] = relu ? relu_of(value) : value;
  }
  store_packed(y + i * VECTOR, values);
}

// The ReLU behind a normalisation: its result, or the function of x that it was taken of; neither: there is none.
struct Relu {
  const float *output, *scale, *shift;
};

// Whether a gradient passes: as in torch, where the ReLU's result is not zero.
__device__ __forceinline__ bool passes(float value) { return !(value <= 0.0f); }

// The gradient in front of the ReLU, for a pack of dy.
__device__ __forceinline__ Pack gradient_of(const Pack& x, Pack dy, Relu relu, int offset, int channel) {
  if (relu.output) {
    const Pack output = load_packed<VECTOR>(relu.output + offset);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) dy.items[k] = passes(output.items[k]) ? dy.items[k] : 0.0f;
  } else if (relu.scale) {
    const float factor = relu.scale[channel], summand = relu.shift[channel];
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) dy.items[k] = passes(x.items[k] * factor + summand) ? dy.items[k] : 0.0f;
  }
  return dy;
}

// Sums of the gradient and of its products with x - mean.
extern "C" __global__ void __launch_bounds__(THREADS)
    norm_gradient_sums(const float* x, const float* dy, const float* output, const float* scale, const float* shift,
                       const float* mean, float* partial, int images, int channels, int units, int splits) {
  const Work work = work_of(blockIdx.x, images, channels, splits);
  const float middle = mean[work.channel];
  float sum = 0.0f, products = 0.0f;
#pragma unroll 4
  for (int i = threadIdx.x; i < work.images * units; i += THREADS) {
    const int plane = (work.first_image + i / units) * channels + work.channel;
    const int offset = (plane * units + i % units) * VECTOR;
    const Pack values = load_packed<VECTOR>(x + offset);
    const Pack gradient =
        gradient_of(values, load_packed<VECTOR>(dy + offset), {output, scale, shift}, offset, work.channel);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k)
      sum += gradient.items[k], products += gradient.items[k] * (values.items[k] - middle);
  }
  store_sums(sum, products, partial, blockIdx.x);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    finish_norm_gradient(const float* partial, const float* invstd, float* dweight, float* dbias, int channels,
                         int splits) {
  const int channel = (blockIdx.x * THREADS + threadIdx.x) / 32;
  if (channel >= channels) return;
  const float sum = sum_of_splits(partial, channel, channels, splits, 0);
  const float products = sum_of_splits(partial, channel, channels, splits, 1);
  if (threadIdx.x % 32 == 0) dbias[channel] = sum, dweight[channel] = products * invstd[channel];
}

// dx = factor * gradient; where the statistics depended on x, that is with `dweight`, less what they took part in:
// factor * (mean of gradients + normalised x * mean of their products with it).
struct Normalisation {
  float factor, middle, of_all, of_x;
  bool of_batch;

  __device__ __forceinline__ float backward(float gradient, float x) const {
    return of_batch ? gradient * factor - of_all - (x - middle) * of_x : gradient * factor;
  }
};

__device__ __forceinline__ Normalisation normalisation_of(int channel, const float* mean, const float* invstd,
                                                          const float* weight, const float* dweight, const float* dbias,
                                                          float share) {
  const float factor = weight ? weight[channel] * invstd[channel] : invstd[channel];
  if (!dweight) return {factor, 0.0f, 0.0f, 0.0f, false};
  const float part = factor * share;
  return {factor, mean[channel], part * dbias[channel], part * dweight[channel] * invstd[channel], true};
}

// The gradient of x; `share` is 1 / values of a channel.
extern "C" __global__ void __launch_bounds__(THREADS)
    norm_gradient(const float* x, const float* dy, const float* output, const float* scale, const float* shift,
                  const float* mean, const float* invstd, const float* weight, const float* dweight, const float* dbias,
                  float* dx, int channels, int units, int count, int blocks, float share) {
  const int i = backwards(blocks) * THREADS + threadIdx.x;
  if (i >= count) return;
  const int channel = i / units % channels;
  const Normalisation normalisation = normalisation_of(channel, mean, invstd, weight, dweight, dbias, share);
  const Pack values = load_packed<VECTOR>(x + i * VECTOR);
  Pack found = gradient_of(values, load_packed<VECTOR>(dy + i * VECTOR), {output, scale, shift}, i * VECTOR, channel);
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) found.items[k] = normalisation.backward(found.items[k], values.items[k]);
  store_packed(dx + i * VECTOR, found);
}
