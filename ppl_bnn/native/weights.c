/* The arithmetic of a step over a site's weights, each function one pass over memory: those of normal.py, groups.py and
   ivon.py, under their names there. t are the tensors that they are given, number the scalars. */

#include <math.h>

#include "elementary.h"

#define CHUNK 4096 /* weights of one task */
#define SMALLEST_SCALE 1.2e-7f

typedef float *restrict array;
typedef void kernel(long tensors, float *const *t, const float *number, long n, float *sums);

/* sums is [chunks, 2]. */
void run(kernel *function, long threads, long tensors, float *const *t, const float *number, long count, float *sums) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count > CHUNK)
    for (long first = 0; first < count; first += CHUNK) {
        float *part[tensors];
        for (long i = 0; i < tensors; i++) part[i] = t[i] + first;
        function(tensors, part, number, count - first < CHUNK ? count - first : CHUNK, sums + 2 * (first / CHUNK));
    }
}

static inline float softplus(float u) {
    return (u > 0 ? u : 0) + log_of_one_and(exponential(-fabsf(u))) + SMALLEST_SCALE;
}

static inline float sigmoid(float u) {
    const float t = exponential(-fabsf(u));
    return (u > 0 ? 1 : t) / (1 + t);
}

void scale(long tensors, float *const *t, const float *number, long n, float *sums) {
    array scale = t[0], u = t[1], loc = t[2];
    float squares = 0, logs = 0;
#pragma omp simd reduction(+ : squares, logs)
    for (long i = 0; i < n; i++) {
        const float s = softplus(u[i]);
        scale[i] = s;
        squares += loc[i] * loc[i] + s * s;
        logs += logarithm(s);
    }
    sums[0] = squares, sums[1] = logs;
}

void scale_gradients(long tensors, float *const *t, const float *number, long n, float *sums) {
    array to_loc = t[0], to_u = t[1], loc = t[2], u = t[3], to_scale = t[4];
    const float to_half_squares = number[0], to_logs = number[1];
#pragma omp simd
    for (long i = 0; i < n; i++) {
        const float s = softplus(u[i]);
        to_loc[i] = loc[i] * to_half_squares;
        to_u[i] = sigmoid(u[i]) * (to_scale[i] + s * to_half_squares + to_logs / s);
    }
}

void draw(long tensors, float *const *t, const float *number, long n, float *sums) {
    array draw = t[0], loc = t[1], u = t[2], noise = t[3];
    float squares = 0, logs = 0;
#pragma omp simd reduction(+ : squares, logs)
    for (long i = 0; i < n; i++) {
        const float s = softplus(u[i]);
        draw[i] = loc[i] + s * noise[i];
        squares += loc[i] * loc[i] + s * s;
        logs += logarithm(s);
    }
    sums[0] = squares, sums[1] = logs;
}

void draw_gradients(long tensors, float *const *t, const float *number, long n, float *sums) {
    array to_loc = t[0], to_u = t[1], loc = t[2], u = t[3], noise = t[4], to_draw = t[5];
    const float to_half_squares = number[0], to_logs = number[1];
#pragma omp simd
    for (long i = 0; i < n; i++) {
        const float s = softplus(u[i]);
        to_loc[i] = to_draw[i] + loc[i] * to_half_squares;
        to_u[i] = sigmoid(u[i]) * (to_draw[i] * noise[i] + s * to_half_squares + to_logs / s);
    }
}

void flipped(long tensors, float *const *t, const float *number, long n, float *sums) {
    const long pairs = (tensors - 3) / 3;
    array opposite = t[0], weight = t[2 * pairs + 1], loc = t[2 * pairs + 2];
    float noise[CHUNK];
#pragma omp simd
    for (long i = 0; i < n; i++) {
        noise[i] = weight[i] - loc[i];
        opposite[i] = loc[i] - noise[i];
    }
    for (long pair = 0; pair < pairs; pair++) {
        array plus = t[1 + 2 * pair], minus = t[2 + 2 * pair], flip = t[3 + 2 * pairs + pair];
#pragma omp simd
        for (long i = 0; i < n; i++) {
            plus[i] = loc[i] + flip[i] * noise[i];
            minus[i] = loc[i] - flip[i] * noise[i];
        }
    }
}

void flipped_gradients(long tensors, float *const *t, const float *number, long n, float *sums) {
    const long pairs = (tensors - 3) / 3;
    array to_weight = t[0], to_loc = t[1], to_opposite = t[2];
#pragma omp simd
    for (long i = 0; i < n; i++) {
        to_weight[i] = -to_opposite[i];
        to_loc[i] = 2 * to_opposite[i];
    }
    for (long pair = 0; pair < pairs; pair++) {
        array plus = t[3 + 2 * pair], minus = t[4 + 2 * pair], flip = t[3 + 2 * pairs + pair];
#pragma omp simd
        for (long i = 0; i < n; i++) {
            const float difference = (plus[i] - minus[i]) * flip[i];
            to_weight[i] += difference;
            to_loc[i] += plus[i] + minus[i] - difference;
        }
    }
}

void step(long tensors, float *const *t, const float *number, long n, float *sums) {
    array loc = t[0], u = t[1], momentum = t[2], to_loc = t[3], to_u = t[4];
    const float rate = number[0], c = number[1], beta1 = number[2];
#pragma omp simd
    for (long i = 0; i < n; i++) {
        const float e = exponential(-fabsf(u[i])), positive = u[i] > 0 ? u[i] : 0;
        float s = positive + log_of_one_and(e) + SMALLEST_SCALE;
        const float change = to_u[i] * (1 + e) / (u[i] > 0 ? 1 : e) * s * c;
        s /= sqrtf(1 + change + 0.5f * change * change);
        momentum[i] = to_loc[i] + beta1 * (momentum[i] - to_loc[i]);
        loc[i] -= s * s * rate * momentum[i];
        s -= SMALLEST_SCALE;
        s = s < 1e-9f ? 1e-9f : s;
        u[i] = s + logarithm(complement(-s));
    }
}
