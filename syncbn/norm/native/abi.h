// Linkage of the functions that Python calls.
#pragma once

#define SYNCBN_API extern "C" __attribute__((visibility("default")))
