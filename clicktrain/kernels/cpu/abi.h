// The structures that Python fills in (kernels/cpu/library.py mirrors them field by field) and the C functions.
#pragma once

#include <cstdint>

extern "C" {

// What one call of a sweep needs: all kept weights of some filters in one channel block, for one tile.
//
// Weights come as records. A record is the place of a kernel (or of a single tap) in the window and its weights;
// the records of a filter follow one another. taps.h explains one kind, filter_sweeps.py and channel_sweeps.py the
// other.
struct Sweep {
  const float* window;      // [channel block][tile_blocks][window_h][window_pitch][8], or woven
  int64_t window_row;       // floats from the input row of one output row to that of the next
  int64_t window_pixel;     // floats from the input pixel of one output pixel to that of the next
  const int32_t* order;     // [filters] the filter in each place; the lists below are by place
  const int64_t* starts;    // [filters + 1] first record
  const uint16_t* runs;      // [filters to do][patterns] or [channels][patterns]: records of each pattern
  const int32_t* offsets;   // [records] floats from the start of the window
  const float* weights;     // [records][weights of a record], or the canonical values
  const int32_t* gather;    // [records] of sweeps that read the values: where the weights of a record start there
  const float* sums_in;     // sums so far; null = zero
  float* sums_out;
  int64_t in_filter, in_block, in_row, in_pixel;      // strides of sums_in in floats
  int64_t out_filter, out_block, out_row, out_pixel;  // strides of sums_out, or of output where there is one
  int32_t begin, end;       // places to do
  int32_t channels;         // of the window
  int32_t streaming;        // store past the caches
  const float* bias;        // [filters] what the sums start from where sums_in is null; null = zero
  const float* residual;    // added to the finished sums, placed as the outputs are; null = nothing
  int32_t relu;             // of the finished sums
  int32_t max_pool;         // what is written is the largest of each 2 x 2
  // Of sweeps by channel, whose sums stay in memory until all channels are done:
  float* output;            // where the finished sums of the first filter go; null: there are channels to come
};

typedef void (*SweepFunction)(const Sweep*);

// A convolution pass on blocked activations: a forward pass, or the input gradient, which is a forward pass over
// the transposed layer whose input is spread out by the stride.
struct Pass {
  int32_t blocks;                  // groups of eight lanes
  int32_t channels, in_h, in_w;    // input [blocks][channels][in_h][in_w][8]
  int32_t filters, out_h, out_w;   // output [blocks][filters][out_h][out_w][8]
  int32_t tile_blocks, tile_h, tile_w;  // blocks and output pixels that are computed at once
  int32_t band;                    // tiles along the columns that share a window
  int32_t window_h, window_w;      // input pixels that a band of tiles reads
  int32_t window_pitch;            // pixels from one row of a window to the next
  int32_t start_h, start_w;        // input pixel where the window of the first tile starts (< 0: in the padding)
  int32_t stride_h, stride_w;      // input pixels from one output pixel of a phase to the next
  int32_t spread_h, spread_w;      // output pixels y, y + spread, ... are a phase: they use the same taps
  int32_t phases;                  // lists of records: spread_h * spread_w, or 1 if a sweep does all phases at once
  int32_t groups;                  // lists of records that add to the same sums one after the other
  int32_t channel_block, channel_blocks;
  int32_t part;                    // filters that an item computes; places [i * part, (i + 1) * part) hold the same
                                   // filters in every channel block
  int32_t record_weights;          // weights in a record
  int32_t reversed;                // take the weights of a record from last to first
  int32_t part_runs, list_runs;    // entries of `runs` for a part, and for all parts of a channel block and group
  int32_t streaming;               // outputs are too large for the caches, and tiles fill whole cache lines
  int32_t whole_tiles;             // sweeps write whole tiles, also where they stick out of the output
  int32_t keeps_sums;              // sweeps are by channel: they keep sums in memory until all channels are done, and
                                   // read the input itself, not a copy of its window
  int32_t reads_values;            // sweeps read the weights of a record where they are in the canonical values
  int32_t woven;                   // windows are [channel block][window_h][window_pitch][tile_blocks][8]
  int32_t max_pool;                // of 2 x 2 finished outputs only the largest is written: y is half as high and wide;
                                   // sums are kept or windows woven, tiles start and end at even pixels, nothing is
                                   // added to the sums
  int64_t records;
  const int32_t* order;            // [channel_blocks][groups][filters]
  const int64_t* starts;           // [channel_blocks][groups][phases][filters + 1]
  const uint16_t* runs;             // [channel_blocks][groups][parts][filters or channels][patterns of a group]
  const int32_t* offsets;          // [records]
  const int32_t* gather;           // [records] where the weights of a record start in the canonical values
  const SweepFunction* sweeps;     // [groups][tiles along blocks][along rows][along columns]
  // Where the lanes of x are strips of an image that hold no copy of their neighbours' pixels, the pass makes wide
  // strips, of in_h x in_w pixels, which do, and reads those.
  int32_t grid_h, grid_w;          // strips per image; 0: none of this
  int32_t strip_h, strip_w;        // pixels of a strip of x
  int32_t before_h, before_w;      // rows and columns of a wide strip that come before those of x
  const int32_t* neighbours;       // [-grid_h .. grid_h][-grid_w .. grid_w][8] the lane so many strips away; 8: none
  // Of passes by Winograd's transform (winograd.h), which have no sweeps. There a record is a kernel, its weights are
  // those at 36 points, offsets are channels of a block, `part` is a multiple of four, runs are [channel_blocks]
  // [filters / 4][15 sets of filters], and starts are [channel_blocks][filters / 4][2]: first channel, first record.
  int32_t entries;                 // of a kernel
  const float* transforms;         // [patterns][entries][36]; null: a pass of sweeps
  const uint8_t* patterns;         // [records]
};

// What follows a convolution: y = relu(sums + bias + residual), each part of it optional.
struct Epilogue {
  const float* bias;
  const float* residual;
  int32_t relu;
};

// What one call of a specialised accumulator needs (accumulators.py): a channel and a few filters, and a chunk of
// rows of some blocks. Strides are in floats.
struct Accumulation {
  const float* x;            // of the channel, so many pixels before it as there is padding
  int64_t x_block, x_row;
  const float* const* dy;    // [filters] of the first block
  int64_t dy_block, dy_row;
  int32_t blocks, row, rows; // rows of the output
  const int32_t* row_ends;     // [classes of rows]
  const int64_t* column_ends;  // [classes of columns] in floats
  const float* sums_in;      // [filters][entries][8]; null = zero
  float* sums_out;
};

typedef void (*AccumulateFunction)(const Accumulation*);

// The gradient of the values: dvalues[kernel][entry] = sum over images and pixels of x * dy.
struct Gradient {
  int32_t blocks;
  int32_t channels, in_h, in_w;    // x [blocks][channels][in_h][in_w][8]
  int32_t filters, out_h, out_w;   // dy [blocks][filters][out_h][out_w][8]
  int32_t stride_h, stride_w, pad_h, pad_w;
  int32_t kernel_size, entries;
  int32_t chunk_blocks, chunk_rows;  // blocks and output rows that are summed up at once
  int32_t tasks;                   // groups of channels
  const int32_t* task_starts;      // [tasks + 1] first run
  const int32_t* run_starts;       // [runs + 1] first kernel; a run has one channel and one pattern
  const int32_t* run_channels;     // [runs]
  const int32_t* run_patterns;     // [runs]
  const int32_t* kernel_filters;   // [kernels]
  const int32_t* kernel_ids;       // [kernels] canonical number
  const int32_t* positions;        // [patterns][entries] row * kernel_size + column
  const AccumulateFunction* accumulators;  // [patterns][most_filters], or null: the generic ones
  const int32_t* row_ends;         // see Accumulation
  const int64_t* column_ends;
  int32_t most_filters;            // at once
};

// How NCHW images become lanes: lane = image, or lane = strip of one image in a grid of eight strips.
struct Lanes {
  int32_t images, channels;
  int32_t image_h, image_w;        // of the NCHW tensor
  int32_t blocks, lane_h, lane_w;  // of the blocked one
  int32_t grid_h, grid_w;          // strips per image; 1 x 1: a lane is a whole image
  int32_t start_h, start_w;        // image pixel where the first strip starts (< 0: in the padding)
  int32_t step_h, step_w;          // image pixels from one strip to the next
};

// Steps of a network -------------------------------------------------------------------------------------------

// An activation whose lanes are strips of images (grid_h * grid_w = 8) or images (1 x 1).
struct Strips {
  int32_t blocks, channels, height, width;  // [blocks][channels][height][width][8]
  int32_t grid_h, grid_w;
  int32_t image_h, image_w;                 // what lies outside is zero
  int32_t images;
};

struct Pooling {
  Strips x;
  int32_t out_h, out_w;  // of a strip
  int32_t size_h, size_w, stride_h, stride_w, pad_h, pad_w;
  int32_t average;       // over the whole window, padding included; else the maximum, padding left out
};

// Plain [planes][in_h][in_w] -> [planes][out_h][out_w], as torch.nn.AdaptiveAvgPool2d.
struct AdaptivePooling {
  int32_t planes, in_h, in_w, out_h, out_w;
};

// Plain [images][inputs] -> [images][outputs]; weights [ceil(outputs / 16)][inputs][16], padded with zeros.
struct Linear {
  int32_t images, inputs, outputs;
};

// One step of a network. Operands lie in buffers: so many floats from the start of buffers[i].
struct Step {
  int32_t kind;       // kernels/cpu/program.py numbers the kinds
  int32_t relu;
  int32_t x_buffer, residual_buffer, y_buffer;  // residual_buffer < 0: there is none
  int32_t unused;
  int64_t x, residual, y;
  int64_t floats;     // of an element-wise step
  const void* geometry;
  const float* weights;
  const float* bias;
};

}
