/* Loops that no update can beat, for the benchmark: one moves the memory of a rule with next to no arithmetic, in several
 * orders, and one makes the division and the square root of a rule with next to no memory, the root where a kernel of the
 * tier makes it. */
#include <math.h>
#include <string.h>
#include "internal.h"
#ifdef AVX512
#include "roots.h"
#endif

enum { IN_L1 = 1024 };                                    /* elements */

/* do `work` for every i, in tiles with prefetching as in kernels.inc */
#define EACH(work, ...)                                                                                         \
    {                                                                                                           \
        enum { TILE = FASTRMS_TILE / sizeof(real) };                                                            \
        int64_t start = 0;                                                                                      \
        for (; start + TILE <= size; start += TILE) {                                                           \
            const real *ahead[] = {__VA_ARGS__};                                                                \
            for (unsigned k = 0; k < sizeof ahead / sizeof *ahead; ++k)                                         \
                for (int line = 0; line < FASTRMS_TILE; line += FASTRMS_LINE)                                   \
                    FASTRMS_PREFETCH(ahead[k] + start, line)                                                         \
            INDEPENDENT for (int64_t i = start; i < start + TILE; ++i) work                                     \
        }                                                                                                       \
        INDEPENDENT for (int64_t i = start; i < size; ++i) work                                                 \
    }
#define STREAMS int64_t size, int states, real *restrict param, const real *restrict grad, \
                real *restrict state0, real *restrict state1, real *restrict state2
#define LOOPS(isa, target, supported, roots, dtype)                                                                    \
    target static void together_##dtype##_##isa(STREAMS)                                                        \
    {                                                                                                           \
        if (states == 1)                                                                                        \
            EACH({ state0[i] += grad[i]; param[i] += state0[i]; }, grad, param, state0)                         \
        else if (states == 2)                                                                                   \
            EACH({ state0[i] += grad[i]; state1[i] += grad[i]; param[i] += state0[i]; },                        \
                 grad, param, state0, state1)                                                                   \
        else                                                                                                    \
            EACH({ state0[i] += grad[i]; state1[i] += grad[i]; state2[i] += grad[i]; param[i] += state0[i]; },  \
                 grad, param, state0, state1, state2)                                                           \
    }                                                                                                           \
    target static void in_turn_##dtype##_##isa(STREAMS)                                                         \
    {                                                                                                           \
        EACH(state0[i] += grad[i];, grad, state0)                                                               \
        if (states > 1)                                                                                         \
            EACH(state1[i] += grad[i];, grad, state1)                                                           \
        if (states > 2)                                                                                         \
            EACH(state2[i] += grad[i];, grad, state2)                                                           \
        EACH(param[i] += state0[i];, param, state0)                                                             \
    }                                                                                                           \
    target static void quotients_##dtype##_##isa(int64_t size, real *restrict to, const real *restrict x)       \
    {                                                                                                           \
        enum { LINE = FASTRMS_LINE / sizeof(real) };                                                            \
        for (; size >= 2 * LINE; size -= 2 * LINE, to += 2 * LINE, x += 2 * LINE)                               \
            roots(dtype)                                                                                        \
        INDEPENDENT for (int64_t i = 0; i < size; ++i) to[i] = x[i] / sqrt(x[i]);                               \
    }
#define DIVIDER(dtype)                                                                                          \
    {                                                                                                           \
        INDEPENDENT for (int i = 0; i < 2 * LINE; ++i) to[i] = x[i] / sqrt(x[i]);                               \
    }
#define MULTIPLIERS(dtype)                                                                                      \
    {                                                                                                           \
        real root[LINE];                                                                                        \
        ONE_VECTOR for (int i = 0; i < LINE; ++i) to[i] = x[i] / sqrt(x[i]);                                   \
        memcpy(root, x + LINE, sizeof root);                                                                    \
        dtype##_roots(root);                                                                                    \
        ONE_VECTOR for (int i = 0; i < LINE; ++i) to[LINE + i] = x[LINE + i] / root[i];                        \
    }

#define real float
#define sqrt sqrtf
TIERS(LOOPS, float)
#undef sqrt
#undef real
#define real double
TIERS(LOOPS, double)
#undef real

typedef void float_streams(int64_t, int, float *, const float *, float *, float *, float *);
typedef void double_streams(int64_t, int, double *, const double *, double *, double *, double *);
struct fastrms_ceiling_loops {
    float_streams *float_together, *float_in_turn;
    double_streams *double_together, *double_in_turn;
    void (*float_quotients)(int64_t, float *, const float *);
    void (*double_quotients)(int64_t, double *, const double *);
};
#define OF_TIER(isa, target, supported, roots, with)                                                                   \
    const fastrms_ceiling_loops fastrms_ceilings_##isa = {                                                      \
        together_float_##isa, in_turn_float_##isa, together_double_##isa, in_turn_double_##isa,                 \
        quotients_float_##isa, quotients_double_##isa};
TIERS(OF_TIER, )

static void streams_part(const fastrms_ceiling *job, int64_t begin, int64_t size)
{
    const fastrms_ceiling_loops *loops = fastrms_tier_of(job->isa)->ceilings;
    int turn = job->block > 0;
    int64_t bytes = begin * job->itemsize;
    char *param = (char *)job->param + bytes, *state[FASTRMS_MAX_STATES];
    const char *grad = (const char *)job->grad + bytes;
    for (int s = 0; s < FASTRMS_MAX_STATES; ++s)
        state[s] = job->state[s] ? (char *)job->state[s] + bytes : NULL;
    if (job->itemsize == 4)
        (turn ? loops->float_in_turn : loops->float_together)(
            size, job->states, (float *)param, (const float *)grad, (float *)state[0], (float *)state[1], (float *)state[2]);
    else
        (turn ? loops->double_in_turn : loops->double_together)(
            size, job->states, (double *)param, (const double *)grad, (double *)state[0], (double *)state[1], (double *)state[2]);
}

static void streams_range(void *context, int64_t begin, int64_t end)
{
    const fastrms_ceiling *job = context;
    int64_t block = job->block > 0 ? job->block : end - begin;
    for (; begin < end; begin += block)
        streams_part(job, begin, end - begin < block ? end - begin : block);
}

static void divider_range(void *context, int64_t begin, int64_t end)
{
    const fastrms_ceiling *job = context;
    union { float floats[IN_L1]; double doubles[IN_L1]; } to, from;
    const fastrms_ceiling_loops *loops = fastrms_tier_of(job->isa)->ceilings;
    int first = begin == 0;
    int64_t used = job->size < IN_L1 ? job->size : IN_L1;
    memcpy(&from, job->grad, (size_t)(used * job->itemsize));
    for (int64_t size; begin < end; begin += size) {
        size = end - begin < used ? end - begin : used;
        if (job->itemsize == 4)
            loops->float_quotients(size, to.floats, from.floats);
        else
            loops->double_quotients(size, to.doubles, from.doubles);
        __asm__ volatile("" : : "r"(&to) : "memory");      /* keeps the compiler from dropping a round */
    }
    if (first)
        memcpy(job->param, &to, (size_t)(used * job->itemsize));
}

static void run(fastrms_ceiling *job, fastrms_task *task)
{
    fastrms_enter_step();
    fastrms_parallel(job->shared ? INT64_MAX : 0, task, job, job->size, job->chunk);
    fastrms_leave_step();
}

void fastrms_streams(fastrms_ceiling *job) { run(job, streams_range); }
void fastrms_divider(fastrms_ceiling *job) { run(job, divider_range); }
