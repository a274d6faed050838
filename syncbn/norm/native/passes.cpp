// The entry points of passes: one pass, and a fused pass, that is forward or backward in one call, of a group of one rank,
// or of ranks that share memory, their exchange included. Called one by one from Python, the steps of a small layer cost
// more than its passes over memory.
#include "exchange.h"
#include "pass.h"

namespace syncbn {

// Results beside the statuses of an exchange: the statistics are unusable, or the caller has to exchange `own`.
enum FusedStatus { NOT_FINITE = 4, ONE_VALUE = 5, EXCHANGE_PENDING = 6 };

// syncbn/norm/backends/cpu.py declares the same.
struct FusedPassArgs {
  PassArgs pass;  // of NORMALIZE or BACKWARD_INPUT
  void* own;  // what this rank sends: packed moments, or sums; a group of one has no moments
  SharedMemory* memory;  // null for a group of one; without slots for ranks that share no memory
  int64_t sequence, limit_ns;
  double eps;
  void* var;
  RunningStats running;  // its mean is null where there is nothing to update
};

namespace {

// `function` for statistics of an input of `dtype`.
#define FOR_STATISTICS(dtype, function) ((dtype) == FLOAT64 ? function<double> : function<float>)

int64_t own_values(const FusedPassArgs& args) {
  return (args.pass.kind == NORMALIZE ? 2 : 0) + 2 * args.pass.channels;
}

BatchStats batch_stats(const FusedPassArgs& args) {
  return {args.pass.total, args.pass.mean, args.var, args.pass.invstd};
}

template <class A> void run(const PassArgs& args) {
  const Pass<A> pass(args);
  const Window all = {0, pass.plan.width()};
  if (args.kind == MOMENTS) return pass.moments(all, args.threads, (A*)args.result);
  pass.fill(all);
  if (args.kind == BACKWARD_SUMS) return pass.backward_sums(all, args.threads, (A*)args.result);
  pass.write(args.kind, all, args.threads);
}

// Check that the statistics are usable, and only then update the running statistics.
template <class A> int check_and_update(const FusedPassArgs& args) {
  if (args.memory)  // in a group of one, NaN passes through as in torch; otherwise it would reach every rank
    for (int64_t c = 0; c < args.pass.channels; ++c)
      if (!isfinite(((const A*)args.var)[c])) return NOT_FINITE;
  if (*args.pass.total == 1) return ONE_VALUE;
  if (args.running.mean) update<A>(args.running, batch_stats(args), args.pass.channels);
  return 0;
}

// Both passes of a group of one rank, window by window: the second finds in the cache what the first has read.
template <class A> int local(const FusedPassArgs& args) {
  const Pass<A> pass(args.pass);
  const Plan& plan = pass.plan;
  const bool forward = args.pass.kind == NORMALIZE;
  each_window(plan, (forward ? 1 : 2) + (args.pass.extra != nullptr), args.pass.threads, [&](Window window, int64_t threads) {
    if (!forward) {
      pass.fill(window);
      pass.backward_sums(window, threads, (A*)args.own);
      pass.fill_backward(window, (const A*)args.own);
      return pass.write(BACKWARD_INPUT, window, threads);
    }
    const int64_t begin = plan.channel(window.begin), C = plan.channel(window.end) - begin;
    const std::unique_ptr<A[]> packed(new A[2 + 2 * C]);
    pass.moments(window, threads, packed.get());
    double total;  // the same in every window
    const auto from_begin = [&](void* stats) { return (A*)stats + begin; };
    merge<A>(packed.get(), 0, 1, C, args.eps,
             {&total, from_begin(args.pass.mean), from_begin(args.var), from_begin(args.pass.invstd)});
    pass.fill(window);
    pass.write(NORMALIZE, window, threads);
  });
  if (!forward) return 0;
  *args.pass.total = double(plan.samples * plan.size);
  return check_and_update<A>(args);
}

// The rest of a pass after its exchange, from rows that are `stride` values apart: packed moments, or sums, which are added
// in the order of ranks.
template <class A> int finish(const FusedPassArgs& args, const void* gathered, int64_t rows, int64_t stride) {
  const A* row = (const A*)gathered;
  const Pass<A> pass(args.pass);
  const Window all = {0, pass.plan.width()};
  if (args.pass.kind == NORMALIZE) {
    merge<A>(row, stride, rows, args.pass.channels, args.eps, batch_stats(args));
    if (const int unusable = check_and_update<A>(args)) return unusable;
    pass.fill(all);
  } else {
    const int64_t count = own_values(args);
    std::vector<A> sums(row, row + count);
    for (int64_t added = 1; added < rows; ++added) {
      row += stride;
      for (int64_t i = 0; i < count; ++i) sums[i] += row[i];
    }
    pass.fill(all);
    pass.fill_backward(all, sums.data());
  }
  pass.write(args.pass.kind, all, args.pass.threads);
  return 0;
}

template <class A> int fused_pass(const FusedPassArgs& args, const char* body) {
  if (!args.memory) return local<A>(args);
  PassArgs first = args.pass;
  first.kind = args.pass.kind == NORMALIZE ? MOMENTS : BACKWARD_SUMS;
  first.result = args.own;
  run<A>(first);
  if (!args.memory->slots) return EXCHANGE_PENDING;
  const int64_t bytes = own_values(args) * int64_t(sizeof(A));
  const Exchanged exchanged = exchange(args.memory, args.sequence, body, args.own, bytes, args.limit_ns);
  if (exchanged.status) return exchanged.status;
  return finish<A>(args, exchanged.payloads, args.memory->world_size, args.memory->slot_bytes / int64_t(sizeof(A)));
}

}  // namespace
}  // namespace syncbn

using namespace syncbn;

// The version of these signatures; syncbn/norm/native/__init__.py compares it.
SYNCBN_API int syncbn_abi() { return 10; }

// One pass, other than BACKWARD_INPUT, over the whole input.
SYNCBN_API void syncbn_pass(const PassArgs* args) { FOR_STATISTICS(args->dtype, run)(*args); }

// A fused pass, with the exchange whose header is `body`; returns 0, an exchange's status, or a FusedStatus.
SYNCBN_API int syncbn_fused_pass(const FusedPassArgs* args, const char* body) {
  return FOR_STATISTICS(args->pass.dtype, fused_pass)(*args, body);
}

// The rest of a pass whose exchange did not complete in the call above, from the gathered rows, `stride` values apart.
SYNCBN_API int syncbn_finish_pass(const FusedPassArgs* args, const void* gathered, int64_t rows, int64_t stride) {
  return FOR_STATISTICS(args->pass.dtype, finish)(*args, gathered, rows, stride);
}
