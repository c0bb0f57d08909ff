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

typedef void fastrms_kernel(int64_t size, void *param, const void *grad, void *const *state, const void *coefficients);
extern fastrms_kernel *const fastrms_kernels_baseline[][2][2];      /* [rule][float, double][neutral, general] */
extern fastrms_kernel *const fastrms_kernels_avx2[][2][2];

fastrms_kernel *fastrms_find(const fastrms_group *group);

/* sum of squares of one gradient as sum * 2^(2*exponent), in one fixed order */
typedef struct { double sum; int exponent; } fastrms_squares;
void fastrms_add_squares(fastrms_squares *total, int64_t size, int itemsize, const void *grad);
double fastrms_root(const fastrms_squares *total);

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
