// The arithmetic of each pass on one vector of values, whatever the order in which elementwise.h and reductions.h take
// the vectors.
//
// Operations on the hot combinations know their activation and third tensor at compile time; others (ANY) look them up
// for each vector, which costs little beside the cost of such an activation.
#pragma once

#include "activations.h"

namespace {

using syncbn::Extra;
using syncbn::KernelArgs;
using syncbn::Kind;
using syncbn::Tile;

constexpr int ANY = -1;

template <class A> struct Coefficients { Pack<A> mean, scale, bias, slope, offset; };

// Coefficients of one channel in every lane, or of as many columns as there are lanes.
template <class A> struct Source {
  const A *mean, *scale, *bias, *slope, *offset;
  explicit Source(const KernelArgs& args)
      : mean((const A*)args.mean), scale((const A*)args.scale), bias((const A*)args.bias),
        slope((const A*)args.slope), offset((const A*)args.offset) {}
  template <class F> INLINE Coefficients<A> all(F f) const {
    return {f(mean), f(scale), f(bias), f(slope), f(offset)};
  }
  INLINE Coefficients<A> channel(int64_t c) const {
    return all(LAMBDA(const A* from) { return broadcast<A>(from[c]); });
  }
  INLINE Coefficients<A> columns(int64_t j) const {
    return all(LAMBDA(const A* from) { return load(from + j); });
  }
};

// What a reduction adds up: the value, and the value times the factor.
template <class A> struct Terms { Pack<A> value, factor; };

template <Kind KIND, class T, int ACT, int EXTRA> struct Operation {
  using Element = T;
  using A = Statistics<T>;
  static constexpr Kind kind = KIND;
  const KernelArgs& args;
  const T *x, *dy, *extra;
  const int act, role;
  explicit Operation(const KernelArgs& given)
      : args(given), x((const T*)given.x), dy((const T*)given.dy), extra((const T*)given.extra),
        act(ACT == ANY ? (int)given.act : ACT), role(EXTRA == ANY ? (int)given.extra_is : EXTRA) {}

  // The output at i of an element-wise pass, or the terms that a reduction adds up.
  INLINE auto operator()(const Coefficients<A>& k, int64_t i) const {
    if constexpr (KIND == syncbn::NORMALIZE) {
      return map<A>(LAMBDA(auto u) { return activated<A>(u, act); }, z(k, i));
    } else if constexpr (KIND == syncbn::BACKWARD_RESIDUAL) {
      return dz(k, i);
    } else {
      const Pack<A> centred = load(x + i) - k.mean;
      if constexpr (KIND == syncbn::MOMENTS) return Terms<A>{centred, centred};
      else if constexpr (KIND == syncbn::BACKWARD_SUMS) return Terms<A>{dz(k, i), centred};
      else return (centred * k.slope + dz(k, i) - k.offset) * k.scale;
    }
  }
  // Fetch what the pass reads at i, in good time.
  INLINE void prefetch(int64_t i) const {
    if (KIND != syncbn::BACKWARD_RESIDUAL) __builtin_prefetch(x + i);
    if (KIND >= syncbn::BACKWARD_SUMS) __builtin_prefetch(dy + i);
  }

 private:
  INLINE Pack<A> z(const Coefficients<A>& k, int64_t i) const {
    Pack<A> z = (load(x + i) - k.mean) * k.scale + k.bias;
    if (role == syncbn::RESIDUAL) z = z + load(extra + i);
    return z;
  }
  INLINE Pack<A> dz(const Coefficients<A>& k, int64_t i) const {
    const Pack<A> gradient = load(dy + i);
    if (act == syncbn::IDENTITY) return gradient;
    const Pack<A> at = role == syncbn::OUTPUT ? load(extra + i) : z(k, i);
    return map<A>(LAMBDA(auto u, auto v) { return before_act<A>(u, v, act); }, gradient, at);
  }
};

}  // namespace
