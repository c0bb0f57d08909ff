/* The storage formats: how a float is stored in fewer bits.  Each block encodes or decodes one element; formats.c makes loops
 * of them.  fastrms/formats.py has the same text, function by function, and says how large the errors are.
 *
 * u has the bits of a float, a those of its magnitude; random has 32 random bits.  A conversion drops the lowest bits of u after
 * noise has been added: half of the last bit that stays, ties to even, or all random bits that are dropped (stochastic). */
#ifndef FASTRMS_FORMATS_H
#define FASTRMS_FORMATS_H
#include <stdint.h>
#include <string.h>

#define ELEMENT static inline __attribute__((always_inline, unused))

enum { INFINITE = 0x7f800000, SIGN = 0x80000000, MAGNITUDE = 0x7fffffff, QUIET = 0x7fc00000 };      /* bits of floats */
enum { Q8_BLOCK = 256, Q8_LARGEST = 0x7f7 };              /* elements; the upper 12 bits of the largest number of a code */
#define GOLDEN 0x9e3779b9u

ELEMENT uint32_t bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

ELEMENT float float_of(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

ELEMENT int is_nan(uint32_t u) { return float_of(u) != float_of(u); }

/* the number of a key and a position: w = position * GOLDEN + key */
ELEMENT uint32_t random_of(uint32_t w) { return (w ^ (w >> 15)) * 0x2c1b3c6du; }

ELEMENT uint32_t noise(uint32_t u, int dropped, int stochastic, uint32_t random)
{
    return stochastic ? random >> (32 - dropped) : (1u << (dropped - 1)) - 1 + ((u >> dropped) & 1);
}

/* t, from 0 to 1024, as a whole number */
ELEMENT uint32_t whole(float t, int stochastic, uint32_t random)
{
    return stochastic ? ((uint32_t)(int32_t)(t * 0x1p21f) + (random >> 11)) >> 21 : bits_of(t + 0x1p23f) - 0x4b000000u;
}

ELEMENT uint32_t bf16_decoded(uint32_t h) { return h << 16; }

ELEMENT uint32_t bf16_encoded(uint32_t u, int stochastic, uint32_t random)
{
    return is_nan(u) ? (u >> 16) | 0x40 : (u + noise(u, 16, stochastic, random)) >> 16;
}

ELEMENT uint32_t fp16_decoded(uint32_t h)
{
    uint32_t m = (h & 0x7fff) << 13, u = bits_of(float_of(m) * 0x1p112f);
    return (m >= 0x0f800000 ? u | INFINITE : u) | (h & 0x8000) << 16;
}

ELEMENT uint32_t fp16_magnitude(uint32_t a, int stochastic, uint32_t random)
{
    uint32_t small = whole(float_of(a < 0x38800000 ? a : 0) * 0x1p24f, stochastic, random);
    uint32_t large = ((a + noise(a, 13, stochastic, random)) >> 13) - 0x1c000;
    large = (int32_t)large > 0x7c00 ? 0x7c00 : large;
    return a < 0x38800000 ? small : large;
}

ELEMENT uint32_t fp16_encoded(uint32_t u, int stochastic, uint32_t random)
{
    uint32_t a = u & MAGNITUDE, c = fp16_magnitude(a, stochastic, random);
    return (a > INFINITE ? 0x7e00 : c) | (u & SIGN) >> 16;
}

/* a state saturates, and nothing but 0 becomes 0 */
ELEMENT uint32_t fp16s_encoded(uint32_t u, int stochastic, uint32_t random)
{
    uint32_t a = u & MAGNITUDE, c = fp16_magnitude(a, stochastic, random);
    uint32_t least = a < 1 ? 0 : 1, most = a < INFINITE ? 0x7bff : 0x7c00;
    c = c > least ? c : least;
    c = c < most ? c : most;
    return (a > INFINITE ? 0x7e00 : c) | (u & SIGN) >> 16;
}

/* q8u: a state that is never negative, in blocks.  base and most: of the block, from the largest finite magnitude in it; most is
 * the largest code of a finite number.  finite: whether there are only such in the block. */
ELEMENT int32_t q8u_base(uint32_t top)
{
    int32_t base = (int32_t)(top >> 20) - 253;
    return base > 0 ? base : 0;
}

ELEMENT int32_t q8u_most(int32_t base) { return base + 254 > Q8_LARGEST ? Q8_LARGEST - base : 254; }

ELEMENT uint32_t q8u_encoded(uint32_t u, int32_t base, int32_t most, int finite, int stochastic, uint32_t random)
{
    uint32_t a = u & MAGNITUDE;
    int32_t c = (int32_t)((a + noise(a, 20, stochastic, random)) >> 20) - base, least = a < 1 ? 0 : 1;
    c = c > least ? c : least;
    c = c < most ? c : most;
    return !finite && a >= INFINITE ? 255 : (uint32_t)c;
}

ELEMENT uint32_t q8u_decoded(uint32_t code, int32_t base)
{
    uint32_t u = (code + (uint32_t)base) << 20;
    return code == 0 ? 0 : code == 255 ? INFINITE : u;
}

/* q8: a state with a sign, in blocks.  base is a multiple of 8, which is a power of 2 in the numbers. */
ELEMENT int32_t q8_base(uint32_t top)
{
    int32_t base = (int32_t)(top >> 20) - 149;
    return ((base > 0 ? base : 0) + 7) & ~7;
}

ELEMENT int32_t q8_most(int32_t base) { return base + 24 + 126 > Q8_LARGEST ? Q8_LARGEST - (base + 24) : 126; }

/* the distance of the numbers below the eighth, which are at equal distances down to 0, and its inverse */
ELEMENT float q8_unit(int32_t base) { return float_of((uint32_t)(base + 8) << 20); }
ELEMENT float q8_per_unit(int32_t base) { return float_of((uint32_t)(2024 - base) << 20); }

ELEMENT uint32_t q8_encoded(uint32_t u, int32_t base, int32_t most, float per_unit, int finite, int stochastic, uint32_t random)
{
    uint32_t a = u & MAGNITUDE, eighth = (uint32_t)(base + 32) << 20;
    uint32_t small = whole(float_of(a < eighth ? a : 0) * per_unit, stochastic, random);
    int32_t c = (int32_t)((a + noise(a, 20, stochastic, random)) >> 20) - (base + 24);
    c = c < most ? c : most;
    uint32_t m = a < eighth ? small : (uint32_t)c;
    return (!finite && a >= INFINITE ? 127 : m) | (u & SIGN) >> 24;
}

ELEMENT uint32_t q8_decoded(uint32_t code, int32_t base, float unit)
{
    uint32_t m = code & 127, small = bits_of((float)(int32_t)m * unit), large = (m + (uint32_t)base + 24) << 20;
    return (m == 127 ? (uint32_t)QUIET : m < 8 ? small : large) | (code & 128) << 24;
}

/* a bf16 parameter with the 16 bits that make a float of it again: high is the nearest bf16, ties away from 0 */
ELEMENT uint32_t without_payload(uint32_t u) { return (u & MAGNITUDE) > INFINITE ? (uint32_t)QUIET : u; }
ELEMENT uint32_t split16_high(uint32_t u) { return (u + 0x8000) >> 16; }
/* a remainder below 0 belongs to no 0: somebody has written the 0 since, and the number would be NaN */
ELEMENT uint32_t split16_decoded(uint32_t high, uint32_t low)
{
    return (high << 16) + (high & 0x7fff ? (low ^ 0x8000) - 0x8000 : low & 0x7fff);
}

/* and with 8 bits, of 24 that the float is first rounded to */
ELEMENT uint32_t split8_rounded(uint32_t u, int stochastic, uint32_t random)
{
    return (u & MAGNITUDE) > INFINITE ? QUIET >> 8 : (u + noise(u, 8, stochastic, random)) >> 8;
}
ELEMENT uint32_t split8_high(uint32_t v) { return (v + 0x80) >> 8; }
ELEMENT uint32_t split8_decoded(uint32_t high, uint32_t low)
{
    return ((high << 8) + (high & 0x7fff ? (low ^ 0x80) - 0x80 : low & 0x7f)) << 8;
}
#endif
