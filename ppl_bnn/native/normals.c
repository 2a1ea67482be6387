#include "normals.h"

#define CHUNK (64 * GROUP) /* numbers of one task */

void normals(long threads, uint64_t key, uint64_t stream, long count, float *y) {
    const long chunks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (chunks > 1)
    for (long chunk = 0; chunk < chunks; chunk++) {
        const long first = chunk * CHUNK;
        fill(key, stream, first / GROUP, count - first < CHUNK ? count - first : CHUNK, y + first);
    }
}
