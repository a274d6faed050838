// Memory for results that is used again once their last tensor is gone.
//
// glibc gives large blocks back to the kernel as soon as they are free, and mapping them anew, page by page, takes longer
// than a pass over them. Blocks are mapped here instead, in pages of 2 MiB where that is worth it, and kept: never more
// than were in use at once. They leave as DLPack tensors, whose deleter brings them back.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <mutex>
#include <vector>

#include "common.h"
#include "kernels.h"

namespace {

// What DLPack 0.x and 1.x define under these names.
struct DLTensor {
  void* data;
  struct { int32_t type, id; } device;
  int32_t ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
constexpr int32_t CPU = 1;
constexpr uint8_t FLOAT = 2, BFLOAT = 4;

constexpr int64_t HUGE_PAGE = 1 << 21;

// Sizes of blocks are eight to an octave, so that one of another batch size may serve.
int64_t size_class(int64_t bytes) {
  int64_t step = 1 << 12;
  while (step * 8 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

void* mapped(int64_t bytes) {
  const int64_t spare = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 0;
  void* const found = mmap(nullptr, size_t(bytes + spare), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) return nullptr;
  if (!spare) return found;
  char* const begin = (char*)((uintptr_t(found) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
  const int64_t head = begin - (char*)found;
  if (head) munmap(found, size_t(head));
  if (spare - head) munmap(begin + bytes, size_t(spare - head));
#ifdef MADV_HUGEPAGE
  madvise(begin, size_t(bytes), MADV_HUGEPAGE);  // a wish: nothing depends on it
#endif
  return begin;
}

class Blocks {
 public:
  // `bytes` is a size class. Null where there is no memory.
  void* take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    void* memory = found(bytes);
    if (!memory) {
      while (!idle_.empty() && in_use_ + idle_bytes_ + bytes > most_in_use_) drop_oldest();
      memory = mapped(bytes);
    }
    if (!memory) return nullptr;
    in_use_ += bytes;
    if (in_use_ > most_in_use_) most_in_use_ = in_use_;
    return memory;
  }
  void bring_back(void* memory, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= bytes;
    idle_bytes_ += bytes;
    idle_.push_back({memory, bytes});
  }
  int64_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t bytes = idle_bytes_;
    while (!idle_.empty()) drop_oldest();
    most_in_use_ = in_use_;
    return bytes;
  }
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Block { void* memory; int64_t bytes; };
  // The block that came back last: it is the likeliest to be in a cache.
  void* found(int64_t bytes) {
    for (size_t i = idle_.size(); i-- > 0;)
      if (idle_[i].bytes == bytes) {
        void* const memory = idle_[i].memory;
        idle_.erase(idle_.begin() + long(i));
        idle_bytes_ -= bytes;
        return memory;
      }
    return nullptr;
  }
  void drop_oldest() {
    munmap(idle_.front().memory, size_t(idle_.front().bytes));
    idle_bytes_ -= idle_.front().bytes;
    idle_.erase(idle_.begin());
  }
  std::mutex mutex_;
  std::vector<Block> idle_;  // the oldest first
  int64_t in_use_ = 0, idle_bytes_ = 0, most_in_use_ = 0;
};

Blocks& blocks() {
  static Blocks* const all = new Blocks;  // for ever: tensors may outlive whatever ends it
  return *all;
}

// Nobody is in there while a thread forks: the child would find the mutex locked for ever.
[[maybe_unused]] const int fork_safe =
    pthread_atfork([] { blocks().lock(); }, [] { blocks().unlock(); }, [] { blocks().unlock(); });

void bring_back(DLManagedTensor* managed) {
  blocks().bring_back(managed->tensor.data, size_class(int64_t(intptr_t(managed->context))));
  free(managed);
}

}  // namespace

// An uninitialised DLPack tensor of `ndim` sizes, followed by as many strides, that takes `bytes` without a gap; null
// where there is no memory.
SYNCBN_API void* syncbn_result(int64_t ndim, const int64_t* layout, int dtype, int64_t bytes) {
  auto* const managed = (DLManagedTensor*)malloc(sizeof(DLManagedTensor) + 2 * size_t(ndim) * sizeof(int64_t));
  void* const memory = managed ? blocks().take(size_class(bytes)) : nullptr;
  if (!memory) {
    free(managed);
    return nullptr;
  }
  auto* const sizes = (int64_t*)(managed + 1);
  memcpy(sizes, layout, 2 * size_t(ndim) * sizeof(int64_t));
  const uint8_t bits = dtype == syncbn::FLOAT64 ? 64 : dtype == syncbn::FLOAT32 ? 32 : 16;
  const uint8_t code = dtype == syncbn::BFLOAT16 ? BFLOAT : FLOAT;
  managed->tensor = {memory, {CPU, 0}, int32_t(ndim), {code, bits, 1}, sizes, sizes + ndim, 0};
  managed->context = (void*)intptr_t(bytes);
  managed->deleter = bring_back;
  return managed;
}

// Give memory that no tensor uses back to the system; returns how many bytes.
SYNCBN_API int64_t syncbn_release() { return blocks().release(); }
