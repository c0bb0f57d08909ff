/* The loops over the storage formats of formats.h, for each tier.  The compiler vectorises them under the options in csrc/flags. */
#include <stddef.h>
#include "formats.h"
#include "internal.h"

#define LOOPS static inline __attribute__((always_inline))
#define EACH(size) INDEPENDENT for (int64_t i = 0; i < (size); ++i)
typedef uint32_t __attribute__((may_alias)) word;         /* the bits of a float */

int fastrms_format_itemsize(int format)
{
    switch (format) {
    case FASTRMS_FLOAT: return 4;
    case FASTRMS_Q8: case FASTRMS_Q8U: case FASTRMS_SPLIT8: return 1;
    default: return 2;
    }
}

static int64_t codes_of(int64_t size) { return (size + FASTRMS_LINE - 1) / FASTRMS_LINE * FASTRMS_LINE; }

int64_t fastrms_stored_bytes(int format, int64_t size)
{
    if (format != FASTRMS_Q8 && format != FASTRMS_Q8U)
        return size * fastrms_format_itemsize(format);
    return codes_of(size) + (size + Q8_BLOCK - 1) / Q8_BLOCK * (int64_t)sizeof(int32_t);
}

LOOPS void decode_q8(int is_signed, int64_t size, const uint8_t *code, int32_t base, word *to)
{
    float unit = q8_unit(base);
    if (is_signed)
        EACH(size) to[i] = q8_decoded(code[i], base, unit);
    else
        EACH(size) to[i] = q8u_decoded(code[i], base);
}

LOOPS void decode(int format, int64_t size, fastrms_stored from, float *to_)
{
    word *to = (word *)to_;
    const uint16_t *half = from.stored, *low16 = from.low;
    const uint8_t *code = from.stored, *low8 = from.low;
    const int32_t *base = from.low;
    switch (format) {
    case FASTRMS_FLOAT: EACH(size) to[i] = ((const word *)from.stored)[i]; break;
    case FASTRMS_BF16: EACH(size) to[i] = bf16_decoded(half[i]); break;
    case FASTRMS_FP16: case FASTRMS_FP16S: EACH(size) to[i] = fp16_decoded(half[i]); break;
    case FASTRMS_SPLIT16: EACH(size) to[i] = split16_decoded(half[i], low16[i]); break;
    case FASTRMS_SPLIT8: EACH(size) to[i] = split8_decoded(half[i], low8[i]); break;
    default:
        for (; size > 0; size -= Q8_BLOCK, code += Q8_BLOCK, to += Q8_BLOCK, ++base)
            if (size < Q8_BLOCK)
                decode_q8(format == FASTRMS_Q8, size, code, *base, to);
            else
                decode_q8(format == FASTRMS_Q8, Q8_BLOCK, code, *base, to);
    }
}

/* the largest magnitude, or the largest finite one */
LOOPS uint32_t largest(int finite, int64_t size, const word *from)
{
    int32_t top = 0;
    for (int64_t i = 0; i < size; ++i) {
        int32_t a = (int32_t)(from[i] & MAGNITUDE);
        a = !finite || a < (int32_t)INFINITE ? a : 0;
        top = a > top ? a : top;
    }
    return (uint32_t)top;
}

/* each element with its random number; w grows by additions, since multiplications of i would be made in 64 bits */
#define EACH_RANDOM(size) \
    uint32_t w = first; \
    INDEPENDENT for (int64_t i = 0; i < (size); ++i, w += GOLDEN)
#define RANDOM random_of(w)
LOOPS void encode_finite_q8(int is_signed, int finite, int stochastic, int64_t size, const word *from, uint8_t *code,
                            int32_t base, uint32_t first)
{
    int32_t most = is_signed ? q8_most(base) : q8u_most(base);
    float per_unit = q8_per_unit(base);
    if (is_signed) {
        EACH_RANDOM(size) code[i] = (uint8_t)q8_encoded(from[i], base, most, per_unit, finite, stochastic, RANDOM);
    } else {
        EACH_RANDOM(size) code[i] = (uint8_t)q8u_encoded(from[i], base, most, finite, stochastic, RANDOM);
    }
}

/* a block; returns its base */
LOOPS int32_t encode_q8(int is_signed, int stochastic, int64_t size, const word *from, uint8_t *code, uint32_t first)
{
    uint32_t top = largest(0, size, from), finite = top < INFINITE;
    if (!finite)
        top = largest(1, size, from);
    int32_t base = is_signed ? q8_base(top) : q8u_base(top);
    if (finite)
        encode_finite_q8(is_signed, 1, stochastic, size, from, code, base, first);
    else
        encode_finite_q8(is_signed, 0, stochastic, size, from, code, base, first);
    return base;
}

LOOPS void encode(int format, int stochastic, int64_t size, const float *from_, fastrms_stored to, uint32_t first)
{
    const word *from = (const word *)from_;
    uint16_t *half = to.stored, *low16 = to.low;
    uint8_t *code = to.stored, *low8 = to.low;
    int32_t *base = to.low;
    switch (format) {
    case FASTRMS_FLOAT: EACH(size) ((word *)to.stored)[i] = from[i]; break;
    case FASTRMS_BF16: { EACH_RANDOM(size) half[i] = (uint16_t)bf16_encoded(from[i], stochastic, RANDOM); } break;
    case FASTRMS_FP16: { EACH_RANDOM(size) half[i] = (uint16_t)fp16_encoded(from[i], stochastic, RANDOM); } break;
    case FASTRMS_FP16S: { EACH_RANDOM(size) half[i] = (uint16_t)fp16s_encoded(from[i], stochastic, RANDOM); } break;
    case FASTRMS_SPLIT16:
        EACH(size) {
            uint32_t u = without_payload(from[i]);
            half[i] = (uint16_t)split16_high(u);
            low16[i] = (uint16_t)u;
        }
        break;
    case FASTRMS_SPLIT8: {
        EACH_RANDOM(size) {
            uint32_t v = split8_rounded(from[i], stochastic, RANDOM);
            half[i] = (uint16_t)split8_high(v);
            low8[i] = (uint8_t)v;
        }
        break;
    }
    default:
        for (; size > 0; size -= Q8_BLOCK, code += Q8_BLOCK, from += Q8_BLOCK, first += Q8_BLOCK * GOLDEN, ++base)
            if (size < Q8_BLOCK)
                *base = encode_q8(format == FASTRMS_Q8, stochastic, size, from, code, first);
            else
                *base = encode_q8(format == FASTRMS_Q8, stochastic, Q8_BLOCK, from, code, first);
    }
}

#define OF_TIER(isa, target, supported, roots, with)                                                            \
    target void fastrms_decode_##isa(int format, int64_t size, fastrms_stored from, float *to)                  \
    {                                                                                                           \
        decode(format, size, from, to);                                                                         \
    }                                                                                                           \
    target void fastrms_encode_##isa(int format, int64_t size, const float *from, fastrms_stored to, fastrms_rounding r) \
    {                                                                                                           \
        uint32_t first = r.position * GOLDEN + r.key;                                                           \
        if (r.stochastic)                                                                                       \
            encode(format, 1, size, from, to, first);                                                           \
        else                                                                                                    \
            encode(format, 0, size, from, to, first);                                                           \
    }
TIERS(OF_TIER, )

fastrms_stored fastrms_part(int format, int64_t size, void *stored, void *low, int64_t begin)
{
    char *from = stored, *beside = low;
    if (!from)
        return (fastrms_stored){NULL, NULL};
    if (format == FASTRMS_Q8 || format == FASTRMS_Q8U)
        return (fastrms_stored){from + begin, (int32_t *)(void *)(from + codes_of(size)) + begin / Q8_BLOCK};
    return (fastrms_stored){from + begin * fastrms_format_itemsize(format == FASTRMS_SPLIT8 ? FASTRMS_BF16 : format),
                            beside ? beside + begin * fastrms_format_itemsize(format) : NULL};
}

uint32_t fastrms_key(uint64_t seed, int64_t step, int stream)
{
    uint64_t z = seed + UINT64_C(0x9e3779b97f4a7c15) * (4 * (uint64_t)step + (uint64_t)stream);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}

void fastrms_decode(int isa, int format, int64_t size, const void *stored, const void *low, float *x)
{
    fastrms_tier_of(isa)->decode(format, size, fastrms_part(format, size, (void *)stored, (void *)low, 0), x);
}

void fastrms_encode(int isa, int format, int64_t size, const float *x, void *stored, void *low, fastrms_rounding rounding)
{
    fastrms_tier_of(isa)->encode(format, size, x, fastrms_part(format, size, stored, low, 0), rounding);
}
