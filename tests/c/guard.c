/* Every kernel of every tier between pages that may not be touched: an access outside of a buffer ends the program.  All lengths
 * and offsets, flush with the page before and with the page behind; numbers of the same type beside the buffer stay as they were,
 * and each element has the bits of a call that has it alone.  Arguments: the largest length, and the step between lengths. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "fastrms.h"
#include "testing_decl.h"

enum { PAGE = 4096, PAGES = 4, OFFSETS = 64, BUFFERS = 2 + FASTRMS_MAX_STATES, MOST = 1600, FILL = 0x41 };

static char *room[BUFFERS];                               /* PAGES pages between two that may not be touched */
static char start[BUFFERS][MOST * 8], want[BUFFERS][MOST * 8], filled[PAGES * PAGE];

static char *between_pages(void)
{
    char *whole = mmap(NULL, (PAGES + 2) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED || mprotect(whole + PAGE, PAGES * PAGE, PROT_READ | PROT_WRITE))
        abort();
    return whole + PAGE;
}

static int words(const char *text)
{
    int count = 1;
    for (; *text; ++text)
        count += *text == ' ';
    return count;
}

static fastrms_recipe recipe_of(int rule, int itemsize, int general)
{
    fastrms_recipe made = {.rule = rule, .itemsize = itemsize, .general = general};
    made.coefficients = words(fastrms_rule_arguments(rule)) - 2 - fastrms_rule_states(rule);
    for (int k = 0; k < made.coefficients; ++k)
        made.value[k] = 0.3 + 0.03 * k;
    return made;
}

static void put(char *to, int itemsize, double value)
{
    float narrow = (float)value;
    memcpy(to, itemsize == 8 ? (void *)&value : (void *)&narrow, (size_t)itemsize);
}

static int update(const fastrms_recipe *recipe, int64_t size, char *const *at)
{
    char *state[FASTRMS_MAX_STATES] = {NULL};
    memcpy(state, at + 2, (size_t)fastrms_rule_states(recipe->rule) * sizeof *state);
    return fastrms_update(recipe, size, 1, 1.0, at[0], at[1], state[0], state[1], state[2]);
}

/* numbers to start from, and what single elements become */
static void prepare(const fastrms_recipe *recipe)
{
    int itemsize = recipe->itemsize;
    for (int b = 0; b < BUFFERS; ++b)
        for (int i = 0; i < MOST; ++i)
            put(start[b] + i * itemsize, itemsize, (b < 2 && i % 3 == 0 ? -1 : 1) * (0.1 + (i * 37 + b * 11) % 101));
    memcpy(want, start, sizeof want);
    fastrms_isa_set(fastrms_isa_count() - 1);
    for (int i = 0; i < MOST; ++i) {
        char *at[BUFFERS];
        for (int b = 0; b < BUFFERS; ++b)
            at[b] = want[b] + i * itemsize;
        if (update(recipe, 1, at))
            abort();
    }
}

/* whether a call with buffers of this length at this offset, from the front or from the end of their rooms, is right */
static int is_right(const fastrms_recipe *recipe, int64_t length, int offset, int from_end)
{
    int count = 2 + fastrms_rule_states(recipe->rule), right = 1;
    size_t bytes = (size_t)(length * recipe->itemsize), zone = OFFSETS * 8;
    char *at[BUFFERS];
    for (int b = 0; b < count; ++b) {
        size_t apart = (size_t)(offset * (b + 1) % OFFSETS * recipe->itemsize);
        at[b] = from_end ? room[b] + PAGES * PAGE - apart - bytes : room[b] + apart;
        memset(from_end ? at[b] - zone : room[b], FILL, bytes + apart + zone);
        memcpy(at[b], start[b], bytes);
    }
    right &= !update(recipe, length, at);
    for (int b = 0; b < count; ++b) {
        char *front = from_end ? at[b] - zone : room[b], *end = from_end ? room[b] + PAGES * PAGE : at[b] + bytes + zone;
        right &= !memcmp(at[b], want[b], bytes);
        right &= !memcmp(front, filled, (size_t)(at[b] - front)) && !memcmp(at[b] + bytes, filled, (size_t)(end - at[b]) - bytes);
    }
    return right;
}

/* the calls with one kernel; -1 where one of them is wrong */
static long calls(int isa, const fastrms_recipe *recipe, int most, int step)
{
    long made = 0;
    fastrms_isa_set(isa);
    for (int length = 0; length <= most; length += step)
        for (int offset = 0; offset < OFFSETS; ++offset)
            for (int from_end = 0; from_end < 2; ++from_end, ++made)
                if (!is_right(recipe, length, offset, from_end)) {
                    printf("%s, tier %s, %d bytes, form %d: wrong at length %d, offset %d\n", fastrms_rule_name(recipe->rule),
                           fastrms_isa_name(isa), recipe->itemsize, recipe->general, length, offset);
                    return -1;
                }
    return made;
}

int main(int count, char **arguments)
{
    int most = count > 1 ? atoi(arguments[1]) : 1025, step = count > 2 ? atoi(arguments[2]) : 1, kernels = 0, tiers = 0;
    long made = 0;
    for (int b = 0; b < BUFFERS; ++b)
        room[b] = between_pages();
    memset(filled, FILL, sizeof filled);
    for (int isa = 0; isa < fastrms_isa_count(); ++isa)
        tiers += fastrms_isa_supported(isa);
    for (int k = 0; k < 4 * fastrms_rule_count(); ++k) {
        fastrms_recipe recipe = recipe_of(k / 4, k & 1 ? 8 : 4, k >> 1 & 1);
        prepare(&recipe);
        for (int isa = 0; isa < fastrms_isa_count(); ++isa)
            if (fastrms_isa_supported(isa)) {
                long more = calls(isa, &recipe, most, step);
                if (more < 0)
                    return 1;
                made += more;
                ++kernels;
            }
    }
    printf("%ld calls, %d kernels of %d tiers\n", made, kernels, tiers);
    return 0;
}
