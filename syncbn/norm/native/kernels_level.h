// All kernels for one instruction set: included once for each, by a file that sets the target, VECTOR_BYTES and
// KERNEL, the name of the function defined here. Everything else is local to that file, so that no linker can hand
// one instruction set's code to another.
#include "common.h"
#include "kernels_maps.h"
#include "kernels_reductions.h"

namespace {

using syncbn::Kernel;

template <template <class, int, int> class Op, class T, int ACT, int EXTRA> Kernel map_kernel(bool planes) {
  return planes ? map_planes<Op<T, ACT, EXTRA>> : map_columns<Op<T, ACT, EXTRA>>;
}

template <class T, int ACT, int EXTRA> Kernel sums_kernel(bool planes) {
  return planes ? reduce_planes<BackwardSums<T, ACT, EXTRA>> : reduce_columns<BackwardSums<T, ACT, EXTRA>>;
}

// The combinations worth code of their own: residual blocks of networks have just these.
template <class T> Kernel hot(const Job& job) {
#if SYNCBN_X86_LEVELS && VECTOR_BYTES == 16
  return nullptr;  // processors that need this level beside the others are too old to compile much for
#endif
  const bool relu = job.act == syncbn::RELU, plain = job.act == syncbn::IDENTITY;
  const auto is = [&](Extra extra) { return job.extra_is == extra; };
  if (job.kind == syncbn::NORMALIZE && plain)
    return is(syncbn::RESIDUAL) ? map_kernel<Normalize, T, 0, 1>(job.planes) : map_kernel<Normalize, T, 0, 0>(job.planes);
  if (job.kind == syncbn::NORMALIZE && relu)
    return is(syncbn::RESIDUAL) ? map_kernel<Normalize, T, 1, 1>(job.planes) : map_kernel<Normalize, T, 1, 0>(job.planes);
  if (job.kind == syncbn::BACKWARD_SUMS && plain) return sums_kernel<T, 0, 0>(job.planes);
  if (job.kind == syncbn::BACKWARD_SUMS && relu && !is(syncbn::RESIDUAL))
    return is(syncbn::OUTPUT) ? sums_kernel<T, 1, 2>(job.planes) : sums_kernel<T, 1, 0>(job.planes);
  if (job.kind == syncbn::BACKWARD_INPUT && plain) return map_kernel<BackwardInput, T, 0, 0>(job.planes);
  if (job.kind == syncbn::BACKWARD_INPUT && relu && !is(syncbn::RESIDUAL))
    return is(syncbn::OUTPUT) ? map_kernel<BackwardInput, T, 1, 2>(job.planes) : map_kernel<BackwardInput, T, 1, 0>(job.planes);
  return nullptr;
}
template <> Kernel hot<double>(const Job&) { return nullptr; }

template <class T> Kernel kernel_of(const Job& job) {
  if (job.kind == syncbn::MOMENTS) return job.planes ? reduce_planes<Moments<T>> : reduce_columns<Moments<T>>;
  if (const Kernel found = hot<T>(job)) return found;
  if (job.kind == syncbn::NORMALIZE) return map_kernel<Normalize, T, ANY, ANY>(job.planes);
  if (job.kind == syncbn::BACKWARD_SUMS) return sums_kernel<T, ANY, ANY>(job.planes);
  if (job.kind == syncbn::BACKWARD_INPUT) return map_kernel<BackwardInput, T, ANY, ANY>(job.planes);
  return map_kernel<BackwardResidual, T, ANY, ANY>(job.planes);
}

}  // namespace

namespace syncbn {

Kernel KERNEL(const Job& job) {
  switch (job.dtype) {
    case FLOAT64: return kernel_of<double>(job);
    case BFLOAT16: return kernel_of<Bfloat16>(job);
    case FLOAT16: return kernel_of<Float16>(job);
    default: return kernel_of<float>(job);
  }
}

}  // namespace syncbn
