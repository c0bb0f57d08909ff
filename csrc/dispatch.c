/* Which tier runs: the first of TIERS that this CPU supports, unless another is forced. */
#include <stdatomic.h>
#include <stddef.h>
#include "internal.h"

#define DEFINE_SUPPORTED(isa, target, supported, with) \
    static int isa##_is_supported(void) { return supported; }
TIERS(DEFINE_SUPPORTED, )
#define ROW(isa, target, supported, with) \
    {#isa, isa##_is_supported, fastrms_kernels_##isa, fastrms_scan_##isa, &fastrms_ceilings_##isa},
static const fastrms_tier tiers[] = {TIERS(ROW, )};

static const fastrms_tier *_Atomic current;

int fastrms_isa_count(void) { return (int)(sizeof tiers / sizeof *tiers); }
const char *fastrms_isa_name(int isa) { return tiers[isa].name; }
int fastrms_isa_supported(int isa) { return tiers[isa].supported(); }

int fastrms_isa_set(int isa)
{
    if (isa < 0 || isa >= fastrms_isa_count() || !tiers[isa].supported())
        return -1;
    atomic_store_explicit(&current, &tiers[isa], memory_order_relaxed);
    return isa;
}

const fastrms_tier *fastrms_current_tier(void)
{
    const fastrms_tier *tier = atomic_load_explicit(&current, memory_order_relaxed);
    for (int isa = 0; !tier; ++isa)
        tier = fastrms_isa_set(isa) < 0 ? NULL : &tiers[isa];
    return tier;
}

int fastrms_isa_get(void) { return (int)(fastrms_current_tier() - tiers); }

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
