// Convolutions on tensor cores, where blocks of 16 neighbouring filters keep the same taps of the same channels.
//
// What is kept in common by the 16 filters of a block makes its convolution a dense product of matrices:
// y[16 filters, pixels] = a[16 x K] * b[K x pixels], K = kept kernels of a filter times entries, b = rows of x shifted
// by a tap. `multiply_accumulate` multiplies 16 x 16 by 16 x 8, with float32 sums.
//
// Unit = 16 bytes = the same pixel of 8 neighbouring images. An image tile in shared memory is [channel][group of 8
// images][row][column] of units, with zeros where padding is. The row of b for k = (channel, tap) and an output pixel
// is one unit of the tile, at 16 bytes whatever the tap: `load_matrices` gathers, each lane gives the place of its own
// row, and no shifted or transposed copy of x exists. The 8 columns of a product are the images of one pixel.
//
// Where the limit is. A multiprocessor of an H200 multiplies 16 x 16 by 16 x 8 about every 2 cycles with this
// instruction. One `load_matrices` takes 4 cycles of shared memory, 128 bytes each, and feeds two products in the
// forward pass and the gradient of the values: both limits meet at 1024 FMA a cycle, 8 times the FP32 rate. At 8x
// compression few products are left for each unit of a tile: with 28 % of the kernels and 4 entries, 16 rows of a
// product are 14 units, so that a unit takes part in 0.07 products for a block of filters, 0.14 cycles, while copying
// it takes 0.7 (the second-level cache gives a multiprocessor about 24 bytes a cycle) and its halo once more. Blocks of
// filters therefore share tiles, up to 8 of them. And waits count: a load that misses the second-level cache takes an
// H100 about 0.6 us. Where an address depends on another load, tiles are already on their way.
//
// What an H100 reaches (bench/evidence/gpu.json: VGG-13 at 8x, batch 128): the forward pass is level with cuDNN in the
// same type (1.03 times as fast, 1.23 times on 64 channels of 32 x 32), the gradient of the input takes 1.4 times as
// long, that of the values 1.2 times. Both limits are far: kernels of 15 to 30 microseconds wait for memory once or
// twice, and small images leave few blocks.
//
// Banks. The 8 rows of a matrix are read without a conflict if their units differ modulo 8. The row pitch is 2 modulo
// 4 units, so that the taps {0, 1, pitch, pitch + 1} of a square differ, and the pitch from one channel to the next is
// 4 modulo 8: the next channel's square fits in, if the distance of the channels is odd. `tensor_layout` orders the
// kernels of a block so that neighbours fit together where they can; the order of taps within a kernel is kept. For
// 1x1 kernels pitches of channels are odd. The gradient of the values reads 16 filters at one pixel: odd too.
//
// Formats. Tensors are NCHW, or batch last: [channel][row][column][image] in memory, where a unit of the tile is 16
// neighbouring bytes. Copies are then asynchronous and cost no instructions to speak of, several chunks are on their way
// at once, and results are written as units. A sector of memory has two units, and a line eight: tiles take several
// groups of images, and groups are what counts fastest among positions, so that neighbouring lanes read and write
// neighbouring units. NCHW images are transposed in registers on their way.
//
// What is zero. A copy writes every unit that can ever hold a pixel, zeros included; all others are cleared once.
// Steps of 16 rows that a block cannot fill read a unit of zeros with a weight of zero: with another unit, an infinity
// there would spread. Images beyond the last are zeros.

using Unit = Packed<unsigned, 4>;

constexpr int IMAGES = 8;  // of a unit
constexpr int FILTERS = 16;  // of a block

template <int Channels, int Groups, int Rows, int Columns, int RowPitch, int GroupPitch, int ChannelPitch, int CopyRows,
          int CopyColumns, int WholeRows, int WholeColumns, int Width, int SpreadRows, int SpreadColumns, int Depth,
          int Height, int ImageWidth>
struct Tile {
  static constexpr int channels = Channels, groups = Groups, rows = Rows, columns = Columns;
  static constexpr int row_pitch = RowPitch, group_pitch = GroupPitch, channel_pitch = ChannelPitch;  // in units
  static constexpr int copy_rows = CopyRows, copy_columns = CopyColumns;  // rows of the image, reads of a row
  static constexpr bool whole_rows = WholeRows, whole_columns = WholeColumns;  // every tile holds all of the image
  static constexpr int width = Width;  // pixels that are read at once: 2 or 4 where it divides rows
  static constexpr int spread_rows = SpreadRows, spread_columns = SpreadColumns;  // tile pixels for one of the image
  static constexpr int depth = Depth, height = Height, image_width = ImageWidth;  // of the image; 0: told at launch
  static constexpr int units = Channels * ChannelPitch;
};

// What a tile shows: first image, tile pixel of image row 0 is -top, and the first row and column to take.
struct View {
  int image, top, left, first_row, first_column;
};

template <int Divisor>
__device__ __forceinline__ int divide_down(int value) {
  return value >= 0 ? value / Divisor : -((Divisor - 1 - value) / Divisor);
}

__device__ __forceinline__ unsigned read_bits(const Element* from) { return from->bits; }

// Neighbouring pixels of an image.
template <int Width>
__device__ __forceinline__ Packed<unsigned, (Width + 1) / 2> read_pixels(const Element* from) {
  if constexpr (Width > 1)
    return load_words<Width / 2>(from);
  else
    return Packed<unsigned, 1>{{read_bits(from)}};
}

__device__ __forceinline__ void store_unit(Unit* to, const Unit& unit) {
  store_packed(reinterpret_cast<unsigned*>(to), unit);
}

__device__ __forceinline__ void clear(Unit* units, int count) {
  for (int i = threadIdx.x; i < count; i += THREADS) store_unit(units + i, Unit{});
}

// The pixels of a whole image among `length` of a tile: from the first on, up to the last.
struct Span {
  int first, last;
};
__device__ __forceinline__ constexpr Span span_of(int padding, int pixels, int length) {
  const int first = padding < 0 ? 0 : padding < length ? padding : length, end = padding + pixels;
  return Span{first, end < first ? first : end < length ? end : length};
}

// Clear what no copy writes but products read: the border of whole images, and pixels between spread ones.
template <typename T>
__device__ __forceinline__ void clear_border(T, Unit* tile) {
  constexpr Span rows = T::whole_rows ? span_of(PADDING_ROWS, T::copy_rows, T::rows) : Span{0, T::rows};
  constexpr Span columns =
      T::whole_columns ? span_of(PADDING_COLUMNS, T::copy_columns * T::width, T::columns) : Span{0, T::columns};
  constexpr int ABOVE = T::rows - (rows.last - rows.first), BESIDE = T::columns - (columns.last - columns.first);
  if constexpr (T::spread_rows * T::spread_columns > 1) {
    clear(tile, T::units);
  } else {
    constexpr int OF_PLANE = ABOVE * T::columns + T::rows * BESIDE;
    if constexpr (OF_PLANE > 0)
      for (int item = threadIdx.x; item < T::channels * T::groups * OF_PLANE; item += THREADS) {
        const int plane = item / OF_PLANE, place = item % OF_PLANE, rest = place - ABOVE * T::columns;
        const int above = place / T::columns, beside = BESIDE ? rest % (BESIDE ? BESIDE : 1) : 0;
        int row = above < rows.first ? above : above - rows.first + rows.last, column = place % T::columns;
        if (rest >= 0) {
          row = rest / (BESIDE ? BESIDE : 1);
          column = beside < columns.first ? beside : beside - columns.first + columns.last;
        }
        store_unit(tile + plane / T::groups * T::channel_pitch + plane % T::groups * T::group_pitch +
                       row * T::row_pitch + column,
                   Unit{});
      }
  }
}

// What the text knows, or else what the launch tells.
template <int Known>
__device__ __forceinline__ int known(int told) {
  return Known ? Known : told;
}

// Copy parts of the work into buffers, one after the other, `copy(part, buffer)`, and use each, `use(part, buffer)`.
// What is needed from the first use on, `begin()` brings while the first copies are on their way.
//
// Batch last, all buffers but the one in use are being filled. NCHW images go through registers: between two barriers
// half of the warps copy first and then use, the others the other way around, so that one half waits for memory while
// the other computes. With one buffer, other blocks of threads compute while this one waits.
template <typename Begin, typename Copy, typename Use>
__device__ __forceinline__ void pipeline(int parts, const Begin& begin, const Copy& copy, const Use& use) {
  constexpr int AHEAD = BUFFERS > 1 ? BUFFERS - 1 : 1;
  if constexpr (BUFFERS == 1) {
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      __syncthreads();  // the buffer has been cleared, or used
      copy(part, 0);
      if (part == 0) begin();
      wait_for_copies();
      __syncthreads();
      use(part, 0);
    }
  } else if constexpr (BATCH_LAST) {
    __syncthreads();  // buffers have been cleared
#pragma unroll 1
    for (int part = 0; part < AHEAD; ++part) {
      if (part < parts) copy(part, part);
      close_copies();
    }
    begin();
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      wait_for_batches<AHEAD - 1>();
      __syncthreads();
      const int next = part + AHEAD;
      if (next < parts) copy(next, next % BUFFERS);
      close_copies();
      use(part, part % BUFFERS);
    }
  } else {
    begin();
#pragma unroll 1
    for (int part = -1; part < parts; ++part) {
      wait_for_copies();
      __syncthreads();
#pragma unroll 1
      for (int turn = 0; turn < 2; ++turn)
        if ((threadIdx.x / 128 + turn) % 2 == 0) {
          if (part + 1 < parts) copy(part + 1, (part + 1) % BUFFERS);
        } else if (part >= 0) {
          use(part, part % BUFFERS);
        }
    }
  }
}

// Turn neighbouring pixels of 8 images into units and store them, those that are `shown`. Each lane stores its pixels
// in an order of its own, pixel i ^ turn after pixel (i - 1) ^ turn, so that eight neighbours write to different banks.
template <typename T>
__device__ __forceinline__ void store_pixels(T, Unit* to, Packed<unsigned, (T::width + 1) / 2> (&words)[IMAGES],
                                             const bool (&shown)[T::width], int turn) {
  const bool odd = turn % 2, upper = turn / 2;
#pragma unroll
  for (int i = 0; i < IMAGES; ++i) {
    const unsigned low = words[i].items[0], high = words[i].items[T::width / 4];
    words[i].items[0] = upper ? high : low, words[i].items[T::width / 4] = upper ? low : high;
  }
#pragma unroll
  for (int i = 0; i < T::width; ++i) {
    Unit unit;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      unit.items[j] = join_halves(words[2 * j].items[i / 2], words[2 * j + 1].items[i / 2], i % 2 ? !odd : odd);
    if (shown[i]) store_unit(to + (i ^ turn) * T::spread_columns, unit);
  }
}

// Copy `count` channels of images from `first` on, batch last. Neighbouring lanes read neighbouring groups of images,
// then pixels; a thread keeps its place and goes from channel to channel.
template <typename T>
__device__ __forceinline__ void copy_units(T, Unit* tile, const Element* from, View view, int first, int count,
                                           int images, int height, int width) {
  constexpr int OF_CHANNEL = T::groups * T::copy_rows * T::copy_columns;
  constexpr int SHARES = OF_CHANNEL < THREADS ? THREADS / OF_CHANNEL : 1;
  const int thread = thread_now(), share = OF_CHANNEL < THREADS ? thread / OF_CHANNEL : 0;
  const int top = T::whole_rows ? 0 : divide_down<T::spread_rows>(view.top);
  const int left = T::whole_columns ? 0 : divide_down<T::spread_columns>(view.left);
  const int plane = height * width * images;
  if (share >= SHARES) return;
  for (int item = thread - share * OF_CHANNEL; item < OF_CHANNEL; item += THREADS) {
    const int group = item % T::groups, pixel = item / T::groups;
    const int row = top + pixel / T::copy_columns, column = left + pixel % T::copy_columns;
    const int to_row = row * T::spread_rows - view.top, to_column = column * T::spread_columns - view.left;
    if (to_row < 0 || to_row >= T::rows || to_column < 0 || to_column >= T::columns) continue;
    const int image = view.image + group * IMAGES;
    const bool exists = row >= view.first_row && row < height && column >= view.first_column && column < width &&
                        (WHOLE_GROUPS || image < images);
    const Element* source = from + (first + share) * plane + (row * width + column) * images + image;
    Unit* to =
        tile + share * T::channel_pitch + group * T::group_pitch + to_row * T::row_pitch + to_column;
#pragma unroll 4
    for (int channel = share; channel < count; channel += SHARES) {
      copy_unit(to, source, exists);
      source += SHARES * plane, to += SHARES * T::channel_pitch;
    }
  }
}

// Copy `count` channels of images from `first` on. Neighbouring lanes read neighbouring words of an image; a thread
// keeps its place in the image and goes from channel to channel.
template <typename T>
__device__ __forceinline__ void copy_tile(T, Unit* tile, const Element* from, View view, int first, int count,
                                          int images, int channels, int height, int width) {
  if constexpr (BATCH_LAST) return copy_units(T{}, tile, from, view, first, count, images, height, width);
  constexpr int OF_CHANNEL = T::copy_rows * T::copy_columns, SHARES = OF_CHANNEL < THREADS ? THREADS / OF_CHANNEL : 1;
  constexpr bool ALL_SHOWN = T::whole_columns && PADDING_COLUMNS >= 0 &&
                             (T::copy_columns * T::width - 1) * T::spread_columns + PADDING_COLUMNS < T::columns;
  const int thread = thread_now();
  const int top = T::whole_rows ? 0 : divide_down<T::spread_rows>(view.top);
  const int left = T::whole_columns ? 0 : divide_down<T::spread_columns>(view.left) & -T::width;
  const int plane = channels * height * width, share = OF_CHANNEL < THREADS ? thread / OF_CHANNEL : 0;
  if (share >= SHARES) return;
  for (int item = thread - share * OF_CHANNEL; item < OF_CHANNEL; item += THREADS) {
    const int row = top + item / T::copy_columns, column = left + item % T::copy_columns * T::width;
    const int to_row = row * T::spread_rows - view.top, to_column = column * T::spread_columns - view.left;
    if (to_row < 0 || to_row >= T::rows) continue;
    const bool exists = row >= view.first_row && row < height && column >= view.first_column && column < width;
    const int turn = thread % 32 * T::width / 8 % T::width;
    bool shown[T::width];
#pragma unroll
    for (int i = 0; i < T::width; ++i) {
      const int next = to_column + (i ^ turn) * T::spread_columns;
      shown[i] = ALL_SHOWN || (next >= 0 && next < T::columns);
    }
    const Element* source = from + ((view.image * channels + first) * height + row) * width + column;
    Unit* const to = tile + to_row * T::row_pitch + to_column;
    for (int line = share; line < T::channels * T::groups; line += SHARES) {
      const int channel = line % T::channels, group = line / T::channels;
      if (channel >= count) continue;
      const int there = images - view.image - group * IMAGES;
      const Element* pixels = source + group * IMAGES * plane + channel * height * width;
      Packed<unsigned, (T::width + 1) / 2> words[IMAGES];
#pragma unroll
      for (int i = 0; i < IMAGES; ++i) {
        words[i] = {};
        if (exists && (WHOLE_GROUPS || i < there)) words[i] = read_pixels<T::width>(pixels + i * plane);
      }
      store_pixels(T{}, to + channel * T::channel_pitch + group * T::group_pitch, words, shown, turn);
    }
  }
}

// Output positions count columns fastest, then rows, then groups of images; batch last: groups, columns, rows.
struct Position {
  int group, row, column;
};
__device__ __forceinline__ constexpr Position position_at(int number) {
  if constexpr (BATCH_LAST) {
    const int pixel = number / GROUPS;
    return Position{number % GROUPS, pixel / RECT_COLUMNS, pixel % RECT_COLUMNS};
  }
  return Position{number / (RECT_COLUMNS * RECT_ROWS), number / RECT_COLUMNS % RECT_ROWS, number % RECT_COLUMNS};
}

// Where a position is in a tile, in units.
template <int StrideRows = STRIDE_ROWS, int StrideColumns = STRIDE_COLUMNS, typename T>
__device__ __forceinline__ constexpr int place_at(T, int number) {
  const Position at = position_at(number);
  return at.group * T::group_pitch + at.row * StrideRows * T::row_pitch + at.column * StrideColumns;
}
template <typename T>
__device__ __forceinline__ int place_of(T, int position) {
  return position < POSITIONS ? place_at(T{}, position) : 0;
}

// Whether each run of `length` positions looks like the first one, so that distances in it are known to the compiler.
__device__ __forceinline__ constexpr bool alike(int length) {
  const int run = BATCH_LAST ? GROUPS : RECT_COLUMNS, runs = run * (BATCH_LAST ? RECT_COLUMNS : RECT_ROWS);
  return POSITIONS % length == 0 && (length % run == 0 || run % length == 0) &&
         (length % runs == 0 || runs % length == 0);
}

// Copy some neighbouring weights, or zeros where nothing exists; one alone goes through a register.
template <int Width>
__device__ __forceinline__ void copy_values(Element* to, const Element* from, bool exists) {
  if constexpr (Width == 4)
    copy_async2(to, from, exists);
  else if constexpr (Width == 2)
    copy_async(reinterpret_cast<int*>(to), reinterpret_cast<const int*>(from), exists);
  else
    *to = exists ? *from : Element{};
}
