/* Inverse frequencies of the rotary position embedding, computed in double on the host.
 *
 * Each type is one function over the plain frequencies base^(-2i / dim); the table is in the order of
 * tm_rope_type. Three types depend on how long the sequence is. That length is a property of the request, not of
 * the step, so that keys computed again elsewhere equal the lost ones. */
#include <math.h>

#include "common/check.h"
#include "engine/model/arch.h"

#define TWO_PI 6.283185307179586

static double plain(const tm_rope *r, double base, int i)
{
    return pow(base, -2.0 * i / r->dim);
}

static double freq_default(const tm_rope *r, int length, int i)
{
    (void)length;
    return plain(r, r->base, i);
}

static double freq_linear(const tm_rope *r, int length, int i)
{
    (void)length;
    return plain(r, r->base, i) / r->factor;
}

/* NTK: a larger base for longer sequences stretches the slow waves and leaves the fast ones. */
static double grown(const tm_rope *r, double alpha)
{
    return r->base * pow(alpha, (double)r->dim / (r->dim - 2));
}

static double freq_dynamic(const tm_rope *r, int length, int i)
{
    double alpha =
        length > r->original ? r->factor * length / r->original - (r->factor - 1.0) : 1.0;
    return plain(r, grown(r, alpha), i);
}

static double freq_qwen(const tm_rope *r, int length, int i)
{
    double alpha = 1.0;
    if (length > r->original)
        alpha = TM_MAX(1.0, exp2(ceil(log2(length / r->original) + 1.0)) - 1.0);
    return plain(r, grown(r, alpha), i);
}

static double freq_long(const tm_rope *r, int length, int i)
{
    const float *ext = length > r->original ? r->long_factor : r->short_factor;
    return plain(r, r->base, i) / (double)ext[i];
}

static double freq_llama3(const tm_rope *r, int length, int i)
{
    (void)length;
    double f = plain(r, r->base, i), wave = TWO_PI / f;
    if (wave < r->original / r->high_freq_factor)
        return f;
    if (wave > r->original / r->low_freq_factor)
        return f / r->factor;
    double s =
        (r->original / wave - r->low_freq_factor) / (r->high_freq_factor - r->low_freq_factor);
    return (1.0 - s) * f / r->factor + s * f;
}

/* The pair index whose wave turns n times within the original length. */
static double yarn_dim(const tm_rope *r, double n)
{
    return r->dim * log(r->original / (n * TWO_PI)) / (2.0 * log(r->base));
}

static double freq_yarn(const tm_rope *r, int length, int i)
{
    (void)length;
    double low = yarn_dim(r, r->beta_fast), high = yarn_dim(r, r->beta_slow);
    if (r->truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = TM_MAX(low, 0.0);
    high = TM_MIN(high, (double)(r->dim - 1));
    if (low == high)
        high += 0.001;
    double ramp = TM_MIN(TM_MAX((i - low) / (high - low), 0.0), 1.0);
    double f = plain(r, r->base, i);
    return f / r->factor * ramp + f * (1.0 - ramp);
}

static double yarn_mscale(double factor, double k)
{
    return factor <= 1.0 ? 1.0 : 0.1 * k * log(factor) + 1.0;
}

/* What cos and sin are multiplied by. */
static double attention_factor(const tm_rope *r)
{
    if (r->type != TM_ROPE_YARN && r->type != TM_ROPE_LONG)
        return 1.0;
    if (r->attention_factor > 0.0)
        return r->attention_factor;
    if (r->type == TM_ROPE_LONG)
        return r->factor <= 1.0 ? 1.0 : sqrt(1.0 + log(r->factor) / log(r->original));
    if (r->mscale > 0.0 && r->mscale_all_dim > 0.0)
        return yarn_mscale(r->factor, r->mscale) / yarn_mscale(r->factor, r->mscale_all_dim);
    return yarn_mscale(r->factor, 1.0);
}

double tm_rope_score_factor(const tm_rope *r)
{
    double m = yarn_mscale(r->factor, r->mscale_all_dim);
    return r->type == TM_ROPE_YARN && r->mscale_all_dim > 0.0 ? m * m : 1.0;
}

bool tm_rope_by_length(const tm_rope *r)
{
    return r->type == TM_ROPE_DYNAMIC || r->type == TM_ROPE_LONG || r->type == TM_ROPE_QWEN;
}

int tm_rope_class(const tm_rope *r, int length)
{
    if (!tm_rope_by_length(r) || length <= r->original)
        return 0;
    if (r->type == TM_ROPE_LONG)
        return (int)r->original + 1;
    if (r->type == TM_ROPE_QWEN)
        return (int)(r->original * exp2(ceil(log2(length / r->original))));
    return length;
}

void tm_rope_freqs_at(const tm_rope *r, int length, float *inv_freq, float *mscale)
{
    static double (*const freq[])(const tm_rope *, int, int) = {
        [TM_ROPE_DEFAULT] = freq_default, [TM_ROPE_LINEAR] = freq_linear,
        [TM_ROPE_DYNAMIC] = freq_dynamic, [TM_ROPE_LONG] = freq_long,
        [TM_ROPE_QWEN] = freq_qwen,       [TM_ROPE_LLAMA3] = freq_llama3,
        [TM_ROPE_YARN] = freq_yarn,
    };
    for (int i = 0; i < r->dim / 2; i++)
        inv_freq[i] = (float)freq[r->type](r, length, i);
    *mscale = (float)attention_factor(r);
}

void tm_rope_freqs(const tm_rope *r, float *inv_freq, float *mscale)
{
    tm_rope_freqs_at(r, 0, inv_freq, mscale);
}
