/* Steps over tensors that are stored in formats, and encoders and decoders of all formats, in buffers that are no larger than
 * they must be: for the sanitizers. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "fastrms.h"
#include "testing_decl.h"

enum { SIZE = 3001, TENSORS = 4, STEPS = 3 };

static void *kept[256];                                   /* all memory, so that none of it is lost */

static void *zeros(int64_t bytes)
{
    static int count;
    if (!(kept[count] = calloc((size_t)bytes, 1)))
        exit(2);
    return kept[count++];
}

static void *in_format(int format, int64_t size) { return zeros(fastrms_stored_bytes(format, size)); }

/* a tensor of Adam; each buffer that a storage may lack is missing in one of them */
static fastrms_tensor tensor_in(fastrms_storage *storage)
{
    int high = storage->param == FASTRMS_SPLIT8 || storage->param == FASTRMS_SPLIT16 ? FASTRMS_BF16 : storage->param;
    fastrms_tensor made = {.size = SIZE, .param = in_format(high, SIZE), .storage = storage};
    for (int s = 0; s < 2; ++s)
        made.state[s] = in_format(storage->state[s], SIZE);
    if (high != storage->param)
        storage->low = in_format(storage->param, SIZE);
    if (storage->copy_format)
        storage->copy = in_format(storage->copy_format, SIZE);
    return made;
}

static int steps(void)
{
    fastrms_storage storage[TENSORS] = {
        {.param = FASTRMS_FLOAT, .state = {FASTRMS_Q8, FASTRMS_Q8U}, .stochastic = 1},
        {.param = FASTRMS_SPLIT8, .state = {FASTRMS_BF16, FASTRMS_FP16S}, .copy_format = FASTRMS_FP16, .stochastic = 1},
        {.param = FASTRMS_SPLIT16, .state = {FASTRMS_FLOAT, FASTRMS_BF16}},
        {.param = FASTRMS_BF16, .state = {FASTRMS_FLOAT, FASTRMS_FLOAT}, .copy_format = FASTRMS_BF16},
    };
    fastrms_tensor tensor[TENSORS];
    const void *grad[TENSORS], *held[TENSORS];
    int32_t format[TENSORS] = {FASTRMS_BF16, FASTRMS_FP16, FASTRMS_FLOAT, FASTRMS_BF16};
    for (int k = 0; k < TENSORS; ++k) {
        tensor[k] = tensor_in(&storage[k]);
        grad[k] = in_format(format[k], SIZE);
        memset((void *)grad[k], 0x3c, (size_t)fastrms_stored_bytes(format[k], SIZE));
    }
    storage[3].low = in_format(FASTRMS_FLOAT, SIZE);      /* a master */
    fastrms_recipe recipe;
    fastrms_plan plan;
    if (fastrms_adam_recipe(&recipe, 4, &fastrms_adam_defaults))
        return 1;
    fastrms_plan_init(&plan, TENSORS, tensor, 1, &recipe, held, zeros(fastrms_scratch_bytes(TENSORS, tensor)));
    for (int k = 0; k < STEPS; ++k)
        if (fastrms_change_as(&plan, NULL, grad, format, NULL, 1, 1, 1, k ? 0.5 : -1, NULL))
            return 1;
    return ((float *)tensor[0].param)[SIZE - 1] >= 0;
}

/* every format on every tier; floats come back as they are, and so do zeros */
static int formats(void)
{
    float *x = zeros(SIZE * sizeof *x), *y = zeros(SIZE * sizeof *y);
    int wrong = 0;
    for (int isa = 0; isa < fastrms_isa_count(); ++isa)
        for (int format = FASTRMS_FLOAT; format <= FASTRMS_SPLIT8; ++format) {
            int is_split = format >= FASTRMS_SPLIT16;
            void *stored = in_format(is_split ? FASTRMS_BF16 : format, SIZE), *low = is_split ? in_format(format, SIZE) : NULL;
            fastrms_rounding rounding = {.stochastic = isa & 1, .key = 5, .position = 0xffffff00u};
            if (!fastrms_isa_supported(isa))
                continue;
            for (int k = 0; k < SIZE; ++k)
                x[k] = format == FASTRMS_FLOAT ? (float)k / 3 : 0;
            fastrms_encode(isa, format, SIZE, x, stored, low, rounding);
            fastrms_decode(isa, format, SIZE, stored, low, y);
            wrong |= memcmp(x, y, SIZE * sizeof *x);
            fastrms_encode(isa, format, 0, x, NULL, NULL, rounding);
        }
    return wrong != 0;
}

int main(void)
{
    fastrms_set_num_threads(2);
    fastrms_set_chunks(256, 1);
    int wrong = steps() + 2 * formats();
    printf("%d\n", wrong);
    return wrong;
}
