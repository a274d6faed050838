// One exchange of frames between processes that share memory; see syncbn/norm/comm/transports/shared_memory.py.
//
// Each rank has a control block, whose first word counts the frames it has published, and two slots, used in turn. A frame
// is a header (sequence number and body) and a payload. Publishing is a release store of the count, and reading starts with
// an acquire load of it, so that a frame is visible before its count on any processor.
#include "exchange.h"

#include <sched.h>
#include <string.h>
#include <time.h>
#if defined(__linux__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define HAS_FUTEX  // on the low half of a count
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace syncbn {
namespace {

constexpr int64_t SEQUENCE_BYTES = 8, BODY_BYTES = 184, HEADER_BYTES = SEQUENCE_BYTES + BODY_BYTES;
constexpr int64_t CONTROL_BYTES = 256;
constexpr int64_t SLEEPERS_AT = 88;  // of a control block: the number of processes that sleep until its rank publishes

constexpr int64_t YIELD_NS = 5'000'000;  // a longer wait does not notice the delay of a sleep
constexpr int64_t MIN_SLEEP_NS = 50'000;  // the timer slack of Linux
constexpr int64_t MAX_SLEEP_NS = 1'000'000;

enum Status { DONE = 0, HEADERS_DIFFER = 1, NOT_YET = 2, FAILED = 3 };
enum FailureState : int64_t { NO_FAILURE = 0, WRITING_FAILURE = 1, HAS_FAILURE = 2 };

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

int64_t* published(const SharedMemory* memory, int64_t rank) {
  return (int64_t*)(memory->controls + rank * CONTROL_BYTES);
}

int64_t* sleepers(const SharedMemory* memory, int64_t rank) {
  return (int64_t*)(memory->controls + rank * CONTROL_BYTES + SLEEPERS_AT);
}

char* slot(const SharedMemory* memory, int64_t rank) {
  return memory->slots + ((memory->round % 2) * memory->world_size + rank) * memory->slot_bytes;
}

bool has_failed(const SharedMemory* memory) {
  return __atomic_load_n((int64_t*)memory->failure, __ATOMIC_ACQUIRE) == HAS_FAILURE;
}

// Sleep for `limit_ns`, or until `rank` has published more than `seen` frames.
void sleep_for(const SharedMemory* memory, int64_t rank, int64_t seen, int64_t limit_ns) {
  timespec limit{0, long(limit_ns)};
#ifdef HAS_FUTEX
  __atomic_add_fetch(sleepers(memory, rank), 1, __ATOMIC_SEQ_CST);
  syscall(SYS_futex, published(memory, rank), FUTEX_WAIT, uint32_t(seen), &limit, nullptr, 0);
  __atomic_sub_fetch(sleepers(memory, rank), 1, __ATOMIC_SEQ_CST);
#else
  nanosleep(&limit, nullptr);
#endif
}

// Wait in three stages: spin, yield the core, sleep for increasing times. With more ranks than cores it sleeps at once:
// launchers start each rank in a session of its own, and Linux yields no core to another session (4 ranks on 2 cores,
// 2x64x56x56: 8 ms a layer when yielding, 4 ms asleep).
Status wait_for_all(const SharedMemory* memory, int64_t limit_ns, int64_t waited_ns) {
  const bool sleeps_at_once = waited_ns || !memory->spin_ns;
  int64_t sleep_ns = sleeps_at_once ? MAX_SLEEP_NS : MIN_SLEEP_NS, start_ns = 0;
  for (int64_t rank = 0; rank < memory->world_size; ++rank)
    for (int64_t seen; (seen = __atomic_load_n(published(memory, rank), __ATOMIC_ACQUIRE)) < memory->round;) {
      if (has_failed(memory)) return FAILED;
      if (!start_ns) start_ns = now_ns();
      const int64_t elapsed = now_ns() - start_ns;
      if (!sleeps_at_once && elapsed <= memory->spin_ns) {
        for (int i = 0; i < 16; ++i) pause();
      } else if (elapsed > limit_ns) {
        return NOT_YET;
      } else if (!sleeps_at_once && elapsed < YIELD_NS) {
        sched_yield();
      } else {
        sleep_for(memory, rank, seen, sleep_ns);
        sleep_ns = sleep_ns * 2 < MAX_SLEEP_NS ? sleep_ns * 2 : MAX_SLEEP_NS;
      }
    }
  for (int64_t rank = 0; rank < memory->world_size; ++rank)
    if (memcmp(slot(memory, rank), slot(memory, memory->rank), HEADER_BYTES) != 0) return HEADERS_DIFFER;
  return DONE;
}

}  // namespace
}  // namespace syncbn

// Publish this rank's frame, and wake the processes that sleep until then, unless a rank has marked the memory as failed.
SYNCBN_API int syncbn_exchange_publish(syncbn::SharedMemory* memory, int64_t sequence, const char* body, const void* payload,
                                       int64_t bytes) {
  using namespace syncbn;
  if (has_failed(memory)) return FAILED;
  memory->round += 1;
  char* const own = slot(memory, memory->rank);
  memcpy(own, &sequence, SEQUENCE_BYTES);
  memcpy(own + SEQUENCE_BYTES, body, BODY_BYTES);
  memcpy(own + HEADER_BYTES, payload, bytes);
  int64_t* const count = published(memory, memory->rank);
  __atomic_store_n(count, memory->round, __ATOMIC_SEQ_CST);
#ifdef HAS_FUTEX
  if (__atomic_load_n(sleepers(memory, memory->rank), __ATOMIC_SEQ_CST))
    syscall(SYS_futex, count, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
#endif
  return DONE;
}

syncbn::Exchanged syncbn::exchange(SharedMemory* memory, int64_t sequence, const char* body, const void* payload, int64_t bytes,
                                   int64_t limit_ns) {
  if (syncbn_exchange_publish(memory, sequence, body, payload, bytes)) return {FAILED, nullptr};
  return {wait_for_all(memory, limit_ns, 0), slot(memory, 0) + HEADER_BYTES};
}

// Wait for the round that this rank has published to, after `waited_ns` in earlier calls. out: payload of rank r at r *
// stride bytes.
SYNCBN_API int syncbn_exchange_wait(const syncbn::SharedMemory* memory, int64_t bytes, char* out, int64_t stride,
                                    int64_t limit_ns, int64_t waited_ns) {
  using namespace syncbn;
  const Status status = wait_for_all(memory, limit_ns, waited_ns);
  if (status == DONE)
    for (int64_t rank = 0; rank < memory->world_size; ++rank)
      memcpy(out + rank * stride, slot(memory, rank) + HEADER_BYTES, bytes);
  return status;
}

// Mark the memory as failed; only the first rank's message is kept.
SYNCBN_API void syncbn_exchange_fail(const syncbn::SharedMemory* memory, int64_t lost, const char* message, int64_t length) {
  using namespace syncbn;
  auto* const words = (int64_t*)memory->failure;
  int64_t expected = NO_FAILURE;
  if (!__atomic_compare_exchange_n(words, &expected, WRITING_FAILURE, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return;
  words[1] = lost;
  words[2] = length;
  memcpy(words + 3, message, length);
  __atomic_store_n(words, int64_t(HAS_FAILURE), __ATOMIC_RELEASE);
}
