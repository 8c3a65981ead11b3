// The forward pass; see tensor.cuh.
//
// A block of threads has a rectangle of output pixels of some groups of images, and BLOCKS blocks of filters. A warp
// computes one block of filters at 8-column tiles for TILES positions; PARTS warps share a block. Channels come in
// chunks, two buffers (one, if one chunk holds them all), one barrier a chunk. The rows of a block's matrix (places in the tile, places of its values)
// are one list for all chunks, so that weights are read one step of 16 rows before they are used, and the places of
// values two steps before.

// Rows of a matrix, in steps of 16, as a lane needs them.
struct Steps {
  const Element *low, *high;  // values of filter lane / 4, and of 8 filters further
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
    steps.weights.items[2 * i + 1] = read_pair(steps.high, steps.next[2 * i], steps.next[2 * i + 1]);
  }
}

// Add the products of the steps from k to `end`; the step at k has been read.
__device__ __forceinline__ void sweep(Steps& steps, int k, int end, const Unit* tile, const Unit* zero,
                                      const int (&pixels)[TILES / 2], float (&sum)[TILES][4]) {
  for (; k < end; k += 16) {
    const bool exists = steps.offset >= 0;
    const Unit* rows = exists ? tile + steps.offset : zero;
    const int mask = exists ? -1 : 0;
    const Packed<unsigned, 4> weights = steps.weights;
    read_step(steps, k + 16);
    read_places(steps, k + 32);
#pragma unroll
    for (int i = 0; i < TILES / 2; ++i) {
      const Packed<unsigned, 4> b = load_matrices<true>(rows + (pixels[i] & mask));
      multiply_accumulate(sum[2 * i], weights, b.items[0], b.items[1], Element{});
      multiply_accumulate(sum[2 * i + 1], weights, b.items[2], b.items[3], Element{});
    }
  }
}

// Pitches of the sums of half a block [filter][image][position]: the lanes of a warp write to different banks.
constexpr int STAGE_IMAGE = 4 + (TILES + 3) / 8 * 8, STAGE_FILTER = IMAGES * STAGE_IMAGE + 1;

struct Target {
  Element* y;
  const float *scale, *shift;
  const Element* residual;
  int relu, images, filters, out_h, out_w;
};

// Write half of a warp's filters, from `first` on: y = relu(sum * scale + shift + residual).
__device__ __forceinline__ void store_half(const float* stage, const Target& target, View view, int first, int part) {
  constexpr int WORDS = TILES / VECTOR;
  for (int item = threadIdx.x % 32; item < 8 * IMAGES * WORDS; item += 32) {
    const int tile = item % WORDS * VECTOR, image = item / WORDS % IMAGES, filter = item / (WORDS * IMAGES);
    const int position = part * TILES + tile, group = position / (RECT_COLUMNS * RECT_ROWS);
    const int row = view.top + position / RECT_COLUMNS % RECT_ROWS, column = view.left + position % RECT_COLUMNS;
    const int n = view.image + group * IMAGES + image;
    if (position >= POSITIONS || n >= target.images || row >= target.out_h || column >= target.out_w) continue;
    const int f = first + filter, offset = ((n * target.filters + f) * target.out_h + row) * target.out_w + column;
    const float factor = target.scale ? target.scale[f] : 1.0f, summand = target.shift ? target.shift[f] : 0.0f;
    Packed<Element, VECTOR> packed;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      float value = stage[filter * STAGE_FILTER + image * STAGE_IMAGE + tile + i] * factor + summand;
      if (target.residual) value += to_float(target.residual[offset + i]);
      from_float(target.relu && value < 0.0f ? 0.0f : value, packed.items[i]);
    }
    store_packed(target.y + offset, packed);
  }
}

// The sums of a lane are those of two images at one pixel: through shared memory, to rows of pixels.
__device__ __forceinline__ void store_outputs(float* stage, const float (&sum)[TILES][4], const Target& target,
                                              View view, int block, int part) {
  const int lane = threadIdx.x % 32;
  float* mine = stage + lane / 4 * STAGE_FILTER + lane % 4 * 2 * STAGE_IMAGE;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      mine[tile] = sum[tile][2 * half];
      mine[STAGE_IMAGE + tile] = sum[tile][2 * half + 1];
    }
    warp_barrier();
    store_half(stage, target, view, block * FILTERS + 8 * half, part);
    warp_barrier();
  }
}

// `bounds` has for each block of filters where its rows start in each chunk, and where they end; `strides` how many
// values lie between one filter of a block and the next.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    tensor_forward(const Element* x, const Element* values, Element* y, const int* offsets, const int* places,
                   const int* bounds, const int* strides, const float* scale, const float* shift,
                   const Element* residual, int relu, int images, int channels, int in_h, int in_w, int filters,
                   int out_h, int out_w, int rects_h, int rects_w, int chunks, int sets) {
  Unit* const tiles = reinterpret_cast<Unit*>(shared_memory());
  Unit* const zero = tiles + BUFFERS * Input::units;
  const int set = blockIdx.x % sets, rect = blockIdx.x / sets;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % PARTS;
  const int block = set * BLOCKS + warp / PARTS;
  const bool works = block * FILTERS < filters;
  const View out{rect / (rects_w * rects_h) * IMAGES * Input::groups, rect / rects_w % rects_h * RECT_ROWS,
                 rect % rects_w * RECT_COLUMNS, 0, 0};
  const View in{out.image, out.top * STRIDE_ROWS - PADDING_ROWS, out.left * STRIDE_COLUMNS - PADDING_COLUMNS, 0, 0};

  int pixels[TILES / 2];
#pragma unroll
  for (int i = 0; i < TILES / 2; ++i) pixels[i] = place_of(Input{}, part * TILES + 2 * i + lane / 16);
  float sum[TILES][4];
#pragma unroll
  for (int i = 0; i < TILES; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i][j] = 0.0f;

  const int* bound = bounds + (works ? block : 0) * (chunks + 1);
  const int stride = strides[works ? block : 0];
  Steps steps;
  steps.low = values + lane / 4 * stride, steps.high = steps.low + 8 * stride;
  steps.offsets = offsets, steps.places = places, steps.end = bound[chunks];
  read_places(steps, bound[0]);
  read_step(steps, bound[0]);
  read_places(steps, bound[0] + 16);

  for (int buffer = 0; buffer < BUFFERS; ++buffer) clear_border(Input{}, tiles + buffer * Input::units);
  clear(zero, 1);
  for (int chunk = -1; chunk < chunks; ++chunk) {
    __syncthreads();
    const int first = (chunk + 1) * Input::channels, left = channels - first;
    if (left > 0)
      copy_tile(Input{}, tiles + (chunk + 1) % BUFFERS * Input::units, x, in, first,
                left < Input::channels ? left : Input::channels, images, channels, in_h, in_w);
    if (chunk >= 0 && works)
      sweep(steps, bound[chunk], bound[chunk + 1], tiles + chunk % BUFFERS * Input::units, zero, pixels, sum);
  }
  __syncthreads();
  if (!works) return;
  float* const stage = reinterpret_cast<float*>(tiles) + warp * 8 * STAGE_FILTER;
  store_outputs(stage, sum, Target{y, scale, shift, residual, relu, images, filters, out_h, out_w}, out, block, part);
}
