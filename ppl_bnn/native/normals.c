#include "normals.h"

/* Normal numbers that depend on the seed and their position alone. */
void normals(long threads, uint64_t seed, long count, float *y) {
    const long chunks = (count + NUMBERS - 1) / NUMBERS;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (chunks > 1)
    for (long chunk = 0; chunk < chunks; chunk++) {
        const long first = chunk * NUMBERS;
        fill_chunk(seed, chunk, count - first < NUMBERS ? count - first : NUMBERS, y + first);
    }
}
