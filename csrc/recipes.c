/* From hyper-parameters to the coefficients of a rule, and to those of one step: fastrms/recipes.py in C, with the same
 * names in the same order of operations.  The tests compare the whole fastrms_recipe, byte by byte, with the one that Python
 * fills. */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>
#include "internal.h"

enum { NONE, DIVIDE, TIMES_ROOT, OVER_ROOT };             /* value, value / q, value * sqrt(q), value / sqrt(q) */

const fastrms_hyper fastrms_rmsprop_defaults = {.lr = 0.01, .rho = 0.99, .eps = 1e-8};
const fastrms_hyper fastrms_adagrad_defaults = {.lr = 0.01, .eps = 1e-10};
const fastrms_hyper fastrms_adam_defaults = {
    .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .bias_correction = FASTRMS_CORRECTED};
const fastrms_hyper fastrms_adamw_defaults = {
    .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .bias_correction = FASTRMS_CORRECTED,
    .decoupled = 1, .weight_decay = 0.01};
const fastrms_hyper fastrms_rprop_defaults = {
    .lr = 0.01, .eta_minus = 0.5, .eta_plus = 1.2, .step_min = 1e-6, .step_max = 50, .zero_on_flip = 1};

static double rounded(double value, int itemsize)
{
    volatile float single = (float)value;                 /* gcc 12 loses the rounding where it vectorises two of them */
    return itemsize == 4 ? single : value;
}

/* What values hyper-parameters may have.  usable: at least 0, and finite in the dtype; decaying: in [0, 1) in the dtype;
 * clipping: usable, and not rounded to 0 unless it is 0; word: 0 or one of two words. */
static int usable(double x, int itemsize) { return x >= 0 && rounded(x, itemsize) < INFINITY; }
static int decaying(double x, int itemsize) { return x >= 0 && rounded(x, itemsize) < 1; }
static int clipping(double x, int itemsize) { return usable(x, itemsize) && (x == 0 || rounded(x, itemsize) > 0); }
static int word(int32_t x, int32_t one, int32_t other) { return x == 0 || x == one || x == other; }

static int some_eps(const fastrms_hyper *h, int itemsize)
{
    return usable(h->eps, itemsize) && (rounded(h->eps, itemsize) > 0 || rounded(h->eps_root, itemsize) > 0);
}

typedef struct {
    const char *name;
    int fine;
} check;

static const char *first_wrong(const check *checks)
{
    while (checks->name && checks->fine)
        ++checks;
    return checks->name;
}

/* the place of a coefficient in recipe->value, -1 where the rule has none of that name */
static int place(const fastrms_recipe *recipe, const char *name)
{
    const char *at = strstr(fastrms_rule_arguments(recipe->rule), "grad_scale");
    for (int k = 0; *at; ++k) {
        size_t length = strcspn(at, " ");
        if (length == strlen(name) && !strncmp(at, name, length))
            return k;
        at += length + 1;
    }
    return -1;
}

typedef struct {
    const char *name;
    double value;
} coefficient;

/* write the rule, its form, its coefficients and the constants; those that the rule does not have are ignored */
static void fill(fastrms_recipe *recipe, const char *rule, int general, const coefficient *values)
{
    const coefficient constants[] = {{"grad_rescale", 1}, {"one", 1}, {"tiny", recipe->itemsize == 4 ? FLT_MIN : DBL_MIN},
                                     {"floor", recipe->itemsize == 4 ? 0x1p-20 : 0x1p-49}};
    while (strcmp(fastrms_rule_name(recipe->rule), rule))
        ++recipe->rule;
    recipe->general = general;
    for (const char *at = strstr(fastrms_rule_arguments(recipe->rule), "grad_scale"); (at = strchr(at, ' ')); ++at)
        ++recipe->coefficients;
    for (size_t k = 0; k < sizeof constants / sizeof *constants; ++k)
        if (place(recipe, constants[k].name) >= 0)
            recipe->value[place(recipe, constants[k].name)] = constants[k].value;
    for (; values->name; ++values)
        if (place(recipe, values->name) >= 0)
            recipe->value[place(recipe, values->name)] = values->value;
}

static void correct(fastrms_recipe *recipe, const char *name, fastrms_correction correction)
{
    if (correction.operation == NONE)
        return;
    correction.coefficient = place(recipe, name);
    recipe->correction[recipe->corrections++] = correction;
}

/* what every family shares */
static double direction(const fastrms_hyper *h) { return h->maximize ? -1 : 1; }
static double clip_bound(const fastrms_hyper *h) { return h->clip_value > 0 ? h->clip_value : INFINITY; }
static double added_decay(const fastrms_hyper *h) { return h->decoupled ? 0 : h->weight_decay; }
static double decoupled_decay(const fastrms_hyper *h) { return h->decoupled ? h->lr * h->weight_decay : 0; }
static int needs_general(const fastrms_hyper *h) { return h->clip_value > 0 || added_decay(h) > 0 || h->eps_root > 0; }

/* correct a coefficient for the start at 0 of an average that decays by `rate` */
static void of_average(fastrms_recipe *recipe, const char *name, int operation, double rate, int ahead)
{
    correct(recipe, name, (fastrms_correction){.operation = operation, .ahead = ahead,
        .decay = rounded(rate, recipe->itemsize), .weight = rounded(1 - rate, recipe->itemsize)});
}

static void linear(fastrms_recipe *recipe, const char *name, int operation, double decay)
{
    correct(recipe, name, (fastrms_correction){.operation = operation, .linear = 1, .decay = decay, .weight = 1});
}

/* The families.  The first function of each answers the name of the first hyper-parameter that is wrong, or NULL; the second
 * fills the recipe. */
static const char *rmsprop_checks(const fastrms_hyper *h, int itemsize)
{
    return first_wrong((const check[]){
        {"lr", usable(h->lr, itemsize)}, {"weight_decay", usable(h->weight_decay, itemsize)},
        {"clip_value", clipping(h->clip_value, itemsize)}, {"eps_root", usable(h->eps_root, itemsize)},
        {"eps", some_eps(h, itemsize)},
        {"rho", decaying(h->rho, itemsize)}, {"momentum", decaying(h->momentum, itemsize)},
        {"nesterov", word(h->nesterov, h->momentum > 0, 0)},
        {"bias_correction", word(h->bias_correction, FASTRMS_CORRECTED, h->centered ? 0 : FASTRMS_FOLDED)}, {NULL, 0}});
}

static const char *const rmsprop_rules[2][2] = {          /* [centered][momentum] */
    {"rmsprop", "rmsprop_momentum"}, {"rmsprop_centered", "rmsprop_centered_momentum"}};

static void rmsprop(fastrms_recipe *recipe, const fastrms_hyper *h)
{
    int lr_first = h->lr_in_momentum || h->momentum == 0, form = h->bias_correction;
    fill(recipe, rmsprop_rules[h->centered != 0][h->momentum > 0],
         needs_general(h) || h->nesterov > 0 || form == FASTRMS_CORRECTED, (const coefficient[]){
        {"grad_scale", direction(h)}, {"clip_low", -clip_bound(h)}, {"clip_high", clip_bound(h)},
        {"weight_decay", added_decay(h)}, {"rho", h->rho}, {"one_minus_rho", 1 - h->rho},
        {"v_scale", 1}, {"eps_root", h->eps_root}, {"in_scale", lr_first ? h->lr : 1}, {"eps", h->eps},
        {"momentum", h->momentum}, {"nesterov_b", h->nesterov ? h->momentum : 1}, {"nesterov_u", h->nesterov ? 1 : 0},
        {"out_scale", lr_first ? 1 : h->lr}, {"decay", decoupled_decay(h)}, {NULL, 0}});
    int divide = form == FASTRMS_CORRECTED ? DIVIDE : NONE, times_root = form == FASTRMS_FOLDED ? TIMES_ROOT : NONE;
    of_average(recipe, "v_scale", divide, h->rho, 0);
    of_average(recipe, lr_first ? "in_scale" : "out_scale", times_root, h->rho, 0);
}

static const char *adagrad_checks(const fastrms_hyper *h, int itemsize)
{
    return first_wrong((const check[]){
        {"lr", usable(h->lr, itemsize)}, {"weight_decay", usable(h->weight_decay, itemsize)},
        {"clip_value", clipping(h->clip_value, itemsize)}, {"eps_root", usable(h->eps_root, itemsize)},
        {"eps", usable(h->eps, itemsize)}, {"lr_decay", usable(h->lr_decay, itemsize)}, {NULL, 0}});
}

static void adagrad(fastrms_recipe *recipe, const fastrms_hyper *h)
{
    fill(recipe, "adagrad", needs_general(h), (const coefficient[]){
        {"grad_scale", direction(h)}, {"clip_low", -clip_bound(h)}, {"clip_high", clip_bound(h)},
        {"weight_decay", added_decay(h)},
        {"eps_root", h->eps_root}, {"lr", h->lr}, {"eps", h->eps}, {"decay", decoupled_decay(h)}, {NULL, 0}});
    int slower = h->lr_decay > 0 ? DIVIDE : NONE;
    linear(recipe, "lr", slower, h->lr_decay);
    linear(recipe, "decay", slower, h->lr_decay);
}

static const char *adam_checks(const fastrms_hyper *h, int itemsize)
{
    int32_t corrected = h->bias_correction == FASTRMS_CORRECTED ? FASTRMS_CORRECTED : 0;
    return first_wrong((const check[]){
        {"lr", usable(h->lr, itemsize)}, {"weight_decay", usable(h->weight_decay, itemsize)},
        {"clip_value", clipping(h->clip_value, itemsize)}, {"eps_root", usable(h->eps_root, itemsize)},
        {"eps", some_eps(h, itemsize)},
        {"beta1", decaying(h->beta1, itemsize)}, {"beta2", decaying(h->beta2, itemsize)},
        {"nesterov", word(h->nesterov, FASTRMS_DOZAT, FASTRMS_FOLDED)},
        {"bias_correction", word(h->bias_correction, FASTRMS_CORRECTED, FASTRMS_FOLDED)},
        {"amsgrad", word(h->amsgrad, 1, corrected)}, {NULL, 0}});
}

/* Adam's correction of exp_avg_sq; which coefficient takes it depends on the form of bias correction */
static void of_second_average(fastrms_recipe *recipe, const fastrms_hyper *h)
{
    int divide = h->bias_correction ? DIVIDE : NONE, over_root = h->bias_correction ? OVER_ROOT : NONE;
    if (h->bias_correction == FASTRMS_FOLDED)
        of_average(recipe, "step_size", TIMES_ROOT, h->beta2, 0);
    else if (h->amsgrad == FASTRMS_CORRECTED)
        of_average(recipe, "max_scale", divide, h->beta2, 0);
    else if (h->eps_root > 0)
        of_average(recipe, "v_scale", divide, h->beta2, 0);
    else
        of_average(recipe, "root_scale", over_root, h->beta2, 0);
}

static void adam(fastrms_recipe *recipe, const fastrms_hyper *h)
{
    fill(recipe, h->amsgrad ? "adam_amsgrad" : "adam", needs_general(h) || h->nesterov > 0, (const coefficient[]){
        {"grad_scale", direction(h)}, {"clip_low", -clip_bound(h)}, {"clip_high", clip_bound(h)},
        {"weight_decay", added_decay(h)},
        {"beta1", h->beta1}, {"one_minus_beta1", 1 - h->beta1}, {"beta2", h->beta2}, {"one_minus_beta2", 1 - h->beta2},
        {"max_scale", 1}, {"m_scale", h->nesterov ? h->beta1 : 1}, {"g_scale", h->nesterov ? 1 - h->beta1 : 0},
        {"v_scale", 1}, {"eps_root", h->eps_root}, {"step_size", h->lr}, {"root_scale", 1}, {"eps", h->eps},
        {"decay", decoupled_decay(h)}, {NULL, 0}});
    int divide = h->bias_correction ? DIVIDE : NONE, dozat = h->nesterov == FASTRMS_DOZAT;
    of_average(recipe, dozat ? "m_scale" : "step_size", divide, h->beta1, dozat ? 1 : 0);
    of_average(recipe, "g_scale", dozat ? divide : NONE, h->beta1, 0);
    of_second_average(recipe, h);
}

static const char *rprop_checks(const fastrms_hyper *h, int itemsize)
{
    return first_wrong((const check[]){
        {"lr", usable(h->lr, itemsize)}, {"clip_value", clipping(h->clip_value, itemsize)},
        {"eta_minus", h->eta_minus > 0 && decaying(h->eta_minus, itemsize)},
        {"eta_plus", usable(h->eta_plus, itemsize) && rounded(h->eta_plus, itemsize) > 1},
        {"step_max", usable(h->step_max, itemsize)}, {"step_min", 0 <= h->step_min && h->step_min <= h->step_max}, {NULL, 0}});
}

static void rprop(fastrms_recipe *recipe, const fastrms_hyper *h)
{
    fill(recipe, "rprop", h->clip_value > 0, (const coefficient[]){
        {"grad_scale", direction(h)}, {"clip_low", -clip_bound(h)}, {"clip_high", clip_bound(h)},
        {"eta_minus", h->eta_minus}, {"eta_plus", h->eta_plus}, {"step_min", h->step_min}, {"step_max", h->step_max},
        {"flip_below", h->zero_on_flip ? 0 : -INFINITY}, {NULL, 0}});
}

/* the coefficients before correction, those of them multiplied by the learning rate that it multiplies */
static void rated_values(const fastrms_recipe *recipe, double *value)
{
    memcpy(value, recipe->value, sizeof recipe->value);
    for (unsigned bits = (unsigned)recipe->rated; bits; bits &= bits - 1)
        value[__builtin_ctz(bits)] *= recipe->lr;
}

/* does a coefficient overflow the dtype, by itself or after the division at the first step?  Only coefficients that lr
 * multiplies can. */
static int overflowing(const fastrms_recipe *recipe)
{
    double value[FASTRMS_MAX_COEFFICIENTS];
    int over = 0;
    rated_values(recipe, value);
    for (int k = 0; k < recipe->coefficients; ++k)
        over |= isfinite(value[k]) && !isfinite(rounded(value[k], recipe->itemsize));
    for (int k = 0; k < recipe->corrections; ++k) {
        const fastrms_correction *c = &recipe->correction[k];
        over |= c->operation == DIVIDE && !isfinite(rounded(value[c->coefficient] / c->weight, recipe->itemsize));
    }
    return over;
}

/* The sum 1 + decay + ... + decay^(terms-1) and the power decay^terms by doubling: only * and +, so every machine agrees.
 * double_up takes one more bit of terms into account, from the highest down; leading zero bits change nothing. */
typedef struct {
    double total, power;
} sums;

static sums double_up(sums at, double decay, int bit)
{
    at.total = at.total * (1 + at.power);
    at.power = at.power * at.power;
    at.total = bit ? at.total * decay + 1 : at.total;
    at.power = bit ? at.power * decay : at.power;
    return at;
}

/* The sums of several series of one recipe.  What the bits above the last five give serves 32 steps, so it is kept;
 * the series go through the last bits together, so that none waits for another. */
static void add_series(int count, const double *decay, const int64_t *terms, double *total)
{
    enum { LAST = 5 };
    static _Thread_local struct { double decay; int64_t prefix; sums at; } kept[FASTRMS_MAX_CORRECTIONS];
    sums at[FASTRMS_MAX_CORRECTIONS];
    for (int k = 0; k < count; ++k) {
        int64_t prefix = terms[k] >> LAST;
        if (kept[k].prefix != prefix || kept[k].decay != decay[k]) {
            kept[k].at = (sums){0, 1};
            for (int bit = 62 - LAST; bit >= 0; --bit)
                kept[k].at = double_up(kept[k].at, decay[k], prefix >> bit & 1);
            kept[k].prefix = prefix;
            kept[k].decay = decay[k];
        }
        at[k] = prefix ? kept[k].at : (sums){0, 1};
    }
    for (int bit = LAST - 1; bit >= 0; --bit)
        for (int k = 0; k < count; ++k)
            at[k] = double_up(at[k], decay[k], terms[k] >> bit & 1);
    for (int k = 0; k < count; ++k)
        total[k] = at[k].total;
}

double fastrms_series(double decay, double weight, int64_t terms)
{
    double total;
    terms = terms > 0 ? terms : 0;
    add_series(1, &decay, &terms, &total);
    return weight * total;
}

/* what the corrections divide or multiply by at update number `step` */
static void all_quantities(const fastrms_recipe *recipe, int64_t step, double *q)
{
    double decay[FASTRMS_MAX_CORRECTIONS];
    int64_t terms[FASTRMS_MAX_CORRECTIONS];
    for (int k = 0; k < recipe->corrections; ++k) {
        decay[k] = recipe->correction[k].decay;
        terms[k] = recipe->correction[k].linear ? 0 : step + recipe->correction[k].ahead;
    }
    add_series(recipe->corrections, decay, terms, q);
    for (int k = 0; k < recipe->corrections; ++k) {
        const fastrms_correction *c = &recipe->correction[k];
        q[k] = c->linear ? 1 + (double)(step - 1) * c->decay : c->weight * q[k];
    }
}

static double corrected(double value, int operation, double q)
{
    if (operation == DIVIDE)
        return value / q;
    if (operation == TIMES_ROOT)
        return value * sqrt(q);
    return operation == OVER_ROOT ? value / sqrt(q) : value;
}

/* The coefficients of update number `step`, from 1, rounded once to the compute dtype.  All places are converted, since the
 * compiler makes vectors of a constant number of them. */
void fastrms_evaluate(const fastrms_recipe *recipe, int64_t step, double grad_scale, double *made)
{
    double value[FASTRMS_MAX_COEFFICIENTS], q[FASTRMS_MAX_CORRECTIONS];
    rated_values(recipe, value);
    value[0] = value[0] * grad_scale;
    all_quantities(recipe, step, q);
    for (int k = 0; k < recipe->corrections; ++k) {
        const fastrms_correction *c = &recipe->correction[k];
        value[c->coefficient] = corrected(value[c->coefficient], c->operation, q[k]);
    }
    if (recipe->itemsize == 4)
        for (int k = 0; k < FASTRMS_MAX_COEFFICIENTS; ++k)
            ((float *)made)[k] = (float)value[k];
    else
        memcpy(made, value, sizeof value);
}

/* fill a recipe from hyper-parameters without lr: lr multiplies those coefficients that are not the same for 1 and for 2 */
static void family_by_rate(fastrms_recipe *recipe, const fastrms_hyper *h, void (*family)(fastrms_recipe *, const fastrms_hyper *))
{
    fastrms_recipe other = *recipe;
    fastrms_hyper one = *h, two = *h;
    one.lr = 1;
    two.lr = 2;
    family(recipe, &one);
    family(&other, &two);
    for (int k = 0; k < recipe->coefficients; ++k)
        recipe->rated |= (recipe->value[k] != other.value[k]) << k;
}

static const char *make(fastrms_recipe *recipe, int itemsize, const fastrms_hyper *h,
                        const char *(*checks)(const fastrms_hyper *, int), void (*family)(fastrms_recipe *, const fastrms_hyper *))
{
    if (itemsize != 4 && itemsize != 8)
        return "itemsize";
    fastrms_mode mode = fastrms_set_float_mode();
    fastrms_recipe made = {.itemsize = itemsize, .lr = h->lr};
    const char *refused = checks(h, itemsize);
    if (!refused) {
        family_by_rate(&made, h, family);
        refused = overflowing(&made) ? "lr" : NULL;
    }
    if (!refused)
        *recipe = made;
    fastrms_restore_float_mode(mode);
    return refused;
}

#define FAMILY(name) \
    const char *fastrms_##name##_recipe(fastrms_recipe *recipe, int itemsize, const fastrms_hyper *hyper) \
    { \
        return make(recipe, itemsize, hyper, name##_checks, name); \
    }
FAMILY(rmsprop)
FAMILY(adagrad)
FAMILY(adam)
FAMILY(rprop)
