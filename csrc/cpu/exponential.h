// The exponential function, as a loop the compiler vectorises.
#pragma once

#include "numbers.h"

namespace w2a4::cpu {

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87; NaN stays.
W2A4_INLINE float exp_negative(float x) {
  const float n = round_even(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2, ln 2 in two parts
  float e = 1.0f / 5040;
  e = e * r + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  // The lowest bits of n + 1.5 * 2**23 are the integer n; moved to the exponent they are 2**n.
  const uint32_t shifted = bits<uint32_t>(n + 12582912.0f) << 23;
  const float scaled = bits<float>(bits<uint32_t>(e) + shifted);
  return x < -87.0f ? 0.0f : (x == x ? scaled : x);
}

}  // namespace w2a4::cpu
