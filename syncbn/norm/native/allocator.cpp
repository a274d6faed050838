// An allocator for results that keeps their memory for later results.
//
// glibc returns large blocks to the kernel once they are free, and page faults on new ones take longer than a pass over
// them (8x64x56x56 in float32, forward and backward: 9 ms, and 2.5 ms with this allocator). It keeps at most as many bytes as
// were in use at one time. Results are DLPack tensors, whose deleter returns the block.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <mutex>
#include <vector>

#include "abi.h"
#include "kernels/kernels.h"

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

// Block sizes are eight to an octave, so that a block serves similar batch sizes.
int64_t size_class(int64_t bytes) {
  int64_t step = 1 << 12;
  while (step * 8 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

// Map a block, aligned to huge pages where it holds several. Null where there is no memory.
void* map_block(int64_t bytes) {
  const int64_t spare = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 0;
  void* const mapped = mmap(nullptr, size_t(bytes + spare), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  if (!spare) return mapped;
  char* const begin = (char*)((uintptr_t(mapped) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
  const int64_t head = begin - (char*)mapped;
  if (head) munmap(mapped, size_t(head));
  if (spare - head) munmap(begin + bytes, size_t(spare - head));
#ifdef MADV_HUGEPAGE
  madvise(begin, size_t(bytes), MADV_HUGEPAGE);  // a hint, which may fail
#endif
  return begin;
}

class Allocator {
 public:
  // `bytes` is a size class. Null where there is no memory.
  void* allocate(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    // of the idle blocks of this size the most recently freed one, which is the likeliest to be in a cache
    size_t at = idle_.size();
    while (at > 0 && idle_[at - 1].bytes != bytes) --at;
    if (!at)
      while (!idle_.empty() && in_use_ + idle_bytes_ + bytes > peak_) unmap_oldest();
    void* const memory = at ? take(at - 1).memory : map_block(bytes);
    if (!memory) return nullptr;
    in_use_ += bytes;
    if (in_use_ > peak_) peak_ = in_use_;
    return memory;
  }
  void free(void* memory, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    in_use_ -= bytes;
    idle_bytes_ += bytes;
    idle_.push_back({memory, bytes});
  }
  // Unmap all idle blocks; returns their bytes.
  int64_t release() {
    const std::lock_guard<std::mutex> lock(mutex);
    const int64_t bytes = idle_bytes_;
    while (!idle_.empty()) unmap_oldest();
    peak_ = in_use_;
    return bytes;
  }
  std::mutex mutex;

 private:
  struct Block { void* memory; int64_t bytes; };
  Block take(size_t at) {
    const Block block = idle_[at];
    idle_.erase(idle_.begin() + long(at));
    idle_bytes_ -= block.bytes;
    return block;
  }
  void unmap_oldest() {
    const Block block = take(0);
    munmap(block.memory, size_t(block.bytes));
  }
  std::vector<Block> idle_;  // the oldest first
  int64_t in_use_ = 0, idle_bytes_ = 0, peak_ = 0;
};

Allocator& allocator() {
  static Allocator* const instance = new Allocator;  // never destroyed: tensors may outlive static objects
  return *instance;
}

// No thread holds the mutex during a fork: the child could never lock it.
[[maybe_unused]] const int fork_safe =
    pthread_atfork([] { allocator().mutex.lock(); }, [] { allocator().mutex.unlock(); }, [] { allocator().mutex.unlock(); });

void delete_tensor(DLManagedTensor* managed) {
  allocator().free(managed->tensor.data, size_class(int64_t(intptr_t(managed->context))));
  free(managed);
}

}  // namespace

// An uninitialised DLPack tensor of `bytes` without gaps, whose `layout` is `ndim` sizes followed by `ndim` strides; null
// where there is no memory.
SYNCBN_API void* syncbn_allocate(int64_t ndim, const int64_t* layout, int dtype, int64_t bytes) {
  auto* const managed = (DLManagedTensor*)malloc(sizeof(DLManagedTensor) + 2 * size_t(ndim) * sizeof(int64_t));
  void* const memory = managed ? allocator().allocate(size_class(bytes)) : nullptr;
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
  managed->deleter = delete_tensor;
  return managed;
}

// Return idle memory to the system; returns how many bytes.
SYNCBN_API int64_t syncbn_release_memory() { return allocator().release(); }
