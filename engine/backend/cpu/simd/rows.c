/* The operators that pass over rows of activations once: embedding, norm, activation.
 *
 * They are bound by memory, so each is one pass (norm: two over a row that is in L1). Small steps run on
 * the calling thread: a fork and join costs more than a few thousand elements. */
#include <math.h>

#include "common/check.h"
#include "engine/backend/cpu/cpu.h"
#include "engine/backend/cpu/simd/simd.h"
#include "engine/backend/cpu/simd/vmath.h"

/* Elements below which an operator stays on one thread; 16k elements take about 2 us. */
enum { SERIAL_ELEMENTS = 16 * 1024 };

typedef struct rows_task {
    const void *a; /* the operator's arguments */
    int rows, units;
} rows_task;

static void run_rows(tm_device *dev, int rows, int width, tm_cpu_task_fn fn, const void *a)
{
    bool small = (int64_t)rows * width < SERIAL_ELEMENTS;
    rows_task r = {.a = a, .rows = rows, .units = small ? 1 : TM_MIN(rows, 4 * dev->threads)};
    tm_cpu_run(dev, r.units, fn, &r);
}

static void share_rows(const rows_task *r, int unit, int *from, int *to)
{
    *from = (int)((int64_t)r->rows * unit / r->units);
    *to = (int)((int64_t)r->rows * (unit + 1) / r->units);
}

static void embed_row(const tm_embed_args *a, int64_t row, float *out)
{
    const tm_weight *w = a->table;
    size_t at = (size_t)row * (size_t)w->k;
    vf scale = vf_set1(a->scale);
    int i = 0;
    for (; i + VW <= w->k; i += VW)
        vf_store(out + i, vf_mul(vf_load_t(w->data, at + (size_t)i, w->dtype), scale));
    if (i < w->k)
        vf_storen(out + i, vf_mul(vf_loadn_t(w->data, at + (size_t)i, w->dtype, w->k - i), scale),
                  w->k - i);
}

static void embed_unit(void *arg, int thread, int unit)
{
    const rows_task *r = arg;
    const tm_embed_args *a = r->a;
    (void)thread;
    size_t h = (size_t)a->table->k;
    int t, end;
    share_rows(r, unit, &t, &end);
    for (; t < end; t++) {
        float *out = (float *)a->out + (size_t)t * h;
        int64_t row = (int64_t)tm_embed_id(a, t) - a->v0;
        if (row >= 0 && row < a->table->n)
            embed_row(a, row, out);
        else
            memset(out, 0, h * sizeof *out);
    }
}

tm_status TM_ISA(embed)(tm_device *dev, const tm_embed_args *a)
{
    run_rows(dev, a->n_tokens, a->table->k, embed_unit, a);
    return TM_OK;
}

/* x += d, and the sum of x over the row (d may be NULL). */
static float add_sum(float *x, const float *d, int n)
{
    vf sum = vf_zero();
    int i = 0;
    for (; i + VW <= n; i += VW) {
        vf v = vf_load(x + i);
        if (d) {
            v = vf_add(v, vf_load(d + i));
            vf_store(x + i, v);
        }
        sum = vf_add(sum, v);
    }
    if (i < n) {
        vf v = vf_loadn(x + i, n - i);
        if (d) {
            v = vf_add(v, vf_loadn(d + i, n - i));
            vf_storen(x + i, v, n - i);
        }
        sum = vf_add(sum, v);
    }
    return vf_hsum(sum);
}

static float sum_squares(const float *x, float mean, int n)
{
    vf s0 = vf_zero(), s1 = vf_zero(), m = vf_set1(mean);
    int i = 0;
    for (; i + 2 * VW <= n; i += 2 * VW) {
        vf a = vf_sub(vf_load(x + i), m), b = vf_sub(vf_load(x + i + VW), m);
        s0 = vf_fma(a, a, s0);
        s1 = vf_fma(b, b, s1);
    }
    float tail = 0.0f;
    for (; i < n; i++)
        tail += (x[i] - mean) * (x[i] - mean);
    return vf_hsum(vf_add(s0, s1)) + tail;
}

static void scale_row(const tm_norm_args *a, const float *x, float mean, float inv, float *y)
{
    vf m = vf_set1(mean), s = vf_set1(inv), one = vf_set1(a->add_one ? 1.0f : 0.0f);
    int i = 0;
    for (; i + VW <= a->h; i += VW) {
        vf v = vf_mul(vf_mul(vf_sub(vf_load(x + i), m), s), vf_add(one, vf_load(a->w + i)));
        vf_store(y + i, a->b ? vf_add(v, vf_load(a->b + i)) : v);
    }
    for (; i < a->h; i++) {
        float v = (x[i] - mean) * inv * (a->add_one ? 1.0f + a->w[i] : a->w[i]);
        y[i] = a->b ? v + a->b[i] : v;
    }
}

static void norm_unit(void *arg, int thread, int unit)
{
    const rows_task *r = arg;
    const tm_norm_args *a = r->a;
    (void)thread;
    int t, end;
    share_rows(r, unit, &t, &end);
    for (; t < end; t++) {
        size_t at = (size_t)t * (size_t)a->h;
        float *x = (float *)a->residual + at;
        const float *d = a->delta ? (const float *)a->delta + at : NULL;
        float mean = 0.0f;
        if (d || a->kind == TM_NORM_LAYER)
            mean = add_sum(x, d, a->h) / (float)a->h;
        if (!a->out)
            continue;
        if (a->kind == TM_NORM_RMS)
            mean = 0.0f;
        float inv = 1.0f / sqrtf(sum_squares(x, mean, a->h) / (float)a->h + a->eps);
        scale_row(a, x, mean, inv, (float *)a->out + at);
    }
}

tm_status TM_ISA(norm)(tm_device *dev, const tm_norm_args *a)
{
    run_rows(dev, a->n_tokens, a->h, norm_unit, a);
    return TM_OK;
}

/* GELU with erf: x/2 (1 + erf(x / sqrt 2)) = x/2 erfc(|x| / sqrt 2) on the negative side. With tanh:
 * x/2 (1 + tanh u) = x sigmoid(2u). */
TM_INLINE vf act_value(const tm_act_kind kind, vf x)
{
    if (kind == TM_ACT_GELU_ERF) {
        vf c = vm_erfc_pos(vf_mul(vf_abs(x), vf_set1(0.70710678f)));
        vf phi2 = vf_select(vf_less(x, vf_zero()), c, vf_sub(vf_set1(2.0f), c));
        return vf_mul(vf_mul(vf_set1(0.5f), x), phi2);
    }
    if (kind == TM_ACT_GELU_TANH) {
        vf cube = vf_mul(vf_mul(x, x), x);
        vf u = vf_mul(vf_set1(2.0f * 0.79788456f), vf_fma(vf_set1(0.044715f), cube, x));
        return vf_mul(x, vm_sigmoid(u));
    }
    return vf_mul(x, vm_sigmoid(x));
}

TM_INLINE void act_span(const tm_act_kind kind, const float *gate, const float *up, float *out,
                        int n)
{
    int i = 0;
    for (; i + VW <= n; i += VW) {
        vf v = act_value(kind, vf_load(gate + i));
        vf_store(out + i, up ? vf_mul(v, vf_load(up + i)) : v);
    }
    if (i < n) {
        vf v = act_value(kind, vf_loadn(gate + i, n - i));
        vf_storen(out + i, up ? vf_mul(v, vf_loadn(up + i, n - i)) : v, n - i);
    }
}

static void act_unit(void *arg, int thread, int unit)
{
    const rows_task *r = arg;
    const tm_act_args *a = r->a;
    (void)thread;
    size_t stride = (size_t)a->f * (a->gated ? 2 : 1);
    int t, end;
    share_rows(r, unit, &t, &end);
    for (; t < end; t++) {
        const float *gate = (const float *)a->gate_up + (size_t)t * stride;
        const float *up = a->gated ? gate + a->f : NULL;
        float *out = (float *)a->out + (size_t)t * (size_t)a->f;
        if (a->act == TM_ACT_GELU_ERF)
            act_span(TM_ACT_GELU_ERF, gate, up, out, a->f);
        else if (a->act == TM_ACT_GELU_TANH)
            act_span(TM_ACT_GELU_TANH, gate, up, out, a->f);
        else
            act_span(TM_ACT_SILU, gate, up, out, a->f);
    }
}

tm_status TM_ISA(act)(tm_device *dev, const tm_act_args *a)
{
    run_rows(dev, a->n_tokens, a->f, act_unit, a);
    return TM_OK;
}
