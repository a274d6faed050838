// What each pass does with one vector of values: its coefficients and its arithmetic. Where the values lie, and in
// which order they are taken, is the business of kernels_maps.h and kernels_reductions.h.
//
// FIXED passes know their activation and extra tensor at compile time, as the hot ones do; the others look them up
// for each vector, which costs little beside what such an activation costs.
#pragma once

#include "kernels_act.h"

namespace {

using syncbn::Act;
using syncbn::Extra;
using syncbn::Job;

constexpr int ANY = -1;

template <class A> struct Coefficients { Pack<A> mean, scale, bias, slope, offset; };

// Coefficients of one channel in every lane, or of as many columns as there are lanes.
template <class A> struct Source {
  const A *mean, *scale, *bias, *slope, *offset;
  explicit Source(const Job& job)
      : mean((const A*)job.mean), scale((const A*)job.scale), bias((const A*)job.bias),
        slope((const A*)job.slope), offset((const A*)job.offset) {}
  template <class F> INLINE Coefficients<A> all(F f) const {
    return {f(mean), f(scale), f(bias), f(slope), f(offset)};
  }
  INLINE Coefficients<A> channel(int64_t c) const {
    return all(LAMBDA(const A* from) { return broadcast<A>(from[c]); });
  }
  INLINE Coefficients<A> columns(int64_t j) const {
    return all(LAMBDA(const A* from) { return load_same(from + j); });
  }
};

// A tensor's values and what the passes share: z and dz.
template <class T, int ACT, int EXTRA> struct Pass {
  using Element = T;
  using A = Statistics<T>;
  const Job& job;
  const T *x, *dy, *extra;
  const int act, role;
  explicit Pass(const Job& given)
      : job(given), x((const T*)given.x), dy((const T*)given.dy), extra((const T*)given.extra),
        act(ACT == ANY ? (int)given.act : ACT), role(EXTRA == ANY ? (int)given.extra_is : EXTRA) {}

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

// ---- maps: what is written where x[i] was read ---------------------------------------------------------------

template <class T, int ACT, int EXTRA> struct Normalize : Pass<T, ACT, EXTRA> {
  using Base = Pass<T, ACT, EXTRA>;
  using Base::Base;
  using A = typename Base::A;
  INLINE Pack<A> operator()(const Coefficients<A>& k, int64_t i) const {
    return map<A>(LAMBDA(auto u) { return activated<A>(u, this->act); }, this->z(k, i));
  }
  INLINE void prefetch(int64_t i) const { __builtin_prefetch(this->x + i); }
};

template <class T, int ACT, int EXTRA> struct BackwardInput : Pass<T, ACT, EXTRA> {
  using Base = Pass<T, ACT, EXTRA>;
  using Base::Base;
  using A = typename Base::A;
  INLINE Pack<A> operator()(const Coefficients<A>& k, int64_t i) const {
    const Pack<A> centred = load(this->x + i) - k.mean;
    return (centred * k.slope + this->dz(k, i) - k.offset) * k.scale;
  }
  INLINE void prefetch(int64_t i) const {
    __builtin_prefetch(this->x + i);
    __builtin_prefetch(this->dy + i);
  }
};

template <class T, int ACT, int EXTRA> struct BackwardResidual : Pass<T, ACT, EXTRA> {
  using Base = Pass<T, ACT, EXTRA>;
  using Base::Base;
  using A = typename Base::A;
  INLINE Pack<A> operator()(const Coefficients<A>& k, int64_t i) const { return this->dz(k, i); }
  INLINE void prefetch(int64_t i) const { __builtin_prefetch(this->dy + i); }
};

// ---- reductions: a value, and what it is multiplied with for the second sum ----------------------------------

template <class A> struct Terms { Pack<A> value, factor; };

template <class T> struct Moments : Pass<T, 0, 0> {
  using Pass<T, 0, 0>::Pass;
  using A = Statistics<T>;
  INLINE Terms<A> operator()(const Coefficients<A>& k, int64_t i) const {
    const Pack<A> deviation = load(this->x + i) - k.mean;
    return {deviation, deviation};
  }
  INLINE void prefetch(int64_t i) const { __builtin_prefetch(this->x + i); }
};

template <class T, int ACT, int EXTRA> struct BackwardSums : Pass<T, ACT, EXTRA> {
  using Base = Pass<T, ACT, EXTRA>;
  using Base::Base;
  using A = typename Base::A;
  INLINE Terms<A> operator()(const Coefficients<A>& k, int64_t i) const {
    return {this->dz(k, i), load(this->x + i) - k.mean};
  }
  INLINE void prefetch(int64_t i) const {
    __builtin_prefetch(this->x + i);
    __builtin_prefetch(this->dy + i);
  }
};

}  // namespace
