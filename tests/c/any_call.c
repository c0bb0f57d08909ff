/* Any bytes as a call: hyper-parameters, sizes, offsets, numbers, missing and overlapping buffers.  Nothing outside of a buffer is
 * touched (its memory ends where it ends, for the sanitizers), what is refused changes nothing, and every tier has the same bits.
 * libFuzzer brings the bytes, or main() makes them at random.  Arguments of main: calls and seed; it prints a digest of all results,
 * which is the same on every processor. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "fastrms.h"
#include "testing_decl.h"

enum { BUFFERS = 2 + FASTRMS_MAX_STATES, MOST = 300 };

static const uint8_t *left;
static size_t bytes_left;
static uint64_t digest = 1469598103934665603u, random_state;
static long updates;

static void take(void *to, size_t count)
{
    size_t there = count < bytes_left ? count : bytes_left;
    memset(to, 0, count);
    if (there)
        memcpy(to, left, there);
    left += there;
    bytes_left -= there;
}

static unsigned choose(unsigned count)
{
    uint16_t word;
    take(&word, sizeof word);
    return word % count;
}

static uint32_t random_word(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 16);
}

/* a number for a hyper-parameter whose default is given, which it is where the bytes are at their end */
static double number(double usual)
{
    static const double often[] = {0, 1, 0.5, 0.9, 0.999, 1e-3, 1e-8, 1e-46, 1e-300, 1e39, 2, -1, INFINITY, NAN};
    unsigned which = 159 - choose(160);
    double any;
    if (which < sizeof often / sizeof *often)
        return often[which];
    if (which < 16) {
        take(&any, sizeof any);
        return any;
    }
    return usual;
}

static const char *choose_recipe(fastrms_recipe *recipe, int itemsize)
{
    static const char *(*const make[])(fastrms_recipe *, int, const fastrms_hyper *) = {
        fastrms_rmsprop_recipe, fastrms_adagrad_recipe, fastrms_adam_recipe, fastrms_adam_recipe, fastrms_rprop_recipe};
    const fastrms_hyper *usual[] = {&fastrms_rmsprop_defaults, &fastrms_adagrad_defaults, &fastrms_adam_defaults,
                                    &fastrms_adamw_defaults, &fastrms_rprop_defaults};
    unsigned family = choose(5);
    fastrms_hyper hyper = *usual[family];
    double *real = &hyper.lr;
    int32_t *whole = &hyper.nesterov;
    for (; real <= &hyper.step_max; ++real)
        *real = number(*real);
    for (; whole <= &hyper.zero_on_flip; ++whole)
        *whole = choose(6) < 5 ? *whole : (int32_t)choose(6) - 1;
    return make[family](recipe, itemsize, &hyper);
}

/* usual magnitudes, and one in eight any bits at all; a mean of squares is not negative */
static void fill(char *to, int64_t size, int itemsize, int is_negative_too)
{
    for (int64_t i = 0; i < size; ++i) {
        uint64_t bits = random_word();
        double mantissa = (int32_t)random_word(), wide = ldexp(mantissa, (int)(random_word() % 40) - 50);
        float narrow = (float)wide;
        bits = bits << 32 | random_word();
        if (random_word() % 8)
            memcpy(&bits, itemsize == 8 ? (void *)&wide : (void *)&narrow, (size_t)itemsize);
        memcpy(to + i * itemsize, &bits, (size_t)itemsize);
        if (!is_negative_too)
            to[(i + 1) * itemsize - 1] &= 0x7f;
    }
}

/* the sign and the payload of NaN are not promised */
static void one_nan(char *at, int64_t size, int itemsize)
{
    for (int64_t i = 0; i < size; ++i, at += itemsize) {
        double wide;
        float narrow;
        memcpy(itemsize == 8 ? (void *)&wide : (void *)&narrow, at, (size_t)itemsize);
        if (itemsize == 8 ? isnan(wide) : isnan(narrow))
            memset(at, 0x7f, (size_t)itemsize);
    }
}

static void add(const void *bytes, size_t count)
{
    for (const uint8_t *byte = bytes; count--; ++byte)
        digest = (digest ^ *byte) * 1099511628211u;
}

typedef struct {
    fastrms_recipe recipe;
    int64_t size, step;
    int missing, same, as_plan, on_nonfinite;
    double grad_scale, clip_norm;
    char first[BUFFERS][(MOST + 8) * 8];
    size_t offset[BUFFERS];
} call;

static int by_plan(const call *c, char *const *at)
{
    fastrms_recipe recipe = c->recipe;
    fastrms_tensor tensor = {.size = c->size, .param = at[0], .state = {at[2], at[3], at[4]}};
    const void *held[1];
    fastrms_plan plan;
    void *scratch = malloc((size_t)fastrms_scratch_bytes(1, &tensor));
    fastrms_plan_init(&plan, 1, &tensor, 1, &recipe, held, scratch);
    held[0] = at[1];
    plan.held = 1;
    plan.on_nonfinite = c->on_nonfinite;
    plan.grad_scale = c->grad_scale;
    plan.clip_norm = c->clip_norm;
    int status = fastrms_step(&plan);
    free(scratch);
    return status;
}

/* one call on a tier: its status; the buffers afterwards are in `after` */
static int made(const call *c, int isa, char after[BUFFERS][(MOST + 8) * 8])
{
    int itemsize = c->recipe.itemsize, states = fastrms_rule_states(c->recipe.rule);
    size_t bytes = (size_t)(c->size * itemsize);
    char *memory[BUFFERS], *at[BUFFERS];
    for (int b = 0; b < BUFFERS; ++b) {
        memory[b] = malloc(bytes + c->offset[b] + 1);     /* the end is where the sanitizer looks, give or take a byte */
        at[b] = memory[b] + c->offset[b];
        memcpy(at[b], c->first[b], bytes);
        if (b >= 2 + states)
            at[b] = NULL;
    }
    if (c->missing < 2 + states)
        at[c->missing] = NULL;
    if (c->same)
        at[2] = at[c->same - 1];
    fastrms_isa_set(isa);
    int status = c->as_plan ? by_plan(c, at)
                            : fastrms_update(&c->recipe, c->size, c->step, c->grad_scale, at[0], at[1], at[2], at[3], at[4]);
    for (int b = 0; b < BUFFERS; ++b) {
        memcpy(after[b], memory[b] + c->offset[b], bytes);
        if (status && memcmp(after[b], c->first[b], bytes))
            abort();                                      /* what is refused has changed something */
        one_nan(after[b], c->size, itemsize);
        free(memory[b]);
    }
    return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
    static const int64_t steps[] = {1, 2, 3, 1000, 1 << 24, (int64_t)1 << 31, (int64_t)1 << 62, 0, -1};
    static char got[BUFFERS][(MOST + 8) * 8], want[BUFFERS][(MOST + 8) * 8];
    static call c;
    int first = -1, itemsize, status = 0;
    left = input;
    bytes_left = size;
    itemsize = choose(2) ? 8 : 4;
    const char *refused = choose_recipe(&c.recipe, itemsize);
    if (refused) {
        add(refused, strlen(refused));
        return 0;
    }
    take(&random_state, sizeof random_state);
    random_state |= 1;
    c.size = choose(4) < 3 ? choose(40) : choose(MOST);
    c.as_plan = choose(2);
    c.step = steps[choose(sizeof steps / sizeof *steps)];
    c.grad_scale = number(1);
    c.clip_norm = choose(2) ? -1 : fabs(number(1));
    c.on_nonfinite = (int)choose(3);
    c.missing = c.as_plan || choose(8) < 7 ? BUFFERS : (int)choose(BUFFERS);
    c.same = c.as_plan || choose(8) < 7 ? 0 : 1 + (int)choose(2);
    for (int b = 0; b < BUFFERS; ++b) {
        c.offset[b] = choose(8) * (size_t)itemsize + (c.as_plan || choose(20) < 19 ? 0 : 1);
        fill(c.first[b], c.size, itemsize, b < 2);
    }
    for (int isa = 0; isa < fastrms_isa_count(); ++isa) {
        if (!fastrms_isa_supported(isa))
            continue;
        int again = made(&c, isa, first < 0 ? want : got);
        if (first >= 0 && (again != status || memcmp(got, want, sizeof got)))
            abort();                                      /* a tier has other bits */
        status = again;
        first = isa;
    }
    updates += !status;
    add(&status, sizeof status);
    for (int b = 0; b < BUFFERS; ++b)
        add(want[b], (size_t)(c.size * itemsize));
    return 0;
}

#ifndef LIBFUZZER
int main(int count, char **arguments)
{
    long calls = count > 1 ? atol(arguments[1]) : 1000;
    uint64_t seed = count > 2 ? strtoull(arguments[2], NULL, 10) : 1;
    int tiers = 0;
    for (long k = 0; k < calls; ++k) {
        uint8_t input[256];
        random_state = (seed + (uint64_t)k) * 0x9e3779b97f4a7c15u | 1;
        for (size_t i = 0; i < sizeof input; i += 4) {
            uint32_t word = random_word();
            memcpy(input + i, &word, 4);
        }
        LLVMFuzzerTestOneInput(input, sizeof input);
    }
    for (int isa = 0; isa < fastrms_isa_count(); ++isa)
        tiers += fastrms_isa_supported(isa);
    printf("%ld calls, %ld updates, %d tiers, digest %016llx\n", calls, updates, tiers, (unsigned long long)digest);
    return 0;
}
#endif
