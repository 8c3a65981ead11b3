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
// warps live on a multiprocessor: a block of 32 filters whose input windows are shared.
//
// Second-level cache: a channel's windows of 32 lanes are 60 x 32 floats = 7.7 KB for 32 filters; at 8x compression
// 28 % of the kernels are left, 9 kernels x 128 FMA x 32 lanes x 2 = 74 kFLOP, that is 9.6 FLOP a byte.
//
// Memory: lanes are patches (of whatever image), and a window is stored as [channel][pixel][lane]: a load of a warp
// touches 32 consecutive floats (no bank conflict), its address is a constant relative to the channel, and stride,
// padding and image edges are dealt with where windows are copied. The pitch between pixels spreads the writes of the
// copy over the banks too. Windows, weights and programs of the next channels arrive by asynchronous copies while the
// present ones are swept: two buffers, one barrier a chunk.

struct Place {
  int image, top, left;  // of a lane's patch: first image, and output pixel
};

// Patches count images slowest, then rows, then columns.
__device__ __forceinline__ Place place_of(int patch, int tiles_h, int tiles_w) {
  Place place;
  place.left = patch % tiles_w * TILE_COLUMNS;
  place.top = patch / tiles_w % tiles_h * TILE_ROWS;
  place.image = patch / (tiles_w * tiles_h) * IMAGES;
  return place;
}

// Copy the windows of some channels. WARPS threads share a lane, so that neighbours read neighbouring pixels.
__device__ __forceinline__ void copy_windows(float* tile, const Element* x, Place place, int first, int count,
                                             int images, int channels, int in_h, int in_w) {
  const int lane = threadIdx.x / WARPS;
  const int top = place.top / TILE_ROWS * STEP_ROWS + START_ROW;
  const int left = place.left / TILE_COLUMNS * STEP_COLUMNS + START_COLUMN;
  for (int pixel = threadIdx.x % WARPS; pixel < WINDOW; pixel += WARPS) {
    const int image = place.image + pixel / (WINDOW_ROWS * WINDOW_COLUMNS);
    const int row = top + pixel / WINDOW_COLUMNS % WINDOW_ROWS, column = left + pixel % WINDOW_COLUMNS;
    const bool exists = image < images && row >= 0 && row < in_h && column >= 0 && column < in_w;
    const Element* from = exists ? x + ((image * channels + first) * in_h + row) * in_w + column : x;
    const int step = exists ? in_h * in_w : 0;
    float* to = tile + pixel * PITCH + lane;
    for (int i = 0; i < count; ++i, from += step, to += WINDOW * PITCH) copy_async(to, from, exists);
  }
}

template <typename Word>
__device__ __forceinline__ void copy_range(Word* to, const Word* from, int count) {
  for (int i = threadIdx.x; i < count; i += THREADS) copy_async(to + i, from + i, true);
}

// Write a warp's sums, with what a network does to them next: y = relu(sum * scale + shift + residual).
__device__ __forceinline__ void store_outputs(const float (&sum)[SUMS], Place place, const int* slots, Element* y,
                                              int images, int filters, int out_h, int out_w, const float* scale,
                                              const float* shift, const Element* residual, int relu) {
#pragma unroll
  for (int slot = 0; slot < SLOTS; ++slot) {
    const int filter = slots[slot];
    if (filter < 0) continue;
    const float factor = scale ? scale[filter] : 1.0f, summand = shift ? shift[filter] : 0.0f;
#pragma unroll
    for (int image = 0; image < IMAGES; ++image) {
      if (place.image + image >= images) continue;
      const int plane = ((place.image + image) * filters + filter) * out_h;
#pragma unroll
      for (int row = 0; row < TILE_ROWS; ++row) {
        if (place.top + row >= out_h) continue;
#pragma unroll
        for (int column = 0; column < TILE_COLUMNS; column += VECTOR) {
          if (place.left + column >= out_w) continue;
          const int offset = (plane + place.top + row) * out_w + place.left + column;
          Packed<Element, VECTOR> packed;
#pragma unroll
          for (int i = 0; i < VECTOR; ++i) {
            float value = sum[((slot * IMAGES + image) * TILE_ROWS + row) * TILE_COLUMNS + column + i];
            value = value * factor + summand;
            if (residual) value += to_float(residual[offset + i]);
            from_float(relu && value < 0.0f ? 0.0f : value, packed.items[i]);
          }
          store_packed(y + offset, packed);
        }
      }
    }
  }
}

// One block: 32 patches, WARPS * SLOTS filters. `program` and `weights` hold, for each block of filters and chunk of
// channels, what `bounds` says; a chunk's program starts with the places of each warp's own program and weights.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    convolve(const Element* x, const float* weights, Element* y, const int* program, const int* bounds,
             const int* filter_of_slot, const float* scale, const float* shift, const Element* residual, int relu,
             int images, int channels, int in_h, int in_w, int filters, int out_h, int out_w, int tiles_h, int tiles_w,
             int chunks, int filter_blocks, int weight_words, int program_words) {
  constexpr int TILE_FLOATS = CHANNELS * WINDOW * PITCH;
  float* const weight_space = reinterpret_cast<float*>(shared_memory());
  float* const tiles = weight_space + 2 * weight_words;
  int* const program_space = reinterpret_cast<int*>(tiles + 2 * TILE_FLOATS);

  const int filter_block = blockIdx.x % filter_blocks, group = blockIdx.x / filter_blocks;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Place copied = place_of(group * 32 + int(threadIdx.x) / WARPS, tiles_h, tiles_w);
  const int* bound = bounds + filter_block * chunks * 2;

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
      const int first = next * CHANNELS, buffer = next % 2;
      const int count = channels - first < CHANNELS ? channels - first : CHANNELS;
      copy_range(weight_space + buffer * weight_words, weights + weight_start, weight_end - weight_start);
      copy_range(program_space + buffer * program_words, program + program_start, program_end - program_start);
      copy_windows(tiles + buffer * TILE_FLOATS, x, copied, first, count, images, channels, in_h, in_w);
      if (next + 1 < chunks) {
        program_start = program_end, weight_start = weight_end;
        program_end = bound[(next + 2) * 2], weight_end = bound[(next + 2) * 2 + 1];
      }
    }
    if (chunk >= 0) {
      const int buffer = chunk % 2;
      const int* words = program_space + buffer * program_words;
      sweep(tiles + buffer * TILE_FLOATS + lane, words + words[2 * warp],
            weight_space + buffer * weight_words + words[2 * warp + 1], sum);
    }
  }
  const Place written = place_of(group * 32 + lane, tiles_h, tiles_w);
  store_outputs(sum, written, filter_of_slot + (filter_block * WARPS + warp) * SLOTS, y, images, filters, out_h, out_w,
                scale, shift, residual, relu);
}

// Bring the values into the order in which the warps read them, as float32.
extern "C" __global__ void __launch_bounds__(256)
    arrange(const Element* values, const int* gather, float* weights, int count) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i < count) weights[i] = to_float(values[gather[i]]);
}
