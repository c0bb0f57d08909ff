/* The C interface, declarations only: cffi reads this file as it stands, C programs include fastrms.h. */

#define FASTRMS_MAX_STATES 3
#define FASTRMS_MAX_COEFFICIENTS 24
#define FASTRMS_MAX_CORRECTIONS 4

/* what a call answers; everything but OK has changed nothing (NONFINITE may have zeroed the gradients) */
#define FASTRMS_OK 0
#define FASTRMS_BUSY 1
#define FASTRMS_OVERLAP 2
#define FASTRMS_MISALIGNED 3
#define FASTRMS_MISSING 4
#define FASTRMS_NOT_HELD 5
#define FASTRMS_NONFINITE 6      /* no step was made: on_nonfinite, and a gradient is not finite */
#define FASTRMS_STREAMING 7      /* a streamed step is open; of fastrms_stream_step: none is */
#define FASTRMS_STEP 8           /* the number of an update must be from 1 to 2^62 */

/* on_nonfinite of a plan: look for nothing; leave the step out; leave it out, and the gradients as they are */
#define FASTRMS_PROPAGATE 0
#define FASTRMS_SKIP 1
#define FASTRMS_REFUSE 2

/* A coefficient that changes with the step t.  Its quantity q is 1 + (t-1)*decay when linear, else
 * weight * (1 + decay + ... + decay^(t-1+ahead)).  By operation 0 the coefficient stays value, by 1 it becomes
 * value / q, by 2 value * sqrt(q), by 3 value / sqrt(q). */
typedef struct {
    int32_t coefficient, operation, linear, ahead;
    double decay, weight;
} fastrms_correction;

/* One rule with its hyper-parameters.  rule: index of fastrms_rule_name(); itemsize: 4 float, 8 double;
 * general: 1 for the form with clip, weight decay, v_scale, eps_root and nesterov.
 * value[] holds the coefficients in double, in the order of fastrms_rule_arguments(); value[0] is grad_scale, and
 * value[1] is grad_rescale, a second factor of the gradient in the general form, 1 but for a step that clips to a factor
 * below the normal numbers of float. */
typedef struct {
    int32_t rule, itemsize, general, coefficients, corrections, reserved;
    fastrms_correction correction[FASTRMS_MAX_CORRECTIONS];
    double value[FASTRMS_MAX_COEFFICIENTS];
} fastrms_recipe;

/* One parameter and its state; steps counts the updates it has had. */
typedef struct {
    int64_t size, steps;
    int32_t recipe, ready;
    void *param;
    void *state[FASTRMS_MAX_STATES];
} fastrms_tensor;

/* A sum of squares as sum * 2^(2*exponent), which neither overflows nor vanishes; nonfinite: of how many elements. */
typedef struct {
    double sum;
    int64_t exponent, nonfinite;
} fastrms_squares;

/* What a step found in the gradients before it wrote anything: their norm, where clip_norm asked for it; with on_nonfinite
 * how many elements of grad * grad_scale are NaN or infinite or have a square that overflows their type, and the first
 * tensor with such a one, -1 where there is none. */
typedef struct {
    double grad_norm;
    int64_t nonfinite, tensor;
} fastrms_found;

/* All tensors of an optimizer.  grad[k] == NULL leaves tensor k alone; zero_grad: a step writes zeros over the gradients,
 * also one left out by FASTRMS_SKIP.  streaming, streamed: see fastrms_stream_open.  Scratch: ready for one set of
 * FASTRMS_MAX_COEFFICIENTS per tensor; starts (tensors + 1); segments for fastrms_segments() in all; ranges
 * (2 * tensors * (2 + states)).  held: grad[] points to memory that stays; fastrms_step refuses without it.
 * unchanging: ready[] holds for the next step too; set it to 0 after writing to a recipe. */
typedef struct {
    int64_t tensors, steps;
    fastrms_tensor *tensor;
    fastrms_recipe *recipe;
    const void **grad;
    double *ready;
    uintptr_t *ranges;
    int64_t *starts;
    fastrms_squares *segments;
    double grad_scale, clip_norm;
    fastrms_found found;
    int32_t recipes, states, busy, held, unchanging, on_nonfinite, zero_grad, streaming, streamed, rescaled;
} fastrms_plan;

/* One step over all tensors, of the gradients that the plan holds; fastrms_step_held makes it only while they are those
 * that fastrms_change was told to hold under this number, and answers FASTRMS_NOT_HELD otherwise. */
int fastrms_step(fastrms_plan *plan);
int fastrms_step_held(fastrms_plan *plan, int held);

/* What a plan takes over and does in one call that no other thread and no interrupt can cut: all of it, or nothing.
 * param, grad: new addresses for every tensor, or NULL; recipe: all recipes anew, or NULL; hold: a number not 0 where grad stays valid;
 * run: make a step, with grad_scale, and with clip_norm unless it is negative; *found, unless found is NULL, takes what it
 * found.  FASTRMS_NONFINITE leaves the step out, not what was taken over. */
int fastrms_change(fastrms_plan *plan, void *const *param, const void *const *grad, const fastrms_recipe *recipe,
                   int hold, int run, double grad_scale, double clip_norm, fastrms_found *found);

/* A step in parts, each tensor as soon as its gradient is there: open, then fastrms_stream_step once for every tensor that
 * has a gradient, then close.  The first counts the step.  In between all other calls with this plan answer
 * FASTRMS_STREAMING.  param: a new address, or NULL; recipe: all recipes anew, or NULL.  The plan's own gradients stay. */
int fastrms_stream_open(fastrms_plan *plan);
int fastrms_stream_step(fastrms_plan *plan, int64_t tensor, void *param, const void *grad, const fastrms_recipe *recipe,
                        double grad_scale);
void fastrms_stream_close(fastrms_plan *plan);

/* Copy `count` buffers and the step counts (tensors + 1 of them, the plan's own first) in or out, in the same sense. */
int fastrms_copy(fastrms_plan *plan, int64_t count, void *const *to, const void *const *from, const int64_t *bytes,
                 const fastrms_recipe *recipe, const int64_t *new_steps, int64_t *old_steps);

/* One step on raw buffers, without a plan; step is the number of this update, from 1; states the rule lacks are NULL. */
int fastrms_update(const fastrms_recipe *recipe, int64_t size, int64_t step, double grad_scale,
                   void *param, const void *grad, void *state0, void *state1, void *state2);

int64_t fastrms_segments(int64_t size);
/* the same for rules with one state, step 1 and grad_scale 1: four arguments less to convert */
int fastrms_update_one(const fastrms_recipe *recipe, int64_t size, void *param, const void *grad, void *state);

/* weight * (1 + decay + ... + decay^(terms-1)), which bias correction divides by; 0 where terms < 1 */
double fastrms_series(double decay, double weight, int64_t terms);

/* Hyper-parameters, named as in Python, where help(fastrms.RMSProp) has the formulas.  Start from a set of defaults; what
 * a family does not know it ignores.  clip_value: 0 for none.  bias_correction: 0, FASTRMS_CORRECTED or FASTRMS_FOLDED.
 * nesterov: 0 or 1 for RMSProp, 0, FASTRMS_DOZAT or FASTRMS_FOLDED for Adam.  amsgrad: 0, 1 or FASTRMS_CORRECTED. */
#define FASTRMS_CORRECTED 2
#define FASTRMS_FOLDED 3
#define FASTRMS_DOZAT 4
typedef struct {
    double lr, rho, beta1, beta2, eps, eps_root, momentum, lr_decay, weight_decay, clip_value;
    double eta_minus, eta_plus, step_min, step_max;
    int32_t nesterov, centered, amsgrad, bias_correction, decoupled, maximize, lr_in_momentum, zero_on_flip;
} fastrms_hyper;

extern const fastrms_hyper fastrms_rmsprop_defaults;
extern const fastrms_hyper fastrms_adagrad_defaults;
extern const fastrms_hyper fastrms_adam_defaults;
extern const fastrms_hyper fastrms_adamw_defaults;
extern const fastrms_hyper fastrms_rprop_defaults;

/* The recipe of these hyper-parameters for float (itemsize 4) or double (8), with the bits that Python computes.  The answer
 * is NULL, or the name of the hyper-parameter that is refused, and *recipe is as it was.  Not checked is what only the state
 * shows: AdaGrad with eps and eps_root both 0 needs a sum without zeros.  RProp's state step_size starts as lr, by the caller. */
const char *fastrms_rmsprop_recipe(fastrms_recipe *recipe, int itemsize, const fastrms_hyper *hyper);
const char *fastrms_adagrad_recipe(fastrms_recipe *recipe, int itemsize, const fastrms_hyper *hyper);
const char *fastrms_adam_recipe(fastrms_recipe *recipe, int itemsize, const fastrms_hyper *hyper);
const char *fastrms_rprop_recipe(fastrms_recipe *recipe, int itemsize, const fastrms_hyper *hyper);

int fastrms_rule_count(void);
const char *fastrms_rule_name(int rule);
const char *fastrms_rule_arguments(int rule);
int fastrms_rule_states(int rule);

int fastrms_get_num_threads(void);
void fastrms_set_num_threads(int count);
void fastrms_set_chunks(int64_t chunk, int64_t least_elements);
int fastrms_workers(void);

int fastrms_isa_count(void);
const char *fastrms_isa_name(int isa);
int fastrms_isa_supported(int isa);
int fastrms_isa_get(void);
int fastrms_isa_set(int isa);

/* the compiler that built the kernels, in words */
const char *fastrms_compiler(void);

/* The benchmark's ceilings.  fastrms_streams makes one addition to every buffer that a rule with so many states writes:
 * all streams together, or in turn within blocks of so many elements where block > 0.  fastrms_divider makes `size`
 * divisions and square roots of the first elements of grad, in L1, and leaves param[i] = grad[i] / sqrt(grad[i]) of those.
 * shared: by all threads of the pool, in chunks, however small it is. */
typedef struct {
    int64_t size, block, chunk;
    int32_t itemsize, states, shared, reserved;
    void *param;
    const void *grad;
    void *state[FASTRMS_MAX_STATES];
} fastrms_ceiling;

void fastrms_streams(fastrms_ceiling *job);
void fastrms_divider(fastrms_ceiling *job);
