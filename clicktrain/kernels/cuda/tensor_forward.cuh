// The forward pass; see tensor.cuh.
//
// A block of threads has a rectangle of output pixels of some groups of images, and BLOCKS blocks of filters. A warp
// computes one block of filters at 8-column tiles for TILES positions; PARTS warps share a block. Channels come in
// chunks, two buffers (one, if one chunk holds them all), one barrier a chunk. The rows of a block's matrix (places in
// the tile, places of its values) are one list for all chunks, so that weights are read one step of 16 rows before they are used, and the places of
// values two steps before.

// Rows of a matrix, in steps of 16, as a lane needs them.
struct Steps {
  const Element* low;  // values of filter lane / 4
  int further;  // to those of 8 filters further
  const int *offsets, *places;
  int end;
  int next[4];  // places of the values of the step after the present one
  int offset;
  Packed<unsigned, 4> weights;
};

__device__ __forceinline__ void read_places(Steps& steps, int k) {
  const int* places = steps.places + k + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) steps.next[i] = k < steps.end ? places[i / 2 * 8 + i % 2] : -1;
}

__device__ __forceinline__ void read_step(Steps& steps, int k) {
  steps.offset = k < steps.end ? steps.offsets[k + threadIdx.x % 16] : -1;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    steps.weights.items[2 * i] = read_pair(steps.low, steps.next[2 * i], steps.next[2 * i + 1]);
    steps.weights.items[2 * i + 1] = read_pair(steps.low + steps.further, steps.next[2 * i], steps.next[2 * i + 1]);
  }
}

// A lane's pixels. Where all parts look alike, `first` is the place of its first one, and the others follow at constant
// distances, in the zeros too.
constexpr bool ALIKE = alike(TILES) && RECT_COLUMNS % 2 == 0 && ZEROS > 1;
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

// Add the products of the steps from k to `end`; the step at k has been read.
__device__ __forceinline__ void sweep(Steps& steps, int k, int end, const Unit* tile, const Unit* zero,
                                      const Pixels& pixels, float (&sum)[TILES][4]) {
  const Unit* const first = tile + pixels.first;
#pragma unroll 1
  for (; k < end; k += 16) {
    const bool exists = steps.offset >= 0;
    const Unit* rows = exists ? first + steps.offset : zero;
    const Packed<unsigned, 4> weights = steps.weights;
    read_step(steps, k + 16);
    read_places(steps, k + 32);
#pragma unroll
    for (int i = 0; i < TILES / 2; ++i) {
      int place = place_at(Input{}, 2 * i);
      if constexpr (!ALIKE) place = exists ? pixels.places[i] : 0;
      const Packed<unsigned, 4> b = load_matrices<true>(rows + place);
      multiply_accumulate(sum[2 * i], weights, b.items[0], b.items[1], Element{});
      multiply_accumulate(sum[2 * i + 1], weights, b.items[2], b.items[3], Element{});
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

// Where a run of pixels is in y; -1: outside.
__device__ __forceinline__ int place_in_output(const Target& target, View view, int filter, int image, int position) {
  const int group = position / (RECT_COLUMNS * RECT_ROWS), n = view.image + group * IMAGES + image;
  const int row = view.top + position / RECT_COLUMNS % RECT_ROWS, column = view.left + position % RECT_COLUMNS;
  const bool whole = POSITIONS % VECTOR == 0 && TILES * PARTS == POSITIONS;
  if ((!whole && position >= POSITIONS) || n >= target.images || row >= target.out_h || column >= target.out_w)
    return -1;
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

// `bounds` has for each block of filters where its rows start in each chunk, and where they end; `strides` how many
// values lie between one filter of a block and the next.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    tensor_forward(const Element* x, const Element* values, Element* y, const int* offsets, const int* places,
                   const int* bounds, const int* strides, const float* scale, const float* shift,
                   const Element* residual, int relu, int images, int channels, int in_h, int in_w, int filters,
                   int out_h, int out_w, int rects_h, int rects_w, int chunks, int sets) {
  channels = known<Input::depth>(channels), in_h = known<Input::height>(in_h), in_w = known<Input::image_width>(in_w);
  filters = known<TARGET_DEPTH>(filters), out_h = known<TARGET_ROWS>(out_h), out_w = known<TARGET_COLUMNS>(out_w);
  rects_h = known<(TARGET_ROWS + RECT_ROWS - 1) / RECT_ROWS>(rects_h);
  rects_w = known<(TARGET_COLUMNS + RECT_COLUMNS - 1) / RECT_COLUMNS>(rects_w);
  Unit* const tiles = reinterpret_cast<Unit*>(shared_memory());
  Unit* const zero = tiles + BUFFERS * Input::units;
  const int set = blockIdx.x % sets, rect = blockIdx.x / sets;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % PARTS;
  const int block = set * BLOCKS + warp / PARTS;
  const bool works = block * FILTERS < filters;
  const View out{rect / (rects_w * rects_h) * IMAGES * Input::groups, rect / rects_w % rects_h * RECT_ROWS,
                 rect % rects_w * RECT_COLUMNS, 0, 0};
  const View in{out.image, out.top * STRIDE_ROWS - PADDING_ROWS, out.left * STRIDE_COLUMNS - PADDING_COLUMNS, 0, 0};

  const Pixels pixels = pixels_of(part);
  float sum[TILES][4];
#pragma unroll
  for (int i = 0; i < TILES; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i][j] = 0.0f;

  const int* bound = bounds + (works ? block : 0) * (chunks + 1);
  const int stride = strides[works ? block : 0];
  Steps steps;
  steps.low = values + lane / 4 * stride, steps.further = 8 * stride;
  steps.offsets = offsets, steps.places = places, steps.end = bound[chunks];
  read_places(steps, bound[0]);
  read_step(steps, bound[0]);
  read_places(steps, bound[0] + 16);

  for (int buffer = 0; buffer < BUFFERS; ++buffer) clear_border(Input{}, tiles + buffer * Input::units);
  clear(zero, ZEROS);
  for (int chunk = -1; chunk < chunks; ++chunk) {
    __syncthreads();
    const int first = (chunk + 1) * Input::channels, left = channels - first;
#pragma unroll(BUFFERS == 1 ? 2 : 1)
    for (int turn = 0; turn < 2; ++turn)
      if (BUFFERS == 1 ? turn == 0 : copies_now(turn)) {
        if (left > 0)
          copy_tile(Input{}, tiles + (chunk + 1) % BUFFERS * Input::units, x, in, first,
                    left < Input::channels ? left : Input::channels, images, channels, in_h, in_w);
      } else if (chunk >= 0 && works) {
        sweep(steps, bound[chunk], bound[chunk + 1], tiles + chunk % BUFFERS * Input::units, zero, pixels, sum);
      }
  }
  if (!works) return;
  store_outputs(sum, Target{y, scale, shift, residual, relu, images, filters, out_h, out_w}, out, block, part);
}
