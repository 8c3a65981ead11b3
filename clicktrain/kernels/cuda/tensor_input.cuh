// The input gradient; see tensor.cuh.
//
// For a block of filters and a pattern, the channels that keep the pattern form a product too: dx[pixels, channels] +=
// b^T[pixels x K] * a[K x channels], K = 16 filters times entries, in the order (filter, entry). Here the pixels are
// the 16 rows, two positions times 8 images, and 8 channels a tile: tiles of 8 waste less than tiles of 16 where few
// channels keep a pattern. `load_matrices` gives 16 rows of 16 columns for all tiles of a job, up to COLUMNS of them.
//
// Sums of all channels of the block of threads live in shared memory as float32, [channel][image][position]: an
// addition serves 16 * ENTRIES products. A channel has one pattern in a block of filters, so the jobs of a block of
// filters touch different channels and warps need no locks; a barrier lies between two blocks of filters, whose dy
// comes in chunks of BLOCKS blocks. Sums therefore have a fixed order. Their pitches (4 modulo 8 floats an image, 1
// modulo 32 a channel) put the lanes of an
// addition into different banks where four neighbouring channels of a job differ modulo 4.
//
// A stride spreads dy out in the tile; the zeros between are multiplied like all else. Positions of one remainder of
// the stride would need only their own taps: not done.

constexpr int SUM_IMAGE = 4 + (2 * TILES * PARTS + 3) / 8 * 8;
constexpr int SUM_CHANNEL = IMAGES * SUM_IMAGE + 1;
constexpr int JOB_WORDS = 2 + 16 * COLUMNS;  // pattern, tiles, channels (-1: none) and rows of their weights
constexpr int DEPTH = FILTERS * ENTRIES;
constexpr int KERNEL_UNITS = 2 * ENTRIES + 1;  // weights of a channel, (filter, entry); odd: rows in different banks

// Copy the weights of `kernels` neighbouring kernels of a block of filters, all filters of a kernel together.
__device__ __forceinline__ void copy_weights(Unit* to, const Element* values, int kernels, int stride) {
  constexpr int WIDTH = ENTRIES % 2 ? 1 : ENTRIES % 4 ? 2 : 4, WORDS = ENTRIES / WIDTH;
  Element* const rows = reinterpret_cast<Element*>(to);
  for (int filter = threadIdx.x / 32; filter < FILTERS; filter += THREADS / 32)
    for (int word = threadIdx.x % 32; word < kernels * WORDS; word += 32) {
      Element* target = rows + word / WORDS * KERNEL_UNITS * IMAGES + filter * ENTRIES + word % WORDS * WIDTH;
      const Element* source = values + filter * stride + word * WIDTH;
      if constexpr (WIDTH == 4)
        copy_async2(target, source);
      else if constexpr (WIDTH == 2)
        copy_async(reinterpret_cast<int*>(target), reinterpret_cast<const int*>(source), true);
      else
        *target = *source;
    }
}

// Add a job's products to the sums.
template <int Columns>
__device__ __forceinline__ void run_job(const int* job, const int* taps, const Unit* tile, const Unit* weights,
                                        const int (&pixels)[TILES], float* sums) {
  const int lane = threadIdx.x % 32;
  const int *channels = job + 2, *tap = taps + lane / 16 * 8 + lane % 8;
  const Unit* kernels[Columns];
#pragma unroll
  for (int column = 0; column < Columns; ++column)
    kernels[column] = weights + channels[8 * (COLUMNS + column) + lane % 8] * KERNEL_UNITS;
  float sum[TILES][Columns][4];
#pragma unroll
  for (int i = 0; i < TILES * Columns * 4; ++i) sum[i / (Columns * 4)][i / 4 % Columns][i % 4] = 0.0f;

  int offset = tap[0];
#pragma unroll 1
  for (int step = 0; step < ENTRIES; step += 2) {  // of 16 rows; four matrices of weights are two steps
    const int unit = 2 * step + lane / 8;
    Packed<unsigned, 4> b[Columns];
#pragma unroll
    for (int column = 0; column < Columns; ++column)
      b[column] = load_matrices<false>(kernels[column] + (unit < 2 * ENTRIES ? unit : 0));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (step + half >= ENTRIES) break;
      const Unit* rows = tile + offset;
      if (step + half + 1 < ENTRIES) offset = tap[(step + half + 1) * 16];
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        const Packed<unsigned, 4> a = load_matrices<true>(rows + pixels[i]);
#pragma unroll
        for (int column = 0; column < Columns; ++column)
          multiply_accumulate(sum[i][column], a, b[column].items[2 * half], b[column].items[2 * half + 1], Element{});
      }
    }
  }
#pragma unroll
  for (int column = 0; column < Columns; ++column)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int channel = channels[8 * column + lane % 4 * 2 + j];
      if (channel < 0) continue;
      float* mine = sums + channel * SUM_CHANNEL + lane / 4 * SUM_IMAGE;
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        mine[2 * i] += sum[i][column][j];
        mine[2 * i + 1] += sum[i][column][2 + j];
      }
    }
}

template <int Columns>
__device__ __forceinline__ void choose_job(int columns, const int* job, const int* taps, const Unit* tile,
                                           const Unit* weights, const int (&pixels)[TILES], float* sums) {
  if (columns == Columns)
    run_job<Columns>(job, taps, tile, weights, pixels, sums);
  else if constexpr (Columns > 1)
    choose_job<Columns - 1>(columns, job, taps, tile, weights, pixels, sums);
}

// Round the sums and write them. Neighbouring lanes write neighbouring pixels, then channels.
__device__ __forceinline__ void store_gradient(const float* sums, Element* dx, View view, int first, int images,
                                               int channels, int in_h, int in_w) {
  constexpr int PIXELS = RECT_ROWS * RECT_COLUMNS, WORDS = PIXELS / VECTOR;
  for (int item = threadIdx.x; item < WORDS * CHANNELS * IMAGES * Input::groups; item += THREADS) {
    const int pixel = item % WORDS * VECTOR, channel = item / WORDS % CHANNELS;
    const int image = item / (WORDS * CHANNELS), n = view.image + image;
    const int row = view.top + pixel / RECT_COLUMNS, column = view.left + pixel % RECT_COLUMNS;
    if (first + channel >= channels || n >= images || row >= in_h || column >= in_w) continue;
    const float* from = sums + channel * SUM_CHANNEL + image % IMAGES * SUM_IMAGE + image / IMAGES * PIXELS + pixel;
    Element* target = dx + ((n * channels + first + channel) * in_h + row) * in_w + column;
    if constexpr (VECTOR == 1) {
      from_float(from[0], *target);
    } else {
      Packed<unsigned, (VECTOR + 1) / 2> packed;
#pragma unroll
      for (int i = 0; i < VECTOR / 2; ++i) packed.items[i] = round_pair(from[2 * i], from[2 * i + 1], Element{});
      store_packed(reinterpret_cast<unsigned*>(target), packed);
    }
  }
}

// `taps` has for each pattern the places of the DEPTH rows of a product; for each set of channels and block of filters
// `bounds` says where its jobs start, and where they end, and `kernels` which kernels the set has: the place of the
// first one's values, and their number, at most `most_kernels`.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    tensor_input(const Element* dy, const Element* values, Element* dx, const int* taps, const int* jobs,
                 const int* bounds, const int* kernels, const int* strides, int images, int channels, int in_h,
                 int in_w, int filters, int out_h, int out_w, int rects_h, int rects_w, int sets, int most_kernels) {
  filters = known<Input::depth>(filters), out_h = known<Input::height>(out_h), out_w = known<Input::image_width>(out_w);
  channels = known<TARGET_DEPTH>(channels), in_h = known<TARGET_ROWS>(in_h), in_w = known<TARGET_COLUMNS>(in_w);
  rects_h = known<(TARGET_ROWS + RECT_ROWS - 1) / RECT_ROWS>(rects_h);
  rects_w = known<(TARGET_COLUMNS + RECT_COLUMNS - 1) / RECT_COLUMNS>(rects_w);
  const int block_units = most_kernels * KERNEL_UNITS;
  Unit* const tiles = reinterpret_cast<Unit*>(shared_memory());
  Unit* const weights = tiles + 2 * Input::units;
  float* const sums = reinterpret_cast<float*>(weights + 2 * BLOCKS * block_units);
  const int set = blockIdx.x % sets, rect = blockIdx.x / sets, blocks = filters / FILTERS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % PARTS;
  const int worker = (THREADS / 32 - 1 - warp) / PARTS;  // the last warps first: small copies are of the first ones
  const View to{rect / (rects_w * rects_h) * IMAGES * Input::groups, rect / rects_w % rects_h * RECT_ROWS,
                rect % rects_w * RECT_COLUMNS, 0, 0};
  const View from{to.image, to.top - PADDING_ROWS, to.left - PADDING_COLUMNS, 0, 0};

  int pixels[TILES];
#pragma unroll
  for (int i = 0; i < TILES; ++i) pixels[i] = place_of(Input{}, (part * TILES + i) * 2 + lane / 8 % 2);
  for (int buffer = 0; buffer < 2; ++buffer) clear_border(Input{}, tiles + buffer * Input::units);
  for (int i = threadIdx.x; i < CHANNELS * SUM_CHANNEL; i += THREADS) sums[i] = 0.0f;
  const int *bound = bounds + set * (blocks + 1), *kernel = kernels + set * blocks * 2;
  for (int chunk = -1; chunk * BLOCKS < blocks; ++chunk) {
    wait_for_copies();
    __syncthreads();
    const int first = (chunk + 1) * BLOCKS, next = (chunk + 1) % 2;
    const int count = blocks - first < BLOCKS ? blocks - first : BLOCKS;
    for (int slot = 0; slot < count; ++slot)
      copy_weights(weights + (next * BLOCKS + slot) * block_units, values + kernel[2 * (first + slot)],
                   kernel[2 * (first + slot) + 1], strides[first + slot]);
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn)
      if (copies_now(turn)) {
        if (count > 0)
          copy_tile(Input{}, tiles + next * Input::units, dy, from, first * FILTERS, count * FILTERS, images, filters,
                    out_h, out_w);
      } else {
        for (int slot = 0; slot < BLOCKS && chunk >= 0 && chunk * BLOCKS + slot < blocks; ++slot) {
          if (slot) __syncthreads();
          const int block = chunk * BLOCKS + slot, buffer = chunk % 2;
          const Unit* tile = tiles + buffer * Input::units + slot * FILTERS * Input::channel_pitch;
          for (int number = bound[block] + worker; number < bound[block + 1]; number += THREADS / 32 / PARTS) {
            const int* job = jobs + number * JOB_WORDS;
            choose_job<COLUMNS>(job[1], job, taps + job[0] * DEPTH, tile,
                                weights + (buffer * BLOCKS + slot) * block_units, pixels, sums + part * TILES * 2);
          }
        }
      }
  }
  __syncthreads();
  store_gradient(sums, dx, to, set * CHANNELS, images, channels, in_h, in_w);
}
