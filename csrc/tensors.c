/* Where the tensors of torch lie, read from the Python objects through the C functions that torch offers to compiled code
 * (aoti_torch_get_..., its stable C interface). */
#include <string.h>
#include "internal.h"

enum { TENSOR_LINES = 4 };                                /* of cache, about, for what torch keeps of a tensor */

static int is_number(int32_t (*read)(void *, int32_t *), void *tensor, int32_t wanted)
{
    int32_t seen;
    return !read(tensor, &seen) && seen == wanted;
}

static int has_size(const fastrms_torch *torch, void *tensor, int64_t wanted)
{
    int64_t seen;
    return !torch->get_numel(tensor, &seen) && seen == wanted;
}

/* does a tensor have these lengths, and these strides wherever a stride decides where an element lies? */
static int has_layout(const fastrms_torch *torch, void *tensor, const fastrms_layout *wanted)
{
    int64_t axes;
    const int64_t *shape, *strides;
    if (torch->get_dim(tensor, &axes) || axes != wanted->axes)
        return 0;
    if (torch->get_sizes(tensor, &shape) || torch->get_strides(tensor, &strides))
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
static int is_whole(const fastrms_torch *torch, void *tensor, int64_t size, int itemsize)
{
    int64_t offset, bytes;
    if (torch->get_storage_offset(tensor, &offset) || torch->get_storage_size(tensor, &bytes))
        return 0;
    return (offset + size) * itemsize <= bytes;
}

/* the format of a tensor by its dtype; -1 where it is another one than is wanted */
static int format_of(const fastrms_torch *torch, void *tensor, const fastrms_layout *wanted, int may_be_half)
{
    int32_t dtype;
    if (torch->get_dtype(tensor, &dtype))
        return -1;
    if (dtype == wanted->dtype)
        return FASTRMS_FLOAT;
    if (!may_be_half || wanted->itemsize != sizeof(float))
        return -1;
    return dtype == torch->bf16 ? FASTRMS_BF16 : dtype == torch->fp16 ? FASTRMS_FP16 : -1;
}

static int is_negative(const fastrms_torch *torch, void *tensor)
{
    return (*(const uint64_t *)(*(const char **)tensor + torch->flags_at) & torch->negative) != 0;
}

static int is_like(const fastrms_torch *torch, void *tensor, const fastrms_layout *wanted, void **address, int32_t *format)
{
    if (wanted->axes < 0)                                 /* only its address and its size count */
        return *(void **)tensor && !torch->get_data_ptr(tensor, address) && *address == wanted->address
            && has_size(torch, tensor, wanted->size);
    if (!*(void **)tensor || is_negative(torch, tensor) || !is_number(torch->get_device_type, tensor, wanted->device_type)
        || !is_number(torch->get_device_index, tensor, wanted->device_index)
        || !is_number(torch->get_layout, tensor, torch->strided))
        return 0;
    int found = format_of(torch, tensor, wanted, format != NULL);
    if (found < 0 || !has_layout(torch, tensor, wanted) || torch->get_data_ptr(tensor, address))
        return 0;
    if (format)
        *format = found;
    if (!wanted->size)
        return 1;
    int itemsize = found ? fastrms_format_itemsize(found) : wanted->itemsize;
    return *address && (uintptr_t)*address % (uintptr_t)itemsize == 0 && is_whole(torch, tensor, wanted->size, itemsize)
        && (!wanted->address || *address == wanted->address);
}

static int is_read(const fastrms_torch *torch, const char *object)
{
    const void *kind = *(const void *const *)(object + torch->kind_at);
    return kind == torch->kinds[0] || kind == torch->kinds[1];
}

/* Load what describes the tensors, all at once: one after the other, each would be waited for. */
static void prefetch(const fastrms_torch *torch, char *const *object, int64_t count)
{
    for (int64_t k = 0; k < count; ++k) {
        const char *tensor = is_read(torch, object[k]) ? *(char *const *)(object[k] + torch->tensor_at) : NULL;
        for (int line = 0; tensor && line < TENSOR_LINES; ++line)
            __builtin_prefetch(tensor + line * 64);
    }
}

static char *const *items(const fastrms_torch *torch, uintptr_t list)
{
    return *(char *const **)(list + torch->items_at);
}

int fastrms_same_items(const fastrms_torch *torch, uintptr_t list, uintptr_t other, int64_t count)
{
    return !memcmp(items(torch, list), items(torch, other), (size_t)count * sizeof(char *));
}

int64_t fastrms_read_tensors(const fastrms_torch *torch, uintptr_t list, int64_t first, int64_t count,
                             const fastrms_layout *wanted, void **address, int32_t *format)
{
    char *const *object = items(torch, list) + first;
    int64_t absent = 0;
    prefetch(torch, object, count);
    for (int64_t k = 0; k < count; ++k) {
        int32_t *at = format ? format + k : NULL;
        address[k] = NULL;
        if (object[k] == torch->none) {
            ++absent;
            continue;
        }
        if (!is_read(torch, object[k]) || !is_like(torch, object[k] + torch->tensor_at, &wanted[k], &address[k], at))
            return -1;
        if (!wanted[k].size)
            address[k] = address;                         /* an empty tensor may lie at 0, which means "none" */
    }
    return absent;
}
