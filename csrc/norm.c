/* The norm of all gradients and the clipping by it.  The sum of squares is made in double and in one order of additions:
 * eight lanes within a block of 4096, blocks in sequence within a segment of 2^18, segments in sequence, whichever thread
 * computed them.  Each block of doubles is scaled by a power of two of its own, so that no square overflows; the square of
 * a float cannot overflow a double.  Elements that are not finite are counted in the same scan, so that memory is read once
 * for both.  Where tensors are spread over several ranks, each rank sums the segments and blocks that it holds whole, and
 * all ranks add up the sums of all ranks in the same order.
 * fastrms/backends/norm.py computes the same bits by functions of the same names. */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>
#include "internal.h"

enum { SEGMENT = 1 << 18, BLOCK = 4096, LANES = 8 };      /* elements */

static const fastrms_squares ZERO = {0, -1000, 0};

#define INLINE static inline __attribute__((always_inline))

/* vectors of four; they are written out, since no compiler makes vectors of the eight lanes by itself */
typedef float four_floats __attribute__((vector_size(16)));
typedef double four __attribute__((vector_size(32)));

INLINE void add_four(four *sums, const float *f32, const double *f64, double scale)
{
    four_floats narrow;
    four x;
    if (f32) {
        memcpy(&narrow, f32, sizeof narrow);
        x = __builtin_convertvector(narrow, four);
    } else {
        memcpy(&x, f64, sizeof x);
    }
    x *= scale;
    *sums += x * x;
}

INLINE double block_sum(int64_t size, const float *f32, const double *f64, double scale)
{
    four low = {0}, high = {0};
    int64_t whole = size - size % LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        FASTRMS_PREFETCH(f32 ? (const void *)(f32 + i) : f64 + i, 0)
        add_four(&low, f32 ? f32 + i : NULL, f64 ? f64 + i : NULL, scale);
        add_four(&high, f32 ? f32 + i + 4 : NULL, f64 ? f64 + i + 4 : NULL, scale);
    }
    double lane[LANES];
    memcpy(lane, &low, sizeof low);
    memcpy(lane + 4, &high, sizeof high);
    for (int64_t i = whole; i < size; ++i) {
        double x = (f32 ? (double)f32[i] : f64[i]) * scale;
        lane[i - whole] += x * x;
    }
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

/* the exponent of the power of two just above the largest magnitude, at least -1000; 0 where that magnitude is 0 or
 * infinite.  NaNs are passed over. */
INLINE int block_exponent(int64_t size, const double *f64)
{
    double lane[LANES] = {0}, most = 0;
    int64_t whole = size - size % LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int j = 0; j < LANES; ++j) {
            double x = fabs(f64[i + j]);
            lane[j] = x > lane[j] ? x : lane[j];
        }
    for (int64_t i = whole; i < size; ++i)
        most = fabs(f64[i]) > most ? fabs(f64[i]) : most;
    for (int j = 0; j < LANES; ++j)
        most = lane[j] > most ? lane[j] : most;
    int exponent = 0;
    if (most > 0 && most <= DBL_MAX)
        frexp(most, &exponent);
    return exponent < -1000 ? -1000 : exponent;
}

INLINE fastrms_squares block_squares(int64_t size, int stored, const void *grad)
{
    if (stored == 4)
        return (fastrms_squares){block_sum(size, grad, NULL, 1), 0, 0};
    int exponent = block_exponent(size, grad);
    return (fastrms_squares){block_sum(size, NULL, grad, ldexp(1, -exponent)), exponent, 0};
}

/* how many elements are NaN or infinite or have a square that overflows, in the compute dtype, in which the rule scales and
 * squares, too */
INLINE int64_t block_nonfinite(int64_t size, int stored, const void *grad, double grad_scale)
{
    const float *f32 = grad, scale = (float)grad_scale;
    const double *f64 = grad;
    int32_t few = 0;
    int64_t count = 0;
    for (int64_t i = 0; stored == 4 && i < size; ++i)
        few += !(f32[i] * scale * (f32[i] * scale) <= FLT_MAX);
    for (int64_t i = 0; stored == 8 && i < size; ++i)
        count += !(f64[i] * grad_scale * (f64[i] * grad_scale) <= DBL_MAX);
    return few + count;
}

INLINE fastrms_squares block_scan(int64_t size, int stored, const void *grad, fastrms_scan_options options)
{
    fastrms_squares found = {0, 0, 0};
    if (options.squares)
        found = block_squares(size, stored, grad);
    if (options.nonfinite)
        found.nonfinite = block_nonfinite(size, stored, grad, options.grad_scale);
    return found;
}

#define OF_TIER(isa, target, supported, roots, with)                                                                           \
    target fastrms_squares fastrms_scan_##isa(int64_t size, int stored, const void *grad, fastrms_scan_options options) \
    {                                                                                                                   \
        return block_scan(size, stored, grad, options);                                                                 \
    }
TIERS(OF_TIER, )

/* a gradient: its format, and the bytes of an element in the compute dtype */
typedef struct {
    const void *at;
    int format, stored;
} gradient;

static gradient gradient_of(const fastrms_plan *plan, int64_t k)
{
    const fastrms_tensor *tensor = &plan->tensor[k];
    return (gradient){plan->grad[k], tensor->grad_format, plan->recipe[tensor->recipe].itemsize};
}

static void add(fastrms_squares *total, fastrms_squares part)
{
    total->nonfinite += part.nonfinite;
    if (part.sum == 0)                                    /* then its exponent means nothing */
        return;
    int64_t most = part.exponent > total->exponent ? part.exponent : total->exponent;
    total->sum = ldexp(total->sum, (int)(2 * (total->exponent - most))) + ldexp(part.sum, (int)(2 * (part.exponent - most)));
    total->exponent = most;
}

/* `size` elements of a gradient in its compute dtype: in the gradient itself, or decoded into `floats` */
static const void *decoded(gradient from, int64_t begin, int64_t size, float *floats)
{
    if (from.format == FASTRMS_FLOAT)
        return (const char *)from.at + begin * from.stored;
    fastrms_current_tier()->decode(from.format, size, fastrms_part(from.format, size, (void *)from.at, NULL, begin), floats);
    return floats;
}

static fastrms_squares segment_scan(gradient from, int64_t begin, int64_t size, fastrms_scan_options options)
{
    fastrms_scan_function *scan = fastrms_current_tier()->scan;
    fastrms_squares total = ZERO;
    float floats[BLOCK];
    for (int64_t start = 0; start < size; start += BLOCK) {
        int64_t length = size - start < BLOCK ? size - start : BLOCK;
        add(&total, scan(length, from.stored, decoded(from, begin + start, length, floats), options));
    }
    return total;
}

int64_t fastrms_segments(int64_t size) { return (size + SEGMENT - 1) / SEGMENT; }

static fastrms_scan_options options_of(const fastrms_plan *plan, int64_t k)
{
    double sign = plan->recipe[plan->tensor[k].recipe].value[0];
    return (fastrms_scan_options){plan->clip_norm >= 0, plan->on_nonfinite, sign * plan->grad_scale};
}

/* scan segments [begin, end), counted through all gradients, and write what each holds to plan->segments */
static void scan_range(void *context, int64_t begin, int64_t end)
{
    const fastrms_plan *plan = context;
    fastrms_mode mode = fastrms_set_float_mode();
    int64_t first = 0;
    for (int64_t k = 0; k < plan->tensors; ++k) {
        fastrms_scan_options options = options_of(plan, k);
        int64_t size = plan->grad[k] ? plan->tensor[k].size : 0, count = fastrms_segments(size);
        for (int64_t s = begin > first ? begin - first : 0; s < count && first + s < end; ++s) {
            int64_t start = s * SEGMENT, length = size - start < SEGMENT ? size - start : SEGMENT;
            plan->segments[first + s] = segment_scan(gradient_of(plan, k), start, length, options);
        }
        first += count;
    }
    fastrms_restore_float_mode(mode);
}

static void fill_found(fastrms_plan *plan, fastrms_squares total)
{
    plan->found.nonfinite = total.nonfinite;
    plan->found.grad_norm = ldexp(sqrt(total.sum) * plan->grad_scale, (int)total.exponent);
}

/* add up what scan_range wrote for the segments, and fill plan->found */
static fastrms_squares sum_of_segments(fastrms_plan *plan)
{
    fastrms_squares total = ZERO;
    int64_t s = 0;
    plan->found.tensor = -1;
    for (int64_t k = 0; k < plan->tensors; ++k) {
        int64_t end = s + (plan->grad[k] ? fastrms_segments(plan->tensor[k].size) : 0);
        for (; s < end; ++s)
            add(&total, plan->segments[s]);
        if (total.nonfinite && plan->found.tensor < 0)
            plan->found.tensor = k;
    }
    fill_found(plan, total);
    return total;
}

/* find out, in one pass over the gradients, everything that must be known of them before the first write */
fastrms_squares fastrms_scan(fastrms_plan *plan)
{
    int64_t segments = 0, elements = 0;
    for (int64_t k = 0; k < plan->tensors; ++k)
        if (plan->grad[k]) {
            segments += fastrms_segments(plan->tensor[k].size);
            elements += plan->tensor[k].size;
        }
    fastrms_parallel(elements, scan_range, plan, segments, 1);
    return sum_of_segments(plan);
}

/* write to the message what this rank knows of its pieces [begin, end) */
static void scan_pieces(void *context, int64_t begin, int64_t end)
{
    const fastrms_plan *plan = context;
    char *message = plan->shards->message;
    fastrms_mode mode = fastrms_set_float_mode();
    for (const fastrms_piece *piece = plan->shards->own + begin; piece < plan->shards->own + end; ++piece) {
        fastrms_squares found = ZERO;
        fastrms_scan_options options = options_of(plan, piece->tensor);
        gradient grad = gradient_of(plan, piece->tensor);
        size_t bytes = (size_t)(piece->length * piece->stored);
        if (piece->values) {                              /* whoever holds all parts of the block sums its squares */
            options.squares = 0;
            float floats[BLOCK];
            if (grad.at)
                memcpy(message + piece->values, decoded(grad, piece->begin, piece->length, floats), bytes);
            else
                memset(message + piece->values, 0, bytes);
        }
        if (grad.at)
            found = segment_scan(grad, piece->begin, piece->length, options);
        memcpy(message + piece->squares, &found, sizeof found);
    }
    fastrms_restore_float_mode(mode);
}

/* The squares of a block whose parts are gathered one after the other: all of them with its last part, none before.  buffer
 * holds the `filled` bytes that are there. */
static fastrms_squares part_squares(const fastrms_plan *plan, const fastrms_piece *piece, double *buffer, int64_t *filled)
{
    memcpy((char *)buffer + *filled, plan->shards->gathered + piece->values, (size_t)(piece->length * piece->stored));
    *filled += piece->length * piece->stored;
    if (!piece->ends_block)
        return ZERO;
    int64_t size = *filled / piece->stored;
    *filled = 0;
    gradient whole = {buffer, FASTRMS_FLOAT, piece->stored};
    return segment_scan(whole, 0, size, (fastrms_scan_options){plan->clip_norm >= 0, 0, 0});
}

/* add up the gathered pieces of all ranks in the order in which one process adds up whole tensors, and fill plan->found */
static fastrms_squares fold(fastrms_plan *plan)
{
    const fastrms_shards *shards = plan->shards;
    fastrms_squares total = ZERO, segment = ZERO, squares;
    double buffer[BLOCK];
    int64_t filled = 0;
    plan->found.tensor = -1;
    for (const fastrms_piece *piece = shards->piece; piece < shards->piece + shards->pieces; ++piece) {
        memcpy(&squares, shards->gathered + piece->squares, sizeof squares);
        if (squares.nonfinite && !total.nonfinite && !segment.nonfinite)
            plan->found.tensor = piece->tensor;
        add(&segment, squares);
        if (piece->values)
            add(&segment, part_squares(plan, piece, buffer, &filled));
        if (piece->ends_segment) {
            add(&total, segment);
            segment = ZERO;
        }
    }
    fill_found(plan, total);
    return total;
}

/* fastrms_scan over the tensors of all ranks.  While the messages are gathered, the process may fork. */
int fastrms_scan_shards(fastrms_plan *plan, fastrms_squares *total)
{
    fastrms_shards *shards = plan->shards;
    double asked[] = {plan->grad_scale, plan->clip_norm};
    int64_t elements = 0;
    for (int64_t p = 0; p < shards->own_pieces; ++p)
        elements += shards->own[p].length;
    memcpy(shards->message, asked, sizeof asked);
    fastrms_parallel(elements, scan_pieces, plan, shards->own_pieces, 1);
    fastrms_leave_step();
    int failed = shards->gather(shards);
    fastrms_enter_step();
    if (!failed)
        *total = fold(plan);
    return failed ? FASTRMS_NOT_GATHERED : FASTRMS_OK;
}

/* value * 2^exponent as a factor.  Where that is too small for a float, half of the exponent goes to
 * each part, so that a float can hold both. */
static fastrms_factor factor(double value, int exponent)
{
    double whole = ldexp(value, exponent);
    if (value == 0 || !(fabs(whole) < FLT_MIN))           /* or it is NaN */
        return (fastrms_factor){whole, 1};
    int more;
    value = frexp(value, &more);
    exponent += more;
    return (fastrms_factor){ldexp(value, exponent / 2), ldexp(1, exponent - exponent / 2)};
}

/* grad_scale * (clip_norm / norm) where the norm is larger than clip_norm.  Powers of two are kept apart, since the norm of
 * finite gradients may be too large for a double.  A NaN norm makes the factor NaN, as every framework has it. */
fastrms_factor fastrms_clipped_scale(const fastrms_plan *plan, const fastrms_squares *squares)
{
    if (plan->clip_norm < 0 || isinf(plan->clip_norm) || plan->found.grad_norm <= plan->clip_norm)
        return (fastrms_factor){plan->grad_scale, 1};
    int exponent;
    double clip_norm = frexp(plan->clip_norm, &exponent), norm = sqrt(squares->sum) * plan->grad_scale;
    return factor(plan->grad_scale * (clip_norm / norm), exponent - (int)squares->exponent);
}
