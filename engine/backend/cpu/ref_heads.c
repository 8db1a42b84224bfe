/* Small operators that some families need: norms of single heads, bounds, strided copies.
 *
 * One version serves every instruction set: beside the matrix products of the same layer each is one short
 * pass over data that is still in a cache. */
#include <math.h>
#include <string.h>

#include "engine/backend/cpu/cpu.h"

static void norm_head(const tm_head_norm_args *a, float *x)
{
    float sq = 0.0f;
    for (int i = 0; i < a->d; i++)
        sq += x[i] * x[i];
    float inv = 1.0f / sqrtf(sq / (float)a->d + a->eps), one = a->add_one ? 1.0f : 0.0f;
    for (int i = 0; i < a->d; i++)
        x[i] = x[i] * inv * (one + a->w[i]);
}

tm_status tm_cpu_ref_head_norm(tm_device *dev, const tm_head_norm_args *a)
{
    (void)dev;
    for (int t = 0; t < a->n_tokens; t++)
        for (int g = 0; g < a->n_heads; g++)
            norm_head(a, (float *)a->x + (size_t)t * (size_t)a->ld + (size_t)g * (size_t)a->d);
    return TM_OK;
}

tm_status tm_cpu_ref_bound(tm_device *dev, const tm_bound_args *a)
{
    (void)dev;
    float *x = a->x, limit = a->limit;
    size_t n = (size_t)a->n_rows * (size_t)a->n;
    for (size_t i = 0; a->smooth && i < n; i++)
        x[i] = limit * tanhf(x[i] / limit);
    for (size_t i = 0; !a->smooth && i < n; i++)
        x[i] = fminf(fmaxf(x[i], -limit), limit);
    return TM_OK;
}

tm_status tm_cpu_ref_copy(tm_device *dev, const tm_copy_args *a)
{
    (void)dev;
    for (int t = 0; t < a->n_tokens; t++)
        for (int g = 0; g < a->groups; g++)
            memcpy((float *)a->out + (size_t)t * (size_t)a->ldo + (size_t)g * (size_t)a->gdo,
                   (const float *)a->x + (size_t)t * (size_t)a->ldx + (size_t)g * (size_t)a->gdx,
                   (size_t)a->cols * sizeof(float));
    return TM_OK;
}
