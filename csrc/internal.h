/* What the C files share and users do not see. */
#ifndef FASTRMS_INTERNAL_H
#define FASTRMS_INTERNAL_H
#include "fastrms.h"

#ifdef __FAST_MATH__
#error "fastrms promises IEEE results: build without -ffast-math"
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTRMS_AVX2 __attribute__((target("avx2")))      /* avx2 without fma: nothing may contract */
#endif

#if defined(__clang__)                                    /* before a loop: its buffers never overlap */
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

/* Large buffers are asked for ahead of their use: the processor's own prefetching leaves the divider waiting.  A tile is
 * short, so that the requests of all streams mix with the arithmetic, and of constant length, so that it has no tail. */
enum { FASTRMS_LINE = 64, FASTRMS_TILE = 2 * FASTRMS_LINE, FASTRMS_AHEAD = 24 * FASTRMS_LINE };      /* bytes */
#define FASTRMS_ASK(pointer, line) __builtin_prefetch((const char *)(pointer) + FASTRMS_AHEAD + (line));

typedef void fastrms_kernel(int64_t size, void *param, const void *grad, void *const *state, const void *coefficients);
extern fastrms_kernel *const fastrms_kernels_baseline[][2][2];      /* [rule][float, double][neutral, general] */
extern fastrms_kernel *const fastrms_kernels_avx2[][2][2];

fastrms_kernel *fastrms_find(const fastrms_recipe *recipe);

/* recipes.c: the coefficients of update number `step`, rounded once to the compute dtype */
void fastrms_evaluate(const fastrms_recipe *recipe, int64_t step, double grad_scale, double *ready);

/* pool.c: task over [0, count) in chunks, by all threads where the step has enough elements and the pool is free */
typedef void fastrms_task(void *context, int64_t begin, int64_t end);
void fastrms_parallel(int64_t elements, fastrms_task *task, void *context, int64_t count, int64_t chunk);
int64_t fastrms_chunk_size(void);
void fastrms_enter_step(void);
void fastrms_leave_step(void);
int32_t fastrms_generation(void);
#define FASTRMS_VISIBLE __attribute__((visibility("default")))      /* threadpoolctl finds these two by name */

/* norm.c: sums of squares in one fixed order and counts of nonfinite elements, segment by segment */
#define FASTRMS_SEGMENT (1 << 18)
typedef struct {
    int squares, nonfinite;
    double grad_scale;                                    /* for the count only */
} fastrms_wanted;
fastrms_squares fastrms_look(int64_t size, int itemsize, const void *grad, fastrms_wanted wanted);
void fastrms_add_squares(fastrms_squares *total, fastrms_squares part);
double fastrms_root(const fastrms_squares *total, double scale);

/* The floating-point mode of the calling thread: ours is IEEE with subnormals, whatever the caller has set. */
#if defined(__x86_64__)
#include <xmmintrin.h>
#define FASTRMS_DEFAULT_MODE 0x1f80u
typedef unsigned fastrms_mode;
static inline fastrms_mode fastrms_enter(void)
{
    fastrms_mode mode = _mm_getcsr();
    if ((mode & ~0x3fu) != FASTRMS_DEFAULT_MODE)
        _mm_setcsr(FASTRMS_DEFAULT_MODE);
    return mode;
}
static inline void fastrms_leave(fastrms_mode mode)
{
    if ((mode & ~0x3fu) != FASTRMS_DEFAULT_MODE)
        _mm_setcsr(mode);
}
#elif defined(__aarch64__)
typedef uint64_t fastrms_mode;
static inline fastrms_mode fastrms_enter(void)
{
    fastrms_mode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    if (mode)
        __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
    return mode;
}
static inline void fastrms_leave(fastrms_mode mode)
{
    if (mode)
        __asm__ volatile("msr fpcr, %0" : : "r"(mode));
}
#else
typedef int fastrms_mode;
static inline fastrms_mode fastrms_enter(void) { return 0; }
static inline void fastrms_leave(fastrms_mode mode) { (void)mode; }
#endif
#endif
