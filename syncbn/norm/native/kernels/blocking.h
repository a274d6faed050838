// How an input is divided: as planes or as columns, into tiles for threads and windows for caches.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "kernels.h"

namespace syncbn {

// A range of channels or columns.
struct Window {
  int64_t begin, end;
};

// Planes, where a channel's `size` values fill a vector. Else columns: `fold` samples to a row, so that one row fills
// vectors, and the remaining samples as one shorter row.
struct Plan {
  int64_t samples, channels, size;  // (N, C, S); S = 1 for channels-last, whose positions count as samples
  int64_t item;  // bytes of a value of x
  bool planes;
  int64_t fold;

  Plan(Dtype dtype, int64_t samples, int64_t channels, int64_t size);
  // Channels, or columns of a whole row.
  int64_t width() const { return planes ? channels : fold * channels * size; }
  int64_t rows() const { return planes ? samples : samples / fold; }
  int64_t remainder() const { return planes ? 0 : samples % fold * channels * size; }
  int64_t values() const { return samples * channels * size; }

  // Whether a column is a channel, so that a channel has one index.
  bool direct() const { return planes || (size == 1 && fold == 1); }
  // The channel at a window's bound.
  int64_t channel(int64_t bound) const { return direct() || bound == 0 ? bound : channels; }
  // f(j, channel of j) for each j of `window`, which starts a row where columns are not channels.
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
struct Partial {
  double count;
  int64_t width;
  double *first, *second;
};

struct Partials {
  std::vector<Partial> parts;
  std::unique_ptr<double[]> storage;
};

// Sums over the input's `window`: one part for each range of rows in order, the remainder's last. Their bits do not depend
// on the window; a window of planes begins and ends between tiles.
Partials reduce(KernelArgs args, const Plan& plan, int64_t threads, Window window);

// Write args.out for the input's `window`.
void map(KernelArgs args, const Plan& plan, int64_t threads, Window window);

// f(window, threads it may use) for windows whose values stay in a core's own cache from one pass to the next; both
// passes read `tensors` tensors.
void each_window(const Plan& plan, int tensors, int64_t threads, const std::function<void(Window, int64_t)>& f);

}  // namespace syncbn
