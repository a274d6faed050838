// What a pass is given, the passes over one rank's input, and the statistics between them.
#pragma once

#include "abi.h"
#include "kernels/kernels.h"

namespace syncbn {

// The arguments of one pass; syncbn/norm/backends/cpu.py declares the same. All tensors have the layout of x, and
// weight, bias and statistics have the statistics' dtype.
struct PassArgs {
  int64_t kind, dtype, samples, channels, size, threads, act, extra_is;
  const void *x, *dy, *extra, *mean, *invstd, *weight, *bias, *sums, *total;
  void* result;
};

// The statistics of a batch over all ranks; tensors of the statistics' dtype.
struct BatchStats {
  double* total;
  void *mean, *var, *invstd;
};

// Running statistics, both float or double; `tracked` may be null. A momentum below 0 selects the average over all
// batches.
struct RunningStats {
  void *mean, *var;
  int64_t* tracked;
  double momentum;
  int64_t is_double;
};

// One pass of `kind` over the whole input; `sums` are those of all ranks, for BACKWARD_INPUT.
template <class A> void run(Kind kind, const PassArgs& args, const void* sums, void* result);

// Both passes of a group of one rank, window by window: the second finds in the cache what the first has read. The args
// are those of NORMALIZE, whose mean and invstd are written first, or of BACKWARD_INPUT, without its sums.
template <class A> void forward_local(const PassArgs& args, double eps, const BatchStats& stats);
template <class A> void backward_local(const PassArgs& args, void* sums);

constexpr int64_t LOW_BITS = 1 << 20;  // of a packed count; see syncbn/norm/moments.py

// See `merge` in syncbn/norm/moments.py; the packed moments of each rank start `stride` values after the previous rank's.
template <class A> void merge(const A* packed, int64_t stride, int64_t ranks, int64_t C, double eps, const BatchStats& out);

// Count the batch, and move the running statistics towards `mean` and `var` of `total` values.
template <class A> void update(const RunningStats& running, const A* mean, const A* var, double total, int64_t C);

}  // namespace syncbn
