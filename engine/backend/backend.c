/* The backends of this build, and what a dtype is.
 *
 * The array is explicit: a backend that is not compiled in is simply not listed, and a name that is not
 * listed is refused when a model is opened. Nothing registers itself. */
#include "engine/backend/backend.h"

#include <string.h>

#include "common/check.h"
#include "engine/backend/cpu/cpu.h"
#ifdef TM_HAVE_CUDA
#include "engine/backend/cuda/cuda.h"
#endif

static const tm_backend *const g_backends[] = {
    &tm_backend_cpu,
#ifdef TM_HAVE_CUDA
    &tm_backend_cuda,
#endif
};

static const struct {
    const char *name;
    size_t size;
} g_dtypes[TM_DTYPE_COUNT] = {
    [TM_DTYPE_F32] = {"float32", 4},
    [TM_DTYPE_BF16] = {"bfloat16", 2},
    [TM_DTYPE_F16] = {"float16", 2},
};

size_t tm_dtype_size(tm_dtype t)
{
    TM_ASSERT((unsigned)t < TM_DTYPE_COUNT);
    return g_dtypes[t].size;
}

const char *tm_dtype_name(tm_dtype t)
{
    TM_ASSERT((unsigned)t < TM_DTYPE_COUNT);
    return g_dtypes[t].name;
}

const tm_backend *tm_backend_find(const char *name)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(g_backends); i++)
        if (strcmp(g_backends[i]->name, name) == 0)
            return g_backends[i];
    return NULL;
}

const tm_backend *const *tm_backend_list(int *count)
{
    *count = (int)TM_ARRAY_LEN(g_backends);
    return g_backends;
}
