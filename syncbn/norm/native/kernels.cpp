// One pass, or both passes of a group of one: shapes an input as planes or columns, prepares coefficients, shares the
// work among threads, and merges what they reduced.
//
// How the work is cut depends on the shape alone, never on the number of threads, and parts are merged in order:
// results have the same bits with any number of threads.
#include "kernels_call.h"

namespace syncbn {
namespace {

template <class A> struct Affine { const A *mean, *invstd, *weight, *bias; };

// Coefficients by channel, laid out by column of `plan`, filled in window by window.
template <class A> class Coefficients {
 public:
  Coefficients(const Plan& plan, const Affine<A>& affine, bool backward)
      : plan_(plan), affine_(affine), width_(plan.width()), values_(new A[(backward ? 5 : 3) * width_]), backward_(backward) {}
  void fill(Window window) {
    plan_.each(window, [&](int64_t j, int64_t c) {
      at(MEAN)[j] = affine_.mean[c];
      at(SCALE)[j] = affine_.weight ? affine_.invstd[c] * affine_.weight[c] : affine_.invstd[c];
      at(BIAS)[j] = affine_.bias ? affine_.bias[c] : A(0);
    });
  }
  void fill_backward(Window window, const A* sums, double total) {
    const A values = A(total > 1 ? total : 1);
    plan_.each(window, [&](int64_t j, int64_t c) {
      at(SLOPE)[j] = -affine_.invstd[c] * (sums[plan_.channels + c] / values);
      at(OFFSET)[j] = sums[c] / values;
    });
  }
  void give_to(Job& job) const {
    job.mean = at(MEAN);
    job.scale = at(SCALE);
    job.bias = at(BIAS);
    // passes that have no use for these load them nowhere, but their addresses must be good
    job.slope = at(backward_ ? SLOPE : MEAN);
    job.offset = at(backward_ ? OFFSET : MEAN);
  }

 private:
  enum Which { MEAN, SCALE, BIAS, SLOPE, OFFSET };
  A* at(Which which) const { return values_.get() + which * width_; }
  const Plan& plan_;
  const Affine<A> affine_;
  int64_t width_;
  std::unique_ptr<A[]> values_;
  bool backward_;
};

// The moments of a window's channels, packed; all channels where columns are not channels.
template <class A> void pack(const Plan& plan, const Reduced& reduced, Window window, A* packed) {
  const int64_t count = plan.samples * plan.size, begin = plan.channel(window.begin), C = plan.channel(window.end) - begin;
  packed[0] = A(count % LOW_BITS);
  packed[1] = A(count / LOW_BITS);
  std::vector<double> mean(C), M2(C);
  for (const Share& share : reduced.shares) {
    const double weight = share.count / double(count);
    plan.each({window.begin, window.begin + share.width},
              [&](int64_t j, int64_t c) { mean[c - begin] += weight * share.first[j - window.begin]; });
  }
  for (const Share& share : reduced.shares)
    plan.each({window.begin, window.begin + share.width}, [&](int64_t j, int64_t c) {
      const double delta = share.first[j - window.begin] - mean[c - begin];
      M2[c - begin] += share.second[j - window.begin] + share.count * delta * delta;
    });
  for (int64_t c = 0; c < C; ++c) packed[2 + c] = A(mean[c]);
  for (int64_t c = 0; c < C; ++c) packed[2 + C + c] = A(M2[c]);
}

template <class A> void add_up(const Plan& plan, const Reduced& reduced, Window window, const A* invstd, A* sums) {
  const int64_t begin = plan.channel(window.begin), C = plan.channel(window.end) - begin;
  std::vector<double> first(C), second(C);
  for (const Share& share : reduced.shares)
    plan.each({window.begin, window.begin + share.width}, [&](int64_t j, int64_t c) {
      first[c - begin] += share.first[j - window.begin];
      second[c - begin] += share.second[j - window.begin];
    });
  for (int64_t c = 0; c < C; ++c) sums[begin + c] = A(first[c]);
  for (int64_t c = 0; c < C; ++c) sums[plan.channels + begin + c] = A(second[c] * invstd[begin + c]);
}

template <class A> Affine<A> typed(const Call& call) {
  return {(const A*)call.mean, (const A*)call.invstd, (const A*)call.weight, (const A*)call.bias};
}

Job job_of(const Call& call) {
  Job job = {};
  job.kind = Kind(call.kind);
  job.dtype = Dtype(call.dtype);
  job.act = Act(call.act);
  job.extra_is = Extra(call.extra_is);
  job.x = call.x;
  job.dy = call.dy;
  job.extra = call.extra;
  return job;
}

Shape shape_of(const Call& call) { return {call.samples, call.channels, call.size, int(call.threads)}; }

double total_of(const Call& call) { return call.total ? *(const double*)call.total : 1; }

}  // namespace

template <class A> void run(const Call& call, const void* sums, void* result) {
  Job job = job_of(call);
  const Shape shape = shape_of(call);
  const Plan plan(job, shape);
  const Window all = {0, plan.width()};
  if (job.kind == MOMENTS) return pack(plan, reduce(job, plan, shape.threads, all), all, (A*)result);
  Coefficients<A> coefficients(plan, typed<A>(call), sums);
  coefficients.fill(all);
  if (sums) coefficients.fill_backward(all, (const A*)sums, total_of(call));
  coefficients.give_to(job);
  if (job.kind == BACKWARD_SUMS)
    return add_up(plan, reduce(job, plan, shape.threads, all), all, (const A*)call.invstd, (A*)result);
  job.out = result;
  map(job, plan, shape.threads, all);
}

template <class A> void forward_alone(const Call& call, double eps, const Merged& merged) {
  Job job = job_of(call);
  const Shape shape = shape_of(call);
  const Plan plan(job, shape);
  Coefficients<A> coefficients(plan, typed<A>(call), false);
  coefficients.give_to(job);
  job.out = call.result;
  each_window(plan, job.extra ? 2 : 1, shape.threads, [&](Window window, int threads) {
    const int64_t begin = plan.channel(window.begin), C = plan.channel(window.end) - begin;
    const std::unique_ptr<A[]> packed(new A[2 + 2 * C]);
    Job moments = job;
    moments.kind = MOMENTS;
    moments.out = nullptr;
    pack(plan, reduce(moments, plan, threads, window), window, packed.get());
    double total;  // the same in every window
    const Merged part = {&total, (A*)merged.mean + begin, (A*)merged.var + begin, (A*)merged.invstd + begin};
    merge(packed.get(), 0, 1, C, eps, part);
    coefficients.fill(window);
    map(job, plan, threads, window);
  });
  *merged.total = double(plan.samples * plan.size);
}

template <class A> void backward_alone(const Call& call, void* sums) {
  Job job = job_of(call);
  const Shape shape = shape_of(call);
  const Plan plan(job, shape);
  Coefficients<A> coefficients(plan, typed<A>(call), true);
  coefficients.give_to(job);
  job.out = call.result;
  each_window(plan, job.extra ? 3 : 2, shape.threads, [&](Window window, int threads) {
    coefficients.fill(window);
    Job reduction = job;
    reduction.kind = BACKWARD_SUMS;
    reduction.out = nullptr;
    add_up(plan, reduce(reduction, plan, threads, window), window, (const A*)call.invstd, (A*)sums);
    coefficients.fill_backward(window, (const A*)sums, total_of(call));
    map(job, plan, threads, window);
  });
}

template void run<float>(const Call&, const void*, void*);
template void run<double>(const Call&, const void*, void*);
template void forward_alone<float>(const Call&, double, const Merged&);
template void forward_alone<double>(const Call&, double, const Merged&);
template void backward_alone<float>(const Call&, void*);
template void backward_alone<double>(const Call&, void*);

}  // namespace syncbn

SYNCBN_API void syncbn_pass(const syncbn::Call* call) {
  const auto run = call->dtype == syncbn::FLOAT64 ? syncbn::run<double> : syncbn::run<float>;
  run(*call, call->sums, call->result);
}
