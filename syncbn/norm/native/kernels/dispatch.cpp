// The kernels for any processor (vectors of 16 bytes, as every x86-64 and aarch64 has), and the choice among
// instruction sets at run time.
#define VECTOR_BYTES 16
#define KERNEL kernel_base
#include "instruction_set.h"

#include "../abi.h"

namespace {

int highest_level() {
#if SYNCBN_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 2;
  if (__builtin_cpu_supports("x86-64-v3")) return 1;
#endif
  return 0;
}

int& level() {
  static int chosen = highest_level();
  return chosen;
}

}  // namespace

syncbn::Kernel syncbn::kernel_for(const KernelArgs& args) {
#if SYNCBN_X86_LEVELS
  if (level() == 2) return kernel_avx512(args);
  if (level() == 1) return kernel_avx2(args);
#endif
  return kernel_base(args);
}

// Use no newer instruction set than `highest` (0 any processor's, 1 AVX2, 2 AVX-512), and return the one in use.
SYNCBN_API int syncbn_limit_instruction_set(int highest) {
  const int found = highest_level();
  return level() = highest < found ? highest : found;
}
