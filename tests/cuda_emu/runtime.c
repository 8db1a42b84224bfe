/* The rest of the runtime: devices, errors, copies and launches. There are TM_EMU_DEVICES devices (default 2), all the same
 * and all of this processor; what they share is told apart nowhere. */
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/check.h"
#include "tests/cuda_emu/emu.h"

#define FUNCTIONS_MAX 512

static const struct {
    cudaError_t e;
    const char *name, *text;
} g_errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInvalidDevicePointer, "cudaErrorInvalidDevicePointer", "invalid device pointer"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorPeerAccessAlreadyEnabled, "cudaErrorPeerAccessAlreadyEnabled",
     "peer access is already enabled"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a capture error"},
};

static cudaError_t g_sticky;
static __thread cudaError_t g_last;
static __thread int g_device;

const char *cudaGetErrorString(cudaError_t e)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(g_errors); i++)
        if (g_errors[i].e == e)
            return g_errors[i].text;
    return "unknown error";
}

const char *cudaGetErrorName(cudaError_t e)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(g_errors); i++)
        if (g_errors[i].e == e)
            return g_errors[i].name;
    return "cudaErrorUnknown";
}

cudaError_t emu_sticky(void)
{
    return __atomic_load_n(&g_sticky, __ATOMIC_RELAXED);
}

void emu_set_sticky(cudaError_t e)
{
    __atomic_store_n(&g_sticky, e, __ATOMIC_RELAXED);
}

cudaError_t emu_return(cudaError_t e)
{
    if (e != cudaSuccess && e != cudaErrorNotReady)
        g_last = e;
    return e;
}

cudaError_t cudaPeekAtLastError(void)
{
    return emu_sticky() ? emu_sticky() : g_last;
}

cudaError_t cudaGetLastError(void)
{
    const cudaError_t e = cudaPeekAtLastError();
    g_last = cudaSuccess;
    return e;
}

/* ---- devices ---- */

cudaError_t cudaGetDeviceCount(int *count)
{
    const char *s = getenv("TM_EMU_DEVICES");
    *count = s ? (int)strtol(s, NULL, 10) : 2;
    return *count > 0 ? cudaSuccess : emu_return(cudaErrorNoDevice);
}

static cudaError_t check_device(int device)
{
    int count;
    const cudaError_t e = cudaGetDeviceCount(&count);
    return e ? e : emu_return(device >= 0 && device < count ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaSetDevice(int device)
{
    const cudaError_t e = check_device(device);
    if (e == cudaSuccess)
        g_device = device;
    return e;
}

cudaError_t cudaGetDevice(int *device)
{
    *device = g_device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *prop, int device)
{
    const cudaError_t e = check_device(device);
    size_t left, total;
    cudaMemGetInfo(&left, &total);
    if (e == cudaSuccess)
        *prop = (struct cudaDeviceProp){.name = "emulated on the CPU",
                                        .totalGlobalMem = total,
                                        .sharedMemPerBlock = EMU_SMEM_DEFAULT,
                                        .sharedMemPerBlockOptin = EMU_SMEM_MAX,
                                        .major = 9,
                                        .minor = 0,
                                        .multiProcessorCount = EMU_SMS,
                                        .l2CacheSize = 50 << 20,
                                        .warpSize = EMU_LANES,
                                        .maxThreadsPerBlock = EMU_THREADS_MAX,
                                        .pciBusID = device + 1};
    return e;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attr, int device)
{
    struct cudaDeviceProp p;
    const cudaError_t e = cudaGetDeviceProperties(&p, device);
    if (e != cudaSuccess)
        return e;
    switch (attr) {
    case cudaDevAttrMultiProcessorCount:
        *value = p.multiProcessorCount;
        return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
        *value = p.major;
        return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
        *value = p.minor;
        return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = (int)p.sharedMemPerBlockOptin;
        return cudaSuccess;
    }
    return emu_return(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device)
{
    const cudaError_t e = check_device(device);
    if (e == cudaSuccess)
        snprintf(id, (size_t)size, "0000:%02x:00.0", device + 1);
    return e;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer)
{
    const cudaError_t e = check_device(device) ? check_device(device) : check_device(peer);
    *can = e == cudaSuccess && device != peer;
    return e;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags)
{
    return flags == 0 && peer != g_device ? check_device(peer) : emu_return(cudaErrorInvalidValue);
}

/* Memory stays: what matters to tests is that a failure is forgotten. */
cudaError_t cudaDeviceReset(void)
{
    cudaDeviceSynchronize();
    emu_set_sticky(cudaSuccess);
    g_last = cudaSuccess;
    return cudaSuccess;
}

/* ---- copies ---- */

typedef struct copy_work {
    void *to;
    const void *from; /* NULL: the rows follow this struct */
    size_t to_pitch, from_pitch, width, height;
} copy_work;

static cudaError_t run_copy(void *data)
{
    const copy_work *w = data;
    const char *from = w->from ? w->from : (const char *)(w + 1);
    for (size_t i = 0; i < w->height; i++)
        memmove((char *)w->to + i * w->to_pitch, from + i * w->from_pitch, w->width);
    return cudaSuccess;
}

static size_t extent(size_t pitch, size_t width, size_t height)
{
    return height ? (height - 1) * pitch + width : 0;
}

static bool side_fits(const void *p, size_t bytes, bool device, const char *what)
{
    const bool fits = device ? emu_inside(p, bytes) : emu_memory_of(p) != EMU_DEVICE;
    if (!fits)
        fprintf(stderr, "cuda_emu: copy of %zu bytes %s %p, which is %s\n", bytes, what, p,
                device ? "not inside an allocation of the device" : "not memory of the host");
    return fits;
}

/* From pageable memory the bytes are taken at once; to it, the call waits. Pinned memory is read and written when
 * the work runs. */
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t stream)
{
    const size_t to_bytes = extent(to_pitch, width, height),
                 from_bytes = extent(from_pitch, width, height);
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (width == 0 || height == 0)
        return emu_return(emu_sticky());
    if (kind == cudaMemcpyDefault) {
        to_device = emu_memory_of(to) == EMU_DEVICE;
        from_device = emu_memory_of(from) == EMU_DEVICE;
    }
    if (!side_fits(to, to_bytes, to_device, "to") ||
        !side_fits(from, from_bytes, from_device, "from"))
        return emu_return(cudaErrorInvalidValue);
    const bool capturing = stream && emu_capturing(stream);
    const copy_work w = {to, from, to_pitch, from_pitch, width, height};
    if (emu_memory_of(from) != EMU_PAGEABLE || capturing) {
        const cudaError_t e = emu_enqueue(stream, run_copy, &w, sizeof(w));
        return e == cudaSuccess && !to_device && emu_memory_of(to) == EMU_PAGEABLE && !capturing
                   ? cudaStreamSynchronize(stream)
                   : e;
    }
    char *all = malloc(sizeof(w) + from_bytes);
    TM_ASSERT(all);
    memcpy(all, &w, sizeof(w));
    ((copy_work *)(void *)all)->from = NULL;
    memcpy(all + sizeof(w), from, from_bytes);
    const cudaError_t e = emu_enqueue(stream, run_copy, all, sizeof(w) + from_bytes);
    free(all);
    return e;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream)
{
    return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind)
{
    const cudaError_t e = cudaMemcpyAsync(to, from, bytes, kind, NULL);
    return e ? e : cudaStreamSynchronize(NULL);
}

typedef struct set_work {
    void *p;
    int value;
    size_t bytes;
} set_work;

static cudaError_t run_set(void *data)
{
    const set_work *w = data;
    memset(w->p, w->value, w->bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream)
{
    const set_work w = {p, value, bytes};
    if (bytes > 0 && !side_fits(p, bytes, true, "to"))
        return emu_return(cudaErrorInvalidValue);
    return emu_enqueue(stream, run_set, &w, sizeof(w));
}

cudaError_t cudaMemset(void *p, int value, size_t bytes)
{
    return cudaMemsetAsync(p, value, bytes, NULL);
}

/* ---- launches ---- */

typedef struct limits {
    void *kernel;
    size_t smem;
    unsigned cluster; /* blocks, at most */
} limits;

static limits g_functions[FUNCTIONS_MAX]; /* those that asked for more than what all have */
static pthread_mutex_t g_functions_lock = PTHREAD_MUTEX_INITIALIZER;

/* With the lock held. */
static limits *find_function(void *kernel)
{
    int i = 0;
    while (i < FUNCTIONS_MAX && g_functions[i].kernel && g_functions[i].kernel != kernel)
        i++;
    TM_ASSERT(i < FUNCTIONS_MAX);
    if (!g_functions[i].kernel)
        g_functions[i] = (limits){kernel, EMU_SMEM_DEFAULT, EMU_CLUSTER_PORTABLE};
    return &g_functions[i];
}

cudaError_t emu_func_smem(void *kernel, size_t bytes)
{
    if (bytes > EMU_SMEM_MAX)
        return emu_return(cudaErrorInvalidValue);
    pthread_mutex_lock(&g_functions_lock);
    limits *f = find_function(kernel);
    f->smem = TM_MAX(bytes, (size_t)EMU_SMEM_DEFAULT);
    pthread_mutex_unlock(&g_functions_lock);
    return cudaSuccess;
}

cudaError_t emu_func_large_clusters(void *kernel)
{
    pthread_mutex_lock(&g_functions_lock);
    find_function(kernel)->cluster = EMU_CLUSTER_MAX;
    pthread_mutex_unlock(&g_functions_lock);
    return cudaSuccess;
}

static limits limits_of(void *kernel)
{
    limits f = {kernel, EMU_SMEM_DEFAULT, EMU_CLUSTER_PORTABLE};
    pthread_mutex_lock(&g_functions_lock);
    for (int i = 0; i < FUNCTIONS_MAX && g_functions[i].kernel; i++)
        if (g_functions[i].kernel == kernel)
            f = g_functions[i];
    pthread_mutex_unlock(&g_functions_lock);
    return f;
}

cudaError_t emu_enqueue_launch(cudaStream_t stream, const void *data, size_t bytes)
{
    const emu_launch *l = data;
    const dim3 g = l->grid, b = l->block;
    const uint64_t threads = (uint64_t)b.x * b.y * b.z;
    const limits most = limits_of(l->kernel);
    if (threads == 0 || threads > EMU_THREADS_MAX || b.z > 64 || g.x == 0 || g.y == 0 || g.z == 0 ||
        g.x > INT32_MAX || g.y > 65535 || g.z > 65535 || l->cluster == 0 ||
        l->cluster > most.cluster || g.x % l->cluster != 0)
        return emu_return(cudaErrorInvalidConfiguration);
    if (l->smem > most.smem)
        return emu_return(cudaErrorInvalidValue);
    return emu_enqueue(stream, emu_run_launch, data, bytes);
}

/* ---- names ---- */

/* Kernels are local to their file, so only the symbol table of the program has them. */
static void look_up(const char *elf, size_t bytes, uintptr_t at, const char **name)
{
    const Elf64_Ehdr *h = (const void *)elf;
    if (bytes < sizeof(*h) || memcmp(h->e_ident, ELFMAG, SELFMAG) != 0 ||
        h->e_shoff + (size_t)h->e_shnum * sizeof(Elf64_Shdr) > bytes)
        return;
    const Elf64_Shdr *s = (const void *)(elf + h->e_shoff);
    for (int i = 0; i < h->e_shnum; i++) {
        if (s[i].sh_type != SHT_SYMTAB || s[i].sh_link >= h->e_shnum ||
            s[i].sh_offset + s[i].sh_size > bytes)
            continue;
        const Elf64_Sym *sym = (const void *)(elf + s[i].sh_offset);
        for (size_t k = 0; k < s[i].sh_size / sizeof(*sym); k++)
            if (ELF64_ST_TYPE(sym[k].st_info) == STT_FUNC && at >= sym[k].st_value &&
                at < sym[k].st_value + sym[k].st_size)
                *name = elf + s[s[i].sh_link].sh_offset + sym[k].st_name;
    }
}

/* Of the C++ library, where the program has it. */
extern char *__cxa_demangle(const char *name, char *out, size_t *size, int *status)
    __attribute__((weak));

void emu_name_of(const void *function, char *out, size_t size)
{
    Dl_info info;
    struct stat st;
    int status = -1;
    const char *name = NULL;
    snprintf(out, size, "%p", function);
    if (!dladdr(function, &info))
        return;
    int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) != 0) {
        if (fd >= 0)
            close(fd);
        return;
    }
    char *elf = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (elf == MAP_FAILED)
        return;
    look_up(elf, (size_t)st.st_size, (uintptr_t)function - (uintptr_t)info.dli_fbase, &name);
    char *plain = name && __cxa_demangle ? __cxa_demangle(name, NULL, NULL, &status) : NULL;
    if (name)
        snprintf(out, size, "%s", plain ? plain : name);
    free(plain);
    munmap(elf, (size_t)st.st_size);
}

cudaError_t cudaFuncGetName(const char **name, const void *function)
{
    static __thread char text[256];
    emu_name_of(function, text, sizeof(text));
    *name = text;
    return cudaSuccess;
}
