/* Every kernel once, then whole steps of a tiny bound tensor: tests/test_instructions.py runs this under callgrind and
 * reads the cost of each function.  Arguments: instruction set, elements per kernel, steps. */
#include <stdlib.h>
#include <string.h>
#include "fastrms.h"
#include "testing_decl.h"

enum { MOST = 1 << 14, TINY = 64 };
static double memory[2 + FASTRMS_MAX_STATES][MOST];       /* zeros, like all coefficients: no loop branches on its data */

static int force(const char *isa)
{
    for (int k = 0; k < fastrms_isa_count(); ++k)
        if (!strcmp(fastrms_isa_name(k), isa))
            return fastrms_isa_set(k);
    return -1;
}

static void run_kernel(int rule, int itemsize, int general, int64_t size)
{
    fastrms_recipe recipe = {.rule = rule, .itemsize = itemsize, .general = general, .coefficients = FASTRMS_MAX_COEFFICIENTS};
    if (fastrms_update(&recipe, size, 1, 1, memory[0], memory[1], memory[2], memory[3], memory[4]))
        abort();
}

static void run_steps(int rule, int steps)
{
    fastrms_recipe recipe = {.rule = rule, .itemsize = 4, .coefficients = FASTRMS_MAX_COEFFICIENTS};
    const void *grad = memory[1];
    static double scratch[MOST];
    fastrms_tensor tensor = {.size = TINY, .param = memory[0], .state = {memory[2]}};
    fastrms_plan plan;
    if (fastrms_scratch_bytes(1, &tensor) > (int64_t)sizeof scratch)
        abort();
    fastrms_plan_init(&plan, 1, &tensor, 1, &recipe, &grad, scratch);
    plan.held = 1;
    for (int k = 0; k < steps; ++k)
        if (fastrms_step(&plan))
            abort();
}

int main(int count, char **arguments)
{
    int size = count == 4 ? atoi(arguments[2]) : 0;
    if (size < 1 || size > MOST || force(arguments[1]) < 0)
        return 2;
    for (int rule = 0; rule < fastrms_rule_count(); ++rule) {
        for (int itemsize = 4; itemsize <= 8; itemsize += 4)
            for (int general = 0; general < 2; ++general)
                run_kernel(rule, itemsize, general, size);
        if (!strcmp(fastrms_rule_name(rule), "rmsprop"))
            run_steps(rule, atoi(arguments[3]));
    }
    return 0;
}
