// How an input is cut: as planes or as columns, into parts for threads, and what parts reduce to.
#pragma once

#include <stdint.h>
#include <string.h>

#include <memory>
#include <vector>

#include "common.h"
#include "kernels.h"

namespace syncbn {

constexpr int64_t LOW_BITS = 1 << 20;  // of a count; see syncbn/norm/moments.py

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

  // f(j, channel of j) for each j below `end`.
  template <class F> void each(int64_t end, const F& f) const {
    if (planes || (size == 1 && fold == 1)) {
      for (int64_t j = 0; j < end; ++j) f(j, j);
      return;
    }
    for (int64_t j = 0, c = 0; j < end; c = c + 1 < channels ? c + 1 : 0)
      for (int64_t s = 0; s < size && j < end; ++s, ++j) f(j, c);
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

// Sums over the input, a share for each range of rows in order, the left-over row's last.
Reduced reduce(Job job, const Plan& plan, int threads);

// Write job.out for the whole input.
void map(Job job, const Plan& plan, int threads);

// The kernel for a job on the best instruction set this processor has.
Kernel kernel_for(const Job& job);

}  // namespace syncbn
