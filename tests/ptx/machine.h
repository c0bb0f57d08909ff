/* One C function per PTX instruction that the kernels may use, in the semantics of NVIDIA's PTX ISA.
   An instruction without a function here does not compile, so what is unknown or approximate is refused. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint64_t u64; typedef uint32_t u32; typedef uint16_t u16; typedef uint8_t u8; typedef uint8_t pred;
typedef int64_t s64; typedef int32_t s32; typedef int16_t s16; typedef int8_t s8;
typedef u64 b64; typedef u32 b32; typedef u16 b16; typedef u8 b8;

/* Registers hold bits; these see them as numbers. */
static inline float f32_of(u32 x) { float y; memcpy(&y, &x, 4); return y; }
static inline double f64_of(u64 x) { double y; memcpy(&y, &x, 8); return y; }
static inline u32 bits_of_f32(float x) { u32 y; memcpy(&y, &x, 4); return y; }
static inline u64 bits_of_f64(double x) { u64 y; memcpy(&y, &x, 8); return y; }

#define REAL(t, real, bits, root, absolute, fused)                                                                \
    static inline bits add_rn_##t(bits a, bits b) { return bits_of_##t(t##_of(a) + t##_of(b)); }                \
    static inline bits sub_rn_##t(bits a, bits b) { return bits_of_##t(t##_of(a) - t##_of(b)); }                \
    static inline bits mul_rn_##t(bits a, bits b) { return bits_of_##t(t##_of(a) * t##_of(b)); }                \
    static inline bits div_rn_##t(bits a, bits b) { return bits_of_##t(t##_of(a) / t##_of(b)); }                \
    static inline bits sqrt_rn_##t(bits a) { return bits_of_##t(root(t##_of(a))); }                            \
    static inline bits fma_rn_##t(bits a, bits b, bits c) { return bits_of_##t(fused(t##_of(a), t##_of(b), t##_of(c))); } \
    static inline bits add_##t(bits a, bits b) { return add_rn_##t(a, b); }                                     \
    static inline bits sub_##t(bits a, bits b) { return sub_rn_##t(a, b); }                                     \
    static inline bits mul_##t(bits a, bits b) { return mul_rn_##t(a, b); }                                     \
    static inline bits neg_##t(bits a) { return bits_of_##t(-t##_of(a)); }                                      \
    static inline bits abs_##t(bits a) { return bits_of_##t(absolute(t##_of(a))); }                                 \
    static inline bits larger_##t(bits a, bits b, int sign) { /* not NaN where one is a number; +0 above -0 */       \
        real x = sign * t##_of(a), y = sign * t##_of(b);                                                        \
        return isnan(x) ? b : isnan(y) ? a : x == y ? (signbit(x) ? b : a) : x > y ? a : b; }                   \
    static inline bits max_##t(bits a, bits b) { return larger_##t(a, b, 1); }                                  \
    static inline bits min_##t(bits a, bits b) { return larger_##t(a, b, -1); }                                 \
    static inline bits mov_##t(bits a) { return a; }                                                            \
    static inline bits selp_##t(bits a, bits b, pred p) { return p ? a : b; }                                   \
    COMPARE(lt, <, t, real, bits) COMPARE(le, <=, t, real, bits) COMPARE(gt, >, t, real, bits)                  \
    COMPARE(ge, >=, t, real, bits) COMPARE(eq, ==, t, real, bits)                                               \
    static inline pred setp_neu_##t(bits a, bits b) { return t##_of(a) != t##_of(b); }                          \
    static inline pred setp_ne_##t(bits a, bits b) { return t##_of(a) < t##_of(b) || t##_of(a) > t##_of(b); }   \
    static inline pred setp_nan_##t(bits a, bits b) { return isnan(t##_of(a)) || isnan(t##_of(b)); }            \
    static inline pred setp_num_##t(bits a, bits b) { return !setp_nan_##t(a, b); }

/* A comparison, and its unordered form, which also holds where an operand is NaN. */
#define COMPARE(name, sign, t, real, bits)                                                                      \
    static inline pred setp_##name##_##t(bits a, bits b) { return t##_of(a) sign t##_of(b); }                   \
    static inline pred setp_##name##u_##t(bits a, bits b) {                                                     \
        return isnan(t##_of(a)) || isnan(t##_of(b)) || t##_of(a) sign t##_of(b); }

REAL(f32, float, u32, sqrtf, fabsf, fmaf)
REAL(f64, double, u64, sqrt, fabs, fma)

/* t: the type, u: the unsigned type of its width, bits: its width.  Arithmetic wraps; shifts saturate. */
#define INTEGER(t, u, bits)                                                                                     \
    static inline u add_##t(u a, u b) { return a + b; }                                                         \
    static inline u sub_##t(u a, u b) { return a - b; }                                                         \
    static inline u mul_lo_##t(u a, u b) { return a * b; }                                                      \
    static inline u mad_lo_##t(u a, u b, u c) { return a * b + c; }                                             \
    static inline u div_##t(t a, t b) { return a / b; }                                                         \
    static inline u rem_##t(t a, t b) { return a % b; }                                                         \
    static inline u min_##t(t a, t b) { return a < b ? a : b; }                                                 \
    static inline u max_##t(t a, t b) { return a > b ? a : b; }                                                 \
    static inline u neg_##t(u a) { return -a; }                                                                 \
    static inline u mov_##t(u a) { return a; }                                                                  \
    static inline u cvta_to_global_##t(u a) { return a; }                                                       \
    static inline u shr_##t(t a, u32 n) { return n < bits ? (u)(a >> n) : (u)(a < 0 ? -1 : 0); }                \
    static inline u selp_##t(u a, u b, pred p) { return p ? a : b; }                                            \
    static inline pred setp_lt_##t(t a, t b) { return a < b; }                                                  \
    static inline pred setp_le_##t(t a, t b) { return a <= b; }                                                 \
    static inline pred setp_gt_##t(t a, t b) { return a > b; }                                                  \
    static inline pred setp_ge_##t(t a, t b) { return a >= b; }                                                 \
    static inline pred setp_eq_##t(t a, t b) { return a == b; }                                                 \
    static inline pred setp_ne_##t(t a, t b) { return a != b; }

#define BITS(t, bits)                                                                                           \
    INTEGER(t, t, bits)                                                                                         \
    static inline t and_##t(t a, t b) { return a & b; }                                                         \
    static inline t or_##t(t a, t b) { return a | b; }                                                          \
    static inline t xor_##t(t a, t b) { return a ^ b; }                                                         \
    static inline t not_##t(t a) { return ~a; }                                                                 \
    static inline t shl_##t(t a, u32 n) { return n < bits ? a << n : 0; }

INTEGER(u64, u64, 64) INTEGER(s64, u64, 64) INTEGER(u32, u32, 32) INTEGER(s32, u32, 32)
INTEGER(u16, u16, 16) INTEGER(s16, u16, 16)
BITS(b64, 64) BITS(b32, 32) BITS(b16, 16)

/* bits of a, in b from bit `at` on; a field that would pass the highest bit is cut off there */
static inline u64 bfi_b64(u64 a, u64 b, u32 at, u32 length)
{
    u64 ones = (at & 255) > 63 ? 0 : (length & 255) > 63 ? ~0ull : (1ull << (length & 255)) - 1;
    return (at & 255) > 63 ? b : (b & ~(ones << (at & 255))) | ((a & ones) << (at & 255));
}
/* four bytes of the eight in a and b, each by its number in four bits; the highest of these repeats the sign of the byte */
static inline u32 prmt_b32(u32 a, u32 b, u32 which)
{
    u64 from = (u64)b << 32 | a;
    u32 made = 0;
    for (int k = 0; k < 4; k++) {
        u32 selected = which >> 4 * k & 15, byte = (u32)(from >> 8 * (selected & 7)) & 255;
        made |= (selected & 8 ? byte & 128 ? 255u : 0 : byte) << 8 * k;
    }
    return made;
}
static inline u64 mul_wide_u32(u32 a, u32 b) { return (u64)a * b; }
static inline u64 mul_wide_s32(s32 a, s32 b) { return (s64)a * b; }
static inline u32 mul_wide_u16(u16 a, u16 b) { return (u32)a * b; }
static inline u64 mad_wide_u32(u32 a, u32 b, u64 c) { return (u64)a * b + c; }
static inline u64 mad_wide_s32(s32 a, s32 b, u64 c) { return (u64)((s64)a * b) + c; }
static inline pred and_pred(pred a, pred b) { return a & b; }
static inline pred or_pred(pred a, pred b) { return a | b; }
static inline pred not_pred(pred a) { return !a; }
static inline pred xor_pred(pred a, pred b) { return a ^ b; }
static inline pred mov_pred(s64 a) { return a != 0; }

#define CONVERT(to, from) static inline u64 cvt_##to##_##from(from a) { return (u64)(to)a; }
#define CONVERT_FROM(from) CONVERT(u64, from) CONVERT(s64, from) CONVERT(u32, from) CONVERT(s32, from) CONVERT(u16, from) CONVERT(s16, from)
CONVERT_FROM(u64) CONVERT_FROM(s64) CONVERT_FROM(u32) CONVERT_FROM(s32) CONVERT_FROM(u16) CONVERT_FROM(s16)
CONVERT_FROM(u8) CONVERT_FROM(s8)
static inline u64 cvt_f64_f32(u32 a) { return bits_of_f64(f32_of(a)); }
static inline u32 cvt_rn_f32_f64(u64 a) { return bits_of_f32((float)f64_of(a)); }
static inline u32 cvt_rn_f32_u32(u32 a) { return bits_of_f32((float)a); }
static inline u32 cvt_rn_f32_u16(u16 a) { return bits_of_f32((float)a); }
static inline u32 cvt_rzi_u32_f32(u32 a) { /* towards 0, between 0 and the largest */
    float x = f32_of(a); return isnan(x) || x <= 0 ? 0 : x >= 0x1p32f ? ~0u : (u32)x; }
static inline u32 cvt_rn_f32_s32(s32 a) { return bits_of_f32((float)a); }
static inline u64 cvt_rn_f64_s64(s64 a) { return bits_of_f64((double)a); }
static inline s64 cvt_rzi_s64_f64(u64 a) { return (s64)f64_of(a); } /* of what fits */

/* Memory: each access lies inside one region, aligned; each store is counted per byte. */
typedef struct { u64 start, end; uint8_t *stores; } region;
typedef struct { const region *region; int regions, error; u64 address; } memory;
enum { MISALIGNED = 1, BAD_LOAD, BAD_STORE, DIVERGED };

static inline int reach(memory *m, u64 address, u64 size, int error)
{
    if (address % size) { m->error = MISALIGNED; m->address = address; return 0; }
    for (const region *r = m->region; r < m->region + m->regions; r++)
        if (address >= r->start && address + size <= r->end) {
            if (error == BAD_STORE && r->stores)
                for (u64 k = address - r->start; k < address + size - r->start; k++)
                    if (r->stores[k] < 255) r->stores[k]++;
            return 1;
        }
    m->error = error; m->address = address; return 0;
}
#define LOAD(register_, type, address) { type x; memcpy(&x, (void *)(address), sizeof x); register_ = (u64)x; }
#define STORE(type, address, register_) { type x = (type)(register_); memcpy((void *)(address), &x, sizeof x); }
typedef u32 f32; typedef u64 f64; /* in memory, too, only bits */

/* A shuffle: every thread of a warp waits for all others, whose registers it may read then; see warp.h. */
static u32 exchanged(u32 x, u32 with);
static inline u32 shfl_sync_bfly_b32(u32 x, u32 mask, u32 clamp, u32 members)
{
    if (clamp != 31 || members != ~0u) __builtin_trap();
    return exchanged(x, mask);
}
