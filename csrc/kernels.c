/* Every rule as a loop: float and double, neutral and general form, for each tier in one binary.
 * The loops are plain C; the compiler vectorises them under the options in the file csrc/flags. */
#include <math.h>
#include <stddef.h>
#include "internal.h"
#ifdef AVX512
#include "roots.h"
#endif

/* gcc 14 would turn selects that depend on each other, as those of rprop, into jumps, and vectorises no loop with jumps */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-thread-jumps")
#endif

#define GENERAL 0
#define form neutral
#define real float
#define ROOTS float_roots
#define sqrt sqrtf
#define fabs fabsf
#include "kernels.inc"
#undef real
#undef ROOTS
#undef sqrt
#undef fabs
#define real double
#define ROOTS double_roots
#include "kernels.inc"
#undef real
#undef ROOTS
#undef form
#undef GENERAL

#define GENERAL 1
#define form general
#define real float
#define ROOTS float_roots
#define sqrt sqrtf
#define fabs fabsf
#include "kernels.inc"
#undef real
#undef ROOTS
#undef sqrt
#undef fabs
#define real double
#define ROOTS double_roots
#include "kernels.inc"
#undef real
#undef ROOTS
#undef form
#undef GENERAL

#define ROW(rule, isa) {{rule##_float_neutral_##isa, rule##_float_general_##isa}, \
                        {rule##_double_neutral_##isa, rule##_double_general_##isa}},
#define TABLE(isa, target, supported, roots, with) fastrms_kernel *const fastrms_kernels_##isa[][2][2] = {RULES(ROW, isa)};
TIERS(TABLE, )

/* names for the comparison with rules.py at import */
#define NAME(name) #name " "
#define ONE(name) + 1
#define NOTHING(name)
#define LIST(rule, with) {#rule, "param grad " rule##_NAMES(NAME, NAME), 0 rule##_NAMES(ONE, NOTHING)},
static const struct { const char *rule, *arguments; int states; } names[] = {RULES(LIST, )};

const fastrms_tier *_Atomic fastrms_fastest[sizeof names / sizeof *names][2][2];

int fastrms_rule_count(void) { return (int)(sizeof names / sizeof *names); }
const char *fastrms_rule_name(int rule) { return names[rule].rule; }
const char *fastrms_rule_arguments(int rule) { return names[rule].arguments; }
int fastrms_rule_states(int rule) { return names[rule].states; }
