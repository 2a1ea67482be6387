/* The scale of an unconstrained scale, as native/weights.py defines it. */

#include <math.h>

#include "elementary.h"

#define SMALLEST_SCALE 1.2e-7f

static inline float softplus(float u) {
    return (u > 0 ? u : 0) + log_of_one_and(exponential(-fabsf(u))) + SMALLEST_SCALE;
}

static inline float sigmoid(float u) {
    const float t = exponential(-fabsf(u));
    return (u > 0 ? 1 : t) / (1 + t);
}

/* IVON's step of one weight, as `ivon_step` in weights.py. */
static inline void ivon_of(float *loc, float *u, float *momentum, float to_loc, float to_u, float rate, float c,
                           float beta1) {
    const float e = exponential(-fabsf(*u)), positive = *u > 0 ? *u : 0;
    float s = positive + log_of_one_and(e) + SMALLEST_SCALE;
    const float change = to_u * (1 + e) / (*u > 0 ? 1 : e) * s * c;
    s /= sqrtf(1 + change + 0.5f * change * change);
    *momentum = to_loc + beta1 * (*momentum - to_loc);
    *loc -= s * s * rate * *momentum;
    s -= SMALLEST_SCALE;
    s = s < 1e-9f ? 1e-9f : s;
    *u = s + logarithm(complement(-s));
}
