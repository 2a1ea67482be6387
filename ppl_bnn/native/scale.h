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
