// One pass, or both passes of a group of one rank: prepares coefficients, runs the kernels, and merges the parts of a
// reduction.
#include "passes.h"

#include "kernels/blocking.h"

namespace syncbn {
namespace {

// A pass over one input, whole or window by window.
template <class A> class Pass {
 public:
  Pass(Kind kind, const PassArgs& args)
      : args_(args), plan_(Dtype(args.dtype), args.samples, args.channels, args.size), width_(plan_.width()), kernel_args_() {
    const int rows = kind == MOMENTS ? 0 : kind == BACKWARD_INPUT ? 5 : 3;
    values_.reset(new A[rows * width_]);
    kernel_args_.kind = kind;
    kernel_args_.dtype = Dtype(args.dtype);
    kernel_args_.act = Act(args.act);
    kernel_args_.extra_is = Extra(args.extra_is);
    kernel_args_.x = args.x;
    kernel_args_.dy = args.dy;
    kernel_args_.extra = args.extra;
    kernel_args_.mean = row(MEAN);
    kernel_args_.scale = row(SCALE);
    kernel_args_.bias = row(BIAS);
    // other passes do not use slope and offset, but load from their addresses
    kernel_args_.slope = row(kind == BACKWARD_INPUT ? SLOPE : MEAN);
    kernel_args_.offset = row(kind == BACKWARD_INPUT ? OFFSET : MEAN);
  }
  const Plan& plan() const { return plan_; }

  // Lay out the coefficients of each channel by column.
  void fill(Window window) const {
    const A *const mean = (const A*)args_.mean, *const invstd = (const A*)args_.invstd;
    const A *const weight = (const A*)args_.weight, *const bias = (const A*)args_.bias;
    plan_.each(window, [&](int64_t j, int64_t c) {
      row(MEAN)[j] = mean[c];
      row(SCALE)[j] = weight ? invstd[c] * weight[c] : invstd[c];
      row(BIAS)[j] = bias ? bias[c] : A(0);
    });
  }
  void fill_backward(Window window, const A* sums) const {
    const double total = args_.total ? *(const double*)args_.total : 1;
    const A values = A(total > 1 ? total : 1);
    const A* const invstd = (const A*)args_.invstd;
    plan_.each(window, [&](int64_t j, int64_t c) {
      row(SLOPE)[j] = -invstd[c] * (sums[plan_.channels + c] / values);
      row(OFFSET)[j] = sums[c] / values;
    });
  }

  // The packed moments of a window's channels; of all channels where columns are not channels.
  void moments(Window window, int threads, A* packed) const {
    const Partials partials = reduced(MOMENTS, window, threads);
    const int64_t count = plan_.samples * plan_.size, begin = plan_.channel(window.begin);
    const int64_t C = plan_.channel(window.end) - begin;
    std::vector<double> mean(C), M2(C);
    for (const Partial& part : partials.parts) {
      const double weight = part.count / double(count);
      plan_.each({window.begin, window.begin + part.width},
                 [&](int64_t j, int64_t c) { mean[c - begin] += weight * part.first[j - window.begin]; });
    }
    for (const Partial& part : partials.parts)
      plan_.each({window.begin, window.begin + part.width}, [&](int64_t j, int64_t c) {
        const double delta = part.first[j - window.begin] - mean[c - begin];
        M2[c - begin] += part.second[j - window.begin] + part.count * delta * delta;
      });
    packed[0] = A(count % LOW_BITS);
    packed[1] = A(count / LOW_BITS);
    for (int64_t c = 0; c < C; ++c) packed[2 + c] = A(mean[c]);
    for (int64_t c = 0; c < C; ++c) packed[2 + C + c] = A(M2[c]);
  }
  // The sums of dz and of dz * xhat, at the window's channels of `sums`.
  void backward_sums(Window window, int threads, A* sums) const {
    const Partials partials = reduced(BACKWARD_SUMS, window, threads);
    const int64_t begin = plan_.channel(window.begin), C = plan_.channel(window.end) - begin;
    std::vector<double> first(C), second(C);
    for (const Partial& part : partials.parts)
      plan_.each({window.begin, window.begin + part.width}, [&](int64_t j, int64_t c) {
        first[c - begin] += part.first[j - window.begin];
        second[c - begin] += part.second[j - window.begin];
      });
    const A* const invstd = (const A*)args_.invstd;
    for (int64_t c = 0; c < C; ++c) sums[begin + c] = A(first[c]);
    for (int64_t c = 0; c < C; ++c) sums[plan_.channels + begin + c] = A(second[c] * invstd[begin + c]);
  }
  // Write the result of an element-wise pass.
  void write(Window window, int threads, void* result) const {
    KernelArgs args = kernel_args_;
    args.out = result;
    map(args, plan_, threads, window);
  }

 private:
  enum Row { MEAN, SCALE, BIAS, SLOPE, OFFSET };
  A* row(Row which) const { return values_.get() + which * width_; }
  Partials reduced(Kind kind, Window window, int threads) const {
    KernelArgs args = kernel_args_;
    args.kind = kind;
    return reduce(args, plan_, threads, window);
  }
  const PassArgs& args_;
  const Plan plan_;
  const int64_t width_;
  std::unique_ptr<A[]> values_;
  KernelArgs kernel_args_;
};

}  // namespace

template <class A> void run(Kind kind, const PassArgs& args, const void* sums, void* result) {
  const Pass<A> pass(kind, args);
  const Window all = {0, pass.plan().width()};
  const int threads = int(args.threads);
  if (kind == MOMENTS) return pass.moments(all, threads, (A*)result);
  pass.fill(all);
  if (kind == BACKWARD_SUMS) return pass.backward_sums(all, threads, (A*)result);
  if (kind == BACKWARD_INPUT) pass.fill_backward(all, (const A*)sums);
  pass.write(all, threads, result);
}

template <class A> void forward_local(const PassArgs& args, double eps, const BatchStats& stats) {
  const Pass<A> pass(NORMALIZE, args);
  const Plan& plan = pass.plan();
  each_window(plan, args.extra ? 2 : 1, int(args.threads), [&](Window window, int threads) {
    const int64_t begin = plan.channel(window.begin), C = plan.channel(window.end) - begin;
    const std::unique_ptr<A[]> packed(new A[2 + 2 * C]);
    pass.moments(window, threads, packed.get());
    double total;  // the same in every window
    merge(packed.get(), 0, 1, C, eps, {&total, (A*)stats.mean + begin, (A*)stats.var + begin, (A*)stats.invstd + begin});
    pass.fill(window);
    pass.write(window, threads, args.result);
  });
  *stats.total = double(plan.samples * plan.size);
}

template <class A> void backward_local(const PassArgs& args, void* sums) {
  const Pass<A> pass(BACKWARD_INPUT, args);
  each_window(pass.plan(), args.extra ? 3 : 2, int(args.threads), [&](Window window, int threads) {
    pass.fill(window);
    pass.backward_sums(window, threads, (A*)sums);
    pass.fill_backward(window, (const A*)sums);
    pass.write(window, threads, args.result);
  });
}

template void run<float>(Kind, const PassArgs&, const void*, void*);
template void run<double>(Kind, const PassArgs&, const void*, void*);
template void forward_local<float>(const PassArgs&, double, const BatchStats&);
template void forward_local<double>(const PassArgs&, double, const BatchStats&);
template void backward_local<float>(const PassArgs&, void*);
template void backward_local<double>(const PassArgs&, void*);

}  // namespace syncbn

SYNCBN_API void syncbn_pass(const syncbn::PassArgs* args) {
  const auto run = args->dtype == syncbn::FLOAT64 ? syncbn::run<double> : syncbn::run<float>;
  run(syncbn::Kind(args->kind), *args, args->sums, args->result);
}
