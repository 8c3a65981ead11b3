// The input gradient; see tensor.cuh.
//
// For a block of filters and a pattern, the channels that keep the pattern form a product too: dx[pixels, channels] +=
// b^T[pixels x K] * a[K x channels], K = 16 filters times entries, in the order (filter, entry). Here the pixels are
// the 16 rows, two positions times 8 images, and 8 channels a tile: tiles of 8 waste less than tiles of 16 where few
// channels keep a pattern. `load_matrices` gives 16 rows of 16 columns for all tiles of a job, up to COLUMNS of them.
//
// Sums of all channels of the block of threads live in shared memory as float32. A job starts from them and leaves
// more of them, 16 * ENTRIES products later. A channel has one pattern in a block of filters, so the jobs of a block of
// filters touch different channels and warps need no locks; a barrier lies between two blocks of filters, whose dy
// comes in chunks of BLOCKS blocks, unless each warp has positions of its own. Sums therefore have a fixed order.
//
// The order of the sums is [channel][SPAN positions][image][SPAN], so that a lane reads and writes its SPAN positions of
// an image at once. The lanes that do so together have some images and four channels each; a channel's pitch of 8
// modulo 32 floats puts them into different banks where four neighbouring channels of a job differ modulo 4. Images
// are rotated from one span to the next: results are read from the same image of many spans.
//
// A stride spreads dy out in the tile; the zeros between are multiplied like all else. Positions of one remainder of
// the stride would need only their own taps: not done.

constexpr int SPAN = TILES % 2 ? 2 : 4;
constexpr int SPANS = TILES * 2 / SPAN;  // of a warp
constexpr int SUM_CHANNEL = (2 * TILES * PARTS * IMAGES + 23) / 32 * 32 + 8;
constexpr int WORKERS = THREADS / 32 / PARTS;  // warps that share positions
constexpr int TAPS = 1, JOB_CHANNELS = TAPS + ENTRIES, JOB_KERNELS = JOB_CHANNELS + 8 * COLUMNS;
constexpr int JOB_WORDS = (JOB_KERNELS + 8 * COLUMNS + 3) / 4 * 4;  // tiles, taps, channels (-1: none), their kernels
constexpr int KERNEL_UNITS = 2 * ENTRIES + 1;  // weights of a channel, (filter, entry); odd: rows in different banks

// Copy the weights of `kernels` neighbouring kernels of a block of filters, all filters of a kernel together.
__device__ __forceinline__ void copy_weights(Unit* to, const Element* values, int kernels, int stride) {
  constexpr int WIDTH = ENTRIES % 2 ? 1 : ENTRIES % 4 ? 2 : 4, WORDS = ENTRIES / WIDTH;
  Element* const rows = reinterpret_cast<Element*>(to);
  const int thread = thread_now();
  for (int filter = thread / 32; filter < FILTERS; filter += THREADS / 32)
    for (int word = thread % 32; word < kernels * WORDS; word += 32) {
      Element* target = rows + word / WORDS * KERNEL_UNITS * IMAGES + filter * ENTRIES + word % WORDS * WIDTH;
      const Element* source = values + filter * stride + word * WIDTH;
      copy_values<WIDTH>(target, source, true);
    }
}

// Where an image's sums of a span are in a channel.
__device__ __forceinline__ int place_of_sums(int span, int image) {
  return (span * IMAGES + (image + span) % IMAGES) * SPAN;
}

// A lane's places: of its rows' pixels, and of its sums in a channel. Where all parts look alike, `first` is the place
// of the first pixel, and the others follow at constant distances.
constexpr bool ALIKE = alike(2 * TILES) && alike(2);
struct Mine {
  int first;
  int pixels[ALIKE ? 1 : TILES];
  int sums[SPANS];
};

__device__ __forceinline__ Mine mine_of(int part) {
  const int lane = threadIdx.x % 32, first = part * TILES * 2 + lane / 8 % 2;
  Mine mine{};
  if constexpr (ALIKE) {
    mine.first = place_of(Input{}, first);
  } else {
#pragma unroll
    for (int i = 0; i < TILES; ++i) mine.pixels[i] = place_of(Input{}, first + 2 * i);
  }
#pragma unroll
  for (int i = 0; i < SPANS; ++i) mine.sums[i] = place_of_sums(part * SPANS + i, lane / 4);
  return mine;
}

// Read the sums of a lane's channels, or write them; -1: no channel.
template <bool Write, int Columns>
__device__ __forceinline__ void move_sums(const int (&channels)[Columns][2], const Mine& mine, float* sums,
                                          float (&sum)[TILES][Columns][4]) {
#pragma unroll
  for (int column = 0; column < Columns; ++column)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int channel = channels[column][j];
      float* const of_channel = sums + channel * SUM_CHANNEL;
#pragma unroll
      for (int i = 0; i < SPANS; ++i) {
        Packed<float, SPAN> span = {};
        if (!Write && channel >= 0) span = load_packed<SPAN>(of_channel + mine.sums[i]);
#pragma unroll
        for (int k = 0; k < SPAN; ++k) {
          float& one = sum[i * SPAN / 2 + k / 2][column][k % 2 * 2 + j];
          if (Write)
            span.items[k] = one;
          else
            one = span.items[k];
        }
        if (Write && channel >= 0) store_packed(of_channel + mine.sums[i], span);
      }
    }
}

// Where row k = (filter, entry) of a product is in the tile.
__device__ __forceinline__ int place_of_row(const int* job, int k) {
  return k / ENTRIES * Input::channel_pitch + job[TAPS + k % ENTRIES];
}

// Add a job's products to the sums.
template <int Columns>
__device__ __forceinline__ void run_job(const int* job, const Unit* tile, const Unit* weights, const Mine& mine,
                                        float* sums) {
  const int lane = threadIdx.x % 32, first_row = lane / 16 * 8 + lane % 8;
  int channels[Columns][2];
  const Unit* kernels[Columns];
#pragma unroll
  for (int column = 0; column < Columns; ++column) {
    for (int j = 0; j < 2; ++j) channels[column][j] = job[JOB_CHANNELS + 8 * column + lane % 4 * 2 + j];
    kernels[column] = weights + job[JOB_KERNELS + 8 * column + lane % 8] * KERNEL_UNITS;
  }
  float sum[TILES][Columns][4];
  move_sums<false>(channels, mine, sums, sum);

  // Where kernels fill steps, the next step's rows are those of the next filters.
  constexpr bool EVEN = 16 % ENTRIES == 0;
  const Unit* rows = tile + place_of_row(job, first_row) + mine.first;
#pragma unroll(ENTRIES <= 4 ? 2 : 1)
  for (int step = 0; step < ENTRIES; step += 2) {  // of 16 rows; four matrices of weights are two steps
    const int unit = 2 * step + lane / 8;
    Packed<unsigned, 4> b[Columns];
#pragma unroll
    for (int column = 0; column < Columns; ++column)
      b[column] = load_matrices<false>(kernels[column] + (unit < 2 * ENTRIES ? unit : 0));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (step + half >= ENTRIES) break;
      const Unit* const now = rows;
      if (EVEN)
        rows += 16 / ENTRIES * Input::channel_pitch;
      else if (step + half + 1 < ENTRIES)
        rows = tile + place_of_row(job, (step + half + 1) * 16 + first_row) + mine.first;
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        const int pixel = ALIKE ? place_at(Input{}, 2 * i) : mine.pixels[ALIKE ? 0 : i];
        const Packed<unsigned, 4> a = load_matrices<true>(now + pixel);
#pragma unroll
        for (int column = 0; column < Columns; ++column)
          multiply_accumulate(sum[i][column], a, b[column].items[2 * half], b[column].items[2 * half + 1], Element{});
      }
    }
  }
  move_sums<true>(channels, mine, sums, sum);
}

template <int Columns>
__device__ __forceinline__ void choose_job(int columns, const int* job, const Unit* tile, const Unit* weights,
                                           const Mine& mine, float* sums) {
  if (columns == Columns)
    run_job<Columns>(job, tile, weights, mine, sums);
  else if constexpr (Columns > 1)
    choose_job<Columns - 1>(columns, job, tile, weights, mine, sums);
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
    const float* from = sums + channel * SUM_CHANNEL;
    float values[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const int position = image / IMAGES * PIXELS + pixel + i;
      values[i] = from[place_of_sums(position / SPAN, image % IMAGES) + position % SPAN];
    }
    Element* target = dx + ((n * channels + first + channel) * in_h + row) * in_w + column;
    if constexpr (VECTOR == 1) {
      from_float(values[0], *target);
    } else {
      Packed<unsigned, (VECTOR + 1) / 2> packed;
#pragma unroll
      for (int i = 0; i < VECTOR / 2; ++i) packed.items[i] = round_pair(values[2 * i], values[2 * i + 1], Element{});
      store_packed(reinterpret_cast<unsigned*>(target), packed);
    }
  }
}

// The same batch last: neighbouring lanes write units of neighbouring positions, then channels.
__device__ __forceinline__ void store_units(const float* sums, Element* dx, View view, int first, int images,
                                            int channels, int in_h, int in_w) {
  for (int item = threadIdx.x; item < POSITIONS * CHANNELS; item += THREADS) {
    const int position = item % POSITIONS, channel = item / POSITIONS;
    const Position at = position_at(position);
    const int row = view.top + at.row, column = view.left + at.column, n = view.image + at.group * IMAGES;
    if (first + channel >= channels || n >= images || row >= in_h || column >= in_w) continue;
    const float* from = sums + channel * SUM_CHANNEL + position % SPAN;
    Unit unit;
#pragma unroll
    for (int i = 0; i < IMAGES; i += 2)
      unit.items[i / 2] = round_pair(from[place_of_sums(position / SPAN, i)],
                                     from[place_of_sums(position / SPAN, i + 1)], Element{});
    Element* target = dx + (((first + channel) * in_h + row) * in_w + column) * images + n;
    store_packed(reinterpret_cast<unsigned*>(target), unit);
  }
}

// For each set of channels and block of filters `bounds` says where its jobs start, and where they end (at most
// `most_jobs`), and `kernels` which kernels the set has: the place of the first one's values, and their number, at most
// `most_kernels`. Both come with the chunk that needs them.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    tensor_input(const Element* dy, const Element* values, Element* dx, const int* jobs, const int* bounds,
                 const int* kernels, const int* strides, int images, int channels, int in_h,
                 int in_w, int filters, int out_h, int out_w, int rects_h, int rects_w, int sets, int most_kernels,
                 int most_jobs) {
  filters = known<Input::depth>(filters), out_h = known<Input::height>(out_h), out_w = known<Input::image_width>(out_w);
  channels = known<TARGET_DEPTH>(channels), in_h = known<TARGET_ROWS>(in_h), in_w = known<TARGET_COLUMNS>(in_w);
  rects_h = known<(TARGET_ROWS + RECT_ROWS - 1) / RECT_ROWS>(rects_h);
  rects_w = known<(TARGET_COLUMNS + RECT_COLUMNS - 1) / RECT_COLUMNS>(rects_w);
  const int block_units = most_kernels * KERNEL_UNITS, job_units = most_jobs * JOB_WORDS / 4;
  Unit* const tiles = reinterpret_cast<Unit*>(shared_memory());
  Unit* const weights = tiles + BUFFERS * Input::units;
  Unit* const own_jobs = weights + BUFFERS * BLOCKS * block_units;
  float* const sums = reinterpret_cast<float*>(own_jobs + BUFFERS * BLOCKS * job_units);
  const int set = blockIdx.x % sets, rect = blockIdx.x / sets, blocks = filters / FILTERS;
  const int warp = threadIdx.x / 32, part = warp % PARTS;
  const int worker = (THREADS / 32 - 1 - warp) / PARTS;  // the last warps first: small copies are of the first ones
  const View to{rect / (rects_w * rects_h) * IMAGES * Input::groups, rect / rects_w % rects_h * RECT_ROWS,
                rect % rects_w * RECT_COLUMNS, 0, 0};
  const View from{to.image, to.top - PADDING_ROWS, to.left - PADDING_COLUMNS, 0, 0};

  const Mine mine = mine_of(part);
  for (int buffer = 0; buffer < BUFFERS; ++buffer) clear_border(Input{}, tiles + buffer * Input::units);
  clear(reinterpret_cast<Unit*>(sums), CHANNELS * SUM_CHANNEL / 4);
  const int *bound = bounds + set * (blocks + 1), *kernel = kernels + set * blocks * 2;
  const auto copy = [&](int chunk, int buffer) {
    const int first = chunk * BLOCKS, count = blocks - first < BLOCKS ? blocks - first : BLOCKS;
    const auto copy_dy = [&] {
      copy_tile(Input{}, tiles + buffer * Input::units, dy, from, first * FILTERS, count * FILTERS, images, filters,
                out_h, out_w);
    };
    if (BATCH_LAST) copy_dy();  // on its way while bounds are waited for; else after all that is asynchronous
    for (int slot = 0; slot < count; ++slot) {
      const int block = first + slot, begin = bound[block] * JOB_WORDS, units = bound[block + 1] * JOB_WORDS - begin;
      copy_weights(weights + (buffer * BLOCKS + slot) * block_units, values + kernel[2 * block], kernel[2 * block + 1],
                   strides[block]);
      for (int unit = thread_now(); unit < units / 4; unit += THREADS)
        copy_unit(own_jobs + (buffer * BLOCKS + slot) * job_units + unit, jobs + begin + 4 * unit, true);
    }
    if (!BATCH_LAST) copy_dy();
  };
  pipeline((blocks + BLOCKS - 1) / BLOCKS, [] {}, copy, [&](int chunk, int buffer) {
    for (int slot = 0; slot < BLOCKS && chunk * BLOCKS + slot < blocks; ++slot) {
      if (WORKERS > 1 && slot) __syncthreads();
      const int block = chunk * BLOCKS + slot, count = bound[block + 1] - bound[block];
      const int* own = reinterpret_cast<const int*>(own_jobs + (buffer * BLOCKS + slot) * job_units);
      const Unit* tile = tiles + buffer * Input::units + slot * FILTERS * Input::channel_pitch;
      for (int number = worker; number < count; number += WORKERS) {
        const int* job = own + number * JOB_WORDS;
        choose_job<COLUMNS>(job[0], job, tile, weights + (buffer * BLOCKS + slot) * block_units, mine, sums);
      }
      if (WORKERS == 1) sync_warp();  // other lanes have these channels next
    }
  });
  __syncthreads();
  if constexpr (BATCH_LAST)
    store_units(sums, dx, to, set * CHANNELS, images, channels, in_h, in_w);
  else
    store_gradient(sums, dx, to, set * CHANNELS, images, channels, in_h, in_w);
}
