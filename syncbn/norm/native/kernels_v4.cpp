// The kernels for x86-64-v4, AVX-512: the target is set before the first declaration, so that all below has it.
#include "common.h"
#if SYNCBN_X86_LEVELS
#pragma GCC target("arch=x86-64-v4")
#define VECTOR_BYTES 64
#define KERNEL kernel_v4
#include "kernels_level.h"
#endif
