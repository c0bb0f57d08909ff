/* The C interface, declarations only: cffi reads this file as it stands, C programs include fastrms.h.  Sections: limits and
 * answers; recipes; plans; a step of a plan; a step without a plan; hyper-parameters; rules; threads. */

/* ---- limits and answers ---- */

#define FASTRMS_MAX_STATES 3
#define FASTRMS_MAX_COEFFICIENTS 24
#define FASTRMS_MAX_CORRECTIONS 4

/* The statuses that a call answers with.  FASTRMS_OK: it has done everything.  Any other: it has changed nothing, except
 * that FASTRMS_NONFINITE and FASTRMS_NOT_GATHERED leave out only the step; with the former the gradients may have been
 * zeroed, and fastrms_change has taken over what it was given. */
#define FASTRMS_OK 0
#define FASTRMS_BUSY 1           /* another thread is in a call with this plan */
#define FASTRMS_OVERLAP 2        /* two buffers share a byte */
#define FASTRMS_MISALIGNED 3     /* a buffer does not start at a multiple of the size of its numbers */
#define FASTRMS_MISSING 4        /* a buffer that the rule needs is NULL */
#define FASTRMS_NOT_HELD 5       /* the plan holds no gradients, or other ones than the call names */
#define FASTRMS_NONFINITE 6      /* a gradient is not finite, and on_nonfinite left the step out */
#define FASTRMS_STREAMING 7      /* a streamed step is open; from fastrms_stream_step: none is open */
#define FASTRMS_STEP 8           /* the number of an update must be from 1 to 2^62 */
#define FASTRMS_NO_RATE 9        /* fastrms_set_rates gave learning rates, but none for this step */
#define FASTRMS_NOT_GATHERED 10  /* the gather function of fastrms_shards failed */

/* The values of on_nonfinite in a plan.  FASTRMS_PROPAGATE does not look for nonfinite gradients; the other two leave a step
 * with such gradients out, and FASTRMS_REFUSE never zeroes the gradients of a step that is left out. */
#define FASTRMS_PROPAGATE 0
#define FASTRMS_SKIP 1
#define FASTRMS_REFUSE 2

/* ---- recipes: a rule with its coefficients ---- */

/* A coefficient that changes with the step t.  Its quantity q is 1 + (t-1)*decay when linear, else
 * weight * (1 + decay + ... + decay^(t-1+ahead)).  Operation 0 leaves the coefficient at value, 1 makes it value / q,
 * 2 makes it value * sqrt(q), and 3 makes it value / sqrt(q). */
typedef struct {
    int32_t coefficient, operation, linear, ahead;
    double decay, weight;
} fastrms_correction;

/* One rule with its hyper-parameters.  rule: the number that fastrms_rule_name() takes; itemsize: bytes of a number in the
 * compute dtype, 4 for float, 8 for double; general: 1 for the form with clip, weight decay, v_scale, eps_root and nesterov.
 * value[] holds the coefficients in double, in the order of fastrms_rule_arguments().  value[0] is grad_scale.  value[1] is
 * grad_rescale, a second factor of the gradient in the general form; it is 1, except during a step whose clipping makes the
 * factor smaller than the normal numbers of float.
 * lr, the learning rate, multiplies value[k] where bit k of rated is set.  It may be changed from step to step. */
typedef struct {
    int32_t rule, itemsize, general, coefficients, corrections, rated;
    fastrms_correction correction[FASTRMS_MAX_CORRECTIONS];
    double lr, value[FASTRMS_MAX_COEFFICIENTS];
} fastrms_recipe;

/* ---- storage formats ---- */

/* How a buffer of floats is stored.  FASTRMS_FP16S is FASTRMS_FP16 of a state: it saturates, and nothing but 0 becomes 0.
 * FASTRMS_Q8 has 8 bits for a number with a sign, FASTRMS_Q8U for one that is never negative: the codes of all elements, a byte
 * each, up to a multiple of 64 bytes, and after them an int32 for each block of 256 elements.  FASTRMS_SPLIT16 and
 * FASTRMS_SPLIT8 are a bf16 parameter and, in a buffer of its own, 16 or 8 bits more of each element. */
#define FASTRMS_FLOAT 0
#define FASTRMS_BF16 1
#define FASTRMS_FP16 2
#define FASTRMS_FP16S 3
#define FASTRMS_Q8 4
#define FASTRMS_Q8U 5
#define FASTRMS_SPLIT16 6
#define FASTRMS_SPLIT8 7

/* The bytes of a buffer of `size` elements; for the last two formats, of the buffer with their lower bits. */
int64_t fastrms_stored_bytes(int format, int64_t size);

/* How the buffers of a tensor, whose compute dtype is float, are stored.
 * param, state: their formats.  low: with a split format the buffer of the lower bits; with FASTRMS_BF16 and FASTRMS_FP16 NULL,
 *     or the parameter in floats, which is updated and then rounded to param.
 * copy: NULL, or where the new parameter is written once more, in copy_format.
 * stochastic: states, and a parameter without low, are rounded up or down at random, else to nearest; the random numbers depend
 *     on seed, on the number of the update and on the position of an element, which is that in the tensor plus `origin`. */
typedef struct {
    int32_t param, state[FASTRMS_MAX_STATES], copy_format, stochastic;
    void *low, *copy;
    uint64_t seed;
    int64_t origin;
} fastrms_storage;

/* ---- plans: all tensors of an optimizer ---- */

/* One parameter and its states.  size: in elements; steps: how many updates it has had; recipe: index into the recipes of
 * the plan; grad_format: of the gradient, FASTRMS_FLOAT, FASTRMS_BF16 or FASTRMS_FP16; set: for the plan's own use; storage:
 * NULL where parameter and states are in the compute dtype. */
typedef struct {
    int64_t size, steps;
    int32_t recipe, set, grad_format;
    void *param;
    void *state[FASTRMS_MAX_STATES];
    fastrms_storage *storage;
} fastrms_tensor;

/* A sum of squares, kept as sum * 2^(2*exponent) so that it neither overflows nor vanishes; nonfinite: how many of the
 * elements are not finite. */
typedef struct {
    double sum;
    int64_t exponent, nonfinite;
} fastrms_squares;

/* What a step found in the gradients before it wrote anything.  grad_norm: the norm of grad * grad_scale, where clip_norm
 * asked for it; it is infinite where it is too large for a double.  The other two are set where on_nonfinite asks for them.
 * nonfinite: how many elements of grad * grad_scale are NaN or infinite or have a square that overflows their type; tensor:
 * the index of the first tensor with such an element, -1 where there is none. */
typedef struct {
    double grad_norm;
    int64_t nonfinite, tensor;
} fastrms_found;

/* A piece of a tensor that is spread over several ranks: a whole segment of it, a whole block of a segment that is cut, or a
 * part of a block that is cut.  A rank writes what it knows of its pieces to its message: two numbers, grad_scale and
 * clip_norm; one fastrms_squares for each piece, and after them all elements of its parts of blocks.  All ranks gather the
 * messages of all ranks, one after the other.
 * tensor: the index in this plan; among the gathered pieces -1 where the plan has no part of this tensor; begin: the first
 * element in the tensor of this plan; length: in elements; squares, values: where its fastrms_squares and its elements
 * begin, in bytes from the first message; values is 0 for a whole segment and a whole block; stored: bytes of an element;
 * ends_block, ends_segment: whether it is the last piece of its block and of its segment. */
typedef struct {
    int64_t tensor, begin, length, squares, values;
    int32_t stored, ends_block, ends_segment, unused;
} fastrms_piece;

/* How the plans of several ranks find the norm of all gradients together; all memory is the caller's.
 * own: the pieces of this rank, in the order of its message; piece: those of all ranks in the order of the sum: by tensor,
 *     and within a tensor by position.
 * message: room for the message of this rank; gathered: those of all ranks.
 * gather: sends the message, receives those of all ranks and sets gathered; it answers 0, or another number where it failed.
 *     A step calls it where clip_norm or on_nonfinite asks for a look at the gradients.
 * context: for the use of gather. */
typedef struct fastrms_shards fastrms_shards;
struct fastrms_shards {
    int64_t own_pieces, pieces;
    const fastrms_piece *own, *piece;
    char *message;
    const char *gathered;
    int (*gather)(fastrms_shards *shards);
    void *context;
};

/* All tensors of an optimizer; all memory is the caller's.  fastrms_plan_init fills a plan, and leaves
 * these fields to the caller.
 * grad[k]: the gradient of tensor k; NULL leaves tensor k alone.
 * grad_scale, clip_norm: what fastrms_step uses.  It multiplies every gradient by grad_scale (at first 1), and reduces their
 *     common norm to clip_norm where it is larger, unless clip_norm is negative (at first -1).
 * on_nonfinite: FASTRMS_PROPAGATE, FASTRMS_SKIP or FASTRMS_REFUSE.
 * zero_grad: a step writes zeros over the gradients, also a step left out by FASTRMS_SKIP.
 * held: not 0 while grad[] points to memory that stays valid; where it is 0, fastrms_step answers FASTRMS_NOT_HELD.
 * unchanging: set it to 0 after writing to a recipe; otherwise the next step may use the coefficients of the last one.
 *     fastrms_set_rates does so by itself.
 * shards: NULL, or where the tensors lie in tensors that are spread over several ranks.
 * steps counts the steps of the plan.  The other fields are the plan's own. */
typedef struct {
    int64_t tensors, steps;
    fastrms_tensor *tensor;
    fastrms_recipe *recipe;
    const void **grad;
    double *made;
    uintptr_t *ranges;
    int64_t *starts;
    fastrms_squares *segments;
    double grad_scale, clip_norm;
    const double *rates;
    int64_t first_rate, rate_rows;
    fastrms_found found;
    int32_t recipes, states, busy, held, unchanging, on_nonfinite, zero_grad, streaming, streamed, rescaled, unit_bits, each;
    fastrms_shards *shards;
} fastrms_plan;

/* Make *plan a plan of these tensors and recipes, which holds no gradients yet.  tensor[k].size and storage must be set.
 * grad: room for one address per tensor, that of its gradient.  scratch: fastrms_scratch_bytes() bytes, aligned like a
 * double. */
int64_t fastrms_scratch_bytes(int64_t tensors, const fastrms_tensor *tensor);
void fastrms_plan_init(fastrms_plan *plan, int64_t tensors, fastrms_tensor *tensor, int32_t recipes, fastrms_recipe *recipe,
                       const void **grad, void *scratch);

/* ---- a step of a plan ---- */

/* Make one step over all tensors, from the gradients that the plan holds.  fastrms_step_held makes it only while these are
 * the gradients that fastrms_change was told to hold under the number held, and answers FASTRMS_NOT_HELD otherwise; no
 * gradients have the number 0. */
int fastrms_step(fastrms_plan *plan);
int fastrms_step_held(fastrms_plan *plan, int held);

/* fastrms_step_held with another grad_scale, and with clip_norm unless that is negative; *found receives what the step
 * found, unless found is NULL. */
int fastrms_step_with(fastrms_plan *plan, int held, double grad_scale, double clip_norm, fastrms_found *found);

/* The same where on_nonfinite is FASTRMS_PROPAGATE and clip_norm is not negative: the norm, or the status times -1. */
double fastrms_step_clipped(fastrms_plan *plan, int held, double grad_scale, double clip_norm);

/* Take over parameters, gradients and recipes, and make a step, in one call that no other thread and no interrupt can cut in
 * two: all of it is done, or nothing.
 * param, grad: new addresses for every tensor, or NULL; recipe: the new values of all recipes, or NULL; hold: a number other
 * than 0 where the memory of the gradients stays valid, by which fastrms_step_held names them; run: whether to make a step,
 * with grad_scale, and with clip_norm unless that is negative; *found receives what the step found, unless found is NULL.
 * FASTRMS_NONFINITE leaves out the step; parameters, gradients and recipes are taken over all the same. */
int fastrms_change(fastrms_plan *plan, void *const *param, const void *const *grad, const fastrms_recipe *recipe,
                   int hold, int run, double grad_scale, double clip_norm, fastrms_found *found);

/* The same with gradients of other formats: format[k] is that of grad[k], FASTRMS_FLOAT, FASTRMS_BF16 or FASTRMS_FP16. */
int fastrms_change_as(fastrms_plan *plan, void *const *param, const void *const *grad, const int32_t *format,
                      const fastrms_recipe *recipe, int hold, int run, double grad_scale, double clip_norm,
                      fastrms_found *found);

/* fastrms_set_rate gives every recipe one learning rate for all steps from now on.
 * fastrms_set_rates gives each its own: rates[k] that of recipe k, for all steps from now on, where rows is 0.  Where rows
 * is not 0, rates[r * recipes + k] is that of recipe k in the step that comes after first + r steps of the plan, r < rows;
 * this memory must stay valid, and a step outside of these rows is answered by FASTRMS_NO_RATE.  New recipes bring rates of
 * their own, which take the place of these. */
int fastrms_set_rate(fastrms_plan *plan, double rate);
int fastrms_set_rates(fastrms_plan *plan, int64_t first, int64_t rows, const double *rates);

/* Make a step in parts, each tensor as soon as its gradient is there: open, then fastrms_stream_step once for every tensor
 * that has a gradient, then close.  The first part counts the step.  In between all other calls with this plan answer
 * FASTRMS_STREAMING.  param: a new address, or NULL; format: that of the gradient; rates: the learning rate of each
 * recipe, or NULL.  A gradient that shares a byte with a parameter or a state of any tensor is answered by FASTRMS_OVERLAP.
 * The plan goes on holding the gradients that it held before. */
int fastrms_stream_open(fastrms_plan *plan);
int fastrms_stream_step(fastrms_plan *plan, int64_t tensor, void *param, const void *grad, int32_t format,
                        const double *rates, double grad_scale);
void fastrms_stream_close(fastrms_plan *plan);

/* Copy `count` buffers in or out of the plan, and with them the step counts (tensors + 1 of them, the plan's own first) and
 * the recipes; like fastrms_change it does all of this or nothing.  recipe, new_steps and old_steps may be NULL. */
int fastrms_copy(fastrms_plan *plan, int64_t count, void *const *to, const void *const *from, const int64_t *bytes,
                 const fastrms_recipe *recipe, const int64_t *new_steps, int64_t *old_steps);

/* ---- a step without a plan ---- */

/* Make one step on raw buffers.  step: the number of this update, from 1.  States that the rule does not have are NULL. */
int fastrms_update(const fastrms_recipe *recipe, int64_t size, int64_t step, double grad_scale,
                   void *param, const void *grad, void *state0, void *state1, void *state2);

/* ---- hyper-parameters ---- */

/* Hyper-parameters, named as in Python, where help(fastrms.RMSProp) has the formulas.  Start from a set of defaults.  A
 * family ignores the fields that it does not use.  clip_value: 0 for no clipping.  bias_correction: 0, FASTRMS_CORRECTED or
 * FASTRMS_FOLDED.
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
 * is NULL, or the name of the hyper-parameter that is refused; then *recipe is as it was.  What depends on the state is not
 * checked: AdaGrad with eps and eps_root both 0 needs a sum without zeros.  The caller fills RProp's state step_size with lr
 * before the first step. */
const char *fastrms_rmsprop_recipe(fastrms_recipe *recipe, int itemsize, const fastrms_hyper *given);
const char *fastrms_adagrad_recipe(fastrms_recipe *recipe, int itemsize, const fastrms_hyper *given);
const char *fastrms_adam_recipe(fastrms_recipe *recipe, int itemsize, const fastrms_hyper *given);
const char *fastrms_rprop_recipe(fastrms_recipe *recipe, int itemsize, const fastrms_hyper *given);

/* ---- rules ---- */

/* The rules of this library, numbered from 0: their names, their arguments as one text with blanks in between, and the
 * number of their states. */
int fastrms_rule_count(void);
const char *fastrms_rule_name(int rule);
const char *fastrms_rule_arguments(int rule);
int fastrms_rule_states(int rule);

/* ---- threads ---- */

/* How many threads a step may use, 1 at first. */
int fastrms_get_num_threads(void);
void fastrms_set_num_threads(int count);
