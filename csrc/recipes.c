/* From hyper-parameters to the coefficients of a rule: fastrms/optimizers.py in C, with the same names in the same order.
 * The tests compare the whole fastrms_group, byte by byte, with the one that Python fills. */
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

static double rounded(const fastrms_group *group, double value)
{
    volatile float single = (float)value;                 /* gcc 12 vectorises two (double)(float) side by side into none */
    return group->itemsize == 4 ? single : value;
}

/* what hyper-parameters may be: finite and at least 0; in [0, 1); 0 or not rounded to it; 0 or one of two words */
static int usable(const fastrms_group *group, double x) { return x >= 0 && isfinite(rounded(group, x)); }
static int decaying(const fastrms_group *group, double x) { return x >= 0 && rounded(group, x) < 1; }
static int clipping(const fastrms_group *group, double x) { return usable(group, x) && (x == 0 || rounded(group, x) > 0); }
static int word(int32_t x, int32_t one, int32_t other) { return x == 0 || x == one || x == other; }

static int some_eps(const fastrms_group *group, const fastrms_hyper *h)
{
    return usable(group, h->eps) && (rounded(group, h->eps) > 0 || rounded(group, h->eps_root) > 0);
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

/* index of a coefficient in group->value, -1 where the rule has none of that name */
static int place(const fastrms_group *group, const char *name)
{
    const char *at = strstr(fastrms_rule_arguments(group->rule), "grad_scale");
    for (int k = 0; *at; ++k) {
        size_t length = strcspn(at, " ");
        if (length == strlen(name) && !strncmp(at, name, length))
            return k;
        at += length + 1;
    }
    return -1;
}

static void set(fastrms_group *group, const char *name, double value)
{
    int k = place(group, name);
    if (k >= 0)
        group->value[k] = value;
}

static void correct(fastrms_group *group, const char *name, int operation, double rate, int ahead)
{
    group->correction[group->corrections++] = (fastrms_correction){
        .coefficient = place(group, name), .operation = operation, .ahead = ahead,
        .decay = rounded(group, rate), .weight = rounded(group, 1 - rate)};
}

static void correct_linearly(fastrms_group *group, const char *name, double decay)
{
    group->correction[group->corrections++] = (fastrms_correction){
        .coefficient = place(group, name), .operation = DIVIDE, .linear = 1, .decay = decay, .weight = 1};
}

/* the rule, its form, and the coefficients that every rule shares; a rule that lacks one of them ignores it */
static void begin(fastrms_group *group, const char *rule, int general, const fastrms_hyper *h)
{
    double clip = h->clip_value > 0 ? h->clip_value : INFINITY;
    while (strcmp(fastrms_rule_name(group->rule), rule))
        ++group->rule;
    for (const char *at = strstr(fastrms_rule_arguments(group->rule), "grad_scale"); (at = strchr(at, ' ')); ++at)
        ++group->coefficients;
    group->general = general || h->clip_value > 0;
    set(group, "grad_scale", h->maximize ? -1 : 1);
    set(group, "clip_low", -clip);
    set(group, "clip_high", clip);
    set(group, "weight_decay", h->decoupled ? 0 : h->weight_decay);
    set(group, "decay", h->decoupled ? h->lr * h->weight_decay : 0);
    set(group, "one", 1);
    set(group, "tiny", group->itemsize == 4 ? FLT_MIN : DBL_MIN);
    set(group, "floor", group->itemsize == 4 ? 0x1p-20 : 0x1p-49);
}

static int needs_general(const fastrms_hyper *h) { return (h->weight_decay > 0 && !h->decoupled) || h->eps_root > 0; }

static const char *wrong_rmsprop(const fastrms_group *group, const fastrms_hyper *h)
{
    return first_wrong((const check[]){
        {"lr", usable(group, h->lr)}, {"weight_decay", usable(group, h->weight_decay)},
        {"clip_value", clipping(group, h->clip_value)}, {"eps_root", usable(group, h->eps_root)}, {"eps", some_eps(group, h)},
        {"rho", decaying(group, h->rho)}, {"momentum", decaying(group, h->momentum)},
        {"nesterov", word(h->nesterov, h->momentum > 0, 0)},
        {"bias_correction", word(h->bias_correction, FASTRMS_CORRECTED, h->centered ? 0 : FASTRMS_FOLDED)}, {NULL, 0}});
}

static const char *const rmsprop_rules[2][2] = {          /* [centered][momentum] */
    {"rmsprop", "rmsprop_momentum"}, {"rmsprop_centered", "rmsprop_centered_momentum"}};

static void rmsprop(fastrms_group *group, const fastrms_hyper *h)
{
    int lr_first = h->lr_in_momentum || h->momentum == 0, corrected = h->bias_correction == FASTRMS_CORRECTED;
    begin(group, rmsprop_rules[h->centered != 0][h->momentum > 0], needs_general(h) || h->nesterov || corrected, h);
    set(group, "rho", h->rho);
    set(group, "one_minus_rho", 1 - h->rho);
    set(group, "v_scale", 1);
    set(group, "eps_root", h->eps_root);
    set(group, "eps", h->eps);
    set(group, "in_scale", lr_first ? h->lr : 1);
    set(group, "out_scale", lr_first ? 1 : h->lr);
    set(group, "momentum", h->momentum);
    set(group, "nesterov_b", h->nesterov ? h->momentum : 1);
    set(group, "nesterov_u", h->nesterov != 0);
    if (corrected)
        correct(group, "v_scale", DIVIDE, h->rho, 0);
    else if (h->bias_correction == FASTRMS_FOLDED)
        correct(group, lr_first ? "in_scale" : "out_scale", TIMES_ROOT, h->rho, 0);
}

static const char *wrong_adagrad(const fastrms_group *group, const fastrms_hyper *h)
{
    return first_wrong((const check[]){
        {"lr", usable(group, h->lr)}, {"weight_decay", usable(group, h->weight_decay)},
        {"clip_value", clipping(group, h->clip_value)}, {"eps_root", usable(group, h->eps_root)},
        {"eps", usable(group, h->eps)}, {"lr_decay", usable(group, h->lr_decay)}, {NULL, 0}});
}

static void adagrad(fastrms_group *group, const fastrms_hyper *h)
{
    begin(group, "adagrad", needs_general(h), h);
    set(group, "eps_root", h->eps_root);
    set(group, "lr", h->lr);
    set(group, "eps", h->eps);
    if (h->lr_decay > 0) {
        correct_linearly(group, "lr", h->lr_decay);
        correct_linearly(group, "decay", h->lr_decay);
    }
}

static const char *wrong_adam(const fastrms_group *group, const fastrms_hyper *h)
{
    int32_t corrected = h->bias_correction == FASTRMS_CORRECTED ? FASTRMS_CORRECTED : 0;
    return first_wrong((const check[]){
        {"lr", usable(group, h->lr)}, {"weight_decay", usable(group, h->weight_decay)},
        {"clip_value", clipping(group, h->clip_value)}, {"eps_root", usable(group, h->eps_root)}, {"eps", some_eps(group, h)},
        {"beta1", decaying(group, h->beta1)}, {"beta2", decaying(group, h->beta2)},
        {"nesterov", word(h->nesterov, FASTRMS_DOZAT, FASTRMS_FOLDED)},
        {"bias_correction", word(h->bias_correction, FASTRMS_CORRECTED, FASTRMS_FOLDED)},
        {"amsgrad", word(h->amsgrad, 1, corrected)}, {NULL, 0}});
}

static void correct_adam(fastrms_group *group, const fastrms_hyper *h)
{
    if (h->nesterov == FASTRMS_DOZAT) {
        correct(group, "m_scale", DIVIDE, h->beta1, 1);
        correct(group, "g_scale", DIVIDE, h->beta1, 0);
    } else {
        correct(group, "step_size", DIVIDE, h->beta1, 0);
    }
    if (h->bias_correction == FASTRMS_FOLDED)
        correct(group, "step_size", TIMES_ROOT, h->beta2, 0);
    else if (h->amsgrad == FASTRMS_CORRECTED)
        correct(group, "max_scale", DIVIDE, h->beta2, 0);
    else if (h->eps_root > 0)
        correct(group, "v_scale", DIVIDE, h->beta2, 0);
    else
        correct(group, "root_scale", OVER_ROOT, h->beta2, 0);
}

static void adam(fastrms_group *group, const fastrms_hyper *h)
{
    begin(group, h->amsgrad ? "adam_amsgrad" : "adam", needs_general(h) || h->nesterov, h);
    set(group, "beta1", h->beta1);
    set(group, "one_minus_beta1", 1 - h->beta1);
    set(group, "beta2", h->beta2);
    set(group, "one_minus_beta2", 1 - h->beta2);
    set(group, "m_scale", h->nesterov ? h->beta1 : 1);
    set(group, "g_scale", h->nesterov ? 1 - h->beta1 : 0);
    set(group, "max_scale", 1);
    set(group, "v_scale", 1);
    set(group, "root_scale", 1);
    set(group, "eps_root", h->eps_root);
    set(group, "step_size", h->lr);
    set(group, "eps", h->eps);
    if (h->bias_correction)
        correct_adam(group, h);
}

static const char *wrong_rprop(const fastrms_group *group, const fastrms_hyper *h)
{
    return first_wrong((const check[]){
        {"lr", usable(group, h->lr)}, {"clip_value", clipping(group, h->clip_value)},
        {"eta_minus", h->eta_minus > 0 && decaying(group, h->eta_minus)},
        {"eta_plus", usable(group, h->eta_plus) && rounded(group, h->eta_plus) > 1},
        {"step_max", usable(group, h->step_max)}, {"step_min", h->step_min >= 0 && h->step_min <= h->step_max}, {NULL, 0}});
}

static void rprop(fastrms_group *group, const fastrms_hyper *h)
{
    begin(group, "rprop", 0, h);
    set(group, "eta_minus", h->eta_minus);
    set(group, "eta_plus", h->eta_plus);
    set(group, "step_min", h->step_min);
    set(group, "step_max", h->step_max);
    set(group, "flip_below", h->zero_on_flip ? 0 : -INFINITY);
}

/* does a coefficient overflow the dtype, now or at the first step?  All that can hold lr. */
static int overflows(const fastrms_group *group)
{
    int over = 0;
    for (int k = 0; k < group->coefficients; ++k)
        over |= isfinite(group->value[k]) && !isfinite(rounded(group, group->value[k]));
    for (int k = 0; k < group->corrections; ++k) {
        const fastrms_correction *c = &group->correction[k];
        over |= c->operation == DIVIDE && !isfinite(rounded(group, group->value[c->coefficient] / c->weight));
    }
    return over;
}

static const char *make(fastrms_group *group, int itemsize, const fastrms_hyper *h,
                        const char *(*wrong)(const fastrms_group *, const fastrms_hyper *),
                        void (*recipe)(fastrms_group *, const fastrms_hyper *))
{
    if (itemsize != 4 && itemsize != 8)
        return "itemsize";
    fastrms_mode mode = fastrms_enter();
    fastrms_group made = {.itemsize = itemsize};
    const char *refused = wrong(&made, h);
    if (!refused) {
        recipe(&made, h);
        refused = overflows(&made) ? "lr" : NULL;
    }
    if (!refused)
        *group = made;
    fastrms_leave(mode);
    return refused;
}

#define FAMILY(name) \
    const char *fastrms_##name##_group(fastrms_group *group, int itemsize, const fastrms_hyper *hyper) \
    { \
        return make(group, itemsize, hyper, wrong_##name, name); \
    }
FAMILY(rmsprop)
FAMILY(adagrad)
FAMILY(adam)
FAMILY(rprop)
