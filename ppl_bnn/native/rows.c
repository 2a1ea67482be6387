/* Rows of a file, read into memory one after the other: see rows.py. */
#define _FILE_OFFSET_BITS 64
#include <stdint.h>
#include <unistd.h>

/* Copies `size` bytes from start + rows[k] * stride to out + k * size, k = 0 .. count - 1. Returns how many rows it
   has copied: fewer than count where the file cannot be read there. */
int64_t read_rows(int file, int64_t start, int64_t stride, int64_t size, const int64_t *rows, int64_t count, char *out)
{
    for (int64_t k = 0; k < count; k++) {
        for (int64_t done = 0; done < size;) {
            ssize_t found = pread(file, out + k * size + done, (size_t)(size - done),
                                  (off_t)(start + rows[k] * stride + done));
            if (found <= 0)
                return k;
            done += found;
        }
    }
    return count;
}
