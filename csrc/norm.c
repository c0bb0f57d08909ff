/* The norm of a gradient in double, in one order of additions: eight lanes within a block of 4096, blocks in
 * sequence within a segment of 2^18, segments in sequence, whichever thread computed them.  Each block of doubles is scaled by a power of two of its own, so that no square overflows;
 * squares of floats cannot.  backends/numpy.py computes the same bits. */
#include <math.h>
#include <stddef.h>
#include "internal.h"

enum { BLOCK = 4096, LANES = 8 };

#define INLINE static inline __attribute__((always_inline))

INLINE double block_sum(int64_t size, const float *single, const double *twice, double scale)
{
    double lane[LANES] = {0};
    int64_t whole = size - size % LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int j = 0; j < LANES; ++j) {
            double x = (single ? (double)single[i + j] : twice[i + j]) * scale;
            lane[j] += x * x;
        }
    for (int64_t i = whole; i < size; ++i) {
        double x = (single ? (double)single[i] : twice[i]) * scale;
        lane[i - whole] += x * x;
    }
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

/* the power of two just above the largest finite magnitude; 0 for zeros, infinities and floats */
INLINE int block_exponent(int64_t size, const double *grad)
{
    double lane[LANES] = {0}, most = 0;
    int64_t whole = size - size % LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int j = 0; j < LANES; ++j) {
            double x = fabs(grad[i + j]);
            lane[j] = x > lane[j] ? x : lane[j];
        }
    for (int64_t i = whole; i < size; ++i)
        most = fabs(grad[i]) > most ? fabs(grad[i]) : most;
    for (int j = 0; j < LANES; ++j)
        most = lane[j] > most ? lane[j] : most;
    int exponent = 0;
    if (most > 0 && most <= 0x1.fffffffffffffp1023)
        frexp(most, &exponent);
    return exponent < -1000 ? -1000 : exponent;
}

INLINE fastrms_squares block_squares(int64_t size, int itemsize, const void *grad)
{
    if (itemsize == 4)
        return (fastrms_squares){block_sum(size, grad, NULL, 1), 0};
    int exponent = block_exponent(size, grad);
    return (fastrms_squares){block_sum(size, NULL, grad, ldexp(1, -exponent)), exponent};
}

void fastrms_add_squares(fastrms_squares *total, fastrms_squares part)
{
    if (part.sum == 0)                                    /* its exponent says nothing */
        return;
    int64_t most = part.exponent > total->exponent ? part.exponent : total->exponent;
    total->sum = ldexp(total->sum, (int)(2 * (total->exponent - most))) + ldexp(part.sum, (int)(2 * (part.exponent - most)));
    total->exponent = most;
}

typedef fastrms_squares squares_function(int64_t size, int itemsize, const void *grad);
static fastrms_squares squares_baseline(int64_t size, int itemsize, const void *grad)
{
    return block_squares(size, itemsize, grad);
}
#ifdef FASTRMS_AVX2
FASTRMS_AVX2 static fastrms_squares squares_avx2(int64_t size, int itemsize, const void *grad)
{
    return block_squares(size, itemsize, grad);
}
static squares_function *const squares_of[] = {squares_avx2, squares_baseline};      /* in the order of dispatch.c */
#else
static squares_function *const squares_of[] = {squares_baseline};
#endif

fastrms_squares fastrms_segment_squares(int64_t size, int itemsize, const void *grad)
{
    squares_function *squares = squares_of[fastrms_isa_get()];
    fastrms_squares total = {0, -1000};
    for (int64_t start = 0; start < size; start += BLOCK) {
        int64_t length = size - start < BLOCK ? size - start : BLOCK;
        fastrms_add_squares(&total, squares(length, itemsize, (const char *)grad + start * itemsize));
    }
    return total;
}

int64_t fastrms_segments(int64_t size) { return (size + FASTRMS_SEGMENT - 1) / FASTRMS_SEGMENT; }

double fastrms_root(const fastrms_squares *total, double scale)
{
    return ldexp(sqrt(total->sum) * scale, (int)total->exponent);
}
