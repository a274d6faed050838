// One exchange of frames between processes that share memory; syncbn/norm/comm/transports/shared_memory.py tells the protocol.
//
// Every rank has a control block, whose first word counts the frames it has published, and two slots, used in
// turn. A frame is a header and a payload. Publishing is a release store of the count, reading starts with an
// acquire load of it: that alone makes the frame visible before its number, on any processor.
#include <cstdint>
#include <cstring>
#include <ctime>
#include <sched.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "exchange.h"

namespace {

using syncbn::BODY_BYTES;
using syncbn::CALL_BYTES;
using syncbn::HEADER_BYTES;

constexpr int64_t kControlBytes = 256;
constexpr int64_t kSleepersAt = 88;  // of a control block: how many wait to be woken by its rank

constexpr int64_t kYieldNs = 5'000'000;       // whoever is that late is not missed by a nap
constexpr int64_t kShortestNapNs = 50'000;    // the timer slack of Linux
constexpr int64_t kLongestNapNs = 1'000'000;

enum Status { kDone = 0, kDiffer = 1, kNotYet = 2, kFailed = 3 };
enum Failure { kNone = 0, kWriting = 1, kSet = 2 };

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

}  // namespace

namespace {

int64_t* published(const SyncbnRing* ring, int64_t rank) {
  return reinterpret_cast<int64_t*>(ring->controls + rank * kControlBytes);
}

int64_t* sleepers(const SyncbnRing* ring, int64_t rank) {
  return reinterpret_cast<int64_t*>(ring->controls + rank * kControlBytes + kSleepersAt);
}

// Sleep until `rank` publishes, unless it has published more than `seen` frames already, or for `limit_ns`.
void sleep_for(const SyncbnRing* ring, int64_t rank, int64_t seen, int64_t limit_ns) {
  timespec limit{0, static_cast<long>(limit_ns)};
#if defined(__linux__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  __atomic_add_fetch(sleepers(ring, rank), 1, __ATOMIC_SEQ_CST);
  syscall(SYS_futex, published(ring, rank), FUTEX_WAIT, static_cast<uint32_t>(seen), &limit, nullptr, 0);
  __atomic_sub_fetch(sleepers(ring, rank), 1, __ATOMIC_SEQ_CST);
#else
  nanosleep(&limit, nullptr);
#endif
}

// Publish this rank's frame, and wake whoever sleeps until then.
void publish(const SyncbnRing* ring) {
  __atomic_store_n(published(ring, ring->rank), ring->round, __ATOMIC_SEQ_CST);
#if defined(__linux__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  if (__atomic_load_n(sleepers(ring, ring->rank), __ATOMIC_SEQ_CST))
    syscall(SYS_futex, published(ring, ring->rank), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

char* slot(const SyncbnRing* ring, int64_t rank) {
  return ring->slots + ((ring->round % 2) * ring->world_size + rank) * ring->slot_bytes;
}

bool has_failed(const SyncbnRing* ring) {
  auto* state = reinterpret_cast<int64_t*>(ring->failure);
  return __atomic_load_n(state, __ATOMIC_ACQUIRE) == kSet;
}

// Spin while a frame is about to come, then offer the core to others, then sleep ever longer. Where ranks are more than
// cores, sleep at once: launchers start each in a session of its own, and to another session Linux yields no core (4 ranks
// on 2 cores, 2x64x56x56: 8 ms a layer when yielding, 4 ms asleep).
class Patience {
 public:
  Patience(int64_t spin_ns, int64_t limit_ns, int64_t waited_ns)
      : spin_ns_(spin_ns), limit_ns_(limit_ns), waited_ns_(waited_ns),
        yield_ns_(spin_ns > 0 ? kYieldNs : 0),
        nap_ns_(waited_ns > 0 || spin_ns == 0 ? kLongestNapNs : kShortestNapNs) {}

  // Wait for `rank`, which has published `seen` frames, a little. Returns false once the limit is over.
  bool wait(const SyncbnRing* ring, int64_t rank, int64_t seen) {
    if (start_ns_ == 0) start_ns_ = now_ns();
    if (spin_ns_ > 0 && waited_ns_ == 0) {
      for (int i = 0; i < 16; ++i) pause();
      if (now_ns() - start_ns_ > spin_ns_) spin_ns_ = 0;
      return true;
    }
    int64_t elapsed = now_ns() - start_ns_;
    if (elapsed > limit_ns_) return false;
    if (waited_ns_ + elapsed < yield_ns_) {
      sched_yield();
      return true;
    }
    sleep_for(ring, rank, seen, nap_ns_);
    nap_ns_ = nap_ns_ * 2 < kLongestNapNs ? nap_ns_ * 2 : kLongestNapNs;
    return true;
  }

 private:
  int64_t spin_ns_, limit_ns_, waited_ns_;
  int64_t yield_ns_, nap_ns_;
  int64_t start_ns_ = 0;
};

Status compare(const SyncbnRing* ring) {
  const char* own = slot(ring, ring->rank);
  for (int64_t rank = 0; rank < ring->world_size; ++rank)
    if (std::memcmp(slot(ring, rank), own, HEADER_BYTES) != 0) return kDiffer;
  return kDone;
}

void collect(const SyncbnRing* ring, int64_t bytes, char* out, int64_t stride) {
  for (int64_t rank = 0; rank < ring->world_size; ++rank)
    std::memcpy(out + rank * stride, slot(ring, rank) + HEADER_BYTES, bytes);
}

Status await_all(const SyncbnRing* ring, int64_t limit_ns, int64_t waited_ns) {
  Patience patience(ring->spin_ns, limit_ns, waited_ns);
  for (int64_t rank = 0; rank < ring->world_size; ++rank)
    for (int64_t seen; (seen = __atomic_load_n(published(ring, rank), __ATOMIC_ACQUIRE)) < ring->round;) {
      if (has_failed(ring)) return kFailed;
      if (!patience.wait(ring, rank, seen)) return kNotYet;
    }
  return compare(ring);
}

}  // namespace

// Publish this rank's frame, unless the memory has failed.
SYNCBN_API int syncbn_exchange_publish(SyncbnRing* ring, int64_t call, const char* body, const void* payload,
                                       int64_t bytes) {
  if (has_failed(ring)) return kFailed;
  ring->round += 1;
  char* own = slot(ring, ring->rank);
  std::memcpy(own, &call, CALL_BYTES);
  std::memcpy(own + CALL_BYTES, body, BODY_BYTES);
  std::memcpy(own + HEADER_BYTES, payload, bytes);
  publish(ring);
  return kDone;
}

syncbn::Round syncbn::enter(SyncbnRing* ring, int64_t call, const char* body, const void* payload, int64_t bytes,
                            int64_t limit_ns) {
  if (syncbn_exchange_publish(ring, call, body, payload, bytes)) return {kFailed, nullptr};
  return {await_all(ring, limit_ns, 0), slot(ring, 0) + HEADER_BYTES};
}

// Wait, or go on waiting, in the round that this rank has entered. out: payload of rank r at r * stride bytes.
SYNCBN_API int syncbn_exchange_wait(const SyncbnRing* ring, int64_t bytes, char* out, int64_t stride,
                                    int64_t limit_ns, int64_t waited_ns) {
  const Status status = await_all(ring, limit_ns, waited_ns);
  if (status == kDone) collect(ring, bytes, out, stride);
  return status;
}

// Mark the memory as failed; the first rank to do so has its message kept.
SYNCBN_API void syncbn_exchange_fail(const SyncbnRing* ring, int64_t lost, const char* message, int64_t length) {
  auto* words = reinterpret_cast<int64_t*>(ring->failure);
  int64_t expected = kNone;
  if (!__atomic_compare_exchange_n(&words[0], &expected, kWriting, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return;
  words[1] = lost;
  words[2] = length;
  std::memcpy(words + 3, message, length);
  __atomic_store_n(&words[0], kSet, __ATOMIC_RELEASE);
}
