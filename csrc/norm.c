/* The norm of a gradient in double, in one order of additions: eight lanes within a block of 4096, blocks in sequence
 * within a segment of 2^18, segments in sequence, whichever thread computed them.  Each block of doubles is scaled by a
 * power of two of its own, so that no square overflows; squares of floats cannot.  backends/plan.py computes the same
 * bits.  Elements that are not finite are counted on the way, block by block, so that memory is read once for both. */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>
#include "internal.h"

enum { BLOCK = 4096, LANES = 8 };

#define INLINE static inline __attribute__((always_inline))

/* four numbers as doubles; written as vectors, since no compiler makes them of the lanes by itself */
typedef float four_floats __attribute__((vector_size(16)));
typedef double four __attribute__((vector_size(32)));

INLINE void add_four(four *sums, const float *single, const double *twice, double scale)
{
    four_floats narrow;
    four x;
    if (single) {
        memcpy(&narrow, single, sizeof narrow);
        x = __builtin_convertvector(narrow, four);
    } else {
        memcpy(&x, twice, sizeof x);
    }
    x *= scale;
    *sums += x * x;
}

INLINE double block_sum(int64_t size, const float *single, const double *twice, double scale)
{
    four low = {0}, high = {0};
    int64_t whole = size - size % LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        FASTRMS_ASK(single ? (const void *)(single + i) : twice + i, 0)
        add_four(&low, single ? single + i : NULL, twice ? twice + i : NULL, scale);
        add_four(&high, single ? single + i + 4 : NULL, twice ? twice + i + 4 : NULL, scale);
    }
    double lane[LANES];
    memcpy(lane, &low, sizeof low);
    memcpy(lane + 4, &high, sizeof high);
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
        return (fastrms_squares){block_sum(size, grad, NULL, 1), 0, 0};
    int exponent = block_exponent(size, grad);
    return (fastrms_squares){block_sum(size, NULL, grad, ldexp(1, -exponent)), exponent, 0};
}

/* in the type of the rule, which squares what it has scaled */
INLINE int64_t block_nonfinite(int64_t size, int itemsize, const void *grad, double grad_scale)
{
    const float *single = grad, scale = (float)grad_scale;
    const double *twice = grad;
    int32_t few = 0;
    int64_t count = 0;
    for (int64_t i = 0; itemsize == 4 && i < size; ++i)
        few += !(single[i] * scale * (single[i] * scale) <= FLT_MAX);
    for (int64_t i = 0; itemsize == 8 && i < size; ++i)
        count += !(twice[i] * grad_scale * (twice[i] * grad_scale) <= DBL_MAX);
    return few + count;
}

INLINE fastrms_squares block_look(int64_t size, int itemsize, const void *grad, fastrms_wanted wanted)
{
    fastrms_squares found = {0, 0, 0};
    if (wanted.squares)
        found = block_squares(size, itemsize, grad);
    if (wanted.nonfinite)
        found.nonfinite = block_nonfinite(size, itemsize, grad, wanted.grad_scale);
    return found;
}

void fastrms_add_squares(fastrms_squares *total, fastrms_squares part)
{
    total->nonfinite += part.nonfinite;
    if (part.sum == 0)                                    /* its exponent says nothing */
        return;
    int64_t most = part.exponent > total->exponent ? part.exponent : total->exponent;
    total->sum = ldexp(total->sum, (int)(2 * (total->exponent - most))) + ldexp(part.sum, (int)(2 * (part.exponent - most)));
    total->exponent = most;
}

typedef fastrms_squares look_function(int64_t size, int itemsize, const void *grad, fastrms_wanted wanted);
static fastrms_squares look_baseline(int64_t size, int itemsize, const void *grad, fastrms_wanted wanted)
{
    return block_look(size, itemsize, grad, wanted);
}
#ifdef FASTRMS_AVX2
FASTRMS_AVX2 static fastrms_squares look_avx2(int64_t size, int itemsize, const void *grad, fastrms_wanted wanted)
{
    return block_look(size, itemsize, grad, wanted);
}
static look_function *const look_of[] = {look_avx2, look_baseline};      /* in the order of dispatch.c */
#else
static look_function *const look_of[] = {look_baseline};
#endif

fastrms_squares fastrms_look(int64_t size, int itemsize, const void *grad, fastrms_wanted wanted)
{
    look_function *look = look_of[fastrms_isa_get()];
    fastrms_squares total = {0, -1000, 0};
    for (int64_t start = 0; start < size; start += BLOCK) {
        int64_t length = size - start < BLOCK ? size - start : BLOCK;
        fastrms_add_squares(&total, look(length, itemsize, (const char *)grad + start * itemsize, wanted));
    }
    return total;
}

int64_t fastrms_segments(int64_t size) { return (size + FASTRMS_SEGMENT - 1) / FASTRMS_SEGMENT; }
