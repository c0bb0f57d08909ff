/* Which tier runs.  All tiers have the same bits, so each kernel is taken from the tier that is fastest at it on this CPU:
 * that depends on its divider, its clock and the width of its units, and is measured when the kernel is first used. */
#include "system.h"
#include <stdatomic.h>
#include "internal.h"

#define DEFINE_SUPPORTED(isa, target, supported, roots, with) \
    static int isa##_is_supported(void) { return supported; }
TIERS(DEFINE_SUPPORTED, )
#define ROW(isa, target, supported, roots, with) \
    {#isa, isa##_is_supported, fastrms_kernels_##isa, fastrms_scan_##isa, fastrms_decode_##isa, fastrms_encode_##isa, \
     &fastrms_ceilings_##isa},
static const fastrms_tier tiers[] = {TIERS(ROW, )};

enum { COUNT = sizeof tiers / sizeof *tiers };

static const fastrms_tier *_Atomic forced;

int fastrms_isa_count(void) { return COUNT; }
const char *fastrms_isa_name(int isa) { return tiers[isa].name; }
int fastrms_isa_supported(int isa) { return tiers[isa].supported(); }

const fastrms_tier *fastrms_tier_of(int isa) { return &tiers[isa]; }

int fastrms_isa_set(int isa)
{
    if (isa >= COUNT || (isa >= 0 && !tiers[isa].supported()))
        return -1;
    atomic_store_explicit(&forced, isa < 0 ? NULL : &tiers[isa], memory_order_relaxed);
    return isa;
}

const fastrms_tier *fastrms_current_tier(void)
{
    const fastrms_tier *tier = atomic_load_explicit(&forced, memory_order_relaxed);
    for (int isa = 0; !tier; ++isa)
        tier = tiers[isa].supported() ? &tiers[isa] : NULL;
    return tier;
}

int fastrms_isa_get(void) { return (int)(fastrms_current_tier() - tiers); }

enum { DOUBLES = 256, APART = 40, CALLS = 8, ROUNDS = 6 };

static void fill_with_ones(int count, void *to, int wide)
{
    for (int i = 0; i < count; ++i)
        if (wide)
            ((double *)to)[i] = 1;
        else
            ((float *)to)[i] = 1;
}

/* The nanoseconds of some calls of a kernel, on numbers that stay finite and at least 1: with all coefficients 1, a gradient
 * of 1 adds at most 1 to what a state holds.  The buffers start at multiples of a line, at different places modulo 4 KiB:
 * else wide loads and stores hinder each other at some places of the stack, and the widest tier may seem the slowest.  They
 * are short, since the stack of the calling thread may be small. */
static int64_t time_of(fastrms_kernel *kernel, int wide)
{
    __attribute__((aligned(FASTRMS_LINE))) double buffer[2 + FASTRMS_MAX_STATES][DOUBLES + APART];
    int count = wide ? DOUBLES : 2 * DOUBLES;
    double ones[FASTRMS_MAX_COEFFICIENTS];
    void *state[FASTRMS_MAX_STATES];
    for (int k = 0; k < 2 + FASTRMS_MAX_STATES; ++k)
        fill_with_ones(count, buffer[k], wide);
    fill_with_ones(FASTRMS_MAX_COEFFICIENTS, ones, wide);
    for (int s = 0; s < FASTRMS_MAX_STATES; ++s)
        state[s] = buffer[2 + s];
    kernel(count, buffer[0], buffer[1], state, ones);
    int64_t begin = nanoseconds();
    for (int k = 0; k < CALLS; ++k)
        kernel(count, buffer[0], buffer[1], state, ones);
    return nanoseconds() - begin;
}

/* the tier that is fastest at a kernel; the tiers take turns, and the shortest time of each counts */
static const fastrms_tier *find_fastest(int rule, int wide, int general)
{
    int64_t shortest = INT64_MAX;
    const fastrms_tier *found = fastrms_current_tier();
    for (int k = 0; k < ROUNDS * COUNT; ++k) {
        const fastrms_tier *tier = &tiers[k % COUNT];
        int64_t time = tier->supported() ? time_of(tier->kernels[rule][wide][general], wide) : INT64_MAX;
        if (time < shortest) {
            shortest = time;
            found = tier;
        }
    }
    return found;
}

static const fastrms_tier *tier_of_kernel(int rule, int wide, int general)
{
    const fastrms_tier *tier = atomic_load_explicit(&forced, memory_order_relaxed);
    if (tier)
        return tier;
    tier = atomic_load_explicit(&fastrms_fastest[rule][wide][general], memory_order_relaxed);
    if (!tier) {
        tier = find_fastest(rule, wide, general);
        atomic_store_explicit(&fastrms_fastest[rule][wide][general], tier, memory_order_relaxed);
    }
    return tier;
}

fastrms_kernel *fastrms_kernel_of(int rule, int wide, int general)
{
    return tier_of_kernel(rule, wide, general)->kernels[rule][wide][general];
}

int fastrms_isa_of(int rule, int itemsize, int general) { return (int)(tier_of_kernel(rule, itemsize == 8, general) - tiers); }

const char *fastrms_compiler(void)
{
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown";
#endif
}
