/* What the C files share and users do not see. */
#ifndef FASTRMS_INTERNAL_H
#define FASTRMS_INTERNAL_H
#include "fastrms.h"
#include "testing_decl.h"

#ifdef __FAST_MATH__
#error "fastrms promises IEEE results: build without -ffast-math"
#endif

/* The tiers: the instruction sets that the loops are compiled for, the most able first.  dispatch.c takes, kernel by kernel,
 * the fastest that the CPU supports.  X(name, attributes of a function, whether this CPU supports it, where a kernel has its
 * square roots from, with).  Skylake and Cascade Lake, which lower their clock for 512 bits, lack avx512vbmi2. */
#if defined(__x86_64__) && defined(__GNUC__)
#define HAS(feature) (__builtin_cpu_init(), __builtin_cpu_supports(feature) != 0)
#ifdef __clang__                                          /* which takes the widest vectors that it has */
#define AVX512 "avx512f,avx512dq,avx512bw,avx512vl"
#else
#define AVX512 "avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512"
#endif
#define HAS_AVX512 (HAS("avx512f") && HAS("avx512dq") && HAS("avx512bw") && HAS("avx512vl") && HAS("avx512vbmi2") && HAS("fma"))
#define TIERS(X, with)                                                                                          \
    X(avx512, __attribute__((target(AVX512))), HAS_AVX512, DIVIDER, with)                                       \
    X(avx512fma, __attribute__((target(AVX512 ",fma"))), HAS_AVX512 && fastrms_roots_are_right(), MULTIPLIERS, with) \
    X(avx2, __attribute__((target("avx2"))), HAS("avx2"), DIVIDER, with)                                        \
    X(baseline, , 1, DIVIDER, with)                       /* without fma nothing can contract */
int fastrms_roots_are_right(void);                        /* roots.c */
#elif defined(__aarch64__)
#define TIERS(X, with) X(neon, , 1, DIVIDER, with)        /* every such CPU has it */
#else
#define TIERS(X, with) X(baseline, , 1, DIVIDER, with)
#endif

/* before a loop: its buffers never overlap; and before a loop over one vector, which gcc would else take apart into single
 * elements */
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define ONE_VECTOR INDEPENDENT
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#define ONE_VECTOR INDEPENDENT _Pragma("GCC unroll 1")
#endif

/* Large buffers are prefetched ahead of their use: the processor's own prefetching leaves the divider waiting.  A tile is
 * short, so that the requests of all streams mix with the arithmetic, and of constant length, so that it has no tail. */
enum { FASTRMS_LINE = 64, FASTRMS_TILE = 2 * FASTRMS_LINE, FASTRMS_PREFETCHED = 24 * FASTRMS_LINE };      /* bytes */
#define FASTRMS_PREFETCH(pointer, line) __builtin_prefetch((const char *)(pointer) + FASTRMS_PREFETCHED + (line));

enum { FASTRMS_BLOCK_BITS = 8, FASTRMS_BLOCK = 1 << FASTRMS_BLOCK_BITS };      /* elements of a block of an 8-bit format */

typedef void fastrms_kernel(int64_t size, void *param, const void *grad, void *const *state, const void *coefficients);

/* norm.c: what a scan of a gradient looks for, and the function that finds the sum of squares and the number of nonfinite
 * elements of one block, each element of which is stored in `stored` bytes */
typedef struct {
    int squares, nonfinite;
    double grad_scale;                                    /* used by the count only */
} fastrms_scan_options;
typedef fastrms_squares fastrms_scan_function(int64_t size, int stored, const void *grad, fastrms_scan_options options);

typedef struct fastrms_ceiling_loops fastrms_ceiling_loops;      /* ceilings.c */

/* formats.c: a part of a stored buffer, and the loops that read and write it.  low: the lower bits of a split format, and the
 * int32 of the blocks of an 8-bit format, at whose borders such a part begins and ends, unless the tensor ends.  rounding: of
 * the first element of the part. */
typedef struct {
    void *stored, *low;
} fastrms_stored;
typedef void fastrms_decoder(int format, int64_t size, fastrms_stored from, float *to);
typedef void fastrms_encoder(int format, int64_t size, const float *from, fastrms_stored to, fastrms_rounding rounding);
fastrms_stored fastrms_part(int format, int64_t size, void *stored, void *low, int64_t begin);
int fastrms_format_itemsize(int format);                  /* bytes; of a split format, of the lower bits */

typedef struct {
    const char *name;
    int (*supported)(void);
    fastrms_kernel *const (*kernels)[2][2];               /* [rule][float, double][neutral, general] */
    fastrms_scan_function *scan;
    fastrms_decoder *decode;
    fastrms_encoder *encode;
    const fastrms_ceiling_loops *ceilings;
} fastrms_tier;
#define DECLARE_TIER(isa, target, supported, roots, with)                                                              \
    extern fastrms_kernel *const fastrms_kernels_##isa[][2][2];                                                 \
    fastrms_scan_function fastrms_scan_##isa;                                                                   \
    fastrms_decoder fastrms_decode_##isa;                                                                       \
    fastrms_encoder fastrms_encode_##isa;                                                                       \
    extern const fastrms_ceiling_loops fastrms_ceilings_##isa;
TIERS(DECLARE_TIER, )

/* dispatch.c: the kernel of a rule, in float or double, in the neutral or the general form; and the tier for everything else */
fastrms_kernel *fastrms_kernel_of(int rule, int wide, int general);
const fastrms_tier *fastrms_current_tier(void);
const fastrms_tier *fastrms_tier_of(int isa);
extern const fastrms_tier *_Atomic fastrms_fastest[][2][2];      /* kernels.c; NULL until a kernel is first used */

/* recipes.c: the coefficients of update number `step`, rounded once to the compute dtype */
void fastrms_evaluate(const fastrms_recipe *recipe, int64_t step, double grad_scale, double *made);

/* pool.c: run task over [0, count), in chunks by all threads where the step has enough elements and the pool is free, else
 * in one piece by the caller */
typedef void fastrms_task(void *context, int64_t begin, int64_t end);
void fastrms_parallel(int64_t elements, fastrms_task *task, void *context, int64_t count, int64_t chunk);
int64_t fastrms_chunk_size(void);
void fastrms_enter_step(void);
void fastrms_leave_step(void);
int32_t fastrms_generation(void);

/* norm.c.  A step multiplies every gradient by grad_scale * grad_rescale.  grad_rescale is a power of two, and 1 except
 * where the product is below the normal numbers of float; such a step runs the general form of its rules. */
typedef struct {
    double grad_scale, grad_rescale;
} fastrms_factor;
int64_t fastrms_segments(int64_t size);                   /* how many segments a scan of `size` elements has */
fastrms_squares fastrms_scan(fastrms_plan *plan);
int fastrms_scan_shards(fastrms_plan *plan, fastrms_squares *total);      /* a status */
fastrms_factor fastrms_clipped_scale(const fastrms_plan *plan, const fastrms_squares *squares);

/* The floating-point mode of the calling thread: kernels run in IEEE arithmetic with subnormals, whatever the caller set. */
#if defined(__x86_64__)
#include <xmmintrin.h>
#define FASTRMS_DEFAULT_MODE 0x1f80u
typedef unsigned fastrms_mode;
static inline fastrms_mode fastrms_set_float_mode(void)
{
    fastrms_mode mode = _mm_getcsr();
    if ((mode & ~0x3fu) != FASTRMS_DEFAULT_MODE)
        _mm_setcsr(FASTRMS_DEFAULT_MODE);
    return mode;
}
static inline void fastrms_restore_float_mode(fastrms_mode mode)
{
    if ((mode & ~0x3fu) != FASTRMS_DEFAULT_MODE)
        _mm_setcsr(mode);
}
#elif defined(__aarch64__)
typedef uint64_t fastrms_mode;
static inline fastrms_mode fastrms_set_float_mode(void)
{
    fastrms_mode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    if (mode)
        __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
    return mode;
}
static inline void fastrms_restore_float_mode(fastrms_mode mode)
{
    if (mode)
        __asm__ volatile("msr fpcr, %0" : : "r"(mode));
}
#else
typedef int fastrms_mode;
static inline fastrms_mode fastrms_set_float_mode(void) { return 0; }
static inline void fastrms_restore_float_mode(fastrms_mode mode) { (void)mode; }
#endif
#endif
