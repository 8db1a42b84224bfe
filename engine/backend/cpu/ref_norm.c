/* Residual add and normalisation of each token's row [h].
 *
 * RMS:   y = x / sqrt(mean(x^2) + eps) * w          (w + 1 with add_one)
 * Layer: y = (x - mean(x)) / sqrt(var(x) + eps) * w + b, variance in a second pass over x - mean. */
#include <math.h>

#include "engine/backend/cpu/cpu.h"

static void norm_row(const tm_norm_args *a, const float *x, float *y)
{
    float n = (float)a->h, mean = 0.0f, sq = 0.0f;
    if (a->kind == TM_NORM_LAYER) {
        for (int i = 0; i < a->h; i++)
            mean += x[i];
        mean /= n;
    }
    for (int i = 0; i < a->h; i++)
        sq += (x[i] - mean) * (x[i] - mean);
    float inv = 1.0f / sqrtf(sq / n + a->eps);
    for (int i = 0; i < a->h; i++) {
        float w = a->add_one ? 1.0f + a->w[i] : a->w[i];
        y[i] = (x[i] - mean) * inv * w + (a->b ? a->b[i] : 0.0f);
    }
}

tm_status tm_cpu_ref_norm(tm_device *dev, const tm_norm_args *a)
{
    (void)dev;
    for (int t = 0; t < a->n_tokens; t++) {
        size_t at = (size_t)t * (size_t)a->h;
        float *x = (float *)a->residual + at;
        const float *d = a->delta ? (const float *)a->delta + at : NULL;
        for (int i = 0; d && i < a->h; i++)
            x[i] += d[i];
        if (a->out)
            norm_row(a, x, (float *)a->out + at);
    }
    return TM_OK;
}
