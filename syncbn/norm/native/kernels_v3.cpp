// The kernels for x86-64-v3, AVX2: the target is set before the first declaration, so that all below has it.
#include "common.h"
#if SYNCBN_X86_LEVELS
#pragma GCC target("arch=x86-64-v3")
#define VECTOR_BYTES 32
#define KERNEL kernel_v3
#include "kernels_level.h"
#endif
