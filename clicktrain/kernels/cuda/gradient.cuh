// The gradient of the kept weights, and of nothing else: dvalues = sum over pixels of dy times the shifted x.
//
// Where the limit is (see convolution.cuh for the rates). A weight needs one FMA for each output pixel and two values
// for it, so again each lane takes a patch: kernels of one filter form a task, whose patch of dy is loaded into registers
// once, and each value of the window serves all taps of the kernel. A task of 8 kernels with a 2x2-shaped pattern on a
// patch of 4 x 4 pixels does 512 FMA on 16 + 8 * 25 = 216 loads: 216 cycles of shared memory against 128 of FMA, at most
// 59 % of the FP32 rate. To share the window of a channel would take fewer loads (164), but kernels of one channel differ
// in their patterns: a window in registers needs code of its own for every pattern of every kernel of a task, while one
// in shared memory is read from where the pattern begins (`Shapes` in codegen.py).
//
// A block owns up to WARPS * TASKS tasks and keeps all their sums in registers while it walks over its share of the
// regions; lanes are summed at the end by shuffles, blocks by a second kernel, in a fixed order. Patches divide the
// output and lanes the patches of an image, so that no pixel outside the output exists whose zero would meet a NaN of x.

// A region of x or of dy, of which VECTOR neighbours are copied at once.
template <int Images, int Rows, int Columns, int Step, int Pitch, int BandSkew, int ImagePitch, int PlaneWords, int Vector>
struct Area {
  static constexpr int parts = Images * Rows * Columns / Vector, vector = Vector, plane_words = PlaneWords;
  // Where there are more threads than parts, several planes are copied side by side.
  static constexpr int ways = THREADS >= 2 * parts ? THREADS / parts : 1;
  static constexpr int sets = (parts + THREADS - 1) / THREADS;

  // Image, row and column of a part, packed, and its place in a tile.
  __device__ __forceinline__ static constexpr unsigned pixel(int part) {
    return unsigned(part * Vector / (Rows * Columns)) << 24 | unsigned(part * Vector / Columns % Rows) << 12 |
           unsigned(part * Vector % Columns);
  }
  __device__ __forceinline__ static constexpr int place(int image, int row, int column) {
    return image * ImagePitch + row * Pitch + row / Step * BandSkew + column;
  }
};
using X = Area<REGION_IMAGES, REGION_ROWS, REGION_COLUMNS, STEP_ROWS, ROW_PITCH, SKEW, IMAGE_PITCH, CHANNEL_WORDS, 1>;
using Dy = Area<REGION_IMAGES, DY_REGION_ROWS, DY_REGION_COLUMNS, TILE_ROWS, DY_ROW_PITCH, DY_SKEW, DY_IMAGE_PITCH,
                FILTER_WORDS, DY_VECTOR>;

// A thread's share of every plane of a region, found once for all regions.
constexpr unsigned NOTHING = ~0u;
template <typename A>
struct Share {
  unsigned pixels[A::sets];
};

template <typename A>
__device__ __forceinline__ Share<A> share_of(A) {
  Share<A> share;
#pragma unroll
  for (int set = 0; set < A::sets; ++set) {
    const int part = A::ways > 1 ? int(threadIdx.x) % A::parts : int(threadIdx.x) + set * THREADS;
    const bool idle = part >= A::parts || int(threadIdx.x) / A::parts >= A::ways;
    share.pixels[set] = idle ? NOTHING : A::pixel(part);
  }
  return share;
}

// Images of a batch: how many, planes of an image, rows, columns, pixels of a plane.
struct Batch {
  int images, planes, height, width, plane;
};

// Copy some planes of the region that starts at an image, a row and a column.
template <typename A>
__device__ __forceinline__ void copy_planes(A, float* tile, const Share<A>& share, const Element* from_all, int image,
                                            int row, int column, int first, int count, Batch batch) {
  const int way = A::ways > 1 ? int(threadIdx.x) / A::parts : 0;
#pragma unroll
  for (int set = 0; set < A::sets; ++set) {
    if (share.pixels[set] == NOTHING) continue;
    const int i = share.pixels[set] >> 24, r = share.pixels[set] >> 12 & 0xfff, c = share.pixels[set] & 0xfff;
    const bool exists = image + i < batch.images && row + r >= 0 && row + r < batch.height && column + c >= 0 &&
                        column + c < batch.width;
    const int start = (((image + i) * batch.planes + first + way) * batch.height + row + r) * batch.width + column + c;
    const Element* from = from_all + (exists ? start : 0);
    float* to = tile + way * A::plane_words + A::place(i, r, c);
    const int step = exists ? A::ways * batch.plane : 0;
#pragma unroll 4
    for (int k = way; k < count; k += A::ways, to += A::ways * A::plane_words, from += step) {
      if constexpr (A::vector == 4)
        copy_async4(to, from, exists);
      else
        copy_async(to, from, exists);
    }
  }
}

// Words of a task: the place of its filter's patches (-1: no task); for each kernel its shape (-1: none), the place of its
// window and its canonical number.
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

  regions_h = REGIONS_ROWS ? REGIONS_ROWS : regions_h, regions_w = REGIONS_COLUMNS ? REGIONS_COLUMNS : regions_w;
  const Share<X> x_share = share_of(X{});
  const Share<Dy> dy_share = share_of(Dy{});
  const Batch x_batch{images, channels, in_h, in_w, PLANE ? PLANE : in_h * in_w};
  const Batch dy_batch{images, filters, out_h, out_w, DY_PLANE ? DY_PLANE : out_h * out_w};

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
      copy_planes(X{}, target, x_share, x, next_image, next_row * STEP_ROWS + START_ROW,
                  next_column * STEP_COLUMNS + START_COLUMN, first_channel, channel_count, x_batch);
      copy_planes(Dy{}, target + X_WORDS, dy_share, dy, next_image, next_row * TILE_ROWS, next_column * TILE_COLUMNS,
                  first_filter, filter_count, dy_batch);
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
