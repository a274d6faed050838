// An exchange of frames between processes that share memory; exchange.cpp states the protocol.
#pragma once

#include <stdint.h>

#include "abi.h"

namespace syncbn {

// The shared memory as one rank sees it; `Ring` in syncbn/norm/comm/transports/shared_memory.py declares the same.
struct SharedMemory {
  int64_t rank, world_size;
  int64_t slot_bytes;
  int64_t spin_ns;  // 0 where there are more ranks than cores
  int64_t round;    // frames this rank has published
  char *controls, *failure, *slots;
};

// The outcome of an exchange: its status, as syncbn_exchange_wait returns it, and rank 0's payload; each further rank's is
// `slot_bytes` further. Payloads stay valid until this rank publishes its next frame.
struct Exchanged {
  int status;
  const char* payloads;
};

// Publish this rank's frame and wait up to limit_ns for the others'.
Exchanged exchange(SharedMemory* memory, int64_t sequence, const char* body, const void* payload, int64_t bytes, int64_t limit_ns);

}  // namespace syncbn
