/* Where the tensors of torch lie, read from the Python objects through the C functions that torch offers to compiled code
 * (aoti_torch_get_..., its stable C interface). */
#include "internal.h"

typedef int32_t (*get_number)(void *tensor, int32_t *made);
typedef int32_t (*get_count)(void *tensor, int64_t *made);
typedef int32_t (*get_counts)(void *tensor, const int64_t **made);
typedef int32_t (*get_address)(void *tensor, void **made);

static int is_number(void *read, void *tensor, int32_t wanted)
{
    int32_t seen;
    return !((get_number)read)(tensor, &seen) && seen == wanted;
}

/* does a tensor have these lengths, and these strides wherever a stride decides where an element lies? */
static int has_layout(const fastrms_torch *torch, void *tensor, const fastrms_layout *wanted)
{
    int64_t axes;
    const int64_t *shape, *strides;
    if (((get_count)torch->get_dim)(tensor, &axes) || axes != wanted->axes)
        return 0;
    if (((get_counts)torch->get_sizes)(tensor, &shape) || ((get_counts)torch->get_strides)(tensor, &strides))
        return 0;
    for (int64_t k = 0; k < axes; ++k) {
        if (shape[k] != wanted->shape[k])
            return 0;
        if (shape[k] > 1 && wanted->size && strides[k] != wanted->strides[k])
            return 0;
    }
    return 1;
}

/* does the storage of a tensor still have all bytes of it?  A storage can be resized under its tensors. */
static int is_whole(const fastrms_torch *torch, void *tensor, const fastrms_layout *wanted)
{
    int64_t offset, bytes;
    if (((get_count)torch->get_storage_offset)(tensor, &offset) || ((get_count)torch->get_storage_size)(tensor, &bytes))
        return 0;
    return (offset + wanted->size) * wanted->itemsize <= bytes;
}

static int is_like(const fastrms_torch *torch, void *tensor, const fastrms_layout *wanted, void **address)
{
    if (!*(void **)tensor || !is_number(torch->get_device_type, tensor, wanted->device_type)
        || !is_number(torch->get_device_index, tensor, wanted->device_index)
        || !is_number(torch->get_layout, tensor, torch->strided) || !is_number(torch->get_dtype, tensor, wanted->dtype))
        return 0;
    if (!has_layout(torch, tensor, wanted) || ((get_address)torch->get_data_ptr)(tensor, address))
        return 0;
    if (!wanted->size)
        return 1;
    return *address && (uintptr_t)*address % (uintptr_t)wanted->itemsize == 0 && is_whole(torch, tensor, wanted)
        && (!wanted->address || *address == wanted->address);
}

int64_t fastrms_read_tensors(const fastrms_torch *torch, int64_t count, void *const *object, const fastrms_layout *wanted,
                             void **address, int64_t *absent)
{
    *absent = 0;
    for (int64_t k = 0; k < count; ++k) {
        char *at = object[k];
        address[k] = NULL;
        if (at == torch->none) {
            ++*absent;
            continue;
        }
        const void *kind = *(const void **)(at + torch->kind_at);
        if ((kind != torch->kinds[0] && kind != torch->kinds[1]) || !is_like(torch, at + torch->tensor_at, &wanted[k],
                                                                             &address[k]))
            return k;
        if (!wanted[k].size)
            address[k] = address;                         /* an empty tensor may lie at 0, which means "none" */
    }
    return count;
}
