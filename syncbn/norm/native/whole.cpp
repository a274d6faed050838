// A whole pass in one call: of a group of one, or of a group that shares memory, its exchange included. Called one by one
// from Python, the steps of a small layer cost more than its passes over memory.
#include <math.h>

#include "exchange.h"
#include "kernels_call.h"

namespace syncbn {
namespace {

// Beside the statuses of an exchange: there is nothing to normalise with.
enum Unusable { NOT_FINITE = 4, ONE_VALUE = 5 };

// The exchange is the caller's: what this rank sends is there.
constexpr int APART = 6;

}  // namespace

// What a whole pass is given; syncbn/norm/backends/whole.py declares the same.
struct Whole {
  Call call;  // of NORMALIZE, whose mean and invstd are those below, or of BACKWARD_INPUT, without its sums
  void* own;  // of this rank: packed moments, or sums; alone no moments
  SyncbnRing* ring;  // null for a group of one; without slots for one that shares no memory
  int64_t number, limit_ns;
  double eps;
  Merged merged;
  Moving running;  // its mean is null where there is nothing to move
};

namespace {

int64_t own_values(const Whole& whole) {
  return (whole.call.kind == NORMALIZE ? 2 : 0) + 2 * whole.call.channels;
}

// One pass of another kind over the same input.
template <class A> void run_as(Kind kind, const Whole& whole) {
  Call call = whole.call;
  call.kind = kind;
  run<A>(call, nullptr, whole.own);
}

// Whether there is something to normalise with; running statistics are moved only then.
template <class A> int settle(const Whole& whole) {
  const int64_t C = whole.call.channels;
  const A* const var = (const A*)whole.merged.var;
  if (whole.ring)  // alone, NaN passes through as in torch; among ranks it would reach every one of them
    for (int64_t c = 0; c < C; ++c)
      if (!isfinite(var[c])) return NOT_FINITE;
  if (*whole.merged.total == 1) return ONE_VALUE;
  if (whole.running.mean) move(whole.running, (const A*)whole.merged.mean, var, *whole.merged.total, C);
  return 0;
}

// The rest of a forward pass, from all ranks' packed moments.
template <class A> int forward_from(const Whole& whole, const void* rows, int64_t stride) {
  merge((const A*)rows, stride, whole.ring->world_size, whole.call.channels, whole.eps, whole.merged);
  const int unusable = settle<A>(whole);
  if (!unusable) run<A>(whole.call, nullptr, whole.call.result);
  return unusable;
}

// The rest of a backward pass, from all ranks' sums, which are added in the order of ranks.
template <class A> int backward_from(const Whole& whole, const void* rows, int64_t stride) {
  const int64_t count = own_values(whole);
  const A* row = (const A*)rows;
  std::vector<A> sums(row, row + count);
  for (int64_t rank = 1; rank < whole.ring->world_size; ++rank) {
    row += stride;
    for (int64_t i = 0; i < count; ++i) sums[i] += row[i];
  }
  run<A>(whole.call, sums.data(), whole.call.result);
  return 0;
}

template <class A> int rest(const Whole& whole, const void* rows, int64_t stride) {
  return whole.call.kind == NORMALIZE ? forward_from<A>(whole, rows, stride) : backward_from<A>(whole, rows, stride);
}

template <class A> int alone(const Whole& whole) {
  if (whole.call.kind == NORMALIZE) {
    forward_alone<A>(whole.call, whole.eps, whole.merged);
    return settle<A>(whole);
  }
  backward_alone<A>(whole.call, whole.own);
  return 0;
}

template <class A> int among_ranks(const Whole& whole, const char* body) {
  run_as<A>(whole.call.kind == NORMALIZE ? MOMENTS : BACKWARD_SUMS, whole);
  const int64_t bytes = own_values(whole) * int64_t(sizeof(A));
  if (!whole.ring->slots) return APART;
  const Round round = enter(whole.ring, whole.number, body, whole.own, bytes, whole.limit_ns);
  return round.status ? round.status : rest<A>(whole, round.payloads, whole.ring->slot_bytes / int64_t(sizeof(A)));
}

template <class A> int all(const Whole& whole, const char* body) {
  return whole.ring ? among_ranks<A>(whole, body) : alone<A>(whole);
}

}  // namespace
}  // namespace syncbn

// The pass, with the exchange whose header is `body`; returns 0, an exchange's status, or why there is nothing to
// normalise with.
SYNCBN_API int syncbn_whole(const syncbn::Whole* whole, const char* body) {
  return (whole->call.dtype == syncbn::FLOAT64 ? syncbn::all<double> : syncbn::all<float>)(*whole, body);
}

// The rest of a pass whose exchange did not end in the call above, from what it brought: a row a rank, `stride` values
// apart.
SYNCBN_API int syncbn_rest(const syncbn::Whole* whole, const void* gathered, int64_t stride) {
  const auto rest = whole->call.dtype == syncbn::FLOAT64 ? syncbn::rest<double> : syncbn::rest<float>;
  return rest(*whole, gathered, stride);
}
