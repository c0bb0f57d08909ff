/* The benchmark's ceiling: the same streams as a rule reads and writes, with next to no arithmetic. */
#include "internal.h"

#define ARGUMENTS int64_t size, int states, real *restrict param, const real *restrict grad, \
                  real *restrict state0, real *restrict state1, real *restrict state2
#define EACH _Pragma("GCC ivdep") for (int64_t i = 0; i < size; ++i)
#define STREAMS(name, target)                                                                          \
    target static void name(ARGUMENTS)                                                                 \
    {                                                                                                  \
        if (states == 1)                                                                               \
            EACH { state0[i] += grad[i]; param[i] += state0[i]; }                                      \
        else if (states == 2)                                                                          \
            EACH { state0[i] += grad[i]; state1[i] += grad[i]; param[i] += state0[i]; }                \
        else                                                                                           \
            EACH { state0[i] += grad[i]; state1[i] += grad[i]; state2[i] += grad[i]; param[i] += state0[i]; } \
    }

#ifdef FASTRMS_AVX2
#define real float
STREAMS(streams_float_avx2, FASTRMS_AVX2)
#undef real
#define real double
STREAMS(streams_double_avx2, FASTRMS_AVX2)
#undef real
#endif
#define real float
STREAMS(streams_float_baseline, )
#undef real
#define real double
STREAMS(streams_double_baseline, )
#undef real

void fastrms_streams(int64_t size, int itemsize, int states, void *param, const void *grad,
                     void *state0, void *state1, void *state2)
{
#ifdef FASTRMS_AVX2
    if (fastrms_isa_get() + 1 < fastrms_isa_count()) {        /* the last of the list is the baseline */
        if (itemsize == 4)
            streams_float_avx2(size, states, param, grad, state0, state1, state2);
        else
            streams_double_avx2(size, states, param, grad, state0, state1, state2);
        return;
    }
#endif
    if (itemsize == 4)
        streams_float_baseline(size, states, param, grad, state0, state1, state2);
    else
        streams_double_baseline(size, states, param, grad, state0, state1, state2);
}
