/* Products with a sparse matrix whose pattern is fixed: rows in CSR form, `offset` instead of a column. */

#include <stdlib.h>
#include <string.h>

#define LANES 8
#define PANEL 64
#define MOST 12 /* accumulators: as many as 16 vector registers leave room for */

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));

/* y[0 .. n * LANES) = bias + sum_k value[k] * x[offset[k] ..]; n is a constant where it is inlined. */
static inline __attribute__((always_inline)) void span(int n, long from, long to, const int *offset, const float *value,
                                                       float bias, const float *x, float *y) {
    vector sum[MOST];
#pragma GCC unroll 12
    for (int i = 0; i < n; i++) sum[i] = bias - (vector){0};
    for (long k = from; k < to; k++) {
        const vector *at = (const vector *)(x + offset[k]);
        const float v = value[k];
#pragma GCC unroll 12
        for (int i = 0; i < n; i++) sum[i] += v * at[i];
    }
#pragma GCC unroll 12
    for (int i = 0; i < n; i++) ((vector *)y)[i] = sum[i];
}

static void spans(int n, long from, long to, const int *offset, const float *value, float bias, const float *x,
                  float *y) {
#define CASE(c) case c: span(c, from, to, offset, value, bias, x, y); break;
    switch (n) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
}

/* y[r * stride + t] = bias[r] + sum over row r of value * x[offset + t], for t < length. */
static void product(long rows, long length, long stride, const int *start, const int *offset, const float *value,
                    const float *bias, const float *x, float *y) {
    const long vectors = length / LANES, pieces = (vectors + MOST - 1) / MOST;
    /* Piece by piece, so that what a piece reads of x stays in the cache over all rows. */
    for (long piece = 0, at = 0; piece < pieces; piece++) {
        const long n = (vectors - at) / (pieces - piece);
        for (long r = 0; r < rows; r++)
            spans((int)n, start[r], start[r + 1], offset, value, bias[r], x + at * LANES, y + r * stride + at * LANES);
        at += n;
    }
    for (long r = 0; r < rows; r++)
        for (long t = vectors * LANES; t < length; t++) {
            float sum = bias[r];
            for (long k = start[r]; k < start[r + 1]; k++) sum += value[k] * x[offset[k] + t];
            y[r * stride + t] = sum;
        }
}

/* x [n, columns] -> y [n, rows]; offset is column * PANEL. Returns 0, or 1 where there is no memory. */
int sparse_linear(long n, long columns, long rows, const int *start, const int *offset, const float *value,
                  const float *bias, const float *x, float *y) {
    float *in = calloc((size_t)(columns + rows) * PANEL, sizeof(float)), *out = in + columns * PANEL;
    if (!in) return 1;
    for (long first = 0; first < n; first += PANEL) {
        const long m = n - first < PANEL ? n - first : PANEL;
        const long length = m == 1 ? 1 : (m + LANES - 1) / LANES * LANES;
        for (long c = 0; c < columns; c++)
            for (long i = 0; i < m; i++) in[c * PANEL + i] = x[(first + i) * columns + c];
        product(rows, length, PANEL, start, offset, value, bias, in, out);
        for (long i = 0; i < m; i++)
            for (long r = 0; r < rows; r++) y[(first + i) * rows + r] = out[r * PANEL + i];
    }
    free(in);
    return 0;
}

/* x [n, inputs] -> y [n, rows, stride]: windows of one image, an offset for each weight of the kernel. */
int sparse_windows(long n, long inputs, long rows, long length, long stride, const int *start, const int *offset,
                   const float *value, const float *bias, const float *x, float *y) {
    for (long i = 0; i < n; i++)
        product(rows, length, stride, start, offset, value, bias, x + i * inputs, y + i * rows * stride);
    return 0;
}
