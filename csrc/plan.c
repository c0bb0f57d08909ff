/* The plan of an optimizer.  A step computes its coefficients and puts every tensor through its kernel, in one call; a plan
 * also takes over other buffers and recipes, makes steps in parts, and copies its buffers in and out.
 * fastrms/backends/plan.py does the same in Python. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include "internal.h"

#define APART __attribute__((noinline))                   /* not inlined: the plain step keeps its registers */
#define ALWAYS_INLINE inline __attribute__((always_inline))
typedef struct {
    uintptr_t start, end, buffer;                         /* buffer: its number among those of its kind */
} range;
enum {
    CACHE_CHUNK = 4096,                                   /* elements: all buffers of such a chunk stay in cache */
    TILE = 4 * FASTRMS_BLOCK,                             /* elements that are decoded at a time */
    ROW = TILE + 80,                                      /* rows of such floats lie apart modulo 4 KiB */
    MOST_RANGES = 4 + FASTRMS_MAX_STATES                  /* of one tensor: its gradient, its parameter with what belongs to it, and
                                                             its states */
};

/* the coefficients of step number `step`, with both parts of the factor of the gradient */
static void scaled_coefficients(const fastrms_recipe *recipe, int64_t step, fastrms_factor scale, double *made)
{
    fastrms_recipe rescaled;
    if (scale.grad_rescale != 1) {
        rescaled = *recipe;
        rescaled.value[1] = scale.grad_rescale;
        recipe = &rescaled;
    }
    fastrms_evaluate(recipe, step, scale.grad_scale, made);
}

/* is a tensor updated tile by tile, through floats? */
static int is_stored(const fastrms_tensor *tensor) { return tensor->storage || tensor->grad_format != FASTRMS_FLOAT; }

/* Threads share out units of elements: blocks, where a tensor is stored in another format, and single elements otherwise. */
static void set_units(fastrms_plan *plan)
{
    plan->unit_bits = 0;
    for (int64_t k = 0; k < plan->tensors; ++k)
        if (is_stored(&plan->tensor[k]))
            plan->unit_bits = FASTRMS_BLOCK_BITS;
}

static int64_t units(const fastrms_plan *plan, int64_t size)
{
    return (size + ((int64_t)1 << plan->unit_bits) - 1) >> plan->unit_bits;
}

/* tensors of one recipe that have had equally many steps share one set of coefficients; starts[] counts units */
static void make_coefficients(fastrms_plan *plan, fastrms_factor scale)
{
    const fastrms_tensor *last = NULL;
    int32_t sets = 0;
    plan->rescaled = scale.grad_rescale != 1;
    plan->unchanging = scale.grad_scale == 1 && !plan->rescaled;
    plan->starts[0] = 0;
    for (int64_t k = 0; k < plan->tensors; ++k) {
        fastrms_tensor *tensor = &plan->tensor[k];
        plan->starts[k + 1] = plan->starts[k] + (plan->grad[k] ? units(plan, tensor->size) : 0);
        if (!plan->grad[k])
            continue;
        if (last && last->recipe == tensor->recipe && last->steps == tensor->steps) {
            tensor->set = last->set;
        } else {
            tensor->set = sets++;
            scaled_coefficients(&plan->recipe[tensor->recipe], tensor->steps + 1, scale,
                                plan->made + (int64_t)tensor->set * FASTRMS_MAX_COEFFICIENTS);
        }
        plan->unchanging &= plan->recipe[tensor->recipe].corrections == 0;
        last = tensor;
    }
}

/* put the parts of the buffers of a tensor that are given through its kernel */
static void run_kernel(const fastrms_plan *plan, const fastrms_tensor *tensor, int64_t size, void *param, const void *grad,
                       void *const *state)
{
    const fastrms_recipe *recipe = &plan->recipe[tensor->recipe];
    int general = recipe->general || plan->rescaled;
    fastrms_kernel *kernel = fastrms_kernel_of(recipe->rule, recipe->itemsize == 8, general);
    kernel(size, param, grad, state, plan->made + (int64_t)tensor->set * FASTRMS_MAX_COEFFICIENTS);
}

static ALWAYS_INLINE void update_part(const fastrms_plan *plan, int64_t k, int64_t offset, int64_t size)
{
    const fastrms_tensor *tensor = &plan->tensor[k];
    int64_t bytes = offset * plan->recipe[tensor->recipe].itemsize;
    void *state[FASTRMS_MAX_STATES];
    for (int s = 0; s < FASTRMS_MAX_STATES; ++s)
        state[s] = tensor->state[s] ? (char *)tensor->state[s] + bytes : NULL;
    run_kernel(plan, tensor, size, (char *)tensor->param + bytes, (const char *)plan->grad[k] + bytes, state);
}

/* A buffer that a tile is read from and written to: its format, the bytes of a whole tile in it, where the tile lies in it,
 * where the kernel finds the floats of the tile, and how they are rounded when they are written. */
typedef struct {
    int format, bytes, low_bytes;
    fastrms_stored at;
    float *floats;
    fastrms_rounding rounding;
} stream;

enum { PARAM, GRAD, STATES, COPY = STATES + FASTRMS_MAX_STATES, OF_MASTER, STREAMS };

static stream stream_at(int format, int64_t size, void *stored, void *low, int64_t offset, float *row)
{
    int in_blocks = format == FASTRMS_Q8 || format == FASTRMS_Q8U, itemsize = fastrms_format_itemsize(format);
    stream made = {.format = format, .at = fastrms_part(format, size, stored, low, offset), .floats = row};
    made.bytes = TILE * (format == FASTRMS_SPLIT8 ? 2 : itemsize);
    made.low_bytes = in_blocks ? TILE / FASTRMS_BLOCK * (int)sizeof(int32_t) : TILE * itemsize;
    if (format == FASTRMS_FLOAT)
        made.floats = made.at.stored;
    return made;
}

static fastrms_rounding rounding_of(const fastrms_tensor *tensor, int number, int64_t offset)
{
    const fastrms_storage *storage = tensor->storage;
    uint32_t key = storage->stochastic ? fastrms_key(storage->seed, tensor->steps + 1, number) : 0;
    return (fastrms_rounding){storage->stochastic, key, (uint32_t)(storage->origin + offset)};
}

/* is the parameter, in bf16 or fp16, a rounded copy of floats that are updated in its place? */
static int has_floats(const fastrms_storage *storage)
{
    return storage->low && (storage->param == FASTRMS_BF16 || storage->param == FASTRMS_FP16);
}

/* the streams of a tensor from an element on; `count`: how many states it has */
static void open_streams(const fastrms_plan *plan, int64_t k, int64_t offset, int count, float (*row)[ROW], stream *streams)
{
    static const fastrms_storage floats;
    const fastrms_tensor *tensor = &plan->tensor[k];
    const fastrms_storage *storage = tensor->storage ? tensor->storage : &floats;
    int64_t size = tensor->size;
    streams[PARAM] = has_floats(storage) ? stream_at(FASTRMS_FLOAT, size, storage->low, NULL, offset, row[PARAM])
                                         : stream_at(storage->param, size, tensor->param, storage->low, offset, row[PARAM]);
    streams[GRAD] = stream_at(tensor->grad_format, size, (void *)plan->grad[k], NULL, offset, row[GRAD]);
    for (int s = 0; s < FASTRMS_MAX_STATES; ++s)          /* one that the rule lacks is empty */
        streams[STATES + s] = s < count ? stream_at(storage->state[s], size, tensor->state[s], NULL, offset, row[STATES + s])
                                        : (stream){.format = FASTRMS_FLOAT};
    for (int s = 0; tensor->storage && s <= count; ++s)
        streams[s ? GRAD + s : PARAM].rounding = rounding_of(tensor, s, offset);
    streams[COPY] = stream_at(storage->copy_format, size, storage->copy, NULL, offset, NULL);
    streams[OF_MASTER] = stream_at(has_floats(storage) ? storage->param : FASTRMS_FLOAT, size, tensor->param, NULL, offset, NULL);
}

static ALWAYS_INLINE void move(stream *moved)
{
    if (!moved->at.stored)                                /* a buffer that the tensor lacks */
        return;
    moved->at.stored = (char *)moved->at.stored + moved->bytes;
    if (moved->at.low)
        moved->at.low = (char *)moved->at.low + moved->low_bytes;
    if (moved->format == FASTRMS_FLOAT)
        moved->floats += TILE;
    moved->rounding.position += TILE;
}

static ALWAYS_INLINE void read_stream(const fastrms_tier *tier, const stream *from, int64_t size)
{
    if (from->format != FASTRMS_FLOAT)
        tier->decode(from->format, size, from->at, from->floats);
}

static ALWAYS_INLINE void write_stream(const fastrms_tier *tier, const stream *to, int64_t size, const float *floats)
{
    if (to->format != FASTRMS_FLOAT)
        tier->encode(to->format, size, floats, to->at, to->rounding);
}

/* Run the kernel over a tile that has been read.  Before each block of it, the same block of the next tile is prefetched, which
 * the kernel does for floats only; all requests at once would wait for each other. */
static ALWAYS_INLINE void run_tile(const fastrms_plan *plan, const fastrms_tensor *tensor, int64_t size, int count,
                                   const stream *streams)
{
    for (int64_t start = 0; start < size; start += FASTRMS_BLOCK) {
        void *state[FASTRMS_MAX_STATES];
        int64_t length = size - start < FASTRMS_BLOCK ? size - start : FASTRMS_BLOCK;
        for (int s = 0; s < STREAMS; ++s)
            if (streams[s].format != FASTRMS_FLOAT) {
                int bytes = streams[s].bytes / (TILE / FASTRMS_BLOCK), from = (int)(start / FASTRMS_BLOCK) * bytes;
                for (int line = from; line < from + bytes; line += FASTRMS_LINE)
                    __builtin_prefetch((const char *)streams[s].at.stored + streams[s].bytes + line);
            }
        for (int s = 0; s < count; ++s)
            state[s] = streams[STATES + s].floats + start;
        run_kernel(plan, tensor, length, streams[PARAM].floats + start, streams[GRAD].floats + start, state);
    }
}

/* Update a part of a tensor through floats, tile by tile. */
static APART void update_stored(const fastrms_plan *plan, int64_t k, int64_t offset, int64_t size)
{
    __attribute__((aligned(FASTRMS_LINE))) float row[STATES + FASTRMS_MAX_STATES][ROW];
    const fastrms_tensor *tensor = &plan->tensor[k];
    const fastrms_tier *tier = fastrms_current_tier();
    int count = fastrms_rule_states(plan->recipe[tensor->recipe].rule);
    stream streams[STREAMS];
    open_streams(plan, k, offset, count, row, streams);
    for (int64_t length; size > 0; size -= length) {
        length = size < TILE ? size : TILE;
        for (int s = 0; s < STATES + count; ++s)
            read_stream(tier, &streams[s], length);
        run_tile(plan, tensor, length, count, streams);
        write_stream(tier, &streams[PARAM], length, streams[PARAM].floats);
        for (int s = STATES; s < STATES + count; ++s)
            write_stream(tier, &streams[s], length, streams[s].floats);
        for (int s = COPY; s < STREAMS; ++s)
            write_stream(tier, &streams[s], length, streams[PARAM].floats);
        for (int s = 0; s < STREAMS; ++s)
            move(&streams[s]);
    }
}

static int grad_itemsize(const fastrms_plan *plan, int64_t k, int32_t format)
{
    return format ? fastrms_format_itemsize(format) : plan->recipe[plan->tensor[k].recipe].itemsize;
}

static void zero_part(const fastrms_plan *plan, int64_t k, int64_t offset, int64_t size)
{
    int itemsize = grad_itemsize(plan, k, plan->tensor[k].grad_format);
    memset((char *)plan->grad[k] + offset * itemsize, 0, (size_t)(size * itemsize));
}

/* Update a part in chunks, and do to each chunk what belongs to it while it is in cache: zero the gradient. */
static APART void update_chunks(const fastrms_plan *plan, int64_t k, int64_t offset, int64_t size)
{
    for (; size > 0; offset += CACHE_CHUNK, size -= CACHE_CHUNK) {
        int64_t length = size < CACHE_CHUNK ? size : CACHE_CHUNK;
        if (is_stored(&plan->tensor[k]))
            update_stored(plan, k, offset, length);
        else
            update_part(plan, k, offset, length);
        zero_part(plan, k, offset, length);
    }
}

/* update units [begin, end), counted through all tensors of the step; they may belong to several tensors */
static void update_range(void *context, int64_t begin, int64_t end)
{
    const fastrms_plan *plan = context;
    fastrms_mode mode = fastrms_set_float_mode();
    int64_t k = 0, after = plan->tensors;
    while (after - k > 1) {                               /* find the tensor that holds `begin` */
        int64_t middle = (k + after) / 2;
        if (plan->starts[middle] <= begin)
            k = middle;
        else
            after = middle;
    }
    for (; begin < end; ++k) {
        int64_t stop = plan->starts[k + 1] < end ? plan->starts[k + 1] : end;
        int64_t offset = (begin - plan->starts[k]) << plan->unit_bits, beyond = (stop - plan->starts[k]) << plan->unit_bits;
        int64_t size = (beyond < plan->tensor[k].size ? beyond : plan->tensor[k].size) - offset;
        if (begin < stop && plan->zero_grad)
            update_chunks(plan, k, offset, size);
        else if (begin < stop && plan->unit_bits && is_stored(&plan->tensor[k]))
            update_stored(plan, k, offset, size);
        else if (begin < stop)
            update_part(plan, k, offset, size);
        begin = stop;
    }
    fastrms_restore_float_mode(mode);
}

static ALWAYS_INLINE void update(fastrms_plan *plan, fastrms_factor scale)
{
    if (!plan->unchanging || scale.grad_scale != 1)
        make_coefficients(plan, scale);
    int64_t count = plan->starts[plan->tensors];
    fastrms_parallel(count << plan->unit_bits, update_range, plan, count, units(plan, fastrms_chunk_size()));
    for (int64_t k = 0; k < plan->tensors; ++k)
        plan->tensor[k].steps += plan->grad[k] != NULL;
    ++plan->steps;
}

/* zero the gradients of a step that is left out, since what was accumulated in them is of no use */
static void zero_gradients(const fastrms_plan *plan)
{
    for (int64_t k = 0; k < plan->tensors; ++k)
        if (plan->grad[k])
            zero_part(plan, k, 0, plan->tensor[k].size);
}

static APART int scan_and_update(fastrms_plan *plan)
{
    fastrms_squares squares;
    if (!plan->shards)
        squares = fastrms_scan(plan);
    else if (fastrms_scan_shards(plan, &squares))
        return FASTRMS_NOT_GATHERED;
    if (plan->found.nonfinite) {
        if (plan->zero_grad && plan->on_nonfinite == FASTRMS_SKIP)
            zero_gradients(plan);
        return FASTRMS_NONFINITE;
    }
    update(plan, fastrms_clipped_scale(plan, &squares));
    return FASTRMS_OK;
}

/* does the next step have no learning rate? */
static int lacks_rate(const fastrms_plan *plan)
{
    return plan->rate_rows && (plan->steps < plan->first_rate || plan->steps - plan->first_rate >= plan->rate_rows);
}

static void take_rate(fastrms_plan *plan, int k, double rate)
{
    plan->unchanging &= plan->recipe[k].lr == rate;
    plan->recipe[k].lr = rate;
}

static void take_rates(fastrms_plan *plan, const double *rates)
{
    for (int k = 0; k < plan->recipes; ++k)
        take_rate(plan, k, rates[k]);
}

static void take_rates_of_step(fastrms_plan *plan)
{
    if (plan->rate_rows)
        take_rates(plan, plan->rates + (plan->steps - plan->first_rate) * plan->recipes);
}

static int run(fastrms_plan *plan)
{
    int status = FASTRMS_OK;
    take_rates_of_step(plan);
    fastrms_enter_step();
    fastrms_mode mode = fastrms_set_float_mode();
    if (plan->clip_norm < 0 && !plan->on_nonfinite)
        update(plan, (fastrms_factor){plan->grad_scale, 1});
    else
        status = scan_and_update(plan);
    fastrms_restore_float_mode(mode);
    fastrms_leave_step();
    return status;
}

/* the bytes for coefficients, the sums of segments, the ranges of buffers in memory, and the starts of tensors */
int64_t fastrms_scratch_bytes(int64_t tensors, const fastrms_tensor *tensor)
{
    int64_t segments = 0;
    for (int64_t k = 0; k < tensors; ++k)
        segments += fastrms_segments(tensor[k].size);
    return tensors * (FASTRMS_MAX_COEFFICIENTS * (int64_t)sizeof(double) + MOST_RANGES * (int64_t)sizeof(range))
        + segments * (int64_t)sizeof(fastrms_squares) + (tensors + 1) * (int64_t)sizeof(int64_t);
}

void fastrms_plan_init(fastrms_plan *plan, int64_t tensors, fastrms_tensor *tensor, int32_t recipes, fastrms_recipe *recipe,
                       const void **grad, void *scratch)
{
    *plan = (fastrms_plan){.tensors = tensors, .tensor = tensor, .recipes = recipes, .recipe = recipe, .grad = grad,
                           .made = scratch, .grad_scale = 1, .clip_norm = -1};
    plan->starts = (int64_t *)(plan->made + tensors * FASTRMS_MAX_COEFFICIENTS);
    plan->ranges = (uintptr_t *)(plan->starts + tensors + 1);
    plan->segments = (fastrms_squares *)((range *)plan->ranges + tensors * MOST_RANGES);
    for (int k = 0; k < recipes; ++k)
        if (fastrms_rule_states(recipe[k].rule) > plan->states)
            plan->states = fastrms_rule_states(recipe[k].rule);
    plan->each = 1 + plan->states;
    for (int64_t k = 0; k < tensors; ++k)
        if (tensor[k].storage)
            plan->each = 3 + plan->states;
    set_units(plan);
    int64_t stay = tensors * plan->each;                  /* the buffers that are not gradients */
    for (int64_t k = 0; k < stay + tensors; ++k)
        ((range *)plan->ranges)[k].buffer = (uintptr_t)(k < stay ? k : k - stay);
}

static int release(fastrms_plan *plan, int status)
{
    __atomic_store_n(&plan->busy, 0, __ATOMIC_RELEASE);
    return status;
}

static int acquire_part(fastrms_plan *plan)
{
    int32_t here = fastrms_generation();
    return __atomic_exchange_n(&plan->busy, here, __ATOMIC_ACQUIRE) == here ? FASTRMS_BUSY : FASTRMS_OK;
}

static int acquire(fastrms_plan *plan)
{
    if (acquire_part(plan))
        return FASTRMS_BUSY;
    return plan->streaming ? release(plan, FASTRMS_STREAMING) : FASTRMS_OK;
}

/* a step with another grad_scale and clip_norm than those of the plan */
static int run_with(fastrms_plan *plan, double grad_scale, double clip_norm, fastrms_found *found)
{
    double usual_scale = plan->grad_scale, usual_norm = plan->clip_norm;
    plan->grad_scale = grad_scale;
    plan->clip_norm = clip_norm;
    int status = run(plan);
    plan->grad_scale = usual_scale;
    plan->clip_norm = usual_norm;
    if (found)
        *found = plan->found;
    return status;
}

/* why no step can be made from the gradients that are held under this number, FASTRMS_OK where it can */
static int refused(const fastrms_plan *plan, int held)
{
    if (!plan->held || plan->held != held || plan->streaming)
        return plan->streaming ? FASTRMS_STREAMING : FASTRMS_NOT_HELD;
    return lacks_rate(plan) ? FASTRMS_NO_RATE : FASTRMS_OK;
}

int fastrms_step_held(fastrms_plan *plan, int held)
{
    if (acquire_part(plan))
        return FASTRMS_BUSY;
    int status = refused(plan, held);
    return release(plan, status ? status : run(plan));
}

int fastrms_step(fastrms_plan *plan)
{
    if (acquire_part(plan))
        return FASTRMS_BUSY;
    int status = refused(plan, plan->held);
    return release(plan, status ? status : run(plan));
}

int fastrms_step_with(fastrms_plan *plan, int held, double grad_scale, double clip_norm, fastrms_found *found)
{
    if (acquire_part(plan))
        return FASTRMS_BUSY;
    int status = refused(plan, held);
    return release(plan, status ? status : run_with(plan, grad_scale, clip_norm, found));
}

double fastrms_step_clipped(fastrms_plan *plan, int held, double grad_scale, double clip_norm)
{
    fastrms_found found;
    int status = fastrms_step_with(plan, held, grad_scale, clip_norm, &found);
    return status ? -status : found.grad_norm;
}

int fastrms_set_rate(fastrms_plan *plan, double rate)
{
    int status = acquire(plan);
    if (status)
        return status;
    plan->rate_rows = 0;
    for (int k = 0; k < plan->recipes; ++k)
        take_rate(plan, k, rate);
    return release(plan, FASTRMS_OK);
}

int fastrms_set_rates(fastrms_plan *plan, int64_t first, int64_t rows, const double *rates)
{
    int status = acquire(plan);
    if (status)
        return status;
    plan->rates = rates;
    plan->first_rate = first;
    plan->rate_rows = rows;
    if (!rows)
        take_rates(plan, rates);
    return release(plan, FASTRMS_OK);
}

static int by_start(const void *a, const void *b)
{
    uintptr_t x = ((const range *)a)->start, y = ((const range *)b)->start;
    return (x > y) - (x < y);
}

/* sort ranges, quickly where they are nearly sorted: by insertion, as long as few of them have to move */
static void sort(range *ranges, int64_t count)
{
    int64_t moves = 8 * count;
    for (int64_t k = 1; k < count; ++k) {
        range moved = ranges[k];
        int64_t to = k;
        for (; to > 0 && ranges[to - 1].start > moved.start; --to, --moves)
            ranges[to] = ranges[to - 1];
        ranges[to] = moved;
        if (moves < 0) {
            qsort(ranges, (size_t)count, sizeof *ranges, by_start);
            return;
        }
    }
}

/* sort the ranges of some buffers in memory, and those of others; do any two of them all share a byte? */
static int overlap(range *some, int64_t count, range *others, int64_t more)
{
    uintptr_t end = 0;
    sort(some, count);
    sort(others, more);
    for (range *last = some + count, *last_other = others + more; some < last || others < last_other;) {
        range next = others == last_other || (some < last && some->start <= others->start) ? *some++ : *others++;
        if (next.start < end)
            return 1;
        end = next.end;
    }
    return 0;
}

/* a buffer that is empty or missing is a range without bytes, which overlaps nothing */
static range range_of(const void *start, int64_t bytes, uintptr_t buffer)
{
    uintptr_t first = start && bytes ? (uintptr_t)start : 0;
    return (range){first, first ? first + (uintptr_t)bytes : 0, buffer};
}

/* Buffer number `which` of a tensor that is not its gradient: the parameter, the states, and with a storage the lower bits,
 * or floats, of the parameter, and the copy of it. */
static range range_in(const fastrms_plan *plan, int64_t t, int64_t which, void *param, uintptr_t buffer)
{
    static const fastrms_storage none;
    const fastrms_tensor *tensor = &plan->tensor[t];
    const fastrms_storage *storage = tensor->storage ? tensor->storage : &none;
    int64_t floats = tensor->size * plan->recipe[tensor->recipe].itemsize, s = which - 1;
    int is_split = storage->param == FASTRMS_SPLIT16 || storage->param == FASTRMS_SPLIT8;
    int high = is_split ? FASTRMS_BF16 : storage->param;
    if (which == 0)
        return range_of(param, high ? fastrms_stored_bytes(high, tensor->size) : floats, buffer);
    if (s < plan->states)
        return range_of(tensor->state[s], storage->state[s] ? fastrms_stored_bytes(storage->state[s], tensor->size) : floats, buffer);
    if (s == plan->states)
        return range_of(storage->low, is_split ? fastrms_stored_bytes(storage->param, tensor->size) : floats, buffer);
    return range_of(storage->copy, fastrms_stored_bytes(storage->copy_format, tensor->size), buffer);
}

/* would any two buffers of a step overlap, with these parameters and gradients?  param may be NULL for the parameters of the
 * plan, grad for no gradients; format: those of gradients that are not the ones of the plan, NULL for floats.  The ranges of
 * parameters and states, and those of gradients, are left sorted; new gradients mostly have the order of the last ones. */
static int would_overlap(fastrms_plan *plan, void *const *param, const void *const *grad, const int32_t *format)
{
    int64_t count = plan->tensors * plan->each;
    range *stay = (range *)plan->ranges, *grads = stay + count;
    for (int64_t k = 0; k < count; ++k) {
        int64_t t = (int64_t)stay[k].buffer / plan->each, which = (int64_t)stay[k].buffer % plan->each;
        stay[k] = range_in(plan, t, which, param ? param[t] : plan->tensor[t].param, stay[k].buffer);
    }
    for (int64_t k = 0; k < plan->tensors; ++k) {
        int64_t t = (int64_t)grads[k].buffer;
        int itemsize = grad_itemsize(plan, t, grad == plan->grad ? plan->tensor[t].grad_format : format ? format[t] : 0);
        grads[k] = range_of(grad ? grad[t] : NULL, plan->tensor[t].size * itemsize, grads[k].buffer);
    }
    return overlap(stay, count, grads, plan->tensors);
}

/* does a gradient share a byte with one of the sorted ranges of all parameters and states?  These ranges do not overlap,
 * so only the last of them that starts before the end of the gradient can share one. */
static int is_occupied(const fastrms_plan *plan, const void *grad, int64_t bytes)
{
    const range *ranges = (const range *)plan->ranges;
    uintptr_t start = (uintptr_t)grad, end = start + (uintptr_t)bytes;
    int64_t before = 0, after = plan->tensors * plan->each;
    while (before < after) {
        int64_t middle = (before + after) / 2;
        if (ranges[middle].start < end)
            before = middle + 1;
        else
            after = middle;
    }
    return bytes && before && ranges[before - 1].end > start;
}

static void set_recipes(fastrms_plan *plan, const fastrms_recipe *recipe)
{
    if (!recipe)
        return;
    for (int k = 0; k < plan->recipes; ++k)
        plan->recipe[k] = recipe[k];
    plan->unchanging = 0;
    plan->rate_rows = 0;
}

static void take_over(fastrms_plan *plan, void *const *param, const void *const *grad, const int32_t *format,
                      const fastrms_recipe *recipe, int hold)
{
    set_recipes(plan, recipe);
    for (int64_t k = 0; param && k < plan->tensors; ++k)
        plan->tensor[k].param = param[k];
    if (!grad)
        return;
    for (int64_t k = 0; k < plan->tensors; ++k) {
        plan->grad[k] = grad[k];
        plan->tensor[k].grad_format = format ? format[k] : FASTRMS_FLOAT;
    }
    set_units(plan);
    plan->held = hold;
    plan->unchanging = 0;
}

/* would new parameters and gradients, each of which may be NULL, overlap each other or other buffers of the plan? */
static int new_ones_overlap(fastrms_plan *plan, void *const *param, const void *const *grad, const int32_t *format)
{
    if (grad)
        return would_overlap(plan, param, grad, format);
    return param && would_overlap(plan, param, plan->held ? plan->grad : NULL, NULL);
}

int fastrms_change_as(fastrms_plan *plan, void *const *param, const void *const *grad, const int32_t *format,
                      const fastrms_recipe *recipe, int hold, int run_now, double grad_scale, double clip_norm,
                      fastrms_found *found)
{
    int status = acquire(plan);
    if (status)
        return status;
    if (!grad && run_now && !plan->held)
        return release(plan, FASTRMS_NOT_HELD);
    if (run_now && lacks_rate(plan))
        return release(plan, FASTRMS_NO_RATE);
    if (new_ones_overlap(plan, param, grad, format))
        return release(plan, FASTRMS_OVERLAP);
    take_over(plan, param, grad, format, recipe, hold);
    return release(plan, run_now ? run_with(plan, grad_scale, clip_norm, found) : FASTRMS_OK);
}

int fastrms_change(fastrms_plan *plan, void *const *param, const void *const *grad, const fastrms_recipe *recipe,
                   int hold, int run_now, double grad_scale, double clip_norm, fastrms_found *found)
{
    return fastrms_change_as(plan, param, grad, NULL, recipe, hold, run_now, grad_scale, clip_norm, found);
}

int fastrms_stream_open(fastrms_plan *plan)
{
    int status = acquire(plan);
    if (status)
        return status;
    plan->streaming = 1;
    plan->streamed = 0;
    would_overlap(plan, NULL, NULL, NULL);                /* sorts the ranges for is_occupied */
    return release(plan, FASTRMS_OK);
}

void fastrms_stream_close(fastrms_plan *plan) { plan->streaming = 0; }

/* note where the parameter of a streamed tensor has moved, unless it or the gradient overlaps another buffer */
static int accept_streamed(fastrms_plan *plan, int64_t k, void *param, const void *grad, int32_t format)
{
    fastrms_tensor *tensor = &plan->tensor[k];
    int64_t bytes = tensor->size * grad_itemsize(plan, k, format);
    void *before = tensor->param;
    if (param)
        tensor->param = param;
    int moved = tensor->param != before;
    if (!(moved && would_overlap(plan, NULL, NULL, NULL)) && !is_occupied(plan, grad, bytes))
        return FASTRMS_OK;
    tensor->param = before;
    if (moved)
        would_overlap(plan, NULL, NULL, NULL);
    return FASTRMS_OVERLAP;
}

int fastrms_stream_step(fastrms_plan *plan, int64_t tensor, void *param, const void *grad, int32_t format,
                        const double *rates, double grad_scale)
{
    if (acquire_part(plan))
        return FASTRMS_BUSY;
    if (!plan->streaming)
        return release(plan, FASTRMS_STREAMING);
    int status = accept_streamed(plan, tensor, param, grad, format);
    if (status)
        return release(plan, status);
    if (rates)
        take_rates(plan, rates);
    double made[FASTRMS_MAX_COEFFICIENTS];
    int64_t starts[2];
    int32_t usual = plan->tensor[tensor].grad_format;
    plan->tensor[tensor].grad_format = format;
    fastrms_plan one = {.tensors = 1, .tensor = &plan->tensor[tensor], .recipe = plan->recipe, .grad = &grad, .made = made,
                        .starts = starts, .grad_scale = grad_scale, .clip_norm = -1, .zero_grad = plan->zero_grad};
    set_units(&one);
    run(&one);
    plan->tensor[tensor].grad_format = usual;             /* the gradients that the plan holds are others */
    plan->steps += !plan->streamed;
    plan->streamed = 1;
    plan->unchanging = 0;                                 /* the step count of this tensor has changed */
    return release(plan, FASTRMS_OK);
}

int fastrms_copy(fastrms_plan *plan, int64_t count, void *const *to, const void *const *from, const int64_t *bytes,
                 const fastrms_recipe *recipe, const int64_t *new_steps, int64_t *old_steps)
{
    int status = acquire(plan);
    if (status)
        return status;
    fastrms_enter_step();
    for (int64_t k = 0; k < count; ++k)
        memcpy(to[k], from[k], (size_t)bytes[k]);
    set_recipes(plan, recipe);
    for (int64_t k = 0; k <= plan->tensors; ++k) {
        int64_t *steps = k ? &plan->tensor[k - 1].steps : &plan->steps;
        if (old_steps)
            old_steps[k] = *steps;
        if (new_steps)
            *steps = new_steps[k];
    }
    plan->unchanging = 0;
    fastrms_leave_step();
    return release(plan, FASTRMS_OK);
}

/* one step on raw buffers; step is the number of this update, from 1 */
int fastrms_update_at_rate(const fastrms_recipe *recipe, double lr, int64_t size, int64_t step, double grad_scale,
                           void *param, const void *grad, void *state0, void *state1, void *state2)
{
    const void *const buffer[] = {param, grad, state0, state1, state2};
    range ranges[5];
    if (step < 1 || step > INT64_C(1) << 62)
        return FASTRMS_STEP;
    for (int k = 0; k < 5; ++k) {
        if ((uintptr_t)buffer[k] % (uintptr_t)recipe->itemsize)
            return FASTRMS_MISALIGNED;
        if (!buffer[k] && size && k < 2 + fastrms_rule_states(recipe->rule))
            return FASTRMS_MISSING;
        ranges[k] = range_of(buffer[k], size * recipe->itemsize, 0);
    }
    if (overlap(ranges, 5, ranges + 5, 0))
        return FASTRMS_OVERLAP;
    fastrms_tensor tensor = {.size = size, .steps = step - 1, .param = param, .state = {state0, state1, state2}};
    double made[FASTRMS_MAX_COEFFICIENTS];
    int64_t starts[2];
    fastrms_recipe rated;
    if (recipe->lr != lr) {
        rated = *recipe;
        rated.lr = lr;
        recipe = &rated;
    }
    fastrms_plan plan = {.tensors = 1, .tensor = &tensor, .recipe = (fastrms_recipe *)recipe, .grad = &grad, .made = made,
                         .starts = starts, .grad_scale = grad_scale, .clip_norm = -1};
    if (size)
        run(&plan);
    return FASTRMS_OK;
}

int fastrms_update_one_state(const fastrms_recipe *recipe, double lr, int64_t size, int64_t step, double grad_scale,
                             void *param, const void *grad, void *state)
{
    return fastrms_update_at_rate(recipe, lr, size, step, grad_scale, param, grad, state, NULL, NULL);
}

int fastrms_update(const fastrms_recipe *recipe, int64_t size, int64_t step, double grad_scale,
                   void *param, const void *grad, void *state0, void *state1, void *state2)
{
    return fastrms_update_at_rate(recipe, recipe->lr, size, step, grad_scale, param, grad, state0, state1, state2);
}
