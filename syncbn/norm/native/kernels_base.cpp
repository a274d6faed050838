// The kernels for any processor: vectors of 16 bytes, as every x86-64 and aarch64 has.
#define VECTOR_BYTES 16
#define KERNEL kernel_base
#include "kernels_level.h"
