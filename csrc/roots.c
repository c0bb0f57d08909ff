/* Does roots.h give the roots of the divider on this CPU?  It does for all numbers but these and their multiples by powers
 * of 4, whatever the CPU's estimate of 1/sqrt(x) is.  These are the doubles in [1, 4) whose roots come out wrong for some g
 * within 2 ulp of the root and some h within 4 ulp of half its inverse: here the estimate decides. */
#include "internal.h"
#ifdef AVX512
#include <string.h>
#include "roots.h"

static const double decided_by_the_estimate[][8] = {
    {0x1.0000000000001p+0, 0x1.0000000000003p+0, 0x1.256565cadcbf4p+0, 0x1.270ac7cec9d2ap+0,
     0x1.2b035c1197f48p+0, 0x1.732b9a374ddcep+0, 0x1.80b07a7182913p+0, 0x1.955d8279a3c0fp+0},
    {0x1.a881d1831fabdp+0, 0x1.ba44c2a0737a2p+0, 0x1.d407bb3641da5p+0, 0x1.e99893042c2cbp+0,
     0x1.1ac9955fd90d2p+1, 0x1.4eb5f85e783a9p+1, 0x1.5b95344972fe2p+1, 0x1.69ca8fa07c526p+1},
    {0x1.77483d37ce205p+1, 0x1.8444088dbdcb5p+1, 0x1.92e58e3597929p+1, 0x1.d2221598a924ap+1,
     0x1.e4054716ef6ap+1, 0x1.e63a86a12a838p+1, 0x1.f974b2f9b9fd3p+1, 0x1.ffffffffffff5p+1},
    {0x1.ffffffffffff7p+1, 0x1.ffffffffffff9p+1, 0x1.ffffffffffffbp+1, 0x1.ffffffffffffdp+1,
     0x1.fffffffffffffp+1, 1, 1, 1},
};

__attribute__((target(AVX512 ",fma"))) int fastrms_roots_are_right(void)
{
    int right = 1;
    for (unsigned k = 0; k < sizeof decided_by_the_estimate / sizeof *decided_by_the_estimate; ++k) {
        const double *x = decided_by_the_estimate[k];
        double found[8], root[8];
        memcpy(found, x, sizeof found);
        double_roots(found);
        _mm512_storeu_pd(root, _mm512_sqrt_pd(_mm512_loadu_pd(x)));
        right &= !memcmp(found, root, sizeof root);
    }
    return right;
}
#endif
