// What the conductor (kernels.cpp) and the kernels of each instruction set agree on.
//
// One shape of input serves all: rows of contiguous values. As *planes*, row r holds `size` values of channel
// r % channels. As *columns*, a row holds `size` values of which each has coefficients of its own, whatever its
// channel: so go channels-last inputs, and inputs whose channels are too short to fill a vector.
#pragma once

#include <stdint.h>

namespace syncbn {

enum Dtype : int { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, DTYPES };

enum Act : int { IDENTITY, RELU, RELU6, LEAKY_RELU, SILU, HARDSWISH };

// What the third tensor of a pass is: nothing, a term of z, or y, from which act'(z) follows.
enum Extra : int { NOTHING, RESIDUAL, OUTPUT };

enum Kind : int { MOMENTS, NORMALIZE, BACKWARD_SUMS, BACKWARD_INPUT, BACKWARD_RESIDUAL };

// Values a row of planes has at least, and a row of columns too: the most lanes of a vector.
constexpr int64_t MIN_SIZE = 16;
// Most values of a channel that are added in float32 before they go to float64.
constexpr int64_t BLOCK_VALUES = 4096;
constexpr int64_t BLOCK_ROWS = 256;
// Most columns of one task of a reduction: three vectors of state for each stay in the first cache.
constexpr int64_t CHUNK_COLUMNS = 1024;

struct Job {
  Kind kind;
  Dtype dtype;
  bool planes;
  int64_t channels, size;
  bool streamed;  // maps of columns go row by row, else four rows at a time
  bool past_cache;  // out is written past the caches; its rows are whole lines of 64 bytes
  Act act;
  Extra extra_is;
  const void *x, *dy, *extra;
  void* out;
  // Coefficients by channel (planes) or column, in the statistics' dtype.
  const void *mean, *scale, *bias, *slope, *offset;
};

// A range of samples (planes, reductions) or rows, and of channels or columns; maps of planes take whole rows.
struct Part {
  int64_t row_begin, row_end, column_begin, column_end;
};

// Reductions write two sums a channel or column: mean and M2 for moments. Maps write job.out.
using Kernel = void (*)(const Job&, const Part&, double* first, double* second);

// Each instruction set's kernel for a job.
Kernel kernel_base(const Job&);
Kernel kernel_v3(const Job&);
Kernel kernel_v4(const Job&);

// Channels of planes that a reduction takes together, so that what it reads at a stretch is 32 KB of float32 or so: from
// memory, 8 KB took 1.4 times as long (8x128x28x28).
constexpr int64_t MAX_TILE = 32;
inline int64_t tile_channels(int64_t size) {
  const int64_t fitting = 8192 / size;
  return fitting < 1 ? 1 : fitting > MAX_TILE ? MAX_TILE : fitting;
}

}  // namespace syncbn
