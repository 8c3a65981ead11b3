// The gradient of the values; see tensor.cuh.
//
// dvalues[16 filters, entries] = dy[16 x pixels] * x^T[pixels x entries] for each block of filters: a step multiplies
// 2 pixels of 8 images. A warp owns a job, up to TILES steps of 16 entries of one block, and keeps its sums in
// registers while the block of threads walks over its share of rectangles and groups of images; PARTS warps divide the
// pixels of a job. Each share and part leaves its own sums, and a second kernel adds them up in a fixed order.
//
// Rectangles at an edge are moved inward, so that no pixel outside the output exists whose zero would meet a NaN of x;
// pixels that an earlier rectangle covers too have dy = 0.

constexpr int BUFFER = Input::units + Output::units, PAIRS = (POSITIONS + 1) / 2;

__device__ __forceinline__ void copy_both(Unit* buffer, const Element* x, const Element* dy, int walk, int first_filter,
                                          int first_channel, int images, int channels, int in_h, int in_w, int filters,
                                          int out_h, int out_w, int rects_h, int rects_w) {
  const int top = walk / rects_w % rects_h * RECT_ROWS, left = walk % rects_w * RECT_COLUMNS;
  const int most_top = out_h - RECT_ROWS, most_left = out_w - RECT_COLUMNS;
  const View out{walk / (rects_w * rects_h) * IMAGES * Input::groups, top < most_top ? top : most_top,
                 left < most_left ? left : most_left, top, left};
  const View in{out.image, out.top * STRIDE_ROWS - PADDING_ROWS, out.left * STRIDE_COLUMNS - PADDING_COLUMNS, 0, 0};
  const int channel_count = channels - first_channel < Input::channels ? channels - first_channel : Input::channels;
  const int filter_count = filters - first_filter < Output::channels ? filters - first_filter : Output::channels;
  copy_tile(Input{}, buffer, x, in, first_channel, channel_count, images, channels, in_h, in_w);
  copy_tile(Output{}, buffer + Input::units, dy, out, first_filter, filter_count, images, filters, out_h, out_w);
}

// Add the products of a part of the pixels in a buffer; `rows` are the places of this lane's entries.
__device__ __forceinline__ void accumulate(const Unit* buffer, int slot, int steps, const int (&rows)[TILES],
                                           float (&sum)[TILES][2][4]) {
  const int thread = thread_now(), lane = thread % 32, part = thread / 32 % PARTS;
  const Unit* filter = buffer + Input::units + (slot * FILTERS + lane % 16) * Output::channel_pitch + lane / 16;
  const int second = lane / 8 % 2;
  // Unrolled, the places of all pairs are constants, as far as one part's pairs are like the first one.
  constexpr int TURNS = (PAIRS + PARTS - 1) / PARTS;
  constexpr bool ALIKE = alike(2 * PARTS) && RECT_COLUMNS % 2 == 0;
  const Unit* const first = buffer + (ALIKE ? place_at(Input{}, 2 * part + second) : 0);
#pragma unroll(TURNS <= 16 ? TURNS : 1)
  for (int turn = 0; turn < TURNS; ++turn) {
    const int pair = turn * PARTS + part;
    if (pair >= PAIRS) break;
    const Packed<unsigned, 4> a = load_matrices<false>(filter + 2 * pair);
    const Unit* pixel = first + (ALIKE ? place_at(Input{}, 2 * PARTS * turn) : place_of(Input{}, 2 * pair + second));
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      if (i >= steps) break;
      const Packed<unsigned, 4> b = load_matrices<false>(pixel + rows[i]);
      multiply_accumulate(sum[i][0], a, b.items[0], b.items[1], Element{});
      multiply_accumulate(sum[i][1], a, b.items[2], b.items[3], Element{});
    }
  }
}

// `pieces` has the first block of filters and the first channel of each piece, `jobs` for each piece and job: its
// block of filters in the piece (-1: no job), its first row and its steps.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    tensor_values(const Element* x, const Element* dy, float* partial, const int* offsets, const int* places,
                  const int* strides, const int* jobs, const int* pieces, int images, int channels, int in_h, int in_w,
                  int filters, int out_h, int out_w, int rects_h, int rects_w, int walks, int piece_count, int splits,
                  int count) {
  channels = known<Input::depth>(channels), in_h = known<Input::height>(in_h), in_w = known<Input::image_width>(in_w);
  filters = known<TARGET_DEPTH>(filters), out_h = known<TARGET_ROWS>(out_h), out_w = known<TARGET_COLUMNS>(out_w);
  rects_h = known<(TARGET_ROWS + RECT_ROWS - 1) / RECT_ROWS>(rects_h);
  rects_w = known<(TARGET_COLUMNS + RECT_COLUMNS - 1) / RECT_COLUMNS>(rects_w);
  Unit* const buffers = reinterpret_cast<Unit*>(shared_memory());
  const int piece = blockIdx.x % piece_count, split = blockIdx.x / piece_count;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % PARTS;
  const int* job = jobs + (piece * (THREADS / 32 / PARTS) + warp / PARTS) * 3;
  const int slot = job[0], steps = job[2];

  int rows[TILES];
  float sum[TILES][2][4];
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    const int offset = i < steps ? offsets[job[1] + 16 * i + lane / 16 * 8 + lane % 8] : 0;
    rows[i] = offset < 0 ? 0 : offset;  // rows that only fill a step are not written
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[i][j / 4][j % 4] = 0.0f;
  }

  clear(buffers, 2 * BUFFER);
  int buffer = 0;
  for (int walk = split - splits; walk < walks; walk += splits, buffer ^= 1) {
    __syncthreads();
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn)
      if (copies_now(turn)) {
        if (walk + splits < walks)
          copy_both(buffers + (buffer ^ 1) * BUFFER, x, dy, walk + splits, pieces[2 * piece] * FILTERS,
                    pieces[2 * piece + 1], images, channels, in_h, in_w, filters, out_h, out_w, rects_h, rects_w);
      } else if (walk >= 0 && slot >= 0) {
        accumulate(buffers + buffer * BUFFER, slot, steps, rows, sum);
      }
  }
  if (slot < 0) return;

  const int first = job[1], stride = strides[pieces[2 * piece] + slot];
  float* const mine = partial + (split * PARTS + part) * count + lane / 4 * stride;
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    if (i >= steps) break;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int place = places[first + 16 * i + j / 2 * 8 + lane % 4 * 2 + j % 2];
      if (place < 0) continue;
      mine[place] = sum[i][j / 2][j % 2];
      mine[place + 8 * stride] = sum[i][j / 2][2 + j % 2];
    }
  }
}

// Add up what shares and parts found, one after another, and round once.
extern "C" __global__ void __launch_bounds__(256)
    tensor_finish(const float* partial, Element* dvalues, int count, int shares) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= count) return;
  float total = 0.0f;
  for (int share = 0; share < shares; ++share) total += partial[share * count + i];
  from_float(total, dvalues[i]);
}
