// The kernels for x86-64-v4 (AVX-512). The target precedes the first declaration, so that all below has it.
#include "kernels.h"
#if SYNCBN_X86_LEVELS
#pragma GCC target("arch=x86-64-v4")
#define VECTOR_BYTES 64
#define KERNEL kernel_avx512
#include "instruction_set.h"
#endif
