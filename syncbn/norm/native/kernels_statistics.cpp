// The small steps between the passes, which as tensor operations would cost as much as the passes of a small layer:
// merging the ranks' moments, and moving the running statistics.
#include <math.h>
#include <stdint.h>

#include "kernels_call.h"

namespace syncbn {

template <class A> void merge(const A* packed, int64_t stride, int64_t ranks, int64_t C, double eps, const Merged& out) {
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

template void merge(const float*, int64_t, int64_t, int64_t, double, const Merged&);
template void merge(const double*, int64_t, int64_t, int64_t, double, const Merged&);

namespace {

template <class Old, class New> void move_each(void* old, const New* fresh, int64_t C, double weight, double scale) {
  Old* const values = (Old*)old;
  for (int64_t c = 0; c < C; ++c) values[c] = Old(double(values[c]) * (1 - weight) + double(fresh[c]) * scale * weight);
}

}  // namespace

template <class A> void move(const Moving& running, const A* mean, const A* var, double total, int64_t C) {
  if (!(total > 0)) return;
  if (running.tracked) ++*running.tracked;
  const double weight = running.momentum < 0 ? 1 / double(*running.tracked) : running.momentum;
  const double unbiased = total > 2 ? total / (total - 1) : total;
  const auto each = running.is_double ? move_each<double, A> : move_each<float, A>;
  each(running.mean, mean, C, weight, 1);
  each(running.var, var, C, weight, unbiased);
}

template void move(const Moving&, const float*, const float*, double, int64_t);
template void move(const Moving&, const double*, const double*, double, int64_t);

}  // namespace syncbn

SYNCBN_API void syncbn_merge(int is_double, const void* packed, int64_t ranks, int64_t channels, double eps, double* total,
                             void* mean, void* var, void* invstd) {
  const syncbn::Merged out = {total, mean, var, invstd};
  const int64_t stride = 2 + 2 * channels;
  if (is_double) syncbn::merge((const double*)packed, stride, ranks, channels, eps, out);
  else syncbn::merge((const float*)packed, stride, ranks, channels, eps, out);
}

SYNCBN_API void syncbn_update(int running_double, void* running_mean, void* running_var, int64_t* tracked, double momentum,
                              int is_double, const void* mean, const void* var, const double* count, int64_t channels) {
  const syncbn::Moving running = {running_mean, running_var, tracked, momentum, running_double};
  if (is_double) syncbn::move(running, (const double*)mean, (const double*)var, *count, channels);
  else syncbn::move(running, (const float*)mean, (const float*)var, *count, channels);
}
