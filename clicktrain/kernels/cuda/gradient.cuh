// The gradient of the kept weights, and of nothing else: dvalues = sum over pixels of dy times the shifted x.
//
// Where the limit is (see convolution.cuh for the rates). A weight needs one FMA for each output pixel and two values
// for it, so again each lane takes a patch: kernels of one channel form a task, whose window is loaded into registers
// once, and each value of dy serves all taps of its kernel. A task of 8 kernels with a 2x2-shaped pattern on a patch of
// 4 x 4 pixels does 512 FMA on 36 + 8 * 16 = 164 loads: 164 cycles of shared memory against 128 of FMA, at most 78 % of
// the FP32 rate. Taps are compile-time constants, so there is code for every pattern of every kernel of a task; all
// warps walk through it at about the same time, which is what the instruction cache likes.
//
// A block owns up to WARPS * TASKS tasks and keeps all their sums in registers while it walks over its share of the
// regions; lanes are summed at the end by shuffles, blocks by a second kernel, in a fixed order. Patches divide the
// output and lanes the patches of an image, so that no pixel outside the output exists whose zero would meet a NaN of x.

// Copy some planes of a region, of x or of dy, VECTOR neighbours at once. Threads beyond its pixels take the next planes.
template <int IMAGES_, int ROWS, int COLUMNS, int STEP, int PITCH, int BAND_SKEW, int IMAGE_STEP, int WORDS, int VECTOR>
__device__ __forceinline__ void copy_planes(float* tile, const Element* from_all, int image, int row, int column,
                                            int first, int count, int images, int planes, int height, int width,
                                            int plane) {
  constexpr int PARTS = IMAGES_ * ROWS * COLUMNS / VECTOR;
  constexpr int WAYS = THREADS >= 2 * PARTS ? THREADS / PARTS : 1;
  const int way = WAYS > 1 ? int(threadIdx.x) / PARTS : 0;
  if (way >= WAYS) return;
  for (int part = WAYS > 1 ? threadIdx.x % PARTS : threadIdx.x; part < PARTS; part += THREADS) {
    const int pixel = part * VECTOR, i = pixel / (ROWS * COLUMNS), r = pixel / COLUMNS % ROWS, c = pixel % COLUMNS;
    const bool exists = image + i < images && row + r >= 0 && row + r < height && column + c >= 0 && column + c < width;
    const Element* from =
        exists ? from_all + ((image + i) * planes + first + way) * plane + (row + r) * width + column + c : from_all;
    float* to = tile + way * WORDS + i * IMAGE_STEP + r * PITCH + r / STEP * BAND_SKEW + c;
    const int step = exists ? WAYS * plane : 0;
#pragma unroll 4
    for (int k = 0; k < (count - way + WAYS - 1) / WAYS; ++k) {
      if (VECTOR == 4)
        copy_async4(to + k * WAYS * WORDS, from + k * step, exists);
      else
        copy_async(to + k * WAYS * WORDS, from + k * step, exists);
    }
  }
}

__device__ __forceinline__ float sum_of_warp(float value) {
  for (int distance = 16; distance; distance /= 2) value += shuffle_xor(value, distance);
  return value;
}

// Words of a task: the place of its channel's window (-1: no task); for each kernel its pattern (-1: none), the place of
// its filter's patches and its canonical number.
constexpr int TASK_WORDS = 1 + 3 * TASK_KERNELS;

// One block: a piece (tasks within FILTERS filters and CHANNELS channels) and every splits-th region.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    gradient(const Element* x, const Element* dy, float* partial, const int* tasks, const int* pieces, int images,
             int channels, int in_h, int in_w, int filters, int out_h, int out_w, int regions_h, int regions_w, int regions,
             int piece_count, int splits, int kernels) {
  constexpr int X_WORDS = (CHANNELS * CHANNEL_WORDS + 3) / 4 * 4, BUFFER = X_WORDS + FILTERS * FILTER_WORDS;
  constexpr int SEATS = LANE_IMAGES * LANE_ROWS * LANE_COLUMNS;  // lanes beyond them count nothing
  float* const buffers = reinterpret_cast<float*>(shared_memory());
  int* const words = reinterpret_cast<int*>(buffers + 2 * BUFFER);

  const int piece = blockIdx.x % piece_count, split = blockIdx.x / piece_count;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_filter = pieces[2 * piece], first_channel = pieces[2 * piece + 1];
  const int filter_count = filters - first_filter < FILTERS ? filters - first_filter : FILTERS;
  const int channel_count = channels - first_channel < CHANNELS ? channels - first_channel : CHANNELS;
  const int seat = lane < SEATS ? lane : 0, column = seat % LANE_COLUMNS;
  const int row = seat / LANE_COLUMNS % LANE_ROWS, image = seat / (LANE_ROWS * LANE_COLUMNS);
  const int x_corner = image * IMAGE_PITCH + row * (STEP_ROWS * ROW_PITCH + SKEW) + column * STEP_COLUMNS;
  const int dy_corner = image * DY_IMAGE_PITCH + row * (TILE_ROWS * DY_ROW_PITCH + DY_SKEW) + column * TILE_COLUMNS;
  for (int i = threadIdx.x; i < WARPS * TASKS * TASK_WORDS; i += THREADS)
    copy_async(words + i, tasks + piece * WARPS * TASKS * TASK_WORDS + i, true);

  float sum[TASKS][TASK_KERNELS * ENTRIES];
#pragma unroll
  for (int t = 0; t < TASKS; ++t)
#pragma unroll
    for (int i = 0; i < TASK_KERNELS * ENTRIES; ++i) sum[t][i] = 0.0f;

  int buffer = 0;
  for (int region = split - splits; region < regions; region += splits, buffer ^= 1) {
    wait_for_copies();
    __syncthreads();
    const int next = region + splits;
    if (next < regions) {
      float* const target = buffers + (buffer ^ 1) * BUFFER;
      const int next_image = next / (regions_w * regions_h) * REGION_IMAGES;
      const int next_row = next / regions_w % regions_h * LANE_ROWS, next_column = next % regions_w * LANE_COLUMNS;
      copy_planes<REGION_IMAGES, REGION_ROWS, REGION_COLUMNS, STEP_ROWS, ROW_PITCH, SKEW, IMAGE_PITCH, CHANNEL_WORDS, 1>(
          target, x, next_image, next_row * STEP_ROWS + START_ROW, next_column * STEP_COLUMNS + START_COLUMN,
          first_channel, channel_count, images, channels, in_h, in_w, PLANE ? PLANE : in_h * in_w);
      copy_planes<REGION_IMAGES, DY_REGION_ROWS, DY_REGION_COLUMNS, TILE_ROWS, DY_ROW_PITCH, DY_SKEW, DY_IMAGE_PITCH,
                  FILTER_WORDS, DY_VECTOR>(target + X_WORDS, dy, next_image, next_row * TILE_ROWS,
                                           next_column * TILE_COLUMNS, first_filter, filter_count, images, filters,
                                           out_h, out_w, DY_PLANE ? DY_PLANE : out_h * out_w);
    }
    if (region >= 0) {
      const float* const source = buffers + buffer * BUFFER;
#pragma unroll
      for (int t = 0; t < TASKS; ++t) {
        accumulate(words + (t * WARPS + warp) * TASK_WORDS, source + x_corner, source + X_WORDS + dy_corner, sum[t]);
      }
    }
  }
  if (lane >= SEATS) {
#pragma unroll
    for (int t = 0; t < TASKS; ++t)
#pragma unroll
      for (int i = 0; i < TASK_KERNELS * ENTRIES; ++i) sum[t][i] = 0.0f;
  }

#pragma unroll
  for (int t = 0; t < TASKS; ++t) {
    const int* task = words + (t * WARPS + warp) * TASK_WORDS;
#pragma unroll
    for (int i = 0; i < TASK_KERNELS * ENTRIES; ++i) {
      const float total = sum_of_warp(sum[t][i]);
      const int kernel = i / ENTRIES, number = task[3 + 3 * kernel];
      if (lane == 0 && task[0] >= 0 && task[1 + 3 * kernel] >= 0) partial[(split * kernels + number) * ENTRIES + i % ENTRIES] = total;
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
