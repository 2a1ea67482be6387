/* Normal numbers by Box and Muller (1958) from Philox 4x32-10 (Salmon, Moraes, Dror and Shaw 2011). normals.py defines
   them: a number depends on key, stream and position alone. Here COUNTERS counters are worked on side by side. */

#include <math.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "elementary.h"

#define COUNTERS 16
#define GROUP (4 * COUNTERS) /* their numbers, of which w * COUNTERS + i is of word w of counter i */
#define SETS 4 /* independent chains, for the processor to have something to do while it waits for one */
#ifdef __AVX512F__
#define WIDTH 8
#define STEPS (wide){0, 2, 4, 6, 8, 10, 12, 14}
#else
#define WIDTH 4
#define STEPS (wide){0, 2, 4, 6}
#endif
#define GROUPS (SETS * WIDTH / COUNTERS)

/* A word of WIDTH counters, in the lower halves; what is in the upper halves does not matter. */
typedef uint64_t wide __attribute__((vector_size(8 * WIDTH)));

static inline wide times(wide x, uint32_t by) {
#if defined __AVX512F__
    return (wide)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(by));
#elif defined __AVX2__
    return (wide)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(by));
#else
    return (x & 0xffffffff) * by;
#endif
}

static inline __attribute__((always_inline)) void philox(uint64_t key, wide x[4][SETS]) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
#pragma GCC unroll 4
        for (int i = 0; i < SETS; i++) {
            const wide p = times(x[0][i], 0xd2511f53u), q = times(x[2][i], 0xcd9e8d57u);
            x[0][i] = (q >> 32) ^ x[1][i] ^ k0;
            x[2][i] = (p >> 32) ^ x[3][i] ^ k1;
            x[1][i] = q;
            x[3][i] = p;
        }
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
}

/* The words of counters at * COUNTERS and on. Even counters are in the sets 0 and 2, odd ones in those behind them. */
static inline __attribute__((always_inline)) void counted(uint64_t key, uint64_t stream, uint64_t at,
                                                          uint32_t words[GROUPS][4][COUNTERS]) {
    wide x[4][SETS];
#pragma GCC unroll 4
    for (int i = 0; i < SETS; i++) {
        x[0][i] = STEPS + (at * COUNTERS + i / 2 * 2 * WIDTH + i % 2);
        x[1][i] = x[0][i] >> 32;
        x[2][i] = (wide){0} + (uint32_t)stream;
        x[3][i] = (wide){0} + (stream >> 32);
    }
    philox(key, x);
#pragma GCC unroll 2
    for (int i = 0; i < SETS; i += 2)
#pragma GCC unroll 4
        for (int w = 0; w < 4; w++) {
            const wide both = (x[w][i] & 0xffffffff) | x[w][i + 1] << 32;
            memcpy(words[i * WIDTH / COUNTERS][w] + i * WIDTH % COUNTERS, &both, sizeof both);
        }
}

/* Two normal numbers from two words. u has 31 bits in (0, 1], of which small ones keep all their digits: the numbers
   reach 6.7. Two bits of b are the numbers' signs, the rest is an angle in the first quarter, (1 + t) pi / 4. The
   polynomials, Chebyshev's, are cos and sin of t pi / 4, by the root of 1/2, to a float's rounding. */
static inline void pair(uint32_t a, uint32_t b, float *one, float *other) {
    const float u = (float)(int32_t)(a >> 1) * 0x1p-31f + 0x1p-32f, radius = sqrtf(-2 * logarithm(u));
    const float t = (float)(int32_t)(b << 2) * 0x1p-31f, z = t * t;
    const float cosine = ((-0.000225481497f * z + 0.011207581f) * z - 0.218088881f) * z + 0.707106762f;
    const float sine = (((-2.54235995e-05f * z + 0.00176070081f) * z - 0.0570956445f) * z + 0.555360366f) * t;
    *one = number(bits(radius * (cosine - sine)) ^ (b & 0x80000000u));
    *other = number(bits(radius * (cosine + sine)) ^ (b << 1 & 0x80000000u));
}

/* `count` numbers of a (key, stream), from number `group` * GROUP on. */
static void fill(uint64_t key, uint64_t stream, long group, long count, float *y) {
    for (long at = 0; at < count; at += GROUPS * GROUP) {
        uint32_t words[GROUPS][4][COUNTERS] __attribute__((aligned(64)));
        float z[GROUPS * GROUP], *to = count - at < GROUPS * GROUP ? z : y + at;
        counted(key, stream, group + at / GROUP, words);
        for (int g = 0; g < GROUPS; g++)
            for (int w = 0; w < 4; w += 2) {
                float *found = to + g * GROUP + w * COUNTERS;
#pragma omp simd
                for (int i = 0; i < COUNTERS; i++)
                    pair(words[g][w][i], words[g][w + 1][i], found + i, found + COUNTERS + i);
            }
        if (to == z) memcpy(y + at, z, sizeof(float) * (count - at));
    }
}
