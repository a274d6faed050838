// The passes over one rank's input: prepares coefficients, runs the kernels, and merges the parts of a reduction.
#pragma once

#include "kernels/blocking.h"
#include "statistics.h"

namespace syncbn {

// The arguments of one pass; syncbn/norm/backends/cpu.py declares the same. All tensors have the layout of x, and
// weight, bias and statistics have the statistics' dtype.
struct PassArgs {
  Kind kind;
  Dtype dtype;
  int64_t samples, channels, size, threads;
  Act act;
  Extra extra_is;
  const void *x, *dy, *extra;
  void *mean, *invstd;  // a whole forward pass writes them, and total
  const void *weight, *bias;
  double* total;
  void* result;
};

// Passes over one input, whole or window by window.
template <class A> class Pass {
 public:
  explicit Pass(const PassArgs& args)
      : plan(args.dtype, args.samples, args.channels, args.size), args_(args), width_(plan.width()),
        values_(new A[5 * width_]) {}
  const Plan plan;

  // Lay out the coefficients of each channel by column.
  void fill(Window window) const {
    const A *const mean = (const A*)args_.mean, *const invstd = (const A*)args_.invstd;
    const A *const weight = (const A*)args_.weight, *const bias = (const A*)args_.bias;
    plan.each(window, [&](int64_t j, int64_t c) {
      row(MEAN)[j] = mean[c];
      row(SCALE)[j] = weight ? invstd[c] * weight[c] : invstd[c];
      row(BIAS)[j] = bias ? bias[c] : A(0);
    });
  }
  void fill_backward(Window window, const A* sums) const {
    const double total = args_.total ? *args_.total : 1;
    const A values = A(total > 1 ? total : 1);
    const A* const invstd = (const A*)args_.invstd;
    plan.each(window, [&](int64_t j, int64_t c) {
      row(SLOPE)[j] = -invstd[c] * (sums[plan.channels + c] / values);
      row(OFFSET)[j] = sums[c] / values;
    });
  }

  // The packed moments of a window's channels; of all channels where columns are not channels.
  void moments(Window window, int64_t threads, A* packed) const {
    const Partials partials = reduce(kernel_args(MOMENTS), plan, threads, window);
    const int64_t count = plan.samples * plan.size, begin = plan.channel(window.begin);
    const int64_t C = plan.channel(window.end) - begin;
    std::vector<double> mean(C), M2(C);
    for (const Partial& part : partials.parts) {
      const double weight = part.count / double(count);
      plan.each({window.begin, window.begin + part.width},
                [&](int64_t j, int64_t c) { mean[c - begin] += weight * part.first[j - window.begin]; });
    }
    for (const Partial& part : partials.parts)
      plan.each({window.begin, window.begin + part.width}, [&](int64_t j, int64_t c) {
        const double delta = part.first[j - window.begin] - mean[c - begin];
        M2[c - begin] += part.second[j - window.begin] + part.count * delta * delta;
      });
    packed[0] = A(count % LOW_BITS);
    packed[1] = A(count / LOW_BITS);
    for (int64_t c = 0; c < C; ++c) packed[2 + c] = A(mean[c]);
    for (int64_t c = 0; c < C; ++c) packed[2 + C + c] = A(M2[c]);
  }
  // The sums of dz and of dz * xhat, at the window's channels of `sums`.
  void backward_sums(Window window, int64_t threads, A* sums) const {
    const Partials partials = reduce(kernel_args(BACKWARD_SUMS), plan, threads, window);
    const int64_t begin = plan.channel(window.begin), C = plan.channel(window.end) - begin;
    std::vector<double> first(C), second(C);
    for (const Partial& part : partials.parts)
      plan.each({window.begin, window.begin + part.width}, [&](int64_t j, int64_t c) {
        first[c - begin] += part.first[j - window.begin];
        second[c - begin] += part.second[j - window.begin];
      });
    const A* const invstd = (const A*)args_.invstd;
    for (int64_t c = 0; c < C; ++c) sums[begin + c] = A(first[c]);
    for (int64_t c = 0; c < C; ++c) sums[plan.channels + begin + c] = A(second[c] * invstd[begin + c]);
  }
  // The result of an element-wise pass.
  void write(Kind kind, Window window, int64_t threads) const {
    map(kernel_args(kind, args_.result), plan, threads, window);
  }

 private:
  enum Row { MEAN, SCALE, BIAS, SLOPE, OFFSET };
  A* row(Row which) const { return values_.get() + which * width_; }
  KernelArgs kernel_args(Kind kind, void* out = nullptr) const {
    return {kind, args_.dtype, args_.act, args_.extra_is, args_.x, args_.dy, args_.extra, out,
            row(MEAN), row(SCALE), row(BIAS), row(SLOPE), row(OFFSET)};
  }
  const PassArgs& args_;
  const int64_t width_;
  const std::unique_ptr<A[]> values_;
};

}  // namespace syncbn
