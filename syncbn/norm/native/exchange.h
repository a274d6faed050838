// What other sources may do with an exchange of frames; exchange.cpp has the protocol.
#pragma once

#include <stdint.h>

#include "common.h"

namespace syncbn {

constexpr int64_t CALL_BYTES = 8;
constexpr int64_t BODY_BYTES = 184;
constexpr int64_t HEADER_BYTES = CALL_BYTES + BODY_BYTES;

}  // namespace syncbn

// Mirrors `Ring` in syncbn/norm/comm/transports/shared_memory.py.
struct SyncbnRing {
  int64_t rank;
  int64_t world_size;
  int64_t slot_bytes;
  int64_t spin_ns;  // 0 where there are more ranks than cores
  int64_t round;    // frames this rank has published
  char* controls;
  char* failure;
  char* slots;
};

namespace syncbn {

// A round: its status, as syncbn_exchange_wait returns it, and where rank 0's payload lies, the next rank's
// `slot_bytes` further. Payloads stay where they are until this rank enters the next round.
struct Round {
  int status;
  const char* payloads;
};

// Publish this rank's frame and wait up to limit_ns for the others'.
Round enter(SyncbnRing* ring, int64_t call, const char* body, const void* payload, int64_t bytes, int64_t limit_ns);

}  // namespace syncbn
