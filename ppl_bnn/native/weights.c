/* The arithmetic of a step over a site's weights, each function one pass over memory; weights.py defines what they
   compute, and the table in arithmetic.py names them. t are a function's tensors and then its lists of tensors, each a
   list: t[argument][element], of which the lists have `length`; number are its scalars. */

#include "scale.h"

#include "expectations.h"

#define CHUNK 4096 /* weights of one task */

typedef float *restrict array;
typedef void kernel(float *const *const *t, long length, const float *number, long n, float *sums);

/* all are the tensors and then the elements of the lists, one after the other; sums is [chunks, 2]. */
void run(kernel *function, long threads, long tensors, long lists, long length, float *const *all, const float *number,
         long count, float *sums) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count > CHUNK)
    for (long first = 0; first < count; first += CHUNK) {
        float *part[tensors + lists * length], *const *t[tensors + lists];
        for (long i = 0; i < tensors + lists * length; i++) part[i] = all[i] + first;
        for (long i = 0; i < tensors; i++) t[i] = part + i;
        for (long i = 0; i < lists; i++) t[tensors + i] = part + tensors + i * length;
        function(t, length, number, count - first < CHUNK ? count - first : CHUNK, sums + 2 * (first / CHUNK));
    }
}

void scale(float *const *const *t, long length, const float *number, long n, float *sums) {
    array scale = *t[0], u = *t[1], loc = *t[2];
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

void scale_gradients(float *const *const *t, long length, const float *number, long n, float *sums) {
    array to_loc = *t[0], to_u = *t[1], loc = *t[2], u = *t[3], to_scale = *t[4];
    const float to_half_squares = number[0], to_logs = number[1];
#pragma omp simd
    for (long i = 0; i < n; i++) {
        const float s = softplus(u[i]);
        to_loc[i] = loc[i] * to_half_squares;
        to_u[i] = sigmoid(u[i]) * (to_scale[i] + s * to_half_squares + to_logs / s);
    }
}

void draw(float *const *const *t, long length, const float *number, long n, float *sums) {
    array draw = *t[0], loc = *t[1], u = *t[2], noise = *t[3];
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

void draw_gradients(float *const *const *t, long length, const float *number, long n, float *sums) {
    array to_loc = *t[0], to_u = *t[1], loc = *t[2], u = *t[3], noise = *t[4], to_draw = *t[5];
    const float to_half_squares = number[0], to_logs = number[1];
#pragma omp simd
    for (long i = 0; i < n; i++) {
        const float s = softplus(u[i]);
        to_loc[i] = to_draw[i] + loc[i] * to_half_squares;
        to_u[i] = sigmoid(u[i]) * (to_draw[i] * noise[i] + s * to_half_squares + to_logs / s);
    }
}

void flipped(float *const *const *t, long length, const float *number, long n, float *sums) {
    array opposite = *t[0], weight = *t[1], loc = *t[2];
    float noise[CHUNK];
#pragma omp simd
    for (long i = 0; i < n; i++) {
        noise[i] = weight[i] - loc[i];
        opposite[i] = loc[i] - noise[i];
    }
    for (long pair = 0; pair < length; pair++) {
        array plus = t[3][pair], minus = t[4][pair], flip = t[5][pair];
#pragma omp simd
        for (long i = 0; i < n; i++) {
            plus[i] = loc[i] + flip[i] * noise[i];
            minus[i] = loc[i] - flip[i] * noise[i];
        }
    }
}

void flipped_gradients(float *const *const *t, long length, const float *number, long n, float *sums) {
    array to_weight = *t[0], to_loc = *t[1], to_opposite = *t[2];
#pragma omp simd
    for (long i = 0; i < n; i++) {
        to_weight[i] = -to_opposite[i];
        to_loc[i] = 2 * to_opposite[i];
    }
    for (long pair = 0; pair < length; pair++) {
        array plus = t[3][pair], minus = t[4][pair], flip = t[5][pair];
#pragma omp simd
        for (long i = 0; i < n; i++) {
            const float difference = (plus[i] - minus[i]) * flip[i];
            to_weight[i] += difference;
            to_loc[i] += plus[i] + minus[i] - difference;
        }
    }
}

void ivon_step(float *const *const *t, long length, const float *number, long n, float *sums) {
    array loc = *t[0], u = *t[1], momentum = *t[2], to_loc = *t[3], to_u = *t[4];
    const float rate = number[0], c = number[1], beta1 = number[2];
#pragma omp simd
    for (long i = 0; i < n; i++) ivon_of(loc + i, u + i, momentum + i, to_loc[i], to_u[i], rate, c, beta1);
}

void student_t(float *const *const *t, long length, const float *number, long n, float *sums) {
    array to_loc = *t[0], to_u = *t[1], loc = *t[2], u = *t[3];
    const float center = number[1], inverse = 1 / number[2], power = number[3], factor = number[0] * power * inverse;
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (long i = 0; i < n; i++) {
        const expectation found = expected_log((loc[i] - center) * inverse, softplus(u[i]) * inverse);
        to_loc[i] += factor * found.to_x;
        to_u[i] += factor * found.to_r * sigmoid(u[i]);
        total += found.value;
    }
    sums[0] = n * number[4] + power * total, sums[1] = 0;
}

void scale_mixture(float *const *const *t, long length, const float *number, long n, float *sums) {
    array to_loc = *t[0], to_u = *t[1], loc = *t[2], u = *t[3];
    const float k = number[0], c = number[1], root = number[2], precision = number[3], step = number[5];
    float scale[CHUNK], x[CHUNK], r[CHUNK], value[CHUNK], to_x[CHUNK], to_r[CHUNK], total = 0;
    int place[CHUNK], wide = 0, narrow = n;
#pragma omp simd
    for (long i = 0; i < n; i++) scale[i] = softplus(u[i]);
    /* The weights of a large scale come first, the others last. */
    for (long i = 0; i < n; i++) {
        place[i] = root * scale[i] * NARROW >= step ? wide++ : --narrow;
        x[place[i]] = root * loc[i], r[place[i]] = root * scale[i];
    }
    expected_softplus_wide(x, r, c, step, wide, value, to_x, to_r);
    expected_softplus_narrow(x + wide, r + wide, c, n - wide, value + wide, to_x + wide, to_r + wide);
#pragma omp simd reduction(+ : total)
    for (long i = 0; i < n; i++) {
        const int own = place[i];
        to_loc[i] += k * (precision * loc[i] - root * to_x[own]);
        to_u[i] += k * (precision * scale[i] - root * to_r[own]) * sigmoid(u[i]);
        total += 0.5f * precision * (loc[i] * loc[i] + scale[i] * scale[i]) - value[own];
    }
    sums[0] = n * number[4] + total, sums[1] = 0;
}
