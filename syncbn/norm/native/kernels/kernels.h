// The interface between kernels and the code that divides an input among them (blocking.cpp).
//
// Kernels see an input as rows of contiguous values. As *planes*, row r holds `size` values of channel r % channels. As
// *columns*, each of a row's `size` values has coefficients of its own: channels-last inputs, and inputs whose channels
// are too short to fill a vector.
#pragma once

#include <stdint.h>

// Whether this compiler builds code for newer x86-64 processors beside code for all of them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define SYNCBN_X86_LEVELS 1
#else
#define SYNCBN_X86_LEVELS 0
#endif

namespace syncbn {

enum Dtype : int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

enum Act : int64_t { IDENTITY, RELU, RELU6, LEAKY_RELU, SILU, HARDSWISH };

// The third tensor of a pass: none, a term of z, or y, from which act'(z) follows.
enum Extra : int64_t { NOTHING, RESIDUAL, OUTPUT };

enum Kind : int64_t { MOMENTS, NORMALIZE, BACKWARD_SUMS, BACKWARD_INPUT, BACKWARD_RESIDUAL };

// Least values of a row, of planes or columns: the most lanes of a vector.
constexpr int64_t MIN_SIZE = 16;
// Most values of a channel that are added in float32 before they go to float64.
constexpr int64_t BLOCK_VALUES = 4096;
constexpr int64_t BLOCK_ROWS = 256;
// Most columns of one task of a reduction: three vectors of state for each stay in the first-level cache.
constexpr int64_t CHUNK_COLUMNS = 1024;

struct KernelArgs {
  Kind kind;
  Dtype dtype;
  Act act;
  Extra extra_is;
  const void *x, *dy, *extra;
  void* out;
  // Coefficients by channel (planes) or column, in the statistics' dtype.
  const void *mean, *scale, *bias, *slope, *offset;
  bool planes;
  int64_t channels, size;
  bool streamed;  // element-wise passes over columns go row by row, else four rows at a time
  bool past_cache;  // out is written past the caches; its rows are whole lines of 64 bytes
};

// A range of samples (reductions of planes) or rows, and of channels or columns; element-wise passes over planes take
// whole rows.
struct Tile {
  int64_t row_begin, row_end, column_begin, column_end;
};

// Reductions write two sums for each channel or column: mean and M2 for moments. Element-wise passes write args.out.
using Kernel = void (*)(const KernelArgs&, const Tile&, double* first, double* second);

// The kernel for `args` on the best instruction set this processor has, and that of each instruction set.
Kernel kernel_for(const KernelArgs&);
Kernel kernel_base(const KernelArgs&);
Kernel kernel_avx2(const KernelArgs&);
Kernel kernel_avx512(const KernelArgs&);

// Channels of planes that a reduction takes together, about 32 KB of float32: from memory, 8 KB take 1.4 times as long
// (8x128x28x28).
constexpr int64_t MAX_TILE_CHANNELS = 32;
inline int64_t tile_channels(int64_t size) {
  const int64_t fitting = 8192 / size;
  return fitting < 1 ? 1 : fitting > MAX_TILE_CHANNELS ? MAX_TILE_CHANNELS : fitting;
}

}  // namespace syncbn
