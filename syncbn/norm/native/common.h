// What every source of the native library shares.
#pragma once

#define SYNCBN_API extern "C" __attribute__((visibility("default")))
