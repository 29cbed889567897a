// The two inner loops of characteristic.py on a CPU: every knot of a tile of samples in registers. Built by native.py.
#include <string.h>

enum { LANES = 64 / sizeof(REAL), WIDE = 4, TILE = LANES * WIDE };  // WIDE independent chains hide the latency of a rotation
typedef REAL vec __attribute__((vector_size(64)));

// exp(i x) of samples [start, start + TILE); zero beyond the end, where it stays zero under every rotation
static inline void load(const REAL *row, long start, long samples, vec *tile) {
    if (start + TILE <= samples) {
        memcpy(tile, row + start, sizeof(vec) * WIDE);
    } else {
        memset(tile, 0, sizeof(vec) * WIDE);
        memcpy(tile, row + start, sizeof(REAL) * (samples - start));
    }
}

static inline void rotate(vec *c, vec *s, const vec *c1, const vec *s1) {
    for (int w = 0; w < WIDE; w++) {
        const vec turned = c[w] * c1[w] - s[w] * s1[w];
        s[w] = s[w] * c1[w] + c[w] * s1[w];
        c[w] = turned;
    }
}

// cos, sin [rows, samples] of x; out [2, knots, stride]: sums over samples of cos((k + 1) x) and sin((k + 1) x)
extern "C" void sums(const REAL *cos, const REAL *sin, REAL *out, long rows, long samples, long knots, long stride,
                     int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        vec total[2 * knots];
        memset(total, 0, sizeof(vec) * 2 * knots);
        for (long start = 0; start < samples; start += TILE) {
            vec c1[WIDE], s1[WIDE], c[WIDE], s[WIDE];
            load(cos + row * samples, start, samples, c1);
            load(sin + row * samples, start, samples, s1);
            memcpy(c, c1, sizeof c);
            memcpy(s, s1, sizeof s);
            for (long k = 0; k < knots; k++) {
                total[k] += (c[0] + c[1]) + (c[2] + c[3]);
                total[knots + k] += (s[0] + s[1]) + (s[2] + s[3]);
                rotate(c, s, c1, s1);
            }
        }
        for (long k = 0; k < 2 * knots; k++) {
            REAL sum = 0;
            for (int lane = 0; lane < LANES; lane++) sum += total[k][lane];
            out[k * stride + row] = sum;
        }
    }
}

// weights [2, knots, stride]; out [rows, samples] = sum over k of weights_1k cos((k + 1) x) - weights_0k sin((k + 1) x)
extern "C" void gradient(const REAL *cos, const REAL *sin, const REAL *weights, REAL *out, long rows, long samples,
                         long knots, long stride, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        REAL of_sin[knots], of_cos[knots];
        for (long k = 0; k < knots; k++) {
            of_sin[k] = weights[k * stride + row];
            of_cos[k] = weights[(knots + k) * stride + row];
        }
        for (long start = 0; start < samples; start += TILE) {
            vec c1[WIDE], s1[WIDE], real[WIDE] = {}, imaginary[WIDE] = {};
            load(cos + row * samples, start, samples, c1);
            load(sin + row * samples, start, samples, s1);
            for (long k = knots - 1; k >= 0; k--) {  // Horner's rule in exp(i x)
                for (int w = 0; w < WIDE; w++) {
                    real[w] += of_cos[k];
                    imaginary[w] += of_sin[k];
                }
                rotate(real, imaginary, c1, s1);
            }
            const long left = samples - start;
            memcpy(out + row * samples + start, real, sizeof(REAL) * (left < TILE ? left : TILE));
        }
    }
}
