/* The activation of the feed-forward part, gated (act(gate) * up) or plain.
 *
 * GELU is x/2 (1 + erf(x / sqrt 2)), or with tanh(u) for erf, u = sqrt(2 / pi) (x + 0.044715 x^3). Both are
 * written so that the left tail does not cancel: 1 + erf(z) = erfc(-z), (1 + tanh(u)) / 2 = sigmoid(2u). */
#include <math.h>

#include "engine/backend/cpu/cpu.h"

static float act_value(tm_act_kind kind, float x)
{
    switch (kind) {
    case TM_ACT_GELU_ERF:
        return 0.5f * x * erfcf(x * -0.70710678118654752f);
    case TM_ACT_GELU_TANH:
        return x / (1.0f + expf(-2.0f * 0.79788456080286536f * (x + 0.044715f * x * x * x)));
    default:
        return x / (1.0f + expf(-x));
    }
}

tm_status tm_cpu_ref_act(tm_device *dev, const tm_act_args *a)
{
    (void)dev;
    size_t f = (size_t)a->f, stride = a->gated ? 2 * f : f;
    for (int t = 0; t < a->n_tokens; t++) {
        const float *in = (const float *)a->gate_up + (size_t)t * stride;
        float *out = (float *)a->out + (size_t)t * f;
        for (size_t i = 0; i < f; i++) {
            float v = act_value(a->act, in[i]);
            out[i] = a->gated ? v * in[f + i] : v;
        }
    }
    return TM_OK;
}
