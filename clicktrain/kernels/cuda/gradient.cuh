// The gradient of the kept weights, and of nothing else: dvalues = sum over pixels of dy times the shifted x.
//
// Where the limit is (see convolution.cuh for the rates). A weight needs one FMA for each output pixel and two values
// for it, so again each lane takes a patch: kernels of one channel and pattern form a task of up to TASK_FILTERS
// filters, which share the window's values, and each value of dy serves all taps of its kernel. A task of 3 filters
// with a 2x2-shaped pattern on a patch of 2 x 4 pixels does 96 FMA on 15 + 3 * 8 = 39 loads: 39 cycles of shared
// memory against 24 of FMA, at most 61 % of the FP32 rate. Larger patches would share more within a task, but then
// fewer channels and filters fit into shared memory, and what is copied from the second-level cache is used less
// often: with C channels and F filters in a block, C * 24 + F * 8 floats a lane serve 0.28 * C * F * 32 FMA at 8x
// compression, 9 FMA a float for C = 16 and F = 48.
//
// A block owns up to WARPS * TASKS tasks and keeps all their sums in registers while it walks over its share of the
// patches, 32 at a time; lanes are summed at the end by shuffles, blocks by a second kernel, in a fixed order.
// Patches at an edge are moved inward, so that no pixel outside the output exists whose zero would meet a NaN of x;
// pixels that an earlier patch covers too have dy = 0.

struct Place {
  int image, top, left, skip_rows, skip_columns;
};

__device__ __forceinline__ Place place_of(int patch, int tiles_h, int tiles_w, int out_h, int out_w) {
  Place place;
  const int left = patch % tiles_w * TILE_COLUMNS, top = patch / tiles_w % tiles_h * TILE_ROWS;
  place.left = left + TILE_COLUMNS > out_w ? out_w - TILE_COLUMNS : left;
  place.top = top + TILE_ROWS > out_h ? out_h - TILE_ROWS : top;
  place.skip_rows = top - place.top;
  place.skip_columns = left - place.left;
  place.image = patch / (tiles_w * tiles_h) * IMAGES;
  return place;
}

// Copy windows of x. WARPS threads share a lane, so that neighbours read neighbouring pixels.
__device__ __forceinline__ void copy_windows(float* tile, const Element* x, Place place, int first, int count,
                                             int images, int channels, int in_h, int in_w) {
  const int lane = threadIdx.x / WARPS;
  for (int pixel = threadIdx.x % WARPS; pixel < WINDOW; pixel += WARPS) {
    const int image = place.image + pixel / (WINDOW_ROWS * WINDOW_COLUMNS);
    const int row = place.top * STRIDE_ROWS + START_ROW + pixel / WINDOW_COLUMNS % WINDOW_ROWS;
    const int column = place.left * STRIDE_COLUMNS + START_COLUMN + pixel % WINDOW_COLUMNS;
    const bool exists = image < images && row >= 0 && row < in_h && column >= 0 && column < in_w;
    const Element* from = exists ? x + ((image * channels + first) * in_h + row) * in_w + column : x;
    const int step = exists ? in_h * in_w : 0;
    float* to = tile + pixel * PITCH + lane;
    for (int i = 0; i < count; ++i, from += step, to += WINDOW * PITCH) copy_async(to, from, exists);
  }
}

// Copy patches of dy.
__device__ __forceinline__ void copy_patches(float* tile, const Element* dy, Place place, int first, int count,
                                             int images, int filters, int out_h, int out_w) {
  const int lane = threadIdx.x / WARPS;
  for (int pixel = threadIdx.x % WARPS; pixel < PATCH; pixel += WARPS) {
    const int image = place.image + pixel / (TILE_ROWS * TILE_COLUMNS);
    const int row = pixel / TILE_COLUMNS % TILE_ROWS, column = pixel % TILE_COLUMNS;
    const bool exists = image < images && row >= place.skip_rows && column >= place.skip_columns;
    const Element* from =
        exists ? dy + ((image * filters + first) * out_h + place.top + row) * out_w + place.left + column : dy;
    const int step = exists ? out_h * out_w : 0;
    float* to = tile + pixel * PITCH + lane;
    for (int i = 0; i < count; ++i, from += step, to += PATCH * PITCH) copy_async(to, from, exists);
  }
}

__device__ __forceinline__ float sum_of_warp(float value) {
  for (int distance = 16; distance; distance /= 2) value += shuffle_xor(value, distance);
  return value;
}

// Words of a task: pattern (-1: none), place of its channel's window, places of its filters' patches, and the
// canonical numbers of its kernels (-1: none).
constexpr int TASK_WORDS = 2 + 2 * TASK_FILTERS;

// One block: a piece (tasks within FILTERS filters and CHANNELS channels) and every splits-th group of 32 patches.
extern "C" __global__ void __launch_bounds__(THREADS)
    gradient(const Element* x, const Element* dy, float* partial, const int* tasks, const int* pieces, int images,
             int channels, int in_h, int in_w, int filters, int out_h, int out_w, int tiles_h, int tiles_w, int groups,
             int piece_count, int splits, int kernels) {
  constexpr int X_FLOATS = CHANNELS * WINDOW * PITCH, BUFFER = X_FLOATS + FILTERS * PATCH * PITCH;
  float* const buffers = reinterpret_cast<float*>(shared_memory());
  int* const words = reinterpret_cast<int*>(buffers + 2 * BUFFER);

  const int piece = blockIdx.x % piece_count, split = blockIdx.x / piece_count;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_filter = pieces[2 * piece], first_channel = pieces[2 * piece + 1];
  const int filter_count = filters - first_filter < FILTERS ? filters - first_filter : FILTERS;
  const int channel_count = channels - first_channel < CHANNELS ? channels - first_channel : CHANNELS;
  for (int i = threadIdx.x; i < WARPS * TASKS * TASK_WORDS; i += THREADS)
    copy_async(words + i, tasks + piece * WARPS * TASKS * TASK_WORDS + i, true);

  float sum[TASKS][TASK_FILTERS * ENTRIES];
#pragma unroll
  for (int t = 0; t < TASKS; ++t)
#pragma unroll
    for (int i = 0; i < TASK_FILTERS * ENTRIES; ++i) sum[t][i] = 0.0f;

  int buffer = 0;
  for (int group = split - splits; group < groups; group += splits, buffer ^= 1) {
    wait_for_copies();
    __syncthreads();
    const int next = group + splits;
    if (next < groups) {
      float* const target = buffers + (buffer ^ 1) * BUFFER;
      const Place place = place_of(next * 32 + int(threadIdx.x) / WARPS, tiles_h, tiles_w, out_h, out_w);
      copy_windows(target, x, place, first_channel, channel_count, images, channels, in_h, in_w);
      copy_patches(target + X_FLOATS, dy, place, first_filter, filter_count, images, filters, out_h, out_w);
    }
    if (group >= 0) {
      const float* const source = buffers + buffer * BUFFER + lane;
#pragma unroll
      for (int t = 0; t < TASKS; ++t) {
        const int* task = words + (t * WARPS + warp) * TASK_WORDS;
        accumulate(task[0], source + task[1], source + X_FLOATS, task + 2, sum[t]);
      }
    }
  }

#pragma unroll
  for (int t = 0; t < TASKS; ++t) {
    const int* task = words + (t * WARPS + warp) * TASK_WORDS;
#pragma unroll
    for (int i = 0; i < TASK_FILTERS * ENTRIES; ++i) {
      const float total = sum_of_warp(sum[t][i]);
      const int number = task[2 + TASK_FILTERS + i / ENTRIES];
      if (lane == 0 && number >= 0) partial[(split * kernels + number) * ENTRIES + i % ENTRIES] = total;
    }
  }
}

// Add up what the splits found, one after another, and round once.
extern "C" __global__ void __launch_bounds__(256)
    finish(const float* partial, Element* dvalues, int count, int splits) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= count) return;
  float total = 0.0f;
  for (int split = 0; split < splits; ++split) total += partial[split * count + i];
  from_float(total, dvalues[i]);
}
