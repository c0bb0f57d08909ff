/* Every float through the encoders, against the definitions of the formats: numbers are compared as doubles, in which their
 * distances are exact, where csrc/formats.h adds to their bits and cuts these off. */
#include <math.h>
#include <string.h>
#include "fastrms.h"
#include "testing_decl.h"

typedef void encoder(int isa, int format, int64_t size, const float *x, void *stored, void *low, fastrms_rounding rounding);
enum { CHUNK = 1 << 16, BLOCK = 256, LARGEST = 0x7f7, DOWN = -1, NEAREST, STOCHASTIC, AWAY };      /* AWAY: ties, from zero */
#define INLINE static inline __attribute__((always_inline))
static const uint32_t INF = 0x7f800000, QUIET = 0x7fc00000;

typedef struct {
    int how;
    uint32_t random;
} way;

INLINE float float_of(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* a >= 0 as a whole number; at random with this many bits of what lies behind the point */
INLINE uint32_t whole(double a, int bits, way w)
{
    uint32_t down = (uint32_t)a;                          /* a < 2^17 */
    double part = a - down;
    if (w.how == STOCHASTIC)
        return down + ((uint64_t)(part * (double)(UINT64_C(1) << bits)) + (w.random >> (32 - bits)) >= UINT64_C(1) << bits);
    return down + (w.how != DOWN && (part > 0.5 || (part == 0.5 && (w.how == AWAY || down % 2))));
}

/* The number of the magnitude a among all numbers with this many bits behind the first and multiples of 2^least, from 0. */
INLINE uint32_t number_of(uint32_t a, int mantissa, int least, int bits, way w)
{
    int exponent = (a >> 23 ? (int)(a >> 23) : 1) - 127 - mantissa;
    if (exponent < least)
        exponent = least;
    double unit = 1;                                      /* 2^-exponent, from the exponent of a double */
    uint64_t of_unit = (uint64_t)(1023 - exponent) << 52;
    memcpy(&unit, &of_unit, sizeof unit);
    return ((uint32_t)(exponent - least) << mantissa) + whole(float_of(a) * unit, bits, w);
}

INLINE uint32_t in_bf16(uint32_t a, way w) { return number_of(a, 7, -133, 16, w); }
INLINE uint32_t in_q8(uint32_t a, way w) { return number_of(a, 3, -129, 20, w); }

INLINE uint32_t in_fp16(uint32_t a, way w)
{
    uint32_t c = number_of(a, 10, -24, float_of(a) < 0x1p-14f ? 21 : 13, w);
    return c < 0x7c00 ? c : 0x7c00;
}

static int32_t least_of(int32_t x, int32_t y) { return x < y ? x : y; }
static int32_t most_of(int32_t x, int32_t y) { return x > y ? x : y; }

static int32_t base_of(int format, uint32_t top)
{
    int32_t number = (int32_t)in_q8(top, (way){DOWN, 0});
    return format == FASTRMS_Q8U ? most_of(number - 253, 0) : (most_of(number - 149, 0) + 7) / 8 * 8;
}

INLINE uint32_t in_q8_signed(uint32_t a, int32_t base, way w)
{
    if (a < (uint32_t)(base + 32) << 20)
        return whole((double)float_of(a) / float_of((uint32_t)(base + 8) << 20), 21, w);
    return (uint32_t)least_of(least_of((int32_t)in_q8(a, w), LARGEST) - base - 24, 126);
}

/* what is stored of u: an element, and what a split format has beside it */
INLINE uint32_t stored_of(int format, uint32_t u, int32_t base, way w, uint32_t *low)
{
    uint32_t a = u & 0x7fffffff, sign = u >> 31, v;
    switch (format) {
    case FASTRMS_FLOAT: return u;
    case FASTRMS_BF16: return sign << 15 | (a > INF ? (a >> 16) | 0x40 : a == INF ? 0x7f80 : in_bf16(a, w));
    case FASTRMS_FP16: return sign << 15 | (a > INF ? 0x7e00 : a == INF ? 0x7c00 : in_fp16(a, w));
    case FASTRMS_FP16S:
        v = a >= INF ? 0 : (uint32_t)least_of((int32_t)in_fp16(a, w), 0x7bff);
        return sign << 15 | (a > INF ? 0x7e00 : a == INF ? 0x7c00 : a && !v ? 1 : v);
    case FASTRMS_Q8: return sign << 7 | (a >= INF ? 127 : in_q8_signed(a, base, w));
    case FASTRMS_Q8U:
        return !a ? 0 : a >= INF ? 255 : (uint32_t)most_of(1, least_of(254, least_of((int32_t)in_q8(a, w), LARGEST) - base));
    case FASTRMS_SPLIT16:
        u = a > INF ? QUIET : u;
        a = u & 0x7fffffff;
        v = a >= INF ? a >> 16 : in_bf16(a, (way){AWAY, 0});
        v |= u >> 31 << 15;
        *low = (u - (v << 16)) & 0xffff;
        return v;
    default:
        v = a > INF ? QUIET >> 8 : sign << 23 | (a == INF ? INF >> 8 : number_of(a, 15, -141, 8, w));
        *low = v & 0xff;
        return ((v + 0x80) >> 8) & 0xffff;
    }
}

static uint32_t top_of(const uint32_t *u)
{
    uint32_t top = 0;
    for (int i = 0; i < BLOCK; ++i) {
        uint32_t a = u[i] & 0x7fffffff;
        top = a < INF && a > top ? a : top;
    }
    return top;
}

/* the floats of chunk number `chunk`; above: 0, or what is added to the magnitude of the first of each block, so that it is by
 * far the largest */
static void take_floats(uint32_t *u, int64_t chunk, uint32_t above)
{
    for (int i = 0; i < CHUNK; ++i)
        u[i] = (uint32_t)(chunk * CHUNK + i);
    for (int i = 0; above && i < CHUNK; i += BLOCK) {
        uint32_t a = (u[i] & 0x7fffffff) + above;
        u[i] = a < INF ? a : INF - 1;
    }
}

/* a chunk as it is stored, in q8 with its bases behind the elements, and what a split format has beside it */
typedef struct {
    unsigned char stored[4 * CHUNK], low[2 * CHUNK];
} made;

INLINE int itemsize_of(int format)
{
    return format == FASTRMS_Q8 || format == FASTRMS_Q8U ? 1 : format == FASTRMS_FLOAT ? 4 : 2;
}

INLINE void put(void *array, int itemsize, int i, uint32_t value)
{
    if (itemsize == 1)
        ((uint8_t *)array)[i] = (uint8_t)value;
    else if (itemsize == 2)
        ((uint16_t *)array)[i] = (uint16_t)value;
    else
        ((uint32_t *)array)[i] = value;
}

INLINE void store(int format, int stochastic, const uint32_t *u, fastrms_rounding rounding, made *to)
{
    int is_q8 = itemsize_of(format) == 1;
    int32_t *bases = (int32_t *)(void *)(to->stored + CHUNK);
    for (int i = 0; i < CHUNK; ++i) {
        uint32_t x = (rounding.position + (uint32_t)i) * 0x9e3779b9u + rounding.key, low = 0;
        way w = {stochastic ? STOCHASTIC : NEAREST, (x ^ (x >> 15)) * 0x2c1b3c6du};
        if (is_q8 && i % BLOCK == 0)
            bases[i / BLOCK] = base_of(format, top_of(u + i));
        put(to->stored, itemsize_of(format), i, stored_of(format, u[i], is_q8 ? bases[i / BLOCK] : 0, w, &low));
        if (format >= FASTRMS_SPLIT16)
            put(to->low, format == FASTRMS_SPLIT8 ? 1 : 2, i, low);
    }
}

static void store_any(int format, const uint32_t *u, fastrms_rounding rounding, made *to)
{
#define STORE(known)                                                                                            \
    case known:                                                                                                 \
        if (rounding.stochastic)                                                                                \
            store(known, 1, u, rounding, to);                                                                   \
        else                                                                                                    \
            store(known, 0, u, rounding, to);                                                                   \
        break;
    switch (format) {
        STORE(FASTRMS_FLOAT) STORE(FASTRMS_BF16) STORE(FASTRMS_FP16) STORE(FASTRMS_FP16S)
        STORE(FASTRMS_Q8) STORE(FASTRMS_Q8U) STORE(FASTRMS_SPLIT16) STORE(FASTRMS_SPLIT8)
    }
}

static int differ(int format, const made *a, const made *b)
{
    size_t bases = itemsize_of(format) == 1 ? CHUNK / BLOCK * sizeof(int32_t) : 0;
    size_t low = format == FASTRMS_SPLIT16 ? 2 * CHUNK : format == FASTRMS_SPLIT8 ? CHUNK : 0;
    return memcmp(a->stored, b->stored, (size_t)(CHUNK * itemsize_of(format)) + bases) || memcmp(a->low, b->low, low);
}

/* Encode the chunks first, first + stride, ... of the 2^16 chunks of all floats by each of the tiers isa[]; returns the number
 * of a chunk that is not stored as it must be, -1 where there is none. */
int64_t wrong_floats(encoder *encode, const int *isa, int tiers, int format, int64_t first, int64_t stride, uint32_t above,
                     fastrms_rounding rounding)
{
    static _Thread_local uint32_t u[CHUNK];
    static _Thread_local made wanted, found;
    for (int64_t chunk = first; chunk < CHUNK; chunk += stride) {
        fastrms_rounding here = rounding;
        here.position += (uint32_t)(chunk * CHUNK);
        take_floats(u, chunk, above);
        store_any(format, u, here, &wanted);
        for (int t = 0; t < tiers; ++t) {
            encode(isa[t], format, CHUNK, (const float *)u, found.stored, format >= FASTRMS_SPLIT16 ? found.low : NULL, here);
            if (differ(format, &wanted, &found))
                return chunk;
        }
    }
    return -1;
}
