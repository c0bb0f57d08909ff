/* Where the tensors of another library lie, read through the C functions that DLPack makes such libraries offer (torch has
 * them from version 2.10 on). */
#include "internal.h"

/* DLTensor of DLPack 1: a tensor as its library describes it */
typedef struct {
    void *data;
    int32_t device_type, device_id, axes;
    uint8_t code, bits;
    uint16_t lanes;
    const int64_t *shape, *strides;
    uint64_t byte_offset;
} described;

typedef int (*describe)(void *object, described *made);

/* does a tensor have these lengths, and these strides wherever a stride decides where an element lies? */
static int has_layout(const described *seen, const fastrms_layout *wanted)
{
    if (seen->axes != wanted->axes)
        return 0;
    for (int32_t k = 0; k < wanted->axes; ++k) {
        if (seen->shape[k] != wanted->shape[k])
            return 0;
        if (seen->shape[k] > 1 && wanted->size && seen->strides[k] != wanted->strides[k])
            return 0;
    }
    return 1;
}

static int is_like(const described *seen, const fastrms_layout *wanted)
{
    return seen->device_type == wanted->device_type && seen->device_id == wanted->device_id && seen->code == wanted->code
        && seen->bits == 8 * wanted->itemsize && seen->lanes == 1 && seen->byte_offset == 0
        && (uintptr_t)seen->data % (uintptr_t)wanted->itemsize == 0 && (seen->data || !wanted->size)
        && (!wanted->address || seen->data == wanted->address) && has_layout(seen, wanted);
}

int64_t fastrms_read_tensors(void *read, int64_t count, void *const *object, const void *none, const fastrms_layout *wanted,
                             void **address)
{
    for (int64_t k = 0; k < count; ++k) {
        described seen;
        address[k] = NULL;
        if (object[k] == none)
            continue;
        if (((describe)read)(object[k], &seen) || !is_like(&seen, &wanted[k]))
            return k;
        address[k] = wanted[k].size ? seen.data : address;   /* an empty tensor may lie at 0, which means "none" */
    }
    return count;
}
