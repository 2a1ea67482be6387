/* Expectations under a Normal, e ~ Normal(0, 1), as expectations.py defines them and says where they come from. */

typedef struct {
    float value, to_x, to_r;
} expectation;

/* A polynomial at z + i iz: by a recurrence with the series' real coefficients, of z and square = z^2 + iz^2. */
static inline float polynomial(const float *series, int count, float z, float iz, float square, float *imaginary) {
    float one = series[count - 1], other = 0;
    for (int n = count - 2; n > 0; n--) {
        const float next = series[n] + 2 * z * one - square * other;
        other = one;
        one = next;
    }
    *imaginary = iz * one;
    return series[0] + z * one - square * other;
}

/* The coefficients of R and of Q, from the lowest power: what `_series` returns. */
static const float rest[] = {
    -0.88520346f, -0.691368191f, -0.473013641f, -0.279881438f, -0.140061824f, -0.0568476246f, -0.0170083468f,
    -0.002615087f, 0.000571847643f, 0.000475418515f, 9.043494e-05f, -2.95035698e-05f, -1.85405734e-05f,
    -2.7418468e-07f, 2.44435272e-06f,
};
static const float rise[] = {
    2.71275439f, 1.05765246f, 0.518919188f, 0.257335367f, 0.119112173f, 0.0488651319f, 0.0167713511f,
    0.00433035503f, 0.000575503422f, -0.000121450231f, -8.80030004e-05f, -1.4879446e-05f, 4.72421769e-06f,
    2.66718897e-06f, 2.06336152e-08f, -3.09989353e-07f,
};

/* E log(1 + (x + r e)^2), and its derivatives. A name that starts with i is an imaginary part. */
static inline expectation expected_log(float x, float r) {
    const float to_q = 5.65685425f, q = to_q * r, inverse = 1 / ((1 + q) * (1 + q) + x * x);
    const float v = (1 + q) * inverse, iv = x * inverse, t = q * v, it = q * iv;
    const float z = 2 * t - 1, iz = 2 * it, square = z * z + iz * iz;
    float iR, iQ;
    const float R = polynomial(rest, 15, z, iz, square, &iR), Q = polynomial(rise, 16, z, iz, square, &iQ);
    const float tR = t * R - it * iR, itR = t * iR + it * R, ttR = t * tR - it * itR, ittR = t * itR + it * tR;
    const float tv = t * v - it * iv, itv = t * iv + it * v;
    return (expectation){
        log_of_one_and(q * (2 + q) + x * x) - (t * Q - it * iQ),
        2 * (v * (it - 2 * ittR) + iv * (1 + t - 2 * ttR)),
        2 * to_q * (tv * (1 + 2 * (R - tR)) - itv * 2 * (iR - itR)),
    };
}

/* Values of E log(1 + e^(c - (x + r e)^2)) and its derivatives for n Normals, in blocks that stay in the cache while
   all points of a rule are added to them. */
#define BLOCK 256
#define MOST_POINTS 512
#define NARROW 0.67f
#define REACH 8
#define DENSITY 0.398942280f /* of e at 0 */

static inline float softplus_of(float y, float c, float *slope) {
    const float at = c - y * y, t = exponential(-fabsf(at));
    *slope = -2 * y * (at > 0 ? 1 : t) / (1 + t);
    return (at > 0 ? at : 0) + log_of_one_and(t);
}

/* r >= step / NARROW: the points are those of the function, the same for all. */
static void expected_softplus_wide(const float *x, const float *r, float c, float step, long n, float *restrict value,
                                   float *restrict to_x, float *restrict to_r) {
    const float pairs = ceilf(sqrtf((c > 0 ? c : 0) + 15) / step);
    const long points = pairs < MOST_POINTS / 2 ? 2 * (long)pairs : MOST_POINTS;
    float y[MOST_POINTS], values[MOST_POINTS], slopes[MOST_POINTS], from[BLOCK], inverse[BLOCK];
    for (long j = 0; j < points; j++) {
        y[j] = step * (j - 0.5f * (points - 1));
        values[j] = softplus_of(y[j], c, slopes + j) * step * DENSITY;
        slopes[j] *= step * DENSITY;
    }
    for (; n > 0; n -= BLOCK, x += BLOCK, r += BLOCK, value += BLOCK, to_x += BLOCK, to_r += BLOCK) {
        const long count = n < BLOCK ? n : BLOCK;
        for (long i = 0; i < count; i++) {
            inverse[i] = 1 / r[i], from[i] = -x[i] * inverse[i];
            value[i] = to_x[i] = to_r[i] = 0;
        }
        for (long j = 0; j < points; j++)
            for (long i = 0; i < count; i++) {
                const float e = from[i] + y[j] * inverse[i], density = exponential(-0.5f * e * e);
                value[i] += values[j] * density;
                to_x[i] += slopes[j] * density;
                to_r[i] += slopes[j] * density * e;
            }
        for (long i = 0; i < count; i++) value[i] *= inverse[i], to_x[i] *= inverse[i], to_r[i] *= inverse[i];
    }
}

/* r < step / NARROW: the points are those of the Normal. */
static void expected_softplus_narrow(const float *x, const float *r, float c, long n, float *restrict value,
                                     float *restrict to_x, float *restrict to_r) {
    for (; n > 0; n -= BLOCK, x += BLOCK, r += BLOCK, value += BLOCK, to_x += BLOCK, to_r += BLOCK) {
        const long count = n < BLOCK ? n : BLOCK;
        for (long i = 0; i < count; i++) value[i] = to_x[i] = to_r[i] = 0;
        for (long j = -REACH; j <= REACH; j++) {
            const float e = NARROW * j, weight = NARROW * DENSITY * exponential(-0.5f * e * e);
            for (long i = 0; i < count; i++) {
                float slope;
                value[i] += weight * softplus_of(x[i] + e * r[i], c, &slope);
                slope *= weight;
                to_x[i] += slope;
                to_r[i] += slope * e;
            }
        }
    }
}
