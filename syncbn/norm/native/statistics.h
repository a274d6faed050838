// Merging the ranks' moments, and updating the running statistics. As tensor operations these small steps would cost as
// much as the passes of a small layer.
#pragma once

#include <math.h>
#include <stdint.h>

#include <vector>

namespace syncbn {

// The statistics of a batch over all ranks; tensors of the statistics' dtype A.
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

constexpr int64_t LOW_BITS = 1 << 20;  // of a packed count; see syncbn/norm/moments.py

// See `merge` in syncbn/norm/moments.py; the packed moments of each rank start `stride` values after the previous rank's.
template <class A>
void merge(const void* gathered, int64_t stride, int64_t ranks, int64_t C, double eps, const BatchStats& out) {
  const A* const packed = (const A*)gathered;
  const auto count = [&](int64_t rank) {
    return double(packed[rank * stride]) + double(packed[rank * stride + 1]) * LOW_BITS;
  };
  double total = 0;
  for (int64_t rank = 0; rank < ranks; ++rank) total += count(rank);
  *out.total = total;
  std::vector<double> mean(C), M2(C);
  for (int64_t rank = 0; rank < ranks; ++rank)
    for (int64_t c = 0; c < C; ++c) mean[c] += count(rank) / (total > 1 ? total : 1) * packed[rank * stride + 2 + c];
  for (int64_t rank = 0; rank < ranks; ++rank)
    for (int64_t c = 0; c < C; ++c) {
      const double delta = packed[rank * stride + 2 + c] - mean[c];
      M2[c] += packed[rank * stride + 2 + C + c] + count(rank) * delta * delta;
    }
  for (int64_t c = 0; c < C; ++c) {
    const double var = M2[c] / (total > 1 ? total : 1);
    ((A*)out.mean)[c] = A(mean[c]);
    ((A*)out.var)[c] = A(var);
    ((A*)out.invstd)[c] = A(1 / sqrt(var + eps));
  }
}

template <class Old, class New> void update_each(void* running, const void* batch, int64_t C, double weight, double scale) {
  Old* const values = (Old*)running;
  const New* const towards = (const New*)batch;
  for (int64_t c = 0; c < C; ++c) values[c] = Old(double(values[c]) * (1 - weight) + double(towards[c]) * scale * weight);
}

// Count the batch, and move the running statistics towards its own.
template <class A> void update(const RunningStats& running, const BatchStats& batch, int64_t C) {
  const double total = *batch.total;
  if (!(total > 0)) return;
  if (running.tracked) ++*running.tracked;
  const double weight = running.momentum < 0 ? 1 / double(*running.tracked) : running.momentum;
  const double unbiased = total > 2 ? total / (total - 1) : total;
  const auto each = running.is_double ? update_each<double, A> : update_each<float, A>;
  each(running.mean, batch.mean, C, weight, 1);
  each(running.var, batch.var, C, weight, unbiased);
}

}  // namespace syncbn
