// The small steps between the passes, which as tensor operations would cost as much as the passes of a small layer:
// merging the ranks' moments, and moving the running statistics.
#include <math.h>
#include <stdint.h>

#include "common.h"
#include "kernels_plan.h"

namespace syncbn {

template <class A> void merge(const A* packed, int64_t ranks, int64_t C, double eps, const Merged& out) {
  const int64_t stride = 2 + 2 * C;
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

template void merge(const float*, int64_t, int64_t, double, const Merged&);
template void merge(const double*, int64_t, int64_t, double, const Merged&);

}  // namespace syncbn

namespace {

template <class Old, class New> void move(Old* old, const New* fresh, int64_t C, double weight, double scale) {
  for (int64_t c = 0; c < C; ++c) old[c] = Old(double(old[c]) * (1 - weight) + double(fresh[c]) * scale * weight);
}

}  // namespace

SYNCBN_API void syncbn_merge(int is_double, const void* packed, int64_t ranks, int64_t channels, double eps, double* total,
                             void* mean, void* var, void* invstd) {
  const syncbn::Merged out = {total, mean, var, invstd};
  if (is_double) syncbn::merge((const double*)packed, ranks, channels, eps, out);
  else syncbn::merge((const float*)packed, ranks, channels, eps, out);
}

// Count the batch in `tracked` (may be null), and move running_mean and running_var towards mean and var; both pairs
// are float or double. A momentum below 0 stands for the average over all batches.
SYNCBN_API void syncbn_update(int running_double, void* running_mean, void* running_var, int64_t* tracked, double momentum,
                              int is_double, const void* mean, const void* var, const double* count, int64_t channels) {
  const double total = *count;
  if (!(total > 0)) return;
  if (tracked) ++*tracked;
  const double weight = momentum < 0 ? 1 / double(*tracked) : momentum;
  const double unbiased = total > 2 ? total / (total - 1) : total;
  const auto both = [&](auto* old_mean, auto* old_var, auto* new_mean, auto* new_var) {
    move(old_mean, new_mean, channels, weight, 1);
    move(old_var, new_var, channels, weight, unbiased);
  };
  if (running_double && is_double) both((double*)running_mean, (double*)running_var, (const double*)mean, (const double*)var);
  else if (running_double) both((double*)running_mean, (double*)running_var, (const float*)mean, (const float*)var);
  else if (is_double) both((float*)running_mean, (float*)running_var, (const double*)mean, (const double*)var);
  else both((float*)running_mean, (float*)running_var, (const float*)mean, (const float*)var);
}
