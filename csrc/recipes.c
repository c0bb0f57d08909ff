/* From hyper-parameters to the coefficients of a rule: fastrms/optimizers.py in C, with the same names in the same order.
 * The tests compare the whole fastrms_recipe, byte by byte, with the one that Python fills. */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>
#include "internal.h"

enum { DIVIDE, TIMES_ROOT, OVER_ROOT };                   /* value / q, value * sqrt(q), value / sqrt(q) */

const fastrms_hyper fastrms_rmsprop_defaults = {.lr = 0.01, .rho = 0.99, .eps = 1e-8};
const fastrms_hyper fastrms_adagrad_defaults = {.lr = 0.01, .eps = 1e-10};
const fastrms_hyper fastrms_adam_defaults = {
    .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .bias_correction = FASTRMS_CORRECTED};
const fastrms_hyper fastrms_adamw_defaults = {
    .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .bias_correction = FASTRMS_CORRECTED,
    .decoupled = 1, .weight_decay = 0.01};
const fastrms_hyper fastrms_rprop_defaults = {
    .lr = 0.01, .eta_minus = 0.5, .eta_plus = 1.2, .step_min = 1e-6, .step_max = 50, .zero_on_flip = 1};

static double rounded(const fastrms_recipe *recipe, double value)
{
    volatile float single = (float)value;                 /* gcc 12 vectorises two (double)(float) side by side into none */
    return recipe->itemsize == 4 ? single : value;
}

/* what hyper-parameters may be: finite and at least 0; in [0, 1); 0 or not rounded to it; 0 or one of two words */
static int usable(const fastrms_recipe *recipe, double x) { return x >= 0 && isfinite(rounded(recipe, x)); }
static int decaying(const fastrms_recipe *recipe, double x) { return x >= 0 && rounded(recipe, x) < 1; }
static int clipping(const fastrms_recipe *recipe, double x) { return usable(recipe, x) && (x == 0 || rounded(recipe, x) > 0); }
static int word(int32_t x, int32_t one, int32_t other) { return x == 0 || x == one || x == other; }

static int some_eps(const fastrms_recipe *recipe, const fastrms_hyper *h)
{
    return usable(recipe, h->eps) && (rounded(recipe, h->eps) > 0 || rounded(recipe, h->eps_root) > 0);
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

/* index of a coefficient in recipe->value, -1 where the rule has none of that name */
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

static void set(fastrms_recipe *recipe, const char *name, double value)
{
    int k = place(recipe, name);
    if (k >= 0)
        recipe->value[k] = value;
}

static void correct(fastrms_recipe *recipe, const char *name, int operation, double rate, int ahead)
{
    recipe->correction[recipe->corrections++] = (fastrms_correction){
        .coefficient = place(recipe, name), .operation = operation, .ahead = ahead,
        .decay = rounded(recipe, rate), .weight = rounded(recipe, 1 - rate)};
}

static void correct_linearly(fastrms_recipe *recipe, const char *name, double decay)
{
    recipe->correction[recipe->corrections++] = (fastrms_correction){
        .coefficient = place(recipe, name), .operation = DIVIDE, .linear = 1, .decay = decay, .weight = 1};
}

/* the rule, its form, and the coefficients that every rule shares; a rule that lacks one of them ignores it */
static void begin(fastrms_recipe *recipe, const char *rule, int general, const fastrms_hyper *h)
{
    double clip = h->clip_value > 0 ? h->clip_value : INFINITY;
    while (strcmp(fastrms_rule_name(recipe->rule), rule))
        ++recipe->rule;
    for (const char *at = strstr(fastrms_rule_arguments(recipe->rule), "grad_scale"); (at = strchr(at, ' ')); ++at)
        ++recipe->coefficients;
    recipe->general = general || h->clip_value > 0;
    set(recipe, "grad_scale", h->maximize ? -1 : 1);
    set(recipe, "grad_rescale", 1);
    set(recipe, "clip_low", -clip);
    set(recipe, "clip_high", clip);
    set(recipe, "weight_decay", h->decoupled ? 0 : h->weight_decay);
    set(recipe, "decay", h->decoupled ? h->lr * h->weight_decay : 0);
    set(recipe, "one", 1);
    set(recipe, "tiny", recipe->itemsize == 4 ? FLT_MIN : DBL_MIN);
    set(recipe, "floor", recipe->itemsize == 4 ? 0x1p-20 : 0x1p-49);
}

static int needs_general(const fastrms_hyper *h) { return (h->weight_decay > 0 && !h->decoupled) || h->eps_root > 0; }

static const char *wrong_rmsprop(const fastrms_recipe *recipe, const fastrms_hyper *h)
{
    return first_wrong((const check[]){
        {"lr", usable(recipe, h->lr)}, {"weight_decay", usable(recipe, h->weight_decay)},
        {"clip_value", clipping(recipe, h->clip_value)}, {"eps_root", usable(recipe, h->eps_root)}, {"eps", some_eps(recipe, h)},
        {"rho", decaying(recipe, h->rho)}, {"momentum", decaying(recipe, h->momentum)},
        {"nesterov", word(h->nesterov, h->momentum > 0, 0)},
        {"bias_correction", word(h->bias_correction, FASTRMS_CORRECTED, h->centered ? 0 : FASTRMS_FOLDED)}, {NULL, 0}});
}

static const char *const rmsprop_rules[2][2] = {          /* [centered][momentum] */
    {"rmsprop", "rmsprop_momentum"}, {"rmsprop_centered", "rmsprop_centered_momentum"}};

static void rmsprop(fastrms_recipe *recipe, const fastrms_hyper *h)
{
    int lr_first = h->lr_in_momentum || h->momentum == 0, corrected = h->bias_correction == FASTRMS_CORRECTED;
    begin(recipe, rmsprop_rules[h->centered != 0][h->momentum > 0], needs_general(h) || h->nesterov || corrected, h);
    set(recipe, "rho", h->rho);
    set(recipe, "one_minus_rho", 1 - h->rho);
    set(recipe, "v_scale", 1);
    set(recipe, "eps_root", h->eps_root);
    set(recipe, "eps", h->eps);
    set(recipe, "in_scale", lr_first ? h->lr : 1);
    set(recipe, "out_scale", lr_first ? 1 : h->lr);
    set(recipe, "momentum", h->momentum);
    set(recipe, "nesterov_b", h->nesterov ? h->momentum : 1);
    set(recipe, "nesterov_u", h->nesterov != 0);
    if (corrected)
        correct(recipe, "v_scale", DIVIDE, h->rho, 0);
    else if (h->bias_correction == FASTRMS_FOLDED)
        correct(recipe, lr_first ? "in_scale" : "out_scale", TIMES_ROOT, h->rho, 0);
}

static const char *wrong_adagrad(const fastrms_recipe *recipe, const fastrms_hyper *h)
{
    return first_wrong((const check[]){
        {"lr", usable(recipe, h->lr)}, {"weight_decay", usable(recipe, h->weight_decay)},
        {"clip_value", clipping(recipe, h->clip_value)}, {"eps_root", usable(recipe, h->eps_root)},
        {"eps", usable(recipe, h->eps)}, {"lr_decay", usable(recipe, h->lr_decay)}, {NULL, 0}});
}

static void adagrad(fastrms_recipe *recipe, const fastrms_hyper *h)
{
    begin(recipe, "adagrad", needs_general(h), h);
    set(recipe, "eps_root", h->eps_root);
    set(recipe, "lr", h->lr);
    set(recipe, "eps", h->eps);
    if (h->lr_decay > 0) {
        correct_linearly(recipe, "lr", h->lr_decay);
        correct_linearly(recipe, "decay", h->lr_decay);
    }
}

static const char *wrong_adam(const fastrms_recipe *recipe, const fastrms_hyper *h)
{
    int32_t corrected = h->bias_correction == FASTRMS_CORRECTED ? FASTRMS_CORRECTED : 0;
    return first_wrong((const check[]){
        {"lr", usable(recipe, h->lr)}, {"weight_decay", usable(recipe, h->weight_decay)},
        {"clip_value", clipping(recipe, h->clip_value)}, {"eps_root", usable(recipe, h->eps_root)}, {"eps", some_eps(recipe, h)},
        {"beta1", decaying(recipe, h->beta1)}, {"beta2", decaying(recipe, h->beta2)},
        {"nesterov", word(h->nesterov, FASTRMS_DOZAT, FASTRMS_FOLDED)},
        {"bias_correction", word(h->bias_correction, FASTRMS_CORRECTED, FASTRMS_FOLDED)},
        {"amsgrad", word(h->amsgrad, 1, corrected)}, {NULL, 0}});
}

static void correct_adam(fastrms_recipe *recipe, const fastrms_hyper *h)
{
    if (h->nesterov == FASTRMS_DOZAT) {
        correct(recipe, "m_scale", DIVIDE, h->beta1, 1);
        correct(recipe, "g_scale", DIVIDE, h->beta1, 0);
    } else {
        correct(recipe, "step_size", DIVIDE, h->beta1, 0);
    }
    if (h->bias_correction == FASTRMS_FOLDED)
        correct(recipe, "step_size", TIMES_ROOT, h->beta2, 0);
    else if (h->amsgrad == FASTRMS_CORRECTED)
        correct(recipe, "max_scale", DIVIDE, h->beta2, 0);
    else if (h->eps_root > 0)
        correct(recipe, "v_scale", DIVIDE, h->beta2, 0);
    else
        correct(recipe, "root_scale", OVER_ROOT, h->beta2, 0);
}

static void adam(fastrms_recipe *recipe, const fastrms_hyper *h)
{
    begin(recipe, h->amsgrad ? "adam_amsgrad" : "adam", needs_general(h) || h->nesterov, h);
    set(recipe, "beta1", h->beta1);
    set(recipe, "one_minus_beta1", 1 - h->beta1);
    set(recipe, "beta2", h->beta2);
    set(recipe, "one_minus_beta2", 1 - h->beta2);
    set(recipe, "m_scale", h->nesterov ? h->beta1 : 1);
    set(recipe, "g_scale", h->nesterov ? 1 - h->beta1 : 0);
    set(recipe, "max_scale", 1);
    set(recipe, "v_scale", 1);
    set(recipe, "root_scale", 1);
    set(recipe, "eps_root", h->eps_root);
    set(recipe, "step_size", h->lr);
    set(recipe, "eps", h->eps);
    if (h->bias_correction)
        correct_adam(recipe, h);
}

static const char *wrong_rprop(const fastrms_recipe *recipe, const fastrms_hyper *h)
{
    return first_wrong((const check[]){
        {"lr", usable(recipe, h->lr)}, {"clip_value", clipping(recipe, h->clip_value)},
        {"eta_minus", h->eta_minus > 0 && decaying(recipe, h->eta_minus)},
        {"eta_plus", usable(recipe, h->eta_plus) && rounded(recipe, h->eta_plus) > 1},
        {"step_max", usable(recipe, h->step_max)}, {"step_min", h->step_min >= 0 && h->step_min <= h->step_max}, {NULL, 0}});
}

static void rprop(fastrms_recipe *recipe, const fastrms_hyper *h)
{
    begin(recipe, "rprop", 0, h);
    set(recipe, "eta_minus", h->eta_minus);
    set(recipe, "eta_plus", h->eta_plus);
    set(recipe, "step_min", h->step_min);
    set(recipe, "step_max", h->step_max);
    set(recipe, "flip_below", h->zero_on_flip ? 0 : -INFINITY);
}

/* does a coefficient overflow the dtype, now or at the first step?  All that can hold lr. */
static int overflows(const fastrms_recipe *recipe)
{
    int over = 0;
    for (int k = 0; k < recipe->coefficients; ++k)
        over |= isfinite(recipe->value[k]) && !isfinite(rounded(recipe, recipe->value[k]));
    for (int k = 0; k < recipe->corrections; ++k) {
        const fastrms_correction *c = &recipe->correction[k];
        over |= c->operation == DIVIDE && !isfinite(rounded(recipe, recipe->value[c->coefficient] / c->weight));
    }
    return over;
}

static const char *make(fastrms_recipe *recipe, int itemsize, const fastrms_hyper *h,
                        const char *(*wrong)(const fastrms_recipe *, const fastrms_hyper *),
                        void (*fill)(fastrms_recipe *, const fastrms_hyper *))
{
    if (itemsize != 4 && itemsize != 8)
        return "itemsize";
    fastrms_mode mode = fastrms_set_float_mode();
    fastrms_recipe made = {.itemsize = itemsize};
    const char *refused = wrong(&made, h);
    if (!refused) {
        fill(&made, h);
        refused = overflows(&made) ? "lr" : NULL;
    }
    if (!refused)
        *recipe = made;
    fastrms_restore_float_mode(mode);
    return refused;
}

#define FAMILY(name) \
    const char *fastrms_##name##_recipe(fastrms_recipe *recipe, int itemsize, const fastrms_hyper *hyper) \
    { \
        return make(recipe, itemsize, hyper, wrong_##name, name); \
    }
FAMILY(rmsprop)
FAMILY(adagrad)
FAMILY(adam)
FAMILY(rprop)
