/* Square roots of one line of 64 bytes, in place, on the multipliers of a CPU with AVX-512 in place of its divider, which
 * has the divisions to do.  Every root is that of the divider to the last bit.
 *
 * Two numbers run from an estimate y of 1/sqrt(x) to the root and to half its inverse (Goldschmidt): g = x*y and h = y/2.
 * With the error r = 1/2 - g*h, the error of g + g*r and of h + h*r is the square of that of g and h.  In the end,
 * the exact residual x - g*g says how far g is from the root (Markstein).
 *
 * Why it is right in float: for every x in [1, 4) and every y within 2^-14 of 1/sqrt(x), which every processor's estimate
 * is, the result is the correctly rounded root; powers of 4 scale exactly, as long as no residual is subnormal.  In double,
 * two steps bring g and h within an ulp, and the last one is right for every such g and h, except at 29 numbers, whose
 * roots are very near to the middle between two doubles; these are tried on each CPU (roots.c).  tests/c/roots.c shows all
 * this, and tries every float. */
#ifndef FASTRMS_ROOTS_H
#define FASTRMS_ROOTS_H
#include <immintrin.h>

#define ROOTS_INLINE __attribute__((always_inline, target(AVX512 ",fma"))) static inline

ROOTS_INLINE __m512 float_root(__m512 x, __m512 y)
{
    __m512 g = x * y, r;
    __m512 h = _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(y), _mm512_set1_epi32(1 << 23)));    /* y / 2 */
    r = _mm512_fnmadd_ps(g, h, _mm512_set1_ps(0.5f));
    g = _mm512_fmadd_ps(g, r, g);
    h = _mm512_fmadd_ps(h, r, h);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(g, g, x), h, g);
}

ROOTS_INLINE __m512d double_corrected(__m512d x, __m512d g, __m512d h)
{
    return _mm512_fmadd_pd(_mm512_fnmadd_pd(g, g, x), h, g);
}

ROOTS_INLINE __m512d double_root(__m512d x, __m512d y)
{
    __m512d g = x * y, r;
    __m512d h = _mm512_castsi512_pd(_mm512_sub_epi64(_mm512_castpd_si512(y), _mm512_set1_epi64(INT64_C(1) << 52)));
    for (int k = 0; k < 2; ++k) {
        r = _mm512_fnmadd_pd(g, h, _mm512_set1_pd(0.5));
        g = _mm512_fmadd_pd(g, r, g);
        h = _mm512_fmadd_pd(h, r, h);
    }
    return double_corrected(x, g, h);
}

/* A line goes to the divider if one of its numbers is below `low`, so that its residual may be subnormal, or is 0, negative,
 * infinite or NaN: as an unsigned number, the bits of all these are not below those of infinity once those of `low` are
 * subtracted. */
ROOTS_INLINE void float_roots(float *at)
{
    const int low = 0x0c800000, infinity = 0x7f800000;    /* the bits of 2^-102 and of infinity */
    __m512 x = _mm512_loadu_ps(at);
    __m512i above = _mm512_sub_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(low));
    int few = _mm512_cmpge_epu32_mask(above, _mm512_set1_epi32(infinity - low));
    _mm512_storeu_ps(at, __builtin_expect(few, 0) ? _mm512_sqrt_ps(x) : float_root(x, _mm512_rsqrt14_ps(x)));
}

ROOTS_INLINE void double_roots(double *at)
{
    const int64_t low = INT64_C(63) << 52, infinity = INT64_C(2047) << 52;      /* the bits of 2^-960 and of infinity */
    __m512d x = _mm512_loadu_pd(at);
    __m512i above = _mm512_sub_epi64(_mm512_castpd_si512(x), _mm512_set1_epi64(low));
    int few = _mm512_cmpge_epu64_mask(above, _mm512_set1_epi64(infinity - low));
    _mm512_storeu_pd(at, __builtin_expect(few, 0) ? _mm512_sqrt_pd(x) : double_root(x, _mm512_rsqrt14_pd(x)));
}
#endif
