/* A double of the CUDA driver for machines without one.  Device memory is host memory, a launch calls a hook (which runs
   the kernel's PTX on the CPU), and every call is counted by its name.  Only what cuda.core and fastrms call is here. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int (*hook)(const char *name, unsigned grid, unsigned block, void *stream, void **parameters);
static hook run;
static struct { const char *name; long calls; } counter[256];
static int counters, devices = 1, capability[2] = {9, 0}, capturing;
static void *context = NULL;
static uint64_t next_handle = 0x5000;

static int busy, in_use, freed_in_use;
static void (*write_later)(void *to, const void *from, size_t n), (*finish)(void);
static struct { void *waits, *record; } wait[64], recorded[64];
static int waits, records;

static void count(const char *name)
{
    int k = 0;
    while (k < counters && strcmp(counter[k].name, name)) k++;
    if (k == counters) counter[counters++].name = name;
    counter[k].calls++;
}
void double_hook(hook h) { run = h; }
void double_later(void *w, void *f) { write_later = w; finish = f; } /* who queues writes, and runs all before a wait is over */
static int waited(void) { if (finish) finish(); return in_use = 0; }
void double_capability(int major, int minor) { capability[0] = major; capability[1] = minor; }
void double_capturing(int yes) { capturing = yes; }
void double_devices(int many) { devices = many; }
void double_busy(int yes) { busy = yes; }
int double_freed_in_use(void) { return freed_in_use; }
int double_waits(uint64_t *pairs) /* (stream that waits, stream that it waits for) since the last call */
{
    int many = waits;
    for (int k = 0; k < many; k++) { pairs[2 * k] = (uint64_t)wait[k].waits; pairs[2 * k + 1] = (uint64_t)wait[k].record; }
    return waits = 0, many;
}
void double_reset(void) { for (int k = 0; k < counters; k++) counter[k].calls = 0; }
int double_counts(char *out, int size)
{
    int used = 0;
    for (int k = 0; k < counters; k++)
        if (counter[k].calls) used += snprintf(out + used, size - used, "%s %ld\n", counter[k].name, counter[k].calls);
    return used;
}

#define CALL(name, ...) int name(__VA_ARGS__) { count(__func__);
#define OK return 0; }
#define SET(pointer, value) if (pointer) *(pointer) = (value);
CALL(cuInit, unsigned flags) OK
CALL(cuDriverGetVersion, int *v) *v = 13050; OK
CALL(cuDeviceGetCount, int *n) *n = devices; OK
CALL(cuDeviceGet, int *d, int k) *d = k; OK
CALL(cuDeviceGetName, char *s, int n, int d) snprintf(s, n, "driver double"); OK
CALL(cuDeviceGetUuid, void *u, int d) memset(u, 7, 16); OK
CALL(cuDeviceGetUuid_v2, void *u, int d) memset(u, 7, 16); OK
CALL(cuDeviceTotalMem_v2, size_t *n, int d) *n = 1ull << 34; OK
CALL(cuDeviceGetAttribute, int *v, int attribute, int d)
    switch (attribute) {
    case 75: *v = capability[0]; break;
    case 76: *v = capability[1]; break;
    case 1: case 2: case 3: *v = 1024; break;        /* threads per block */
    case 5: *v = 2147483647; break;                  /* blocks */
    case 10: *v = 32; break;                         /* warp */
    case 16: *v = 132; break;                        /* multiprocessors */
    case 41: case 115: *v = 1; break;                /* unified addresses, memory pools */
    default: *v = 0;
    } OK
CALL(cuDevicePrimaryCtxRetain, void **c, int d) *c = (void *)(uintptr_t)(0x100 + d); OK
CALL(cuDevicePrimaryCtxRelease_v2, int d) OK
CALL(cuDevicePrimaryCtxGetState, int d, unsigned *flags, int *active) *flags = 0; *active = 1; OK
CALL(cuCtxGetCurrent, void **c) *c = context; OK
CALL(cuCtxSetCurrent, void *c) context = c; OK
CALL(cuCtxPushCurrent_v2, void *c) context = c; OK
CALL(cuCtxPopCurrent_v2, void **c) *c = context; context = NULL; OK
CALL(cuCtxGetDevice, int *d) *d = context ? (int)(uintptr_t)context - 0x100 : 0; OK
CALL(cuCtxGetDevice_v2, int *d, void *c) *d = (int)(uintptr_t)c - 0x100; OK
CALL(cuCtxSynchronize, void) return waited(); }
CALL(cuCtxGetStreamPriorityRange, int *least, int *greatest) *least = *greatest = 0; OK
CALL(cuMemAllocFromPoolAsync, uint64_t *p, size_t n, void *pool, void *s) return posix_memalign((void **)p, 512, n ? n : 1); }
CALL(cuMemAllocAsync, uint64_t *p, size_t n, void *s) return posix_memalign((void **)p, 512, n ? n : 1); }
CALL(cuMemAlloc_v2, uint64_t *p, size_t n) return posix_memalign((void **)p, 512, n ? n : 1); }
CALL(cuMemFreeAsync, uint64_t p, void *s) freed_in_use += in_use; free((void *)p); OK
CALL(cuMemFree_v2, uint64_t p) free((void *)p); OK
CALL(cuMemAllocHost_v2, void **p, size_t n) return posix_memalign(p, 512, n ? n : 1); }
CALL(cuMemFreeHost, void *p) freed_in_use += in_use; free(p); OK
CALL(cuMemcpy, uint64_t to, uint64_t from, size_t n) if (finish) finish(); memmove((void *)to, (void *)from, n); OK
CALL(cuMemGetInfo_v2, size_t *available, size_t *all) *available = *all = 1ull << 30; OK
CALL(cuMemcpyDtoDAsync_v2, uint64_t to, uint64_t from, size_t n, void *s) memmove((void *)to, (void *)from, n); OK
CALL(cuMemcpyDtoHAsync_v2, void *to, uint64_t from, size_t n, void *s) if (finish) finish(); memcpy(to, (void *)from, n); OK
CALL(cuMemcpyHtoDAsync_v2, uint64_t to, const void *from, size_t n, void *s)
    if (write_later) write_later((void *)to, from, n); else memcpy((void *)to, from, n); OK
CALL(cuMemsetD32_v2, uint64_t to, unsigned value, size_t n) for (size_t k = 0; k < n; k++) ((unsigned *)to)[k] = value; OK
CALL(cuMemsetD16_v2, uint64_t to, unsigned short value, size_t n) for (size_t k = 0; k < n; k++) ((unsigned short *)to)[k] = value; OK
CALL(cuMemsetD8_v2, uint64_t to, unsigned char value, size_t n) memset((void *)to, value, n); OK
CALL(cuEventQuery, void *e) return busy ? 600 : 0; }
CALL(cuMemsetD8Async, uint64_t to, unsigned char value, size_t n, void *s) memset((void *)to, value, n); OK
CALL(cuMemPoolGetAttribute, void *pool, int attribute, void *v) *(uint64_t *)v = 0; OK
CALL(cuMemPoolSetAttribute, void *pool, int attribute, void *v) OK
CALL(cuDeviceGetDefaultMemPool, void **pool, int d) *pool = (void *)0x11; OK
CALL(cuDeviceGetMemPool, void **pool, int d) *pool = (void *)0x11; OK
CALL(cuPointerGetAttributes, unsigned n, int *what, void **out, uint64_t p)
    for (unsigned k = 0; k < n; k++)
        switch (what[k]) {
        case 2: *(unsigned *)out[k] = 2; break;      /* device memory */
        case 3: case 4: *(uint64_t *)out[k] = p; break;
        case 8: case 9: *(int *)out[k] = 0; break;   /* managed, which device */
        default: *(int *)out[k] = 0;
        } OK
CALL(cuPointerGetAttribute, void *out, int what, uint64_t p) void *to[] = {out}; return cuPointerGetAttributes(1, &what, to, p); }
CALL(cuStreamCreateWithPriority, void **s, unsigned flags, int priority) *s = (void *)(next_handle += 16); OK
CALL(cuStreamDestroy_v2, void *s) OK
CALL(cuStreamSynchronize, void *s) if (finish) finish(); OK
CALL(cuStreamWaitEvent, void *s, void *e, unsigned flags)
    for (int k = 0; k < 64; k++)
        if (recorded[k].waits == e && waits < 64) { wait[waits].waits = s; wait[waits++].record = recorded[k].record; break; } OK
CALL(cuStreamGetCtx, void *s, void **c) *c = (void *)0x100; OK
CALL(cuStreamGetCtx_v2, void *s, void **c, void **green) *c = (void *)0x100; SET(green, NULL) OK
CALL(cuStreamGetDevice, void *s, int *d) *d = 0; OK
CALL(cuStreamGetFlags, void *s, unsigned *flags) *flags = 1; OK
CALL(cuStreamGetPriority, void *s, int *priority) *priority = 0; OK
CALL(cuStreamIsCapturing, void *s, int *status) *status = capturing; OK
CALL(cuEventCreate, void **e, unsigned flags) *e = (void *)(next_handle += 16); OK
CALL(cuEventRecord, void *e, void *s) recorded[records % 64].waits = e; recorded[records++ % 64].record = s; OK
CALL(cuEventElapsedTime_v2, float *milliseconds, void *from, void *to) *milliseconds = 1; OK
CALL(cuEventElapsedTime, float *milliseconds, void *from, void *to) *milliseconds = 1; OK
CALL(cuEventDestroy_v2, void *e) OK
CALL(cuLibraryLoadData, void **l, const void *code, void *a, void *b, unsigned n, void *d, void *e, unsigned m) *l = malloc(1); OK
CALL(cuLibraryUnload, void *l) OK
CALL(cuLibraryGetKernel, void **kernel, void *l, const char *name) *kernel = strdup(name); OK
CALL(cuKernelGetAttribute, int *v, int what, void *kernel, int d) *v = what ? 0 : 1024; OK
CALL(cuGetErrorName, int e, const char **s) *s = "CUDA_ERROR_ILLEGAL_ADDRESS"; OK
CALL(cuGetErrorString, int e, const char **s) *s = "an error of the driver double"; OK
struct config { unsigned grid[3], block[3], shared; void *stream, *attributes; unsigned count; };
CALL(cuLaunchKernelEx, const struct config *c, void *kernel, void **parameters, void **extra)
    in_use = 1;
    return run ? run(kernel, c->grid[0], c->block[0], c->stream, parameters) : 0; }

/* Entry points are asked for by name, without the _v2 of their newest form. */
int cuGetProcAddress_v2(const char *name, void **out, int version, uint64_t flags, int *found)
{
    static const char *const suffix[] = {"_v2", ""};
    char full[128];
    *out = !strcmp(name, "cuGetProcAddress") ? (void *)cuGetProcAddress_v2 : NULL;
    void *self = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_NOW);
    for (int k = 0; k < 2 && !*out; k++) {
        snprintf(full, sizeof full, "%s%s", name, suffix[k]);
        *out = dlsym(self, full);
    }
    if (found) *found = *out ? 0 : 1;
    return *out ? 0 : 500;
}
