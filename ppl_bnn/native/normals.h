/* Normal numbers by Box and Muller (1958) from xoshiro128++ (Blackman and Vigna 2021), GENERATORS of it side by side. */

#include <math.h>

#include "elementary.h"

#define GENERATORS 16
#define NUMBERS 4096 /* of one generator: enough to make the seeding cheap, few enough to share among threads */

/* splitmix64: what xoshiro's authors seed it with. */
static uint64_t mixed(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static inline uint32_t turned(uint32_t x, int by) { return x << by | x >> (32 - by); }

static void next(uint32_t s[4][GENERATORS], uint32_t *found) {
    for (int i = 0; i < GENERATORS; i++) {
        found[i] = turned(s[0][i] + s[3][i], 7) + s[0][i];
        const uint32_t shifted = s[1][i] << 9;
        s[2][i] ^= s[0][i];
        s[3][i] ^= s[1][i];
        s[1][i] ^= s[2][i];
        s[0][i] ^= s[3][i];
        s[2][i] ^= shifted;
        s[3][i] = turned(s[3][i], 11);
    }
}

/* Two normal numbers from two words. The polynomials, Chebyshev's, are exact to a float's rounding. */
static inline void pair(uint32_t a, uint32_t b, float *one, float *other) {
    /* 31 bits in (0, 1], of which small ones keep all their digits: the numbers reach 6.7. */
    const float u = (float)(int32_t)(a >> 1) * 0x1p-31f + 0x1p-32f;
    const float square = -2 * logarithm(u), radius = sqrtf(square > 0 ? square : 0);
    /* The angle is b / 2^32 turns: a quarter, and at most an eighth to either side of it. */
    const uint32_t quarter = (b + (1u << 29)) >> 30;
    const float turns = (float)(int32_t)(b - (quarter << 30)) * 0x1p-32f, z = turns * turns;
    const float sine = (((-75.4018403f * z + 81.5925482f) * z - 41.3416626f) * z + 6.28318529f) * turns;
    const float cosine = ((-83.5922144f * z + 64.9212436f) * z - 19.7391522f) * z + 0.999999972f;
    const float x = quarter & 1 ? sine : cosine, y = quarter & 1 ? cosine : sine;
    *one = number(bits(radius * x) ^ ((quarter + 1) & 2) << 30);
    *other = number(bits(radius * y) ^ (quarter & 2) << 30);
}

/* Numbers `chunk` * NUMBERS and on of a seed, at most NUMBERS of them. */
static void fill_chunk(uint64_t seed, long chunk, long count, float *y) {
    uint64_t state = seed;
    state = mixed(&state) + (uint64_t)chunk;
    state = mixed(&state);
    uint32_t s[4][GENERATORS], a[GENERATORS], b[GENERATORS];
    for (int word = 0; word < 4; word++)
        for (int i = 0; i < GENERATORS; i++) s[word][i] = (uint32_t)(mixed(&state) >> 32);
    for (long at = 0; at < count; at += 2 * GENERATORS) {
        float z[2 * GENERATORS];
        next(s, a);
        next(s, b);
        for (int i = 0; i < GENERATORS; i++) pair(a[i], b[i], z + i, z + GENERATORS + i);
        memcpy(y + at, z, sizeof(float) * (count - at < 2 * GENERATORS ? count - at : 2 * GENERATORS));
    }
}
