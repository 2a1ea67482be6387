/* exp and log for loops that the compiler turns into vector instructions, to within two units of a float's last place.
   Their polynomials are Chebyshev's. NaN in, NaN out, but for the logarithm. */

#pragma once

#include <stdint.h>
#include <string.h>

static inline uint32_t bits(float x) {
    uint32_t found;
    memcpy(&found, &x, 4);
    return found;
}

static inline float number(uint32_t x) {
    float found;
    memcpy(&found, &x, 4);
    return found;
}

/* log x of a positive, finite x that is not subnormal: x = m 2^e with m between the roots of 1/2 and 2. */
static inline float logarithm(float x) {
    const int32_t e = (int32_t)(bits(x) - 0x3f3504f3) >> 23;
    const float f = number(bits(x) - ((uint32_t)e << 23)) - 1;
    float log = -0.101340568f;
    log = log * f + 0.162341898f;
    log = log * f - 0.172470133f;
    log = log * f + 0.19898565f;
    log = log * f - 0.249700717f;
    log = log * f + 0.333351141f;
    log = log * f - 0.500003631f;
    return (log * f + 0.999999943f) * f + (float)e * 0.693147181f;
}

/* e^rest - 1, and 2^n as `power`, of x = n log 2 + rest <= 0; below -87, where floats end, as at -87. */
static inline float exponents(float x, float *power) {
    x = x < -87 ? -87 : x;
    const float n = (x * 1.44269504f + 12582912.f) - 12582912.f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    *power = number((uint32_t)((int32_t)n + 127) << 23);
    float p = 0.00138814f;
    p = p * r + 0.00836912f;
    p = p * r + 0.04166725f;
    p = p * r + 0.16666506f;
    p = p * r + 0.49999998f;
    return (p * r + 1.00000001f) * r;
}

/* e^x of x <= 0. */
static inline float exponential(float x) {
    float power;
    const float rest = exponents(x, &power);
    return power + power * rest;
}

/* 1 - e^x of x <= 0, to its last digits also near 0. */
static inline float complement(float x) {
    float power;
    const float rest = exponents(x, &power);
    return (1 - power) - power * rest;
}

/* log(1 + t) of t in [0, 1], to its last digits also near 0: what 1 + t rounds off is put back. */
static inline float log_of_one_and(float t) {
    const float sum = 1 + t;
    return logarithm(sum) + (t - (sum - 1)) / sum;
}
