// What every source of the native library shares.
#pragma once

#define SYNCBN_API extern "C" __attribute__((visibility("default")))

// Whether this compiler can build code for newer x86-64 processors beside code for all of them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define SYNCBN_X86_LEVELS 1
#else
#define SYNCBN_X86_LEVELS 0
#endif
