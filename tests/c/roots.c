/* Are the roots of csrc/roots.h those of the divider?  tests/test_roots.py builds this with csrc/ and runs it where the CPU
 * has AVX-512.  Prints how many roots were compared and how many differ.  Arguments:
 *   floats        every float
 *   pairs K N     every float x in [1, 4), every N-th from the K-th, with every estimate y within 2^-14 of 1/sqrt(x)
 *   doubles       the doubles in [1, 4) whose bits stand in hexadecimal on standard input, times every power of 4; and
 *                 random ones.  Also prints those of them for which some g within 2 ulp of the root and some h within 4 ulp
 *                 of half its inverse give a wrong root. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "internal.h"
#include "formats.h"
#include "roots.h"

#define ANY_AVX512 __attribute__((target(AVX512 ",fma")))

static long long compared, different;

ANY_AVX512 static void floats(void)
{
    for (uint64_t start = 0; start < UINT64_C(1) << 32; start += 16) {
        float x[16], root[16];
        for (int k = 0; k < 16; ++k)
            x[k] = float_of((uint32_t)start + (uint32_t)k);
        _mm512_storeu_ps(root, _mm512_sqrt_ps(_mm512_loadu_ps(x)));
        float_roots(x);
        compared += 16;
        different += memcmp(x, root, sizeof x) != 0;
    }
}

ANY_AVX512 static void pairs(uint32_t first, uint32_t every)
{
    for (uint32_t bits = bits_of(1) + first; bits < bits_of(4); bits += every) {
        float number = float_of(bits);
        double inverse = 1 / sqrt((double)number);
        uint32_t y = bits_of(nextafterf((float)(inverse * (1 - 0x1p-14)), 0));
        uint32_t last = bits_of(nextafterf((float)(inverse * (1 + 0x1p-14)), 2));
        __m512 x = _mm512_set1_ps(number), root = _mm512_set1_ps(sqrtf(number));
        __m512i next = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (; y <= last; y += 16, compared += 16) {
            __m512 found = float_root(x, _mm512_castsi512_ps(_mm512_add_epi32(_mm512_set1_epi32((int)y), next)));
            different += _mm512_cmpneq_ps_mask(found, root) != 0;
        }
    }
}

ANY_AVX512 static void compare_doubles(const double *x)
{
    double root[8], found[8];
    memcpy(found, x, sizeof found);
    _mm512_storeu_pd(root, _mm512_sqrt_pd(_mm512_loadu_pd(x)));
    double_roots(found);
    compared += 8;
    different += memcmp(found, root, sizeof root) != 0;
}

static double moved(double x, int ulps)
{
    for (; ulps; ulps -= ulps < 0 ? -1 : 1)
        x = nextafter(x, ulps < 0 ? 0 : 4);
    return x;
}

ANY_AVX512 static int some_estimate_is_wrong(double x)
{
    int wrong = 0;
    for (int i = -2; i <= 2; ++i)
        for (int j = -4; j <= 4; ++j) {
            __m512d g = _mm512_set1_pd(moved(sqrt(x), i)), h = _mm512_set1_pd(moved(0.5 / sqrt(x), j));
            wrong |= _mm512_cmpneq_pd_mask(double_corrected(_mm512_set1_pd(x), g, h), _mm512_set1_pd(sqrt(x))) != 0;
        }
    return wrong;
}

ANY_AVX512 static void doubles(void)
{
    uint64_t bits, random = 7;
    while (scanf("%lx", &bits) == 1) {
        double number, x[8];
        memcpy(&number, &bits, sizeof number);            /* in [1, 4) */
        for (int exponent = -1076; exponent < 1022; exponent += 16) {
            for (int k = 0; k < 8; ++k)
                x[k] = ldexp(number, exponent + 2 * k);
            compare_doubles(x);
        }
        if (some_estimate_is_wrong(number))
            printf("%lx\n", bits);
    }
    for (int round = 0; round < 10000000; ++round) {
        double x[8];
        for (int k = 0; k < 8; ++k) {
            random = random * UINT64_C(6364136223846793005) + 1442695040888963407;
            memcpy(&x[k], &random, sizeof x[k]);
        }
        compare_doubles(x);
    }
}

int main(int count, char **arguments)
{
    if (!(HAS_AVX512 && HAS("fma")))
        return 77;
    if (count == 2 && !strcmp(arguments[1], "floats"))
        floats();
    else if (count == 4 && !strcmp(arguments[1], "pairs"))
        pairs((uint32_t)atoi(arguments[2]), (uint32_t)atoi(arguments[3]));
    else if (count == 2 && !strcmp(arguments[1], "doubles"))
        doubles();
    else
        return 2;
    printf("%lld compared, %lld lines differ\n", compared, different);
    return different != 0;
}
