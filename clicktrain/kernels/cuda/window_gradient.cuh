// The gradient of the kept weights in float32, with the window of a channel in registers.
//
// Where the limit is (see convolution.cuh for the rates). A lane holds the window of one channel for its patch and goes
// through the filters that keep a kernel of this channel: a patch of 16 pixels of dy comes in 4 loads of 16 bytes, which
// take 16 cycles of shared memory, for 64 FMA, which take 16 cycles of the multiprocessor. Sums over lanes add 3
// shuffles, a store and a load, the program a load: about 22 cycles of shared memory. 40 other instructions make it 26
// cycles of issue, so at most 60 % of the FP32 rate. (gradient.cuh loads 25 words of x and 2 of dy for the same 64 FMA,
// one by one, and adds up lanes only at the end.) A window costs 80 to 150 cycles, copy included, and serves those filters
// of a block that keep a kernel of its channel: a block has as many as fit.
//
// What an H100 reaches (a profile of 512 channels of 4 x 4 pixels; bench/evidence/gpu_candidates.json): issue slots busy
// 52 % of the time, FMA 28 %; of the cycles without an issue, a third waited for copies of dy to read their addresses,
// before teams of all threads made them from constant distances; a fifth for other warps, and a quarter for shared memory.
//
// A block has the dy of FILTERS filters in shared memory, in the order of its lanes: unit g (4 pixels) of lane l is at
// g * UNIT_PITCH + l, so that no bank serves two lanes. x never is as a whole: each warp copies the windows of its next
// channel into a slot of its own while it works on one. So a region's words are copied once for F * C kernels, where C is
// all channels of the piece. A region's sums are added to those of the block's last one in global memory, where they take
// no room from filters; that is 16 bytes for 512 pixels. `finish` adds up blocks, in a fixed order.
//
// No pixel outside the output exists whose zero would meet a NaN of x: patches divide the output, lanes the patches of an
// image, and of images that do not exist both operands are zero. Where a patch spans the image, taps in the padding are
// left out of the code.

constexpr int UNIT_PITCH = 33;  // of 16 bytes: one more than lanes, so that copies do not meet in a bank either
constexpr int SEATS = LANE_IMAGES * LANE_ROWS * LANE_COLUMNS;  // lanes beyond them count nothing
constexpr int REGION_IMAGES = LANE_IMAGES * IMAGES;
constexpr int GROUPS = 32 / CELLS;  // of lanes, each with all entries: kernels whose sums are completed at once
constexpr int PENDING_PITCH = 32 + CELLS;

// Where a region lies: first image, and row and column of its first patch in the output.
struct Place {
  int image, row, column;
};

__device__ __forceinline__ Place place_of(int region) {
  return {region / (REGIONS_ROWS * REGIONS_COLUMNS) * REGION_IMAGES,
          region / REGIONS_COLUMNS % REGIONS_ROWS * (LANE_ROWS * TILE_ROWS),
          region % REGIONS_COLUMNS * (LANE_COLUMNS * TILE_COLUMNS)};
}

template <int Vector>
__device__ __forceinline__ void copy_vector(float* to, const float* from, bool exists) {
  if constexpr (Vector == 4)
    copy_async4(to, from, exists);
  else
    copy_async(to, from, exists);
}

// The word of a plane that keeps each lane's patch together. Patches that span the image are one long row here.
template <int Rows, int Columns, int Units>
__device__ __forceinline__ int patch_word(int image, int row, int column) {
  const int lane = (image % LANE_IMAGES * LANE_ROWS + row / Rows) * LANE_COLUMNS + column / Columns;
  const int word = image / LANE_IMAGES * (4 * Units) + row % Rows * Columns + column % Columns;
  return (word / 4 * UNIT_PITCH + lane) * 4 + word % 4;
}

// Copy the patches of all filters of a piece; neighbouring threads take neighbouring pixels, then neighbouring planes, and
// teams of them every so many planes. Distances between a thread's planes are constants: an address that changed from copy
// to copy could do so only once the copy before has read it.
__device__ __forceinline__ void copy_patches(float* planes, const float* dy, Place at, int first_filter, int filters,
                                             int images) {
  constexpr int ROWS = LANE_ROWS * DY_ROWS, COLUMNS = LANE_COLUMNS * DY_COLUMNS / DY_VECTOR, PARTS = ROWS * COLUMNS;
  constexpr int ITEMS = REGION_IMAGES * PARTS * DY_WAYS, TEAMS = THREADS >= 2 * ITEMS ? THREADS / ITEMS : 1;
  constexpr int STEP = DY_WAYS * TEAMS;
  const int team = TEAMS > 1 ? int(threadIdx.x) / ITEMS : 0;
  if (team >= TEAMS) return;
  const int count = filters - first_filter < FILTERS ? filters - first_filter : FILTERS;
  for (int item = TEAMS > 1 ? threadIdx.x % ITEMS : threadIdx.x; item < ITEMS; item += THREADS) {
    const int image = item / (PARTS * DY_WAYS), first = item / PARTS % DY_WAYS + team * DY_WAYS;
    const int row = item % PARTS / COLUMNS, column = item % COLUMNS * DY_VECTOR;
    const bool exists = at.image + image < images;
    const int pixel = (at.row + row) * OUT_WIDTH + at.column + column;
    const float* from = dy + ((at.image + image) * filters + first_filter + first) * OUT_PIXELS + pixel;
    float* to = planes + first * PLANE_WORDS + patch_word<DY_ROWS, DY_COLUMNS, IMAGE_UNITS>(image, row, column);
#pragma unroll 8
    for (int k = first; k < count; k += STEP, from += STEP * OUT_PIXELS, to += STEP * PLANE_WORDS)
      copy_vector<DY_VECTOR>(to, from, exists);
  }
}

// Copy a warp's windows of a channel into its slot: whole images as they are, or rows that neighbouring windows share.
__device__ __forceinline__ void copy_windows(float* slot, const float* x, Place at, int channel, int channels,
                                             int images) {
  constexpr int COLUMNS = X_COLUMNS / X_VECTOR, PARTS = X_ROWS * COLUMNS;
  const int lane = threadIdx.x % 32, top = X_TOP ? 0 : at.row * STRIDE_ROWS + START_ROW;
  const int left = X_VECTOR == 4 ? 0 : at.column * STRIDE_COLUMNS + START_COLUMN;
#pragma unroll 4
  for (int item = lane; item < REGION_IMAGES * PARTS; item += 32) {
    const int image = item / PARTS, row = item % PARTS / COLUMNS, column = item % COLUMNS * X_VECTOR;
    bool exists = at.image + image < images;
    float* to = slot;
    if constexpr (BARE) {
      to += patch_word<1, X_COLUMNS, WINDOW_UNITS>(image, 0, column);
    } else {
      exists = exists && top + row >= 0 && top + row < IN_HEIGHT && left + column >= 0 && left + column < IN_WIDTH;
      to += image * IMAGE_PITCH + (row + X_TOP) * ROW_PITCH + row / STEP_ROWS * SKEW + X_LEFT + column;
    }
    const int pixel = BARE ? column : (top + row) * IN_WIDTH + left + column;
    const int start = ((at.image + image) * channels + channel) * IN_PIXELS + pixel;
    copy_vector<X_VECTOR>(to, x + (exists ? start : 0), exists);
  }
}

// A warp's sums over lanes that are not complete yet: of up to GROUPS kernels, one word from each lane. `totals` are this
// lane's, in global memory, to which only this warp of this block writes; `begun`: earlier regions are in them.
struct Pending {
  float *words, *next, *totals;
  bool begun;
  int held;
  float before;

  __device__ __forceinline__ Pending(float* words, float* totals, bool begun)
      : words(words), next(words + threadIdx.x % 32), totals(totals), begun(begun), held(0),
        before(begun ? *totals : 0.0f) {}

  __device__ __forceinline__ void add(float value) {
    *next = value;
    next += PENDING_PITCH;
    if (++held == GROUPS) complete();
  }

  // Each lane adds up one entry of one kernel. Of kernels that are not there the totals are never read.
  __device__ __forceinline__ void complete() {
    const int lane = threadIdx.x % 32;
    sync_warp();
    const float* mine = words + lane / CELLS * PENDING_PITCH + lane % CELLS;
    float total = mine[0];
#pragma unroll
    for (int group = 1; group < GROUPS; ++group) total += mine[group * CELLS];
    *totals = total + before;
    totals += 32;
    if (begun) before = *totals;  // long before it is needed; after the last ones there is something that is not used
    next = words + lane;
    held = 0;
    sync_warp();
  }
};

// Words of a warp's program: a channel (-1: the end), its number of kernels, and for each the place of its filter's plane
// and its pattern; then the next channel.
__device__ __forceinline__ void walk(const int* words, const float* planes, float* slot, Pending pending, const float* x,
                                     Place at, int channels, int images) {
  const int lane = thread_now() % 32;  // kept: to find it out anew for each kernel takes longer
  const int seat = SEATS == 32 || lane < SEATS ? lane : 0;
  const int column = seat % LANE_COLUMNS, row = seat / LANE_COLUMNS % LANE_ROWS;
  const int image = seat / (LANE_ROWS * LANE_COLUMNS);
  const float* corner = slot + (BARE ? 4 * seat
                                     : image * IMAGE_PITCH + row * (STEP_ROWS * ROW_PITCH + SKEW) + column * STEP_COLUMNS);
  planes += 4 * seat;
  float window[WINDOW_WORDS];
  while (words[0] >= 0) {
    wait_for_copies();
    sync_warp();
    load_window(corner, window);
    sync_warp();
    const int count = words[1];
    if (words[2 + count] >= 0) copy_windows(slot, x, at, words[2 + count], channels, images);
    words += 2;
    int next = words[0];
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const unsigned kernel = unsigned(next);
      next = *++words;
      float sum[ENTRIES];
      multiply(kernel % PATTERN_SPAN, planes + kernel / PATTERN_SPAN, window, sum);
      if (SEATS < 32 && lane >= SEATS) {
#pragma unroll
        for (int entry = 0; entry < ENTRIES; ++entry) sum[entry] = 0.0f;
      }
      pending.add(sum_of_lanes(sum, lane));
    }
  }
  if (pending.held) pending.complete();
}

// One block: a piece (kernels of FILTERS filters and some channels) and every splits-th region. `pieces` has the first
// filter of each piece and where its words and its kernels' totals start. A piece's words start with those of each warp:
// where its program and its totals start.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    window_gradient(const float* x, const float* dy, float* partial, const int* all_words, const int* pieces, int images,
                    int channels, int filters, int regions, int piece_count, int splits, int kernels) {
  float* const planes = reinterpret_cast<float*>(shared_memory());
  float* const slots = planes + FILTERS * PLANE_WORDS;
  float* const pendings = slots + WARPS * SLOT_WORDS;
  int* const words = reinterpret_cast<int*>(pendings + WARPS * GROUPS * PENDING_PITCH);

  const int* const piece = pieces + 3 * (blockIdx.x % piece_count);
  const int split = blockIdx.x / piece_count, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_filter = piece[0], word_count = piece[4] - piece[1];
  for (int i = threadIdx.x; i < word_count; i += THREADS) copy_async(words + i, all_words + piece[1] + i, true);
  close_copies();
  copy_patches(planes, dy, place_of(split), first_filter, filters, images);
  float* const slot = slots + warp * SLOT_WORDS;
  if (X_LEFT || X_TOP)  // padding that no copy touches
    for (int i = lane; i < SLOT_WORDS; i += 32) slot[i] = 0.0f;
  wait_for_batches<0>();
  __syncthreads();

  const int* const program = words + words[2 * warp];
  float* const totals = partial + (split * kernels + piece[2] + words[2 * warp + 1]) * CELLS + lane;
  for (int region = split; region < regions; region += splits) {
    const Place at = place_of(region);
    if (region != split) copy_patches(planes, dy, at, first_filter, filters, images);
    if (program[0] >= 0) copy_windows(slot, x, at, program[0], channels, images);
    wait_for_copies();
    __syncthreads();
    const Pending pending(pendings + warp * GROUPS * PENDING_PITCH, totals, region != split);
    walk(program, planes, slot, pending, x, at, channels, images);
    __syncthreads();
  }
}
