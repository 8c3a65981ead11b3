// The forward pass; see tensor.cuh.
//
// A block of threads has BLOCKS blocks of filters, and walks over its share of views: rectangles of output pixels of
// some groups of images. A warp computes one block of filters at 8-column tiles for TILES positions; PARTS warps share
// a block. Channels come in chunks, one barrier a chunk. One counter runs over the chunks of all views, so that copies
// of the next view are on their way while the last products of this one are computed and its results written.
//
// Products read the rows of the blocks' matrices, in steps of 16, from shared memory: weights, and places in the tile.
// A chunk's rows of all blocks are neighbours in memory, and so are those of all chunks. Where there is room (ALL_ROWS)
// they come once for all views; else with each chunk, which then waits for `places` before it can copy weights. Bounds
// come once.
//
// Views that are walked over together are neighbours in memory: of NCHW images rectangles count fastest, else groups of
// images, which share lines.

constexpr int WEIGHT_UNITS = 2 * FILTERS;  // of a step
constexpr int OFFSET_UNITS = 16 / 4;  // places of its rows
constexpr int STEP_UNITS = WEIGHT_UNITS + OFFSET_UNITS;

// Where the weights of half of a step's rows are, for one filter: eight neighbours are in different banks.
__device__ __forceinline__ int place_of_weights(int filter, int half) {
  return 2 * filter + (half ^ filter / 4 % 2);
}

// What tells where the rows of a set of blocks of filters are.
struct Program {
  const Element* values;
  const int *offsets, *places, *strides;  // of a step's values: from one filter to the next
  const int* bounds;  // of the set, for each chunk and block: where its rows start; and where the last ones end
};

// Copy the rows from `first` to `end`: all weights, then all places in the tile. Neighbouring lanes have neighbouring
// rows of a step, then filters: they write to different banks. A thread reads several places at once before it copies
// from them, each for some filters.
__device__ __forceinline__ void copy_rows(Unit* weights, Unit* offsets, const Program& program, int first, int end) {
  constexpr int WIDTH = ENTRIES % 2 ? 1 : ENTRIES % 4 ? 2 : 4;  // weights that are neighbours in memory too
  constexpr int WORDS = 16 / WIDTH, APART = 4, OF_STEP = WORDS * APART, AT_ONCE = 4;
  const int thread = thread_now(), steps = (end - first) / 16, items = steps * OF_STEP;
  for (int unit = thread; unit < OFFSET_UNITS * steps; unit += THREADS)
    copy_unit(offsets + unit, program.offsets + first + 4 * unit, true);
  for (int start = thread; start < items; start += AT_ONCE * THREADS) {
    int found[AT_ONCE], strides[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int item = start + i * THREADS;
      if (item >= items) break;
      found[i] = program.places[first + item / OF_STEP * 16 + item % WORDS * WIDTH];
      strides[i] = program.strides[first / 16 + item / OF_STEP];
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int item = start + i * THREADS, row = item % WORDS * WIDTH;
      if (item >= items) break;
#pragma unroll
      for (int other = 0; other < FILTERS; other += APART) {
        const int filter = item / WORDS % APART + other, place = found[i] < 0 ? 0 : filter * strides[i] + found[i];
        Unit* const unit = weights + item / OF_STEP * WEIGHT_UNITS + place_of_weights(filter, row / 8);
        copy_values<WIDTH>(reinterpret_cast<Element*>(unit) + row % 8, program.values + place, found[i] >= 0);
      }
    }
  }
}

// A lane's pixels. Where all parts look alike, `first` is the place of its first one, and the others follow at constant
// distances, in the zeros too.
constexpr bool ALIKE = alike(TILES) && alike(2) && ZEROS > 1;
struct Pixels {
  int first;
  int places[ALIKE ? 1 : TILES / 2];
};

__device__ __forceinline__ Pixels pixels_of(int part) {
  const int first = part * TILES + threadIdx.x % 32 / 16;
  Pixels pixels{};
  if constexpr (ALIKE) {
    pixels.first = place_of(Input{}, first);
  } else {
#pragma unroll
    for (int i = 0; i < TILES / 2; ++i) pixels.places[i] = place_of(Input{}, first + 2 * i);
  }
  return pixels;
}

// Add the products of some steps. What the next one needs is read early.
__device__ __forceinline__ void sweep(const Unit* weights, const Unit* offset_units, int steps, const Unit* tile,
                                      const Unit* zero, const Pixels& pixels, float (&sum)[TILES][4]) {
  const int lane = threadIdx.x % 32;
  const Unit* const first = tile + pixels.first;
  const int* offsets = reinterpret_cast<const int*>(offset_units) + lane % 16;
  weights += place_of_weights(lane % 16, lane / 16);
  if (!steps) return;
  int next_offset = *offsets;
  Packed<unsigned, 4> next = load_matrices<false>(weights);
#pragma unroll 1
  for (int left = steps; left > 0; --left) {
    const int offset = next_offset;
    const Packed<unsigned, 4> a = next;
    if (left > 1) weights += WEIGHT_UNITS, offsets += 16;
    next_offset = *offsets, next = load_matrices<false>(weights);
    const bool exists = offset >= 0;
    const Unit* row = exists ? first + offset : zero;
#pragma unroll
    for (int i = 0; i < TILES / 2; ++i) {
      int place = place_at(Input{}, 2 * i);
      if constexpr (!ALIKE) place = exists ? pixels.places[i] : 0;
      const Packed<unsigned, 4> b = load_matrices<true>(row + place);
      multiply_accumulate(sum[2 * i], a, b.items[0], b.items[1], Element{});
      multiply_accumulate(sum[2 * i + 1], a, b.items[2], b.items[3], Element{});
    }
  }
}

struct Target {
  Element* y;
  const float *scale, *shift;
  const Element* residual;
  int relu, images, filters, out_h, out_w;
};

constexpr int RUNS = TILES / VECTOR;  // of pixels that are neighbours in y
constexpr bool EXCHANGED = VECTOR == 8 && RUNS % 2 == 0;

// Where a run of pixels is in y, or a unit; -1: outside.
__device__ __forceinline__ int place_in_output(const Target& target, View view, int filter, int image, int position) {
  const Position at = position_at(position);
  const int n = view.image + at.group * IMAGES + image, row = view.top + at.row, column = view.left + at.column;
  const bool whole = POSITIONS % VECTOR == 0 && TILES * PARTS == POSITIONS;
  if ((!whole && position >= POSITIONS) || n >= target.images || row >= target.out_h || column >= target.out_w)
    return -1;
  if constexpr (BATCH_LAST) return ((filter * target.out_h + row) * target.out_w + column) * target.images + n;
  return ((n * target.filters + filter) * target.out_h + row) * target.out_w + column;
}

__device__ __forceinline__ void store_run(const Target& target, int place,
                                          const Packed<unsigned, (VECTOR + 1) / 2>& run) {
  if (place < 0) return;
  if constexpr (VECTOR == 1)
    target.y[place] = Element{(unsigned short)run.items[0]};
  else
    store_packed(reinterpret_cast<unsigned*>(target.y + place), run);
}

// A run of a lane's sums of a filter and an image, relu(sum * scale + shift + residual).
__device__ __forceinline__ Packed<unsigned, (VECTOR + 1) / 2> finish_run(const float (&sum)[TILES][4], int first,
                                                                         int which, float factor, float summand,
                                                                         const Target& target, int place) {
  float values[VECTOR + 1] = {};
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) values[i] = sum[first + i][which] * factor + summand;
  if (target.residual && place >= 0) {
    const auto more = read_pixels<VECTOR>(target.residual + place);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i)
      values[i] += to_float(Element{(unsigned short)(more.items[i / 2] >> (i % 2 * 16))});
  }
  Packed<unsigned, (VECTOR + 1) / 2> run;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) values[i] = target.relu && values[i] < 0.0f ? 0.0f : values[i];
#pragma unroll
  for (int i = 0; i < VECTOR; i += 2) run.items[i / 2] = round_pair(values[i], values[i + 1], Element{});
  return run;
}

// A lane has all positions of two filters and two images, so that it writes runs of pixels by itself. Where a run is
// 16 bytes, neighbouring lanes exchange every second one: together they write sectors of 32 bytes.
__device__ __forceinline__ void store_outputs(const float (&sum)[TILES][4], const Target& target, View view, int block,
                                              int part) {
  const int lane = threadIdx.x % 32, odd = lane % 2;
#pragma unroll
  for (int which = 0; which < 4; ++which) {
    const int filter = block * FILTERS + which / 2 * 8 + lane / 4, image = lane % 4 * 2 + which % 2;
    const float factor = target.scale ? target.scale[filter] : 1.0f;
    const float summand = target.shift ? target.shift[filter] : 0.0f;
    const auto place = [&](int of, int run) {
      return place_in_output(target, view, filter, of, part * TILES + run * VECTOR);
    };
#pragma unroll
    for (int run = 0; run < RUNS; run += 1 + EXCHANGED) {
      auto mine = finish_run(sum, run * VECTOR, which, factor, summand, target, place(image, run));
      if constexpr (EXCHANGED) {
        auto other = finish_run(sum, (run + 1) * VECTOR, which, factor, summand, target, place(image, run + 1));
#pragma unroll
        for (int i = 0; i < VECTOR / 2; ++i) {
          const unsigned got = shuffle_xor(odd ? mine.items[i] : other.items[i], 1);
          mine.items[i] = odd ? got : mine.items[i];
          other.items[i] = odd ? other.items[i] : got;
        }
        store_run(target, place(image - 2 * odd, run + odd), mine);
        store_run(target, place(image - 2 * odd + 2, run + odd), other);
      } else {
        store_run(target, place(image, run), mine);
      }
    }
  }
}

// The four lanes of a filter have two images each at four positions; afterwards each has all eight images at one.
__device__ __forceinline__ void exchange(Unit& words) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned &low = words.items[distance == 1 ? 2 * i : i], &high = words.items[distance == 1 ? 2 * i + 1 : i + 2];
      const unsigned got = shuffle_xor(upper ? low : high, distance);
      low = upper ? got : low, high = upper ? high : got;
    }
  }
}

// A lane's two images of a filter at a position, relu(sum * scale + shift + residual).
__device__ __forceinline__ unsigned finish_pair(float first, float second, float factor, float summand,
                                                const Target& target, int place) {
  first = first * factor + summand, second = second * factor + summand;
  if (target.residual && place >= 0) {
    const unsigned more = load_words<1>(target.residual + place).items[0];
    first += to_float(Element{(unsigned short)more}), second += to_float(Element{(unsigned short)(more >> 16)});
  }
  if (target.relu) first = first < 0.0f ? 0.0f : first, second = second < 0.0f ? 0.0f : second;
  return round_pair(first, second, Element{});
}

// Batch last, lanes exchange what they have, so that each writes units.
__device__ __forceinline__ void store_units(const float (&sum)[TILES][4], const Target& target, View view, int block,
                                            int part) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int filter = block * FILTERS + half * 8 + lane / 4;
    const float factor = target.scale ? target.scale[filter] : 1.0f;
    const float summand = target.shift ? target.shift[filter] : 0.0f;
#pragma unroll
    for (int first = 0; first < TILES; first += 4) {
      Unit words{};
#pragma unroll
      for (int i = 0; i < 4 && first + i < TILES; ++i) {
        const float(&mine)[4] = sum[first + i];
        const int place =
            target.residual ? place_in_output(target, view, filter, lane % 4 * 2, part * TILES + first + i) : -1;
        words.items[i] = finish_pair(mine[2 * half], mine[2 * half + 1], factor, summand, target, place);
      }
      exchange(words);
      const int which = first + lane % 4;
      const int place = which < TILES ? place_in_output(target, view, filter, 0, part * TILES + which) : -1;
      if (place >= 0) store_packed(reinterpret_cast<unsigned*>(target.y + place), words);
    }
  }
}

__device__ __forceinline__ void clear_sums(float (&sum)[TILES][4]) {
#pragma unroll
  for (int i = 0; i < TILES; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i][j] = 0.0f;
}

// `bounds` is for each set of BLOCKS blocks of filters as in `Program`, `strides` for each step. At most `most_steps`
// come together. A set's views are divided into `splits` shares: every so many of all `walks`.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    tensor_forward(const Element* x, const Element* values, Element* y, const int* offsets, const int* places,
                   const int* strides, const int* bounds, const float* scale, const float* shift,
                   const Element* residual, int relu, int images, int channels, int in_h, int in_w, int filters,
                   int out_h, int out_w, int rects_h, int rects_w, int chunks, int sets, int most_steps, int walks,
                   int splits) {
  channels = known<Input::depth>(channels), in_h = known<Input::height>(in_h), in_w = known<Input::image_width>(in_w);
  filters = known<TARGET_DEPTH>(filters), out_h = known<TARGET_ROWS>(out_h), out_w = known<TARGET_COLUMNS>(out_w);
  rects_h = known<(TARGET_ROWS + RECT_ROWS - 1) / RECT_ROWS>(rects_h);
  rects_w = known<(TARGET_COLUMNS + RECT_COLUMNS - 1) / RECT_COLUMNS>(rects_w);
  chunks = known<(Input::depth + Input::channels - 1) / Input::channels>(chunks);
  Unit* const tiles = reinterpret_cast<Unit*>(shared_memory());
  Unit* const zero = tiles + BUFFERS * Input::units;
  Unit* const rows = zero + ZEROS;
  int* const bound = reinterpret_cast<int*>(rows + (ALL_ROWS ? 1 : BUFFERS) * most_steps * STEP_UNITS);
  const int set = blockIdx.x % sets, split = blockIdx.x / sets;
  const Program program{values, offsets, places, strides, bounds + set * (chunks * BLOCKS + 1)};
  const auto view_of = [&](int turn) {
    const int walk = split + turn / chunks * splits, rects = rects_w * rects_h, batches = walks / rects;
    const int rect = BATCH_LAST ? walk / batches : walk % rects, batch = BATCH_LAST ? walk % batches : walk / rects;
    return View{batch * IMAGES * Input::groups, rect / rects_w * RECT_ROWS, rect % rects_w * RECT_COLUMNS, 0, 0};
  };
  const auto rows_of = [&](int buffer) { return rows + (ALL_ROWS ? 0 : buffer * most_steps * STEP_UNITS); };

  for (int buffer = 0; buffer < BUFFERS; ++buffer) clear_border(Input{}, tiles + buffer * Input::units);
  clear(zero, ZEROS);
  const auto copy_rows_between = [&](int from, int to, int buffer) {
    copy_rows(rows_of(buffer), rows_of(buffer) + most_steps * WEIGHT_UNITS, program, program.bounds[from],
              program.bounds[to]);
  };
  const auto copy = [&](int turn, int buffer) {
    const int chunk = turn % chunks, first = chunk * Input::channels, left = channels - first;
    const View out = view_of(turn);
    const View in{out.image, out.top * STRIDE_ROWS - PADDING_ROWS, out.left * STRIDE_COLUMNS - PADDING_COLUMNS, 0, 0};
    copy_tile(Input{}, tiles + buffer * Input::units, x, in, first, left < Input::channels ? left : Input::channels,
              images, channels, in_h, in_w);
    if (!ALL_ROWS) copy_rows_between(chunk * BLOCKS, (chunk + 1) * BLOCKS, buffer);
  };
  const auto begin = [&] {
    if (ALL_ROWS) copy_rows_between(0, chunks * BLOCKS, 0);
    for (int i = thread_now(); i <= chunks * BLOCKS; i += THREADS) bound[i] = program.bounds[i];
    if (ALL_ROWS && BATCH_LAST) wait_for_copies();  // the last to come, behind what the first uses wait for
  };

  const Target target{y, scale, shift, residual, relu, images, filters, out_h, out_w};
  const Pixels pixels = pixels_of(threadIdx.x / 32 % PARTS);
  float sum[TILES][4];
  clear_sums(sum);
  pipeline(chunks * ((walks - split + splits - 1) / splits), begin, copy, [&](int turn, int buffer) {
    const int warp = thread_now() / 32, part = warp % PARTS, slot = warp / PARTS, block = set * BLOCKS + slot;
    if (block * FILTERS >= filters) return;
    const int chunk = turn % chunks, *own = bound + chunk * BLOCKS + slot;
    const int step = (own[0] - bound[ALL_ROWS ? 0 : chunk * BLOCKS]) / 16;
    sweep(rows_of(buffer) + step * WEIGHT_UNITS, rows_of(buffer) + most_steps * WEIGHT_UNITS + step * OFFSET_UNITS,
          (own[1] - own[0]) / 16, tiles + buffer * Input::units, zero, pixels, sum);
    if (chunk + 1 < chunks) return;
    if constexpr (BATCH_LAST)
      store_units(sum, target, view_of(turn), block, part);
    else
      store_outputs(sum, target, view_of(turn), block, part);
    clear_sums(sum);
  });
}
