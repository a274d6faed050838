// All kernels for one instruction set. A source file includes this once, after it sets the target, VECTOR_BYTES and
// KERNEL, the name of the function defined here. Everything else is local to that file, so that the linker cannot
// substitute one instruction set's code for another's.
#include "elementwise.h"
#include "reductions.h"

namespace {

template <Kind KIND, class T, int ACT, int EXTRA> syncbn::Kernel instance(const KernelArgs& args) {
  using Op = Operation<KIND, T, ACT, EXTRA>;
  if constexpr (KIND == syncbn::MOMENTS || KIND == syncbn::BACKWARD_SUMS)
    return args.planes ? reduce_planes<Op> : reduce_columns<Op>;
  else
    return args.planes ? map_planes<Op> : map_columns<Op>;
}

// The activations and third tensors of residual networks have code of their own. Not so in float64, nor in the base code
// beside newer instruction sets, which only old processors run: each combination costs compile time.
constexpr bool SPECIALISED = !SYNCBN_X86_LEVELS || VECTOR_BYTES > 16;

template <Kind KIND, class T> syncbn::Kernel kernel_of_kind(const KernelArgs& args) {
  using namespace syncbn;
  if constexpr (SPECIALISED && sizeof(T) < 8) {
    constexpr Extra third = KIND == NORMALIZE ? RESIDUAL : OUTPUT;
    const bool plain = args.act == IDENTITY, relu = args.act == RELU;
    const Extra extra = plain && KIND != NORMALIZE ? NOTHING : args.extra_is;  // without act, z is not needed
    if (plain && extra == NOTHING) return instance<KIND, T, IDENTITY, NOTHING>(args);
    if (relu && extra == NOTHING) return instance<KIND, T, RELU, NOTHING>(args);
    if (relu && extra == third) return instance<KIND, T, RELU, third>(args);
    if constexpr (KIND == NORMALIZE)
      if (plain && extra == third) return instance<KIND, T, IDENTITY, third>(args);
  }
  return instance<KIND, T, ANY, ANY>(args);
}

template <class T> syncbn::Kernel kernel_of(const KernelArgs& args) {
  switch (args.kind) {
    case syncbn::MOMENTS: return instance<syncbn::MOMENTS, T, syncbn::IDENTITY, syncbn::NOTHING>(args);
    case syncbn::NORMALIZE: return kernel_of_kind<syncbn::NORMALIZE, T>(args);
    case syncbn::BACKWARD_SUMS: return kernel_of_kind<syncbn::BACKWARD_SUMS, T>(args);
    case syncbn::BACKWARD_INPUT: return kernel_of_kind<syncbn::BACKWARD_INPUT, T>(args);
    default: return instance<syncbn::BACKWARD_RESIDUAL, T, ANY, ANY>(args);
  }
}

}  // namespace

syncbn::Kernel syncbn::KERNEL(const KernelArgs& args) {
  switch (args.dtype) {
    case FLOAT64: return kernel_of<double>(args);
    case BFLOAT16: return kernel_of<Bfloat16>(args);
    case FLOAT16: return kernel_of<Float16>(args);
    default: return kernel_of<float>(args);
  }
}
