// The version of the signatures in this library; syncbn/norm/native/__init__.py compares it.
#include "abi.h"

SYNCBN_API int syncbn_abi() { return 7; }
