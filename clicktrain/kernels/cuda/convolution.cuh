// A convolution pass: the forward pass, or the input gradient as the forward pass of the transposed layer.
//
// Where the limit is. A multiprocessor has 4 schedulers: at most 4 warp instructions a cycle, hence 4 multiply-adds
// (FMA) of a warp, while shared memory delivers 32 floats a cycle, one load of a warp. One load for each FMA would
// cap a kernel at a quarter of the FP32 rate. So each lane keeps a patch of outputs in registers and uses each input
// value for all the taps of a pattern (and for all filters of a warp that have the same channel and pattern). For a
// 2x2-shaped pattern, with 2 more loads for the four weights and the window's place and about 5 for the loop:
//
//   patch of a lane   FMA   loads   cycles of issue     cycles of shared memory   share of the FP32 rate
//   1 pixel             4    4+2    (4+6+5)/4 = 3.8     6                         17 %
//   4 x 4              64   25+2    (64+27+5)/4 = 24    27                        59 %
//   8 x 4             128   45+2    (128+47+5)/4 = 45   47                        68 %
//   8 x 4, 2 filters  256   45+3    (256+48+5)/4 = 77   48                        83 %   (same channel and pattern)
//   stride 2, 4 x 4    64   64+2    (64+66+5)/4 = 34    66                        24 %   (no two taps share a value)
//
// Registers: 64 sums (two filters of 8 x 4), two rows of inputs, 8 weights and addresses fit into 128, which lets 16
// warps live on a multiprocessor; one filter in a warp fits into 64, which lets 32 live, and needs half of the code.
// Straight-line code of many patterns competes for the instruction cache, so fewer sums can be faster.
//
// What an H100 reaches (profiles; bench/evidence/gpu.json has the times): shared memory is busy 58 % of the time, FMA 30 %.
// Of its cycles two thirds are the loads above. One third is copies: what arrives by `copy_async` is written in sectors
// of 8 words, a row of 18 takes 4 or 5 cycles. So two filters of 4 x 4 pixels, which share a copy, beat one of 8 x 4.
// Four words at once would arrive faster, but rows at multiples of four words put lanes into the same banks.
//
// Memory: the lanes of a block take neighbouring patches, and all warps of a block the same ones: the input of the
// block is one rectangle of each channel, copied row by row (region.py). A 32x32 image of one channel is 4.6 KB with
// its border, for 32 lanes and all filters of the block. Stride, padding and image edges are dealt with where it is
// copied. Windows, weights and programs of the next channels arrive by asynchronous copies while the present ones are
// swept: two buffers, one barrier a chunk.

// A lane's patch among the block's: along images, rows, columns.
struct Seat {
  int image, row, column;
};

__device__ __forceinline__ Seat seat_of(int lane) {
  return {lane / (LANE_ROWS * LANE_COLUMNS), lane / LANE_COLUMNS % LANE_ROWS, lane % LANE_COLUMNS};
}

constexpr int SEATS = LANE_IMAGES * LANE_ROWS * LANE_COLUMNS;  // lanes beyond them repeat the first and write nothing

// First image of a block, and first patch along rows and columns. Blocks count images slowest.
__device__ __forceinline__ Seat first_patch(int region, int regions_h, int regions_w) {
  return {region / (regions_w * regions_h) * REGION_IMAGES, region / regions_w % regions_h * LANE_ROWS,
          region % regions_w * LANE_COLUMNS};
}

// Copy the region of the channels that `order` names. Threads beyond a region's pixels take the next channels.
__device__ __forceinline__ void copy_region(float* tile, const Element* x, const int* order, Seat patch, int count,
                                            int images, int channels, int in_h, int in_w) {
  constexpr int PIXELS = REGION_IMAGES * REGION_ROWS * REGION_COLUMNS;
  constexpr int WAYS = THREADS >= 2 * PIXELS ? THREADS / PIXELS : 1;
  const int way = WAYS > 1 ? int(threadIdx.x) / PIXELS : 0;
  if (way >= WAYS) return;
  for (int pixel = WAYS > 1 ? threadIdx.x % PIXELS : threadIdx.x; pixel < PIXELS; pixel += THREADS) {
    const int image = pixel / (REGION_ROWS * REGION_COLUMNS), row = pixel / REGION_COLUMNS % REGION_ROWS;
    const int column = pixel % REGION_COLUMNS;
    const int x_image = patch.image + image, x_row = patch.row * STEP_ROWS + START_ROW + row;
    const int x_column = patch.column * STEP_COLUMNS + START_COLUMN + column;
    const bool exists = x_image < images && x_row >= 0 && x_row < in_h && x_column >= 0 && x_column < in_w;
    const int plane = PLANE ? PLANE : in_h * in_w, step = exists ? plane : 0;
    const Element* from = exists ? x + x_image * channels * plane + x_row * in_w + x_column : x;
    float* to = tile + way * CHANNEL_WORDS + image * IMAGE_PITCH + row * ROW_PITCH + row / STEP_ROWS * SKEW + column;
#pragma unroll 8
    for (int i = 0; i < (count - way + WAYS - 1) / WAYS; ++i)
      copy_async(to + i * WAYS * CHANNEL_WORDS, from + order[i * WAYS + way] * step, exists);
  }
}

// Write a warp's sums; FUSED: with what a network does to them next, y = relu(sum * scale + shift + residual).
__device__ __forceinline__ void store_outputs(const float (&sum)[SUMS], Seat patch, const int* slots, Element* y,
                                              int images, int filters, int out_h, int out_w, const float* scale,
                                              const float* shift, const Element* residual, int relu) {
  const int top = patch.row * TILE_ROWS, left = patch.column * TILE_COLUMNS;
#pragma unroll
  for (int slot = 0; slot < SLOTS; ++slot) {
    const int filter = slots[slot];
    if (filter < 0) continue;
    float factor = 1.0f, summand = 0.0f;
    if constexpr (FUSED) factor = scale ? scale[filter] : 1.0f, summand = shift ? shift[filter] : 0.0f;
#pragma unroll
    for (int image = 0; image < IMAGES; ++image) {
      if (patch.image + image * LANE_IMAGES >= images) continue;
      const int plane = ((patch.image + image * LANE_IMAGES) * filters + filter) * out_h;
#pragma unroll
      for (int row = 0; row < TILE_ROWS; ++row) {
        if (top + row >= out_h) continue;
#pragma unroll
        for (int column = 0; column < TILE_COLUMNS; column += VECTOR) {
          if (left + column >= out_w) continue;
          const int offset = (plane + top + row) * out_w + left + column;
          Packed<Element, VECTOR> packed;
#pragma unroll
          for (int i = 0; i < VECTOR; ++i) {
            float value = sum[((slot * IMAGES + image) * TILE_ROWS + row) * TILE_COLUMNS + column + i];
            if constexpr (FUSED) {
              value = value * factor + summand;
              if (residual) value += to_float(residual[offset + i]);
              if (relu && value < 0.0f) value = 0.0f;
            }
            from_float(value, packed.items[i]);
          }
          store_packed(y + offset, packed);
        }
      }
    }
  }
}

// One block: SEATS patches, WARPS * SLOTS filters. It takes the channels in an order of its own, in which its warps have
// about as much to do in each chunk (layout.py). `program` and `gather` hold, for each block of filters and chunk of
// channels, what `bounds` says: a chunk's program starts with the places of each warp's own program and weights, and
// the weights are the values that `gather` names, in the order in which the warps read them.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    convolve(const Element* x, const Element* values, Element* y, const int* program, const int* gather, const int* bounds,
             const int* channel_order, const int* filter_of_slot, const float* scale, const float* shift, const Element* residual, int relu,
             int images, int channels, int in_h, int in_w, int filters, int out_h, int out_w, int regions_h,
             int regions_w, int chunks, int filter_blocks, int weight_words, int program_words) {
  constexpr int TILE_WORDS = CHANNELS * CHANNEL_WORDS;
  float* const weight_space = reinterpret_cast<float*>(shared_memory());
  float* const tiles = weight_space + 2 * weight_words;
  int* const program_space = reinterpret_cast<int*>(tiles + 2 * TILE_WORDS);

  const int filter_block = blockIdx.x % filter_blocks;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Seat first = first_patch(blockIdx.x / filter_blocks, regions_h, regions_w);
  const Seat seat = seat_of(lane < SEATS ? lane : 0);
  const int corner =
      seat.image * IMAGE_PITCH + seat.row * (STEP_ROWS * ROW_PITCH + SKEW) + seat.column * STEP_COLUMNS;
  const int *bound = bounds + filter_block * chunks * 2, *order = channel_order + filter_block * channels;

  float sum[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; ++i) sum[i] = 0.0f;

  // The bounds of a chunk are read one chunk before they are needed.
  int program_start = bound[0], weight_start = bound[1], program_end = bound[2], weight_end = bound[3];
  for (int chunk = -1; chunk < chunks; ++chunk) {
    wait_for_copies();
    __syncthreads();
    const int next = chunk + 1;
    if (next < chunks) {
      const int channel = next * CHANNELS, buffer = next % 2;
      const int count = channels - channel < CHANNELS ? channels - channel : CHANNELS;
#pragma unroll 1
      for (int i = threadIdx.x; i < weight_end - weight_start; i += THREADS)
        copy_async(weight_space + buffer * weight_words + i, values + gather[weight_start + i], true);
#pragma unroll 1
      for (int i = threadIdx.x; i < program_end - program_start; i += THREADS)
        copy_async(program_space + buffer * program_words + i, program + program_start + i, true);
      copy_region(tiles + buffer * TILE_WORDS, x, order + channel, first, count, images, channels, in_h, in_w);
      if (next + 1 < chunks) {
        program_start = program_end, weight_start = weight_end;
        program_end = bound[(next + 2) * 2], weight_end = bound[(next + 2) * 2 + 1];
      }
    }
    if (chunk >= 0) {
      const int buffer = chunk % 2;
      const int* words = program_space + buffer * program_words;
      sweep(tiles + buffer * TILE_WORDS + corner, words + words[2 * warp],
            weight_space + buffer * weight_words + words[2 * warp + 1], sum);
    }
  }
  if (lane >= SEATS) return;
  const Seat patch = {first.image + seat.image, first.row + seat.row, first.column + seat.column};
  store_outputs(sum, patch, filter_of_slot + (filter_block * WARPS + warp) * SLOTS, y, images, filters, out_h, out_w,
                scale, shift, residual, relu);
}
