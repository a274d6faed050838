// The kernels for x86-64-v3 (AVX2). The target precedes the first declaration, so that all below has it.
#include "kernels.h"
#if SYNCBN_X86_LEVELS
#pragma GCC target("arch=x86-64-v3")
#define VECTOR_BYTES 32
#define KERNEL kernel_avx2
#include "instruction_set.h"
#endif
