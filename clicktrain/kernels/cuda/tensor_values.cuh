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

// Add the products of a part of the pixels in a buffer; `rows` are the places of this lane's entries. How many steps
// there are is known to the compiler, so that all matrices of a pair are on their way at once.
template <int Steps>
__device__ __forceinline__ void accumulate(const Unit* buffer, int slot, const int (&rows)[TILES],
                                           float (&sum)[TILES][2][4]) {
  const unsigned thread = unsigned(thread_now());
  const int lane = thread % 32, part = thread / 32 % PARTS;
  const Unit* filter = buffer + Input::units + (slot * FILTERS + lane % 16) * Output::channel_pitch;
  const int of_dy = lane / 16, of_x = lane / 8 % 2;  // which pixel of a pair a lane has
  // Unrolled, the places of all pairs are constants, as far as one part's pairs are like the first one.
  constexpr int TURNS = (PAIRS + PARTS - 1) / PARTS;
  constexpr bool ALIKE = alike(2 * PARTS) && alike(2);
  const Unit* const first = buffer + (ALIKE ? place_at(Input{}, 2 * part + of_x) : 0);
  const Unit* entries[Steps];
#pragma unroll
  for (int i = 0; i < Steps; ++i) entries[i] = first + rows[i];
  const Unit* const first_dy = filter + (ALIKE ? place_at<1, 1>(Output{}, 2 * part + of_dy) : 0);
#pragma unroll(TURNS <= 16 ? TURNS : 1)
  for (int turn = 0; turn < TURNS; ++turn) {
    const int pair = turn * PARTS + part;
    if (pair >= PAIRS) break;
    const Unit* of_filter = first_dy + place_at<1, 1>(Output{}, ALIKE ? 2 * PARTS * turn : 2 * pair + of_dy);
    const Packed<unsigned, 4> a = load_matrices<false>(of_filter);
    const int pixel = ALIKE ? place_at(Input{}, 2 * PARTS * turn) : place_of(Input{}, 2 * pair + of_x);
#pragma unroll
    for (int i = 0; i < Steps; ++i) {
      const Packed<unsigned, 4> b = load_matrices<false>(entries[i] + pixel);
      multiply_accumulate(sum[i][0], a, b.items[0], b.items[1], Element{});
      multiply_accumulate(sum[i][1], a, b.items[2], b.items[3], Element{});
    }
  }
}

template <int Steps>
__device__ __forceinline__ void choose_steps(int steps, const Unit* buffer, int slot, const int (&rows)[TILES],
                                             float (&sum)[TILES][2][4]) {
  if (steps == Steps)
    accumulate<Steps>(buffer, slot, rows, sum);
  else if constexpr (Steps > 1)
    choose_steps<Steps - 1>(steps, buffer, slot, rows, sum);
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
  const auto begin = [&] {
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const int offset = i < steps ? offsets[job[1] + 16 * i + lane / 16 * 8 + lane % 8] : 0;
      rows[i] = offset < 0 ? 0 : offset;  // rows that only fill a step are not written
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[i][j / 4][j % 4] = 0.0f;
    }
  };

  for (int buffer = 0; buffer < BUFFERS; ++buffer) {
    clear_border(Input{}, buffers + buffer * BUFFER);
    if (POSITIONS % 2) clear(buffers + buffer * BUFFER + Input::units, Output::units);
  }
  const auto copy = [&](int turn, int buffer) {
    copy_both(buffers + buffer * BUFFER, x, dy, split + turn * splits, pieces[2 * piece] * FILTERS,
              pieces[2 * piece + 1], images, channels, in_h, in_w, filters, out_h, out_w, rects_h, rects_w);
  };
  pipeline((walks - split + splits - 1) / splits, begin, copy, [&](int, int buffer) {
    if (slot >= 0) choose_steps<TILES>(steps, buffers + buffer * BUFFER, slot, rows, sum);
  });
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
