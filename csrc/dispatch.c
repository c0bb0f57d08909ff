/* Which kernels this CPU runs: an ordered list, best first; the first supported one unless another is forced. */
#include <stdatomic.h>
#include <stddef.h>
#include "internal.h"

static int always(void) { return 1; }
#ifdef FASTRMS_AVX2
static int has_avx2(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") != 0;
}
#endif

static const struct {
    const char *name;
    int (*supported)(void);
    fastrms_kernel *const (*kernels)[2][2];
} isas[] = {
#ifdef FASTRMS_AVX2
    {"avx2", has_avx2, fastrms_kernels_avx2},
#endif
    {"baseline", always, fastrms_kernels_baseline},
};

static _Atomic int current = -1;

int fastrms_isa_count(void) { return (int)(sizeof isas / sizeof *isas); }
const char *fastrms_isa_name(int isa) { return isas[isa].name; }
int fastrms_isa_supported(int isa) { return isas[isa].supported(); }

int fastrms_isa_set(int isa)
{
    if (isa < 0 || isa >= fastrms_isa_count() || !isas[isa].supported())
        return -1;
    atomic_store_explicit(&current, isa, memory_order_relaxed);
    return isa;
}

int fastrms_isa_get(void)
{
    int isa = atomic_load_explicit(&current, memory_order_relaxed);
    for (int next = 0; isa < 0; ++next)
        isa = fastrms_isa_set(next);
    return isa;
}

fastrms_kernel *fastrms_find(const fastrms_recipe *recipe, int general)
{
    return isas[fastrms_isa_get()].kernels[recipe->rule][recipe->itemsize == 8][general != 0];
}

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
