// A fused pass: forward or backward in one call, of a group of one rank, or of ranks that share memory, their exchange
// included. Called one by one from Python, the steps of a small layer cost more than its passes over memory.
#include <math.h>

#include <vector>

#include "exchange.h"
#include "passes.h"

namespace syncbn {

// Results beside the statuses of an exchange: the statistics are unusable, or the caller has to exchange `own`.
enum FusedStatus { NOT_FINITE = 4, ONE_VALUE = 5, EXCHANGE_PENDING = 6 };

// syncbn/norm/backends/cpu.py declares the same.
struct FusedPassArgs {
  PassArgs pass;  // of NORMALIZE, whose mean and invstd are those of `stats`, or of BACKWARD_INPUT, without its sums
  void* own;  // what this rank sends: packed moments, or sums; a group of one has no moments
  SharedMemory* memory;  // null for a group of one; without slots for ranks that share no memory
  int64_t sequence, limit_ns;
  double eps;
  BatchStats stats;
  RunningStats running;  // its mean is null where there is nothing to update
};

namespace {

int64_t own_values(const FusedPassArgs& args) {
  return (args.pass.kind == NORMALIZE ? 2 : 0) + 2 * args.pass.channels;
}

// Check that the statistics are usable, and only then update the running statistics.
template <class A> int check_and_update(const FusedPassArgs& args) {
  const int64_t C = args.pass.channels;
  const A* const var = (const A*)args.stats.var;
  if (args.memory)  // in a group of one, NaN passes through as in torch; otherwise it would reach every rank
    for (int64_t c = 0; c < C; ++c)
      if (!isfinite(var[c])) return NOT_FINITE;
  if (*args.stats.total == 1) return ONE_VALUE;
  if (args.running.mean) update(args.running, (const A*)args.stats.mean, var, *args.stats.total, C);
  return 0;
}

// The rest of a pass after its exchange, from a row of each rank, `stride` values apart: packed moments, or sums, which are
// added in the order of ranks.
template <class A> int finish(const FusedPassArgs& args, const void* gathered, int64_t stride) {
  const A* row = (const A*)gathered;
  if (args.pass.kind == NORMALIZE) {
    merge(row, stride, args.memory->world_size, args.pass.channels, args.eps, args.stats);
    const int unusable = check_and_update<A>(args);
    if (!unusable) run<A>(NORMALIZE, args.pass, nullptr, args.pass.result);
    return unusable;
  }
  const int64_t count = own_values(args);
  std::vector<A> sums(row, row + count);
  for (int64_t rank = 1; rank < args.memory->world_size; ++rank) {
    row += stride;
    for (int64_t i = 0; i < count; ++i) sums[i] += row[i];
  }
  run<A>(BACKWARD_INPUT, args.pass, sums.data(), args.pass.result);
  return 0;
}

template <class A> int local(const FusedPassArgs& args) {
  if (args.pass.kind == NORMALIZE) {
    forward_local<A>(args.pass, args.eps, args.stats);
    return check_and_update<A>(args);
  }
  backward_local<A>(args.pass, args.own);
  return 0;
}

template <class A> int fused_pass(const FusedPassArgs& args, const char* body) {
  if (!args.memory) return local<A>(args);
  run<A>(args.pass.kind == NORMALIZE ? MOMENTS : BACKWARD_SUMS, args.pass, nullptr, args.own);
  if (!args.memory->slots) return EXCHANGE_PENDING;
  const int64_t bytes = own_values(args) * int64_t(sizeof(A));
  const Exchanged exchanged = exchange(args.memory, args.sequence, body, args.own, bytes, args.limit_ns);
  if (exchanged.status) return exchanged.status;
  return finish<A>(args, exchanged.payloads, args.memory->slot_bytes / int64_t(sizeof(A)));
}

}  // namespace
}  // namespace syncbn

// The pass, with the exchange whose header is `body`; returns 0, an exchange's status, or a FusedStatus.
SYNCBN_API int syncbn_fused_pass(const syncbn::FusedPassArgs* args, const char* body) {
  return (args->pass.dtype == syncbn::FLOAT64 ? syncbn::fused_pass<double> : syncbn::fused_pass<float>)(*args, body);
}

// The rest of a pass whose exchange did not complete in the call above, from the gathered rows, `stride` values apart.
SYNCBN_API int syncbn_finish_pass(const syncbn::FusedPassArgs* args, const void* gathered, int64_t stride) {
  const auto finish = args->pass.dtype == syncbn::FLOAT64 ? syncbn::finish<double> : syncbn::finish<float>;
  return finish(*args, gathered, stride);
}
