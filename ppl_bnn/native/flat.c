/* A step's arithmetic over all the weights of a posterior, site after site in one buffer; flat.py defines it. A task is
   a part of one site: its site, its first weight in the buffer, and how many. */

#include "normals.h"
#include "scale.h"

#define MOST 4096 /* weights of a task, a multiple of GROUP */
#define COPIES 8  /* most values of a weight */

enum { DRAW, VARIANCE, FLIPPED };

typedef struct {
    long site, first, count;
} task;

typedef struct {
    long first, kind, group; /* in the buffer; see above; of sites whose sums are added */
    uint64_t seed;           /* of the noise */
    float centre;            /* of the squares */
    float rate;              /* of IVON's step of loc */
    float squares, logs;     /* factors of the gradient of half the squares, and of the logarithms */
    const float *to_value[COPIES]; /* gradients by back-propagation of the values, or NULL */
    const float *to_loc, *to_u;    /* of loc and unconstrained scale */
} site;

static const float none[MOST];

/* values [copies, n] are the draw, or the variance, in the first row; FLIPPED has loc - (draw - loc) in the second, and in
   each two rows from there on loc + flip (draw - loc) and loc - flip (draw - loc), of a row of flips. sums [groups, 2] are
   of (loc - centre)^2 + scale^2 and of log scale; part is scratch, [tasks, 2]. */
void draws(long threads, long tasks, const task *all, const site *sites, const float *loc_, const float *u_,
           float *noise_, long n, long copies, float *values, const float *flips, double *part, long groups,
           double *sums) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tasks > 1)
    for (long t = 0; t < tasks; t++) {
        const task own = all[t];
        const site *s = sites + own.site;
        const float *restrict loc = loc_ + own.first, *restrict u = u_ + own.first, centre = s->centre;
        float *restrict value = values + own.first, *restrict noise = noise_ + own.first;
        float squares = 0, logs = 0;
        if (s->kind != VARIANCE) {
            fill(s->seed, 0, (own.first - s->first) / GROUP, own.count, noise);
#pragma omp simd reduction(+ : squares, logs)
            for (long i = 0; i < own.count; i++) {
                const float scale = softplus(u[i]), away = loc[i] - centre;
                value[i] = loc[i] + scale * noise[i];
                squares += away * away + scale * scale;
                logs += logarithm(scale);
            }
        } else {
#pragma omp simd reduction(+ : squares, logs)
            for (long i = 0; i < own.count; i++) {
                const float scale = softplus(u[i]), away = loc[i] - centre;
                value[i] = scale * scale;
                squares += away * away + scale * scale;
                logs += logarithm(scale);
            }
        }
        if (s->kind == FLIPPED) {
            float *restrict opposite = value + n, away[MOST];
#pragma omp simd
            for (long i = 0; i < own.count; i++) {
                away[i] = value[i] - loc[i];
                opposite[i] = loc[i] - away[i];
            }
            for (long copy = 2; copy < copies; copy++) {
                const float *restrict flip = flips + (copy / 2 - 1) * n + own.first, sign = copy % 2 ? -1 : 1;
                float *restrict flipped = value + copy * n;
#pragma omp simd
                for (long i = 0; i < own.count; i++) flipped[i] = loc[i] + sign * flip[i] * away[i];
            }
        }
        part[2 * t] = squares, part[2 * t + 1] = logs;
    }
    for (long i = 0; i < 2 * groups; i++) sums[i] = 0;
    for (long t = 0; t < tasks; t++) {
        double *own = sums + 2 * sites[all[t].site].group;
        own[0] += part[2 * t], own[1] += part[2 * t + 1];
    }
}

/* Gradients of loc and unconstrained scale; returns the sum of their squares. to_u may be the noise's own memory; part
   is scratch, [tasks]. */
double gradients(long threads, long tasks, const task *all, const site *sites, const float *loc_, const float *u_,
                 const float *noise_, long n, long copies, const float *flips, float *to_loc_, float *to_u_,
                 double *part) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tasks > 1)
    for (long t = 0; t < tasks; t++) {
        const task own = all[t];
        const site *s = sites + own.site;
        const long within = own.first - s->first;
        const float *restrict loc = loc_ + own.first, *restrict u = u_ + own.first, *noise = noise_ + own.first;
        const float *by_value = s->to_value[0] ? s->to_value[0] + within : none, *restrict by_noise = by_value;
        const float *restrict by_loc = s->to_loc ? s->to_loc + within : none;
        const float *restrict by_u = s->to_u ? s->to_u + within : none;
        float *restrict to_loc = to_loc_ + own.first, *to_u = to_u_ + own.first;
        const float centre = s->centre, squares = s->squares, logs = s->logs;
        float norm = 0, sum[MOST], difference[MOST];
        if (s->kind == FLIPPED) {
            const float *other = s->to_value[1] ? s->to_value[1] + within : none;
#pragma omp simd
            for (long i = 0; i < own.count; i++) {
                sum[i] = by_value[i] + other[i];
                difference[i] = by_value[i] - other[i];
            }
            for (long copy = 2; copy < copies; copy++) {
                if (!s->to_value[copy]) continue;
                const float *restrict flip = flips + (copy / 2 - 1) * n + own.first, sign = copy % 2 ? -1 : 1;
                const float *by_copy = s->to_value[copy] + within;
#pragma omp simd
                for (long i = 0; i < own.count; i++) {
                    sum[i] += by_copy[i];
                    difference[i] += sign * flip[i] * by_copy[i];
                }
            }
            by_value = sum, by_noise = difference;
        }
        if (s->kind != VARIANCE) {
#pragma omp simd reduction(+ : norm)
            for (long i = 0; i < own.count; i++) {
                const float scale = softplus(u[i]), slope = sigmoid(u[i]);
                to_loc[i] = by_value[i] + by_loc[i] + (loc[i] - centre) * squares;
                to_u[i] = slope * (by_noise[i] * noise[i] + scale * squares + logs / scale) + by_u[i];
                norm += to_loc[i] * to_loc[i] + to_u[i] * to_u[i];
            }
        } else {
#pragma omp simd reduction(+ : norm)
            for (long i = 0; i < own.count; i++) {
                const float scale = softplus(u[i]), slope = sigmoid(u[i]);
                to_loc[i] = by_loc[i] + (loc[i] - centre) * squares;
                to_u[i] = slope * (scale * (2 * by_value[i] + squares) + logs / scale) + by_u[i];
                norm += to_loc[i] * to_loc[i] + to_u[i] * to_u[i];
            }
        }
        part[t] = norm;
    }
    double sum = 0;
    for (long t = 0; t < tasks; t++) sum += part[t];
    return sum;
}

/* IVON's step; each site has a rate of its own. */
void ivon(long threads, long tasks, const task *all, const site *sites, float *loc_, float *u_, float *momentum_,
          const float *to_loc_, const float *to_u_, float c, float beta1) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tasks > 1)
    for (long t = 0; t < tasks; t++) {
        const task own = all[t];
        const float rate = sites[own.site].rate;
        float *restrict loc = loc_ + own.first, *restrict u = u_ + own.first, *restrict momentum = momentum_ + own.first;
        const float *restrict to_loc = to_loc_ + own.first, *restrict to_u = to_u_ + own.first;
#pragma omp simd
        for (long i = 0; i < own.count; i++) ivon_of(loc + i, u + i, momentum + i, to_loc[i], to_u[i], rate, c, beta1);
    }
}
