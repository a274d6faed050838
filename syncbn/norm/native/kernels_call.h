// What a pass is given, and the passes that are put together from kernels.
#pragma once

#include "kernels_plan.h"

namespace syncbn {

// syncbn/norm/backends/native_call.py declares the same. All tensors have the layout of x, and the affine's are of the
// statistics' dtype.
struct Call {
  int64_t kind, dtype, samples, channels, size, threads, act, extra_is;
  const void *x, *dy, *extra, *mean, *invstd, *weight, *bias, *sums, *total;
  void* result;
};

// One pass over the whole input; `sums` are those of all ranks where it is BACKWARD_INPUT.
template <class A> void run(const Call& call, const void* sums, void* result);

// Both passes of a group of one, window by window: what the first has read is still at hand for the second. The call is
// that of NORMALIZE, whose mean and invstd are written first, or of BACKWARD_INPUT, without its sums.
template <class A> void forward_alone(const Call& call, double eps, const Merged& merged);
template <class A> void backward_alone(const Call& call, void* sums);

// Running statistics, both float or double; `tracked` may be null. A momentum below 0 stands for the average over
// all batches.
struct Moving {
  void *mean, *var;
  int64_t* tracked;
  double momentum;
  int64_t is_double;
};

// Count the batch, and move the running statistics towards `mean` and `var` of `total` values.
template <class A> void move(const Moving& running, const A* mean, const A* var, double total, int64_t C);

}  // namespace syncbn
