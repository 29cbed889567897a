// The two inner loops of characteristic.py on a CPU: a tile of samples at a time, every knot of it in registers. Built by
// cpu_kernels.py, once with REAL = float and once with REAL = double.
#include <math.h>
#include <string.h>

enum { LANES = 64 / sizeof(REAL), WIDE = 4, TILE = LANES * WIDE };  // WIDE independent chains hide the latency of a rotation
typedef REAL vec __attribute__((vector_size(64)));
typedef unsigned mask __attribute__((vector_size(64)));

// One cosine and sine of fp32 angles up to 8192: Cody and Waite's reduction to |r| <= pi / 4, in three parts of pi / 2 of which
// the first two times the quadrant are exact; then polynomials in r^2 (Chebyshev interpolation, error below 1e-8). Within 1.5
// units of the last place of 1. False where an angle is larger or not finite.
static inline bool fast_unit(const vec *x, vec *c, vec *s) {
    if (sizeof(REAL) != sizeof(float)) return false;
    mask inside = {};
    inside = ~inside;
    for (int w = 0; w < WIDE; w++) inside &= (mask)(x[w] < REAL(8192)) & (mask)(x[w] > REAL(-8192));
    for (int lane = 0; lane < LANES; lane++)
        if (!inside[lane]) return false;
    for (int w = 0; w < WIDE; w++) {
        const vec shifted = x[w] * REAL(0x1.45f306p-1) + REAL(0x1.8p23);  // the nearest integer in the last bits
        const vec turns = shifted - REAL(0x1.8p23);
        const mask quadrant = (mask)shifted;
        const vec r = x[w] - turns * REAL(0x1.92p+0) - turns * REAL(0x1.fb4p-12) - turns * REAL(0x1.4442d2p-24);
        const vec u = r * r;
        const vec sine = r + r * u * (REAL(-0.16666664) + u * (REAL(0.008332746) + u * REAL(-0.00019587387)));
        const vec cosine = REAL(1) - REAL(0.5) * u +
                           u * u * (REAL(0.041666664) + u * (REAL(-0.00138883) + u * REAL(2.4547437e-05)));
        const mask odd = -(quadrant & 1);
        c[w] = (vec)((((mask)cosine & ~odd) | ((mask)sine & odd)) ^ ((quadrant + 1) & 2) << 30);
        s[w] = (vec)((((mask)sine & ~odd) | ((mask)cosine & odd)) ^ (quadrant & 2) << 30);
    }
    return true;
}

// cos and sin of dt p at samples [start, start + TILE); zero beyond the end, where they stay zero under every rotation
static inline void unit(const REAL *p, REAL dt, long start, long samples, vec *c, vec *s) {
    const long left = samples - start, count = left < TILE ? left : TILE;
    vec x[WIDE] = {};
    memcpy(x, p + start, sizeof(REAL) * count);
    for (int w = 0; w < WIDE; w++) x[w] *= dt;
    if (!fast_unit(x, c, s))
        for (int i = 0; i < TILE; i++) {
            c[i / LANES][i % LANES] = cos(x[i / LANES][i % LANES]);
            s[i / LANES][i % LANES] = sin(x[i / LANES][i % LANES]);
        }
    if (count < TILE) memset((REAL *)c + count, 0, sizeof(REAL) * (TILE - count));
    if (count < TILE) memset((REAL *)s + count, 0, sizeof(REAL) * (TILE - count));
}

// p [rows, samples]; out [2, knots, rows]: sums over samples of cos(k dt p) and sin(k dt p), k = 1 .. knots
extern "C" void sums(const REAL *p, REAL *out, REAL dt, long rows, long samples, long knots, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        vec total[2 * knots];
        memset(total, 0, sizeof(vec) * 2 * knots);
        for (long start = 0; start < samples; start += TILE) {
            vec c1[WIDE], s1[WIDE], c[WIDE], s[WIDE];
            unit(p + row * samples, dt, start, samples, c1, s1);
            memcpy(c, c1, sizeof c);
            memcpy(s, s1, sizeof s);
            for (long k = 0; k < knots; k++) {
                total[k] += (c[0] + c[1]) + (c[2] + c[3]);
                total[knots + k] += (s[0] + s[1]) + (s[2] + s[3]);
                for (int w = 0; w < WIDE; w++) {
                    const vec turned = c[w] * c1[w] - s[w] * s1[w];
                    s[w] = s[w] * c1[w] + c[w] * s1[w];
                    c[w] = turned;
                }
            }
        }
        for (long k = 0; k < 2 * knots; k++) {
            REAL sum = 0;
            for (int lane = 0; lane < LANES; lane++) sum += total[k][lane];
            out[k * rows + row] = sum;
        }
    }
}

// weights [2, knots, rows]; out [rows, samples] = sum over k of weights_1k cos(k dt p) - weights_0k sin(k dt p)
extern "C" void gradient(const REAL *p, const REAL *weights, REAL *out, REAL dt, long rows, long samples, long knots,
                         int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        REAL of_sin[knots], of_cos[knots];
        for (long k = 0; k < knots; k++) {
            of_sin[k] = weights[k * rows + row];
            of_cos[k] = weights[(knots + k) * rows + row];
        }
        for (long start = 0; start < samples; start += TILE) {
            vec c1[WIDE], s1[WIDE], real[WIDE] = {}, imaginary[WIDE] = {}, result[WIDE];
            unit(p + row * samples, dt, start, samples, c1, s1);
            for (long k = knots - 1; k >= 0; k--)  // Horner's rule in exp(i dt p)
                for (int w = 0; w < WIDE; w++) {
                    const vec turned = real[w] * c1[w] + (of_cos[k] - imaginary[w] * s1[w]);
                    imaginary[w] = real[w] * s1[w] + (of_sin[k] + imaginary[w] * c1[w]);
                    real[w] = turned;
                }
            for (int w = 0; w < WIDE; w++) result[w] = real[w] * c1[w] - imaginary[w] * s1[w];
            const long left = samples - start;
            memcpy(out + row * samples + start, result, sizeof(REAL) * (left < TILE ? left : TILE));
        }
    }
}
