// The kernels' C interface: shapes an input as planes or columns, prepares coefficients, shares the work among
// threads, and merges what they reduced.
//
// How the work is cut depends on the shape alone, never on the number of threads, and parts are merged in order:
// results have the same bits with any number of threads.
#include "kernels_plan.h"

namespace syncbn {
namespace {

template <class A> struct Affine { const A *mean, *invstd, *weight, *bias; };

// Coefficients by channel, laid out by column of `plan`.
template <class A> class Coefficients {
 public:
  Coefficients(const Plan& plan, const Affine<A>& affine, const A* sums, double total)
      : width_(plan.width()), values_(new A[(sums ? 5 : 3) * width_]), backward_(sums) {
    plan.each(width_, [&](int64_t j, int64_t c) {
      at(MEAN)[j] = affine.mean[c];
      at(SCALE)[j] = affine.weight ? affine.invstd[c] * affine.weight[c] : affine.invstd[c];
      at(BIAS)[j] = affine.bias ? affine.bias[c] : A(0);
    });
    if (!backward_) return;
    plan.each(width_, [&](int64_t j, int64_t c) {
      at(SLOPE)[j] = -affine.invstd[c] * (sums[plan.channels + c] / A(total));
      at(OFFSET)[j] = sums[c] / A(total);
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
  int64_t width_;
  std::unique_ptr<A[]> values_;
  bool backward_;
};

template <class A> void pack(const Plan& plan, const Reduced& reduced, A* packed) {
  const int64_t C = plan.channels, count = plan.samples * plan.size;
  packed[0] = A(count % LOW_BITS);
  packed[1] = A(count / LOW_BITS);
  std::vector<double> mean(C), M2(C);
  for (const Share& share : reduced.shares) {
    const double weight = share.count / double(count);
    plan.each(share.width, [&](int64_t j, int64_t c) { mean[c] += weight * share.first[j]; });
  }
  for (const Share& share : reduced.shares)
    plan.each(share.width, [&](int64_t j, int64_t c) {
      const double delta = share.first[j] - mean[c];
      M2[c] += share.second[j] + share.count * delta * delta;
    });
  for (int64_t c = 0; c < C; ++c) packed[2 + c] = A(mean[c]);
  for (int64_t c = 0; c < C; ++c) packed[2 + C + c] = A(M2[c]);
}

template <class A> void add_up(const Plan& plan, const Reduced& reduced, const A* invstd, A* sums) {
  const int64_t C = plan.channels;
  std::vector<double> first(C), second(C);
  for (const Share& share : reduced.shares)
    plan.each(share.width, [&](int64_t j, int64_t c) {
      first[c] += share.first[j];
      second[c] += share.second[j];
    });
  for (int64_t c = 0; c < C; ++c) sums[c] = A(first[c]);
  for (int64_t c = 0; c < C; ++c) sums[C + c] = A(second[c] * invstd[c]);
}

// The job with its coefficients, run over the whole input.
template <class A> void run(Job job, const Shape& shape, const void* const affine[4], const void* sums, double total,
                            void* result) {
  const Plan plan(job, shape);
  const Affine<A> given = {(const A*)affine[0], (const A*)affine[1], (const A*)affine[2], (const A*)affine[3]};
  if (job.kind == MOMENTS) return pack(plan, reduce(job, plan, shape.threads), (A*)result);
  Coefficients<A> coefficients(plan, given, (const A*)sums, total > 1 ? total : 1);
  coefficients.give_to(job);
  if (job.kind == BACKWARD_SUMS) return add_up(plan, reduce(job, plan, shape.threads), given.invstd, (A*)result);
  job.out = result;
  map(job, plan, shape.threads);
}

}  // namespace
}  // namespace syncbn

using syncbn::Job;

// What a pass is given; syncbn/norm/kernels/cpu.py declares the same. All tensors have the layout of x, and the
// affine's are of the statistics' dtype.
struct Call {
  int64_t kind, dtype, samples, channels, size, threads, act, extra_is;
  const void *x, *dy, *extra, *mean, *invstd, *weight, *bias, *sums, *total;
  void* result;
};

SYNCBN_API void syncbn_pass(const Call* call) {
  Job job = {};
  job.kind = syncbn::Kind(call->kind);
  job.dtype = syncbn::Dtype(call->dtype);
  job.act = syncbn::Act(call->act);
  job.extra_is = syncbn::Extra(call->extra_is);
  job.x = call->x;
  job.dy = call->dy;
  job.extra = call->extra;
  const syncbn::Shape shape = {call->samples, call->channels, call->size, int(call->threads)};
  const void* const affine[4] = {call->mean, call->invstd, call->weight, call->bias};
  const double total = call->total ? *(const double*)call->total : 1;
  const auto run = job.dtype == syncbn::FLOAT64 ? syncbn::run<double> : syncbn::run<float>;
  run(job, shape, affine, call->sums, total, call->result);
}
