/* What tests, the benchmark and the Python package use beside fastrms_decl.h.  cffi reads this file, too; it is not
 * installed, and what it declares may change. */

/* ---- tiers: the instruction sets that the kernels are compiled for, the most able first ---- */

int fastrms_isa_count(void);
const char *fastrms_isa_name(int isa);
int fastrms_isa_supported(int isa);

/* Force a tier; -1 takes, kernel by kernel, the fastest, which is so at the start.  Returns isa, or -1 where there is no such
 * tier or this CPU lacks it. */
int fastrms_isa_set(int isa);
int fastrms_isa_get(void);                /* the tier that is forced, or else the most able that this CPU supports */
int fastrms_isa_of(int rule, int itemsize, int general);     /* the tier that a kernel is taken from */

/* the name and version of the compiler that built the kernels */
const char *fastrms_compiler(void);

/* ---- threads ---- */

/* A step of at least least_elements elements is shared among threads, chunk elements at a time; it and those
 * on which it follows closely must have ten times as many. */
void fastrms_set_chunks(int64_t chunk, int64_t least_elements);
int fastrms_workers(void);

/* Whether threads may wait awake for the next step of a loop, which takes a second CPU. */
void fastrms_set_wait_awake(int allowed);

/* ---- coefficients ---- */

/* fastrms_update with another learning rate than that of the recipe, which threads may share */
int fastrms_update_at_rate(const fastrms_recipe *recipe, double lr, int64_t size, int64_t step, double grad_scale,
                           void *param, const void *grad, void *state0, void *state1, void *state2);

/* the same for rules with one state: each argument costs a call from Python 15 ns */
int fastrms_update_one_state(const fastrms_recipe *recipe, double lr, int64_t size, int64_t step, double grad_scale,
                             void *param, const void *grad, void *state);

/* weight * (1 + decay + ... + decay^(terms-1)) */
double fastrms_series(double decay, double weight, int64_t terms);

/* ---- storage formats ---- */

/* stochastic: whether to round at random, by the numbers of this key from this position on */
typedef struct {
    int32_t stochastic;
    uint32_t key, position;
} fastrms_rounding;
uint32_t fastrms_key(uint64_t seed, int64_t step, int stream);

/* All elements of a buffer, by a tier; low: the lower bits of a split format, else NULL. */
void fastrms_decode(int isa, int format, int64_t size, const void *stored, const void *low, float *x);
void fastrms_encode(int isa, int format, int64_t size, const float *x, void *stored, void *low, fastrms_rounding rounding);

/* ---- tensors of torch ---- */

/* What fastrms_read_tensors needs: where in a Python object its class is, in a tensor of torch what C takes for one, in a list
 * the pointer to its items, and in what C takes for a tensor the flags of which `negative` is set where the numbers in memory
 * have the other sign, all in bytes; the classes that are read, and None; and of torch the layout "strided", the dtypes bf16 and
 * fp16, and the functions aoti_torch_get_... . */
typedef struct {
    int32_t kind_at, tensor_at, items_at, flags_at, strided, bf16, fp16;
    uint64_t negative;
    const void *kinds[2], *none;
    int32_t (*get_device_type)(void *tensor, int32_t *made), (*get_device_index)(void *tensor, int32_t *made);
    int32_t (*get_layout)(void *tensor, int32_t *made), (*get_dtype)(void *tensor, int32_t *made);
    int32_t (*get_dim)(void *tensor, int64_t *made), (*get_numel)(void *tensor, int64_t *made);
    int32_t (*get_sizes)(void *tensor, const int64_t **made), (*get_strides)(void *tensor, const int64_t **made);
    int32_t (*get_data_ptr)(void *tensor, void **made);
    int32_t (*get_storage_offset)(void *tensor, int64_t *made), (*get_storage_size)(void *tensor, int64_t *made);
} fastrms_torch;

/* What a tensor must be; device_type, device_index and dtype are torch's numbers.  address: where it must lie, NULL for
 * anywhere; shape and strides have one number for each of the axes, the strides in elements; axes is -1 where only the address
 * and the number of elements count. */
typedef struct {
    int32_t device_type, device_index, dtype, itemsize;
    int64_t axes, size;
    const void *address;
    const int64_t *shape, *strides;
} fastrms_layout;

/* Fill address[] for `count` tensors of a Python list, from the one of index `first` on: NULL for None.  format: NULL, or
 * where the format of each is written, which may then be FASTRMS_BF16 or FASTRMS_FP16 where floats are wanted.  Returns how many
 * are None, or -1 where one is not as wanted. */
int64_t fastrms_read_tensors(const fastrms_torch *torch, uintptr_t list, int64_t first, int64_t count,
                             const fastrms_layout *wanted, void **address, int32_t *format);

/* Have two Python lists of `count` items the same objects in them? */
int fastrms_same_items(const fastrms_torch *torch, uintptr_t list, uintptr_t other, int64_t count);

/* ---- the ceilings of the benchmark ---- */

/* fastrms_streams makes one addition to each buffer that a rule with `states` states writes: to all of them in one loop, or,
 * where block > 0, to one after the other within blocks of `block` elements.  fastrms_divider makes `size` divisions and
 * square roots, over and over from the first elements of grad, which stay in L1, and leaves
 * param[i] = grad[i] / sqrt(grad[i]) for these.
 * shared: whether all threads of the pool share the work, in chunks, however small it is; isa: the tier that runs it. */
typedef struct {
    int64_t size, block, chunk;
    int32_t itemsize, states, shared, isa;
    void *param;
    const void *grad;
    void *state[FASTRMS_MAX_STATES];
} fastrms_ceiling;

void fastrms_streams(fastrms_ceiling *job);
void fastrms_divider(fastrms_ceiling *job);
