// Merging the ranks' moments, and updating the running statistics. As tensor operations these small steps would cost as
// much as the passes of a small layer.
#include <math.h>

#include <vector>

#include "passes.h"

namespace syncbn {

template <class A> void merge(const A* packed, int64_t stride, int64_t ranks, int64_t C, double eps, const BatchStats& out) {
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

namespace {

template <class Old, class New> void update_each(void* running, const New* batch, int64_t C, double weight, double scale) {
  Old* const values = (Old*)running;
  for (int64_t c = 0; c < C; ++c) values[c] = Old(double(values[c]) * (1 - weight) + double(batch[c]) * scale * weight);
}

}  // namespace

template <class A> void update(const RunningStats& running, const A* mean, const A* var, double total, int64_t C) {
  if (!(total > 0)) return;
  if (running.tracked) ++*running.tracked;
  const double weight = running.momentum < 0 ? 1 / double(*running.tracked) : running.momentum;
  const double unbiased = total > 2 ? total / (total - 1) : total;
  const auto each = running.is_double ? update_each<double, A> : update_each<float, A>;
  each(running.mean, mean, C, weight, 1);
  each(running.var, var, C, weight, unbiased);
}

template void merge(const float*, int64_t, int64_t, int64_t, double, const BatchStats&);
template void merge(const double*, int64_t, int64_t, int64_t, double, const BatchStats&);
template void update(const RunningStats&, const float*, const float*, double, int64_t);
template void update(const RunningStats&, const double*, const double*, double, int64_t);

}  // namespace syncbn

SYNCBN_API void syncbn_merge_moments(int is_double, const void* packed, int64_t ranks, int64_t channels, double eps, double* total,
                             void* mean, void* var, void* invstd) {
  const syncbn::BatchStats out = {total, mean, var, invstd};
  const int64_t stride = 2 + 2 * channels;
  if (is_double) syncbn::merge((const double*)packed, stride, ranks, channels, eps, out);
  else syncbn::merge((const float*)packed, stride, ranks, channels, eps, out);
}

SYNCBN_API void syncbn_update_running_stats(int running_double, void* running_mean, void* running_var, int64_t* tracked, double momentum,
                              int is_double, const void* mean, const void* var, const double* count, int64_t channels) {
  const syncbn::RunningStats running = {running_mean, running_var, tracked, momentum, running_double};
  if (is_double) syncbn::update(running, (const double*)mean, (const double*)var, *count, channels);
  else syncbn::update(running, (const float*)mean, (const float*)var, *count, channels);
}
