// The activations of syncbn/norm/backends/activations.py and their derivatives, on vectors. Kinks and NaN behave as in
// torch: NaN fails each comparison, and takes the branch which keeps it.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

// e^x to 2 units in the last place, x clamped where float would overflow: x = n ln 2 + r, 2^n built from bits, e^r
// a polynomial (Cephes' expf).
INLINE Floats exponential(Floats x) {
  x = x < -87.3f ? Floats{} - 87.3f : x;
  x = x > 88.3f ? Floats{} + 88.3f : x;
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the last bits
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Words power = (bits_as<Words>(shifted) + 127u) << 23;
  return p * bits_as<Floats>(power);
}

INLINE Floats sigmoid(Floats z) { return 1.0f / (1.0f + exponential(-z)); }

template <class Piece> INLINE Piece silu(Piece z) { return z; }  // ATen serves float64
template <> INLINE Floats silu(Floats z) { return z * sigmoid(z); }

template <class Piece> INLINE Piece silu_derivative(Piece z) { return z; }
template <> INLINE Floats silu_derivative(Floats z) {
  const Floats gate = sigmoid(z);
  return gate * (1.0f + z * (1.0f - gate));
}

template <class Piece, class A> INLINE Piece clamp(Piece z, A low, A high) {
  z = z <= low ? Piece{} + low : z;
  return z >= high ? Piece{} + high : z;
}

template <class A, class Piece> INLINE Piece activated(Piece z, int act) {
  switch (act) {
    case syncbn::RELU: return z <= 0 ? Piece{} : z;
    case syncbn::RELU6: return clamp(z, A(0), A(6));
    case syncbn::LEAKY_RELU: return z > 0 ? z : z * A(0.01);
    case syncbn::SILU: return silu(z);
    case syncbn::HARDSWISH: return z * clamp(z + A(3), A(0), A(6)) * A(1.0 / 6);
    default: return z;
  }
}

// dz = dy * act'(z).
template <class A, class Piece> INLINE Piece before_act(Piece dy, Piece z, int act) {
  switch (act) {
    case syncbn::RELU: return z > 0 ? dy : Piece{};
    case syncbn::RELU6: return z > 0 ? (z < 6 ? dy : Piece{}) : Piece{};
    case syncbn::LEAKY_RELU: return z > 0 ? dy : dy * A(0.01);
    case syncbn::SILU: return dy * silu_derivative(z);
    case syncbn::HARDSWISH: return dy * (z < -3 ? Piece{} : z <= 3 ? z * A(1.0 / 3) + A(0.5) : Piece{} + A(1));
    default: return dy;
  }
}

}  // namespace
