// Batch normalization's passes over x [rows, width] on a CPU, channels last; REAL is float or double. Sums run over blocks of
// rows in REAL, and over blocks, in order, in double: the same for any number of threads.
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 64, LANES = 64 / sizeof(REAL), CHAINS = 4 };  // independent chains hide the latency of an addition
typedef REAL vec __attribute__((vector_size(64)));

static inline void load(const REAL *from, vec &to) { memcpy(&to, from, sizeof to); }
static inline void load(const REAL *from, REAL &to) { to = *from; }

// Columns [column, column + what T holds) of a block of rows; add(T &first, T &second, row * width + column, column)
template <typename T, typename F>
static inline void columns(long start, long end, long width, long column, REAL *parts, F add) {
    T first[CHAINS] = {}, second[CHAINS] = {};
    long row = start;
    for (; row + CHAINS <= end; row += CHAINS)
        for (int c = 0; c < CHAINS; c++) add(first[c], second[c], (row + c) * width + column, column);
    for (; row < end; row++) add(first[0], second[0], row * width + column, column);
    for (int c = 1; c < CHAINS; c++) first[0] += first[c], second[0] += second[c];
    memcpy(parts + column, first, sizeof(T));
    memcpy(parts + width + column, second, sizeof(T));
}

// Two totals per column over all rows
template <typename F> static void two_sums(long rows, long width, double *total, int threads, F add) {
    const long blocks = (rows + BLOCK - 1) / BLOCK;
    REAL *parts = (REAL *)malloc(blocks * 2 * width * sizeof(REAL));
#pragma omp parallel for num_threads(threads)
    for (long block = 0; block < blocks; block++) {
        const long start = block * BLOCK, end = start + BLOCK < rows ? start + BLOCK : rows;
        long column = 0;
        for (; column + LANES <= width; column += LANES)
            columns<vec>(start, end, width, column, parts + block * 2 * width, add);
        for (; column < width; column++) columns<REAL>(start, end, width, column, parts + block * 2 * width, add);
    }
    for (long i = 0; i < 2 * width; i++) total[i] = 0;
    for (long block = 0; block < blocks; block++)
        for (long i = 0; i < 2 * width; i++) total[i] += parts[block * 2 * width + i];
    free(parts);
}

// out [1 + 2 width]: rows, means, sums of squared differences from them. Sums are of differences from the first row, so that
// a mean that is large against the deviation costs no digits.
extern "C" void statistics(const REAL *x, REAL *out, long rows, long width, int threads) {
    double *total = (double *)malloc(2 * width * sizeof(double));
    two_sums(rows, width, total, threads, [=](auto &first, auto &second, long at, long column) {
        auto value = first, shift = first;
        load(x + at, value);
        load(x + column, shift);
        value -= shift;
        first += value;
        second += value * value;
    });
    out[0] = rows;
    for (long i = 0; i < width; i++) {
        const double shift = total[i] / rows, left = total[width + i] - shift * total[i];
        out[1 + i] = x[i] + shift;
        out[1 + width + i] = left < 0 ? 0 : left;
    }
    free(total);
}

// y = (x - mean) scale + bias
extern "C" void normalize(const REAL *x, const REAL *mean, const REAL *scale, const REAL *bias, REAL *y, long rows, long width,
                          int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const REAL *from = x + row * width;
        REAL *__restrict to = y + row * width;
        for (long i = 0; i < width; i++) to[i] = (from[i] - mean[i]) * scale[i] + bias[i];
    }
}

// out [2, width]: sums over rows of grad (x - mean) and of grad
extern "C" void gradient_sums(const REAL *grad, const REAL *x, const REAL *mean, REAL *out, long rows, long width, int threads) {
    double *total = (double *)malloc(2 * width * sizeof(double));
    two_sums(rows, width, total, threads, [=](auto &first, auto &second, long at, long column) {
        auto g = first, value = first, centre = first;
        load(grad + at, g);
        load(x + at, value);
        load(mean + column, centre);
        first += g * (value - centre);
        second += g;
    });
    for (long i = 0; i < 2 * width; i++) out[i] = total[i];
    free(total);
}

// dx = (x - mean) slope + grad scale - shift
extern "C" void gradient(const REAL *grad, const REAL *x, const REAL *mean, const REAL *slope, const REAL *scale,
                         const REAL *shift, REAL *dx, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const REAL *from = x + row * width, *g = grad + row * width;
        REAL *__restrict to = dx + row * width;
        for (long i = 0; i < width; i++) to[i] = (from[i] - mean[i]) * slope[i] + (g[i] * scale[i] - shift[i]);
    }
}
