/* One line for each rule, form and dtype, for each storage format, and for steps that clip on several threads: the hash of all
 * that was computed.  Every tier of the CPU must have it, and tests/test_ports.py compares the lines of other CPUs, systems and
 * compilers with those of this machine.  NaNs count as equal. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "fastrms.h"
#include "testing_decl.h"

enum { MOST = 4099, STEPS = 3, LARGE = 70001 };
static const int64_t LONG[] = {255, 256, 257, 1003, MOST};
static uint64_t random_state;
static int failed;

static uint64_t hash_of(const void *from, size_t bytes, uint64_t hash)
{
    const unsigned char *at = from;
    for (size_t i = 0; i < bytes; ++i)
        hash = (hash ^ at[i]) * UINT64_C(0x100000001b3);
    return hash;
}

static uint32_t random_bits(void)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(random_state >> 32);
}

static double uniform(void) { return random_bits() * 0x1p-32; }

/* usual numbers, and among them zeros, infinities, NaNs, subnormals, and any bits */
static double any_number(int wide, int positive)
{
    uint32_t bits = random_bits();
    uint64_t both = (uint64_t)bits << 32 | random_bits();
    float narrow;
    double x = uniform() * 4 - 2;
    if (random_bits() % 16 == 0) {
        memcpy(&narrow, &bits, sizeof narrow);
        memcpy(&x, &both, sizeof x);
        x = random_bits() % 4 == 0 ? 0 : wide ? x : (double)narrow;
    }
    return positive && x < 0 ? -x : x;
}

static void fill(void *to, int itemsize, int64_t size, int positive)
{
    for (int64_t i = 0; i < size; ++i)
        if (itemsize == 8)
            ((double *)to)[i] = any_number(1, positive);
        else
            ((float *)to)[i] = (float)any_number(0, positive);
}

static uint64_t hash_of_numbers(void *at, int itemsize, int64_t size, uint64_t hash)
{
    for (int64_t i = 0; i < size; ++i)
        if (itemsize == 8 && ((double *)at)[i] != ((double *)at)[i])
            memset((double *)at + i, 0xff, 8);
        else if (itemsize == 4 && ((float *)at)[i] != ((float *)at)[i])
            memset((float *)at + i, 0xff, 4);
    return hash_of(at, (size_t)(size * itemsize), hash);
}

/* all lengths from 0 to 130 and some longer, at two offsets */
static uint64_t hash_of_kernel(const fastrms_recipe *recipe)
{
    static double memory[2 + FASTRMS_MAX_STATES][MOST + 1];
    int states = fastrms_rule_states(recipe->rule);
    uint64_t hash = 0xcbf29ce484222325;
    random_state = 7;
    for (int64_t k = 0; k < 131 + (int64_t)(sizeof LONG / sizeof *LONG); ++k) {
        int64_t size = k < 131 ? k : LONG[k - 131];
        char *at[2 + FASTRMS_MAX_STATES];
        for (int b = 0; b < 2 + FASTRMS_MAX_STATES; ++b) {
            at[b] = (char *)memory[b] + k % 2 * recipe->itemsize;
            fill(at[b], recipe->itemsize, size, b > 1);
        }
        for (int64_t t = 1; t <= STEPS; ++t)
            failed |= fastrms_update(recipe, size, t, 0.5, at[0], at[1], states > 0 ? at[2] : NULL, states > 1 ? at[3] : NULL,
                                     states > 2 ? at[4] : NULL);
        for (int b = 0; b < 2 + states; ++b)
            hash = hash_of_numbers(at[b], recipe->itemsize, size, hash);
    }
    return hash;
}

static uint64_t hash_of_format(int isa, int format, int stochastic)
{
    static float x[MOST], back[MOST];
    static double stored[MOST], low[MOST];
    int is_split = format == FASTRMS_SPLIT16 || format == FASTRMS_SPLIT8;
    fastrms_rounding rounding = {stochastic, fastrms_key(3, 5, 1), 11};
    uint64_t hash = 0xcbf29ce484222325;
    random_state = 9;
    for (int64_t size = 1; size < MOST; size += 1 + size / 9) {
        fill(x, 4, size, format == FASTRMS_Q8U);
        fastrms_encode(isa, format, size, x, stored, is_split ? low : NULL, rounding);
        fastrms_decode(isa, format, size, stored, is_split ? low : NULL, back);
        hash = hash_of_numbers(back, 4, size, hash);
    }
    return hash;
}

/* steps that measure the norm of two tensors, one of them large, and clip it */
static uint64_t hash_of_steps(const fastrms_recipe *given)
{
    static double memory[5][LARGE + 1003], scratch[1000];
    fastrms_recipe recipe = *given;
    fastrms_tensor tensor[2] = {{.size = LARGE}, {.size = 1003}};
    const void *grad[2];
    fastrms_plan plan;
    uint64_t hash = 0xcbf29ce484222325;
    random_state = 11;
    for (int b = 0; b < 5; ++b)
        for (int64_t i = 0; i < LARGE + 1003; ++i)
            if (recipe.itemsize == 8)
                memory[b][i] = uniform();
            else
                ((float *)memory[b])[i] = (float)uniform();
    for (int k = 0; k < 2; ++k) {
        char *at[5];
        for (int b = 0; b < 5; ++b)
            at[b] = (char *)memory[b] + k * LARGE * recipe.itemsize;
        tensor[k].param = at[0];
        grad[k] = at[1];
        for (int s = 0; s < fastrms_rule_states(recipe.rule); ++s)
            tensor[k].state[s] = at[2 + s];
    }
    if (fastrms_scratch_bytes(2, tensor) > (int64_t)sizeof scratch)
        abort();
    fastrms_plan_init(&plan, 2, tensor, 1, &recipe, grad, scratch);
    plan.held = 1;
    for (int t = 0; t < STEPS; ++t) {
        fastrms_found found;
        failed |= fastrms_step_with(&plan, 1, 0.5, 10, &found);
        hash = hash_of(&found.grad_norm, sizeof found.grad_norm, hash);
    }
    return hash_of(memory, sizeof memory, hash);
}

/* prints a line, once, where all tiers have the same hash */
static void report(int isa, uint64_t *first, uint64_t hash, const char *what, const char *how, int number)
{
    if (!*first)
        printf("%s %s %d %016llx\n", what, how, number, (unsigned long long)(*first = hash));
    else if (*first != hash)
        failed |= printf("%s %s %d differs on %s\n", what, how, number, fastrms_isa_name(isa));
}

static void compare_recipe(const char *what, const fastrms_recipe *recipe)
{
    uint64_t kernel = 0, steps = 0;
    for (int isa = 0; isa < fastrms_isa_count(); ++isa)
        if (fastrms_isa_set(isa) == isa) {
            report(isa, &kernel, hash_of_kernel(recipe), what, recipe->general ? "general" : "neutral", recipe->itemsize);
            for (int threads = 1; threads < 8; threads += 3) {
                fastrms_set_num_threads(threads);
                report(isa, &steps, hash_of_steps(recipe), what, recipe->general ? "general steps" : "steps", recipe->itemsize);
            }
        }
}

typedef const char *recipe_maker(fastrms_recipe *recipe, int itemsize, const fastrms_hyper *hyper);

static void compare_rule(recipe_maker *make, fastrms_hyper hyper)
{
    for (int itemsize = 4; itemsize <= 8; itemsize += 4)
        for (int general = 0; general < 2; ++general) {
            fastrms_recipe recipe;
            hyper.clip_value = general ? 0.75 : 0;
            if (make(&recipe, itemsize, &hyper))
                abort();
            compare_recipe(fastrms_rule_name(recipe.rule), &recipe);
        }
}

int main(void)
{
    fastrms_hyper rmsprop = fastrms_rmsprop_defaults, adam = fastrms_adam_defaults;
    fastrms_set_chunks(1000, 1);
    for (int variant = 0; variant < 4; ++variant) {
        rmsprop.momentum = variant & 1 ? 0.9 : 0;
        rmsprop.centered = variant >> 1;
        compare_rule(fastrms_rmsprop_recipe, rmsprop);
    }
    compare_rule(fastrms_adagrad_recipe, fastrms_adagrad_defaults);
    for (adam.amsgrad = 0; adam.amsgrad < 2; ++adam.amsgrad)
        compare_rule(fastrms_adam_recipe, adam);
    compare_rule(fastrms_rprop_recipe, fastrms_rprop_defaults);
    for (int format = FASTRMS_FLOAT; format <= FASTRMS_SPLIT8; ++format)
        for (int stochastic = 0; stochastic < 2; ++stochastic) {
            uint64_t first = 0;
            for (int isa = 0; isa < fastrms_isa_count(); ++isa)
                if (fastrms_isa_supported(isa))
                    report(isa, &first, hash_of_format(isa, format, stochastic), "format", stochastic ? "random" : "nearest", format);
        }
    printf(failed ? "FAILED\n" : "done\n");
    return failed != 0;
}
