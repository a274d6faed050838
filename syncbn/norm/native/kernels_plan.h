// How an input is cut: as planes or as columns, into parts for threads, and what parts reduce to.
#pragma once

#include <stdint.h>
#include <string.h>

#include <functional>
#include <memory>
#include <vector>

#include "common.h"
#include "kernels.h"

namespace syncbn {

constexpr int64_t LOW_BITS = 1 << 20;  // of a count; see syncbn/norm/moments.py

// A range of channels or columns.
struct Window {
  int64_t begin, end;
};

struct Shape {
  int64_t samples, channels, size;  // (N, C, S); S = 1 for channels-last, whose positions count as samples
  int threads;
};

// Planes, where a channel's `size` values fill a vector. Else columns: `fold` samples to a row, so that one row fills
// vectors, and the samples left over as one shorter row.
struct Plan {
  int64_t samples, channels, size, fold;
  bool planes;
  int64_t item;  // bytes of a value of x

  Plan(const Job& job, const Shape& shape);
  // Channels, or columns of a whole row.
  int64_t width() const { return planes ? channels : fold * channels * size; }
  int64_t rows() const { return planes ? samples : samples / fold; }
  int64_t left_over() const { return planes ? 0 : samples % fold * channels * size; }

  // Whether a column is a channel, and so one channel's coefficients stand in one place.
  bool direct() const { return planes || (size == 1 && fold == 1); }
  // The channel at a window's bound.
  int64_t channel(int64_t bound) const { return direct() || bound == 0 ? bound : channels; }
  // f(j, channel of j) for each j of `window`, which is a whole row's beginning where columns are not channels.
  template <class F> void each(Window window, const F& f) const {
    if (direct()) {
      for (int64_t j = window.begin; j < window.end; ++j) f(j, j);
      return;
    }
    for (int64_t j = 0, c = 0; j < window.end; c = c + 1 < channels ? c + 1 : 0)
      for (int64_t s = 0; s < size && j < window.end; ++s, ++j) f(j, c);
  }
};

// Two sums, or mean and M2, of `count` values for each of `width` columns or channels.
struct Share {
  double count;
  int64_t width;
  const double *first, *second;
};

struct Reduced {
  std::vector<Share> shares;
  std::unique_ptr<double[]> storage;
};

// What moments come down to; tensors of the statistics' dtype.
struct Merged {
  double* total;
  void *mean, *var, *invstd;
};

// See `merge` in syncbn/norm/moments.py; each rank's packed moments stand `stride` values after the last one's.
template <class A> void merge(const A* packed, int64_t stride, int64_t ranks, int64_t C, double eps, const Merged& out);

// Sums over the input's `window`, a share for each range of rows in order, the left-over row's last. Its bits do not
// depend on the window; one of planes begins and ends between tiles.
Reduced reduce(Job job, const Plan& plan, int threads, Window window);

// Write job.out for the input's `window`.
void map(Job job, const Plan& plan, int threads, Window window);

// Windows whose values stay in a core's own cache from one pass to the next: `tensors` are read in both.
class Windows {
 public:
  Windows(const Plan& plan, int tensors);
  Window operator[](int64_t i) const { return {width_ * i / count * unit_, i + 1 < count ? width_ * (i + 1) / count * unit_ : end_}; }
  int64_t count;

 private:
  int64_t unit_, width_, end_;
};

// f(window, threads it may use) for each window.
void each_window(const Plan& plan, int tensors, int threads, const std::function<void(Window, int)>& f);

// The kernel for a job on the best instruction set this processor has.
Kernel kernel_for(const Job& job);

}  // namespace syncbn
