/* out[t][n] = sum over k of x[t][k] * W[n][k], then the bias; f32 sums in the order of k. */
#include "engine/backend/cpu/convert.h"
#include "engine/backend/cpu/cpu.h"

tm_status tm_cpu_ref_linear(tm_device *dev, const tm_linear_args *a)
{
    (void)dev;
    const tm_weight *w = a->w;
    for (int t = 0; t < a->n_tokens; t++) {
        const float *x = (const float *)a->x + (size_t)t * (size_t)a->ldx;
        float *out = (float *)a->out + (size_t)t * (size_t)a->ldo;
        for (int n = 0; n < w->n; n++) {
            float sum = 0.0f;
            for (int k = 0; k < w->k; k++)
                sum += x[k] * tm_load_f32(w->data, (size_t)n * (size_t)w->k + (size_t)k, w->dtype);
            out[n] = w->bias ? sum + w->bias[n] : sum;
        }
    }
    return TM_OK;
}
