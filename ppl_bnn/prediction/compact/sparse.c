/* Layers with few weights: rows in CSR form, and in place of a column the `offset` at which its numbers start. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../../native/normals.h"

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define PANEL 32 /* rows of a batch that are worked on together; a column is then two lines of the cache */
#define DRAWS (PANEL / 2)
#define MOST 12 /* accumulators: as many as 16 vector registers leave room for */

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int mask __attribute__((vector_size(4 * LANES), aligned(4)));

/* The columns fall into blocks, each of which fits in the nearest cache: row r has its weights in block b from
   start[r * blocks + b] up to the next start. With a variance the layer gives each unit's mean and variance. */
typedef struct {
    long rows, columns, blocks, relu;
    const int *start, *offset;
    const float *value, *bias, *variance, *bias_variance;
} layer;

/* n vectors of row r, from x to y, over block b. u weights at once, where n sums alone would wait for each other.
   n, u and two are constants where it is inlined: with two, the first half of the vectors is h, the other h^2. */
static inline __attribute__((always_inline)) void span(int n, int u, int two, const layer *l, long r, long b,
                                                       const float *x, float *y) {
    vector sum[MOST], *to = (vector *)y;
#define VALUE(i, a) (two && i >= n / 2 ? l->variance a : l->value a)
#pragma GCC unroll 12
    for (int i = 0; i < n * u; i++)
        sum[i] = i >= n ? (vector){0} : b ? to[i] : (two && i >= n / 2 ? l->bias_variance : l->bias)[r] - (vector){0};
    long k = l->start[r * l->blocks + b];
    const long end = l->start[r * l->blocks + b + 1];
    for (; k + u <= end; k += u)
#pragma GCC unroll 12
        for (int i = 0; i < n * u; i++)
            sum[i] += VALUE(i % n, [k + i / n]) * ((const vector *)(x + l->offset[k + i / n]))[i % n];
    for (; u > 1 && k < end; k++)
#pragma GCC unroll 12
        for (int i = 0; i < n; i++) sum[i] += VALUE(i, [k]) * ((const vector *)(x + l->offset[k]))[i];
#pragma GCC unroll 12
    for (int i = n; i < n * u; i++) sum[i % n] += sum[i];
    const int relu = !two && l->relu && b == l->blocks - 1;
#pragma GCC unroll 12
    for (int i = 0; i < n; i++) to[i] = relu ? (vector)((mask)sum[i] & ~(sum[i] < 0)) : sum[i];
}

/* y[r * stride + t] = bias[r] + sum over row r of value * x[offset + t], for t < length, and its ReLU. */
static void product(const layer *l, long length, long stride, const float *x, float *y) {
    const long vectors = length / LANES, pieces = (vectors + MOST - 1) / MOST;
    for (long piece = 0, at = 0; piece < pieces; piece++) {
        const long n = (vectors - at) / (pieces - piece);
        for (long b = 0; b < l->blocks; b++)
            for (long r = 0; r < l->rows; r++) {
                const float *from = x + at * LANES;
                float *to = y + r * stride + at * LANES;
#define CASE(n, u) case n: span(n, u, 0, l, r, b, from, to); break;
                switch (n) {
                    CASE(1, 8) CASE(2, 4) CASE(3, 3) CASE(4, 2) CASE(5, 2) CASE(6, 2)
                    CASE(7, 1) CASE(8, 1) CASE(9, 1) CASE(10, 1) CASE(11, 1) CASE(12, 1)
                }
            }
        at += n;
    }
    for (long r = 0; r < l->rows; r++)
        for (long t = vectors * LANES; t < length; t++) {
            float sum = l->bias[r];
            for (long k = l->start[r * l->blocks]; k < l->start[(r + 1) * l->blocks]; k++)
                sum += l->value[k] * x[l->offset[k] + t];
            y[r * stride + t] = l->relu && sum < 0 ? 0 : sum;
        }
}

static long widest(long count, const layer *l) {
    long found = l->columns;
    for (long i = 0; i < count; i++) found = l[i].rows > found ? l[i].rows : found;
    return found;
}

/* x [n, columns] -> y [n, rows] through all the layers, panel by panel; offset is column * PANEL. 1: no memory. */
int sparse_chain(long threads, long count, const layer *l, long n, const float *x, float *y) {
    const long size = widest(count, l) * PANEL, columns = l->columns, rows = l[count - 1].rows;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *space = calloc(2 * size, sizeof(float)), *in = space, *out = space + size;
        if (!space) failed = 1;
#pragma omp for schedule(dynamic)
        for (long first = 0; first < n; first += PANEL) {
            if (!space) continue;
            const long m = n - first < PANEL ? n - first : PANEL;
            for (long c = 0; c < columns; c++)
                for (long i = 0; i < m; i++) in[c * PANEL + i] = x[(first + i) * columns + c];
            for (long i = 0; i < count; i++) {
                product(l + i, (m + LANES - 1) / LANES * LANES, PANEL, in, out);
                float *other = in;
                in = out, out = other;
            }
            for (long i = 0; i < m; i++)
                for (long r = 0; r < rows; r++) y[(first + i) * rows + r] = in[r * PANEL + i];
        }
        free(space);
    }
    return failed;
}

/* Mean and variance [2, n] of row r of the first layer, whose inputs are x [n, columns]. */
static void first_moments(const layer *l, long r, long n, const float *x, float *found) {
    const long from = l->start[r * l->blocks], end = l->start[(r + 1) * l->blocks];
    for (long i = 0; i < n; i++, x += l->columns) {
        float mean = l->bias[r], variance = l->bias_variance[r];
#pragma omp simd reduction(+ : mean, variance)
        for (long k = from; k < end; k++) {
            const float h = x[l->offset[k] / PANEL];
            mean += l->value[k] * h;
            variance += l->variance[k] * h * h;
        }
        found[i] = mean, found[n + i] = variance;
    }
}

/* h = mean + sqrt(variance) * noise and its ReLU: rows of [mean, variance] become rows of [h, h^2]. */
static void sample(const layer *l, const float *noise, float *y) {
    const float least = l->relu ? 0 : -INFINITY;
    for (long r = 0; r < l->rows; r++) {
        float *mean = y + r * PANEL, *variance = mean + DRAWS;
        for (int t = 0; t < DRAWS; t++) {
            const float h = mean[t] + sqrtf(variance[t] > 0 ? variance[t] : 0) * noise[r * DRAWS + t];
            mean[t] = h < least ? least : h;
            variance[t] = mean[t] * mean[t];
        }
    }
}

/* Draws of layer outputs of x [n, columns] -> y [draws, n, rows]. A panel is of one example, with h and h^2 of 16 draws.
   noise is [panels of draws, groups * GROUP], of which each begins with [rows of all layers, 16]; without it they are
   made of the seed. */
int sparse_draws(long threads, long count, const layer *l, long n, long draws, const float *x, const float *noise,
                 uint64_t seed, float *y) {
    const long size = widest(count, l) * PANEL, rows = l[count - 1].rows, panels = (draws + DRAWS - 1) / DRAWS;
    float *moments = malloc(2 * l->rows * n * sizeof(float));
    int failed = !moments;
    long units = 0;
    for (long at = 0; at < count; at++) units += l[at].rows;
    const long numbers = units * DRAWS, groups = (numbers + GROUP - 1) / GROUP;
#pragma omp parallel num_threads(threads)
    {
        float *space = malloc((2 * size + numbers) * sizeof(float)), *in = space, *out = space + size;
        if (!space) failed = 1;
#pragma omp for
        for (long r = 0; r < l->rows; r++)
            if (moments) first_moments(l, r, n, x, moments + 2 * r * n);
#pragma omp for schedule(dynamic)
        for (long panel = 0; panel < n * panels; panel++) {
            if (!space || !moments) continue;
            const long i = panel / panels, first = panel % panels * DRAWS;
            const long m = draws - first < DRAWS ? draws - first : DRAWS;
            const float *eps = noise ? noise + panel % panels * groups * GROUP : space + 2 * size;
            if (!noise) fill(seed, 0, panel % panels * groups, numbers, space + 2 * size);
            for (long r = 0; r < l->rows; r++)
                for (int t = 0; t < PANEL; t++) in[r * PANEL + t] = moments[(2 * r + t / DRAWS) * n + i];
            sample(l, eps, in);
            for (long at = 1; at < count; at++) {
                eps += l[at - 1].rows * DRAWS;
                for (long b = 0; b < l[at].blocks; b++)
                    for (long r = 0; r < l[at].rows; r++)
                        span(PANEL / LANES, 8 * LANES / PANEL, 1, l + at, r, b, in, out + r * PANEL);
                sample(l + at, eps, out);
                float *other = in;
                in = out, out = other;
            }
            for (long t = 0; t < m; t++)
                for (long r = 0; r < rows; r++) y[((first + t) * n + i) * rows + r] = in[r * PANEL + t];
        }
        free(space);
    }
    free(moments);
    return failed;
}

/* The largest of every window of size^2 of x, rows `stride` apart -> y [height / size, width / size]. */
static void pool(long size, long height, long width, long stride, const float *x, float *y) {
    float row[width];
    for (long down = 0; down + size <= height; down += size) {
        memcpy(row, x + down * stride, width * sizeof(float));
        for (long i = 1; i < size; i++)
            for (long t = 0; t < width; t++) {
                const float other = x[(down + i) * stride + t];
                row[t] = row[t] < other ? other : row[t];
            }
        for (long across = 0; across + size <= width; across += size) {
            float most = row[across];
            for (long i = 1; i < size; i++) most = most < row[across + i] ? row[across + i] : most;
            *y++ = most;
        }
    }
}

/* x [n, columns] -> y [n, rows, height / size, width / size]: windows of one image, whose rows are `stride` apart, with an
   offset for each weight of the kernel; then max pooling. */
int sparse_windows(long threads, const layer *l, long n, long height, long width, long stride, long size,
                   const float *x, float *y) {
    const long found = (height / size) * (width / size), length = (height - 1) * stride + width, room = height * stride;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *space = malloc(l->rows * room * sizeof(float));
        if (!space) failed = 1;
#pragma omp for schedule(dynamic)
        for (long i = 0; i < n; i++) {
            if (!space) continue;
            product(l, length, room, x + i * l->columns, space);
            for (long r = 0; r < l->rows; r++)
                pool(size, height, width, stride, space + r * room, y + (i * l->rows + r) * found);
        }
        free(space);
    }
    return failed;
}
