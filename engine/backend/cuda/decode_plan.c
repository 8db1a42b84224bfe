/* The plan of a decode step's kernel (decode_step.cu): its phases as a table in device memory, made once. */
#include <stdlib.h>

#include "common/check.h"
#include "engine/backend/cuda/decode_step.h"
#include "engine/backend/cuda/device.h"

#define STEP_K_UNIT 64 /* every K is a multiple */

struct tm_decode_plan {
    tm_cuda_step_args args;
    int head_dim, rows_max;
    void *memory; /* table, kv, counters */
};

static bool weight_fits(const tm_device *dev, const tm_weight *w)
{
    return w->dtype == dev->ctx.act && w->k % STEP_K_UNIT == 0;
}

static bool shape_fits(const tm_device *dev, const tm_decode_shape *s)
{
    if ((s->head_dim != 64 && s->head_dim != 128) || !weight_fits(dev, s->head))
        return false;
    for (int i = 0; i < s->n_layers; i++) {
        const tm_decode_layer *l = &s->layers[i];
        const tm_kv_layer *kv = l->kv;
        if (!weight_fits(dev, l->qkv) || !weight_fits(dev, l->o) || !weight_fits(dev, l->gate_up) ||
            !weight_fits(dev, l->down) || l->gate_up->bias || kv->dtype != dev->ctx.act ||
            kv->block_tokens < 16 || (kv->block_tokens & (kv->block_tokens - 1)) != 0)
            return false;
    }
    return true;
}

static tm_cuda_phase product(const tm_weight *w, const void *x, void *out)
{
    return (tm_cuda_phase){.w = w->data,
                           .x = x,
                           .out = out,
                           .bias = w->bias,
                           .n = w->n,
                           .k = w->k,
                           .tiles = (w->n + 15) / 16,
                           .ldo = w->n};
}

/* x, or, after the first layer, x + delta, whose sum goes on in the other buffer. */
static void set_norm(tm_cuda_phase *p, const tm_decode_shape *s, const float *w, void *x[2],
                     bool first)
{
    p->x = x[0];
    p->norm_w = w;
    if (first)
        return;
    p->delta = s->delta;
    p->x_out = x[1];
    x[1] = x[0];
    x[0] = p->x_out;
}

static void fill_table(const tm_decode_shape *s, tm_cuda_phase *t, tm_cuda_step_kv *kv)
{
    void *x[2] = {s->x, s->x_other};
    for (int i = 0; i < s->n_layers; i++) {
        const tm_decode_layer *l = &s->layers[i];
        t[0] = product(l->qkv, NULL, s->qkv);
        set_norm(&t[0], s, l->attn_norm, x, i == 0);
        t[1] = product(l->o, s->attn, s->delta);
        t[2] = product(l->gate_up, NULL, s->act);
        t[2].gated = 1;
        t[2].n = t[2].ldo = l->gate_up->n / 2;
        t[2].tiles = (t[2].n + 7) / 8;
        set_norm(&t[2], s, l->ffn_norm, x, false);
        t[3] = product(l->down, s->act, s->delta);
        kv[i] = (tm_cuda_step_kv){l->kv->k, l->kv->v};
        t += 4;
    }
    t[0] = product(s->head, NULL, s->logits);
    t[0].f32_out = 1;
    set_norm(&t[0], s, s->final_norm, x, false);
}

static void fill_args(tm_cuda_step_args *a, const tm_decode_shape *s, const tm_device *dev)
{
    const tm_decode_layer *l = &s->layers[0];
    *a = (tm_cuda_step_args){.phases = 4 * s->n_layers + 1,
                             .k_max = TM_MAX(TM_MAX(l->qkv->k, l->o->k), l->down->k),
                             .qkv = s->qkv,
                             .attn = s->attn,
                             .inv_freq = s->inv_freq,
                             .scratch = dev->ctx.scratch,
                             .tickets = dev->ctx.tickets,
                             .heads = s->n_heads,
                             .kv_heads = s->n_kv_heads,
                             .group = s->n_heads / s->n_kv_heads,
                             .scale = s->scale,
                             .mscale = s->mscale,
                             .eps = s->eps,
                             .one = s->add_one ? 1.0f : 0.0f,
                             .act = s->act_kind};
    a->head_groups = (a->group + 7) / 8;
    while (1 << a->block_shift < l->kv->block_tokens)
        a->block_shift++;
}

/* As many sequences as leave x in shared memory; a multiprocessor has 227 KiB of it from sm_90 on. */
static int find_rows(tm_cuda_step_args *a, int head_dim, int smem_max)
{
    int rows = 0;
    for (a->tokens = 1; a->tokens <= TM_CUDA_STEP_TOKENS; a->tokens++)
        if (tm_cuda_step_smem(a, head_dim) <= (size_t)smem_max)
            rows = a->tokens;
    return rows;
}

/* Table, kv and counters as one piece, copied to the device. */
static tm_status upload_plan(tm_device *dev, tm_decode_plan *p, const tm_decode_shape *s)
{
    size_t table = (size_t)p->args.phases * sizeof(tm_cuda_phase);
    size_t kv = (size_t)s->n_layers * sizeof(tm_cuda_step_kv), counters = 64;
    char *host = calloc(1, table + kv + counters);
    if (!host)
        return TM_STATUS_NO_MEMORY;
    fill_table(s, (tm_cuda_phase *)host, (tm_cuda_step_kv *)(host + table));
    tm_status st = TM_CUDA(dev, cudaMalloc(&p->memory, table + kv + counters));
    if (st == TM_OK)
        st = TM_CUDA(dev,
                     cudaMemcpy(p->memory, host, table + kv + counters, cudaMemcpyHostToDevice));
    free(host);
    char *at = p->memory;
    p->args.table = (const tm_cuda_phase *)at;
    p->args.kv = (const tm_cuda_step_kv *)(at + table);
    p->args.arrived = (int *)(at + table + kv);
    p->args.left = p->args.arrived + 8;
    return st;
}

void tm_cuda_decode_plan_free(tm_device *dev, tm_decode_plan *plan)
{
    if (!plan)
        return;
    (void)TM_CUDA(dev, cudaFree(plan->memory));
    free(plan);
}

tm_status tm_cuda_decode_plan(tm_device *dev, const tm_decode_shape *s, tm_decode_plan **out,
                              tm_err *err)
{
    int smem = 0, cooperative = 0;
    *out = NULL;
    TM_TRY(TM_CUDA(
        dev, cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, dev->index)));
    TM_TRY(TM_CUDA(dev,
                   cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, dev->index)));
    if (!cooperative || !shape_fits(dev, s))
        return TM_OK;
    tm_decode_plan *p = calloc(1, sizeof(*p));
    if (!p)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for the plan of a decode step");
    fill_args(&p->args, s, dev);
    p->head_dim = s->head_dim;
    p->rows_max =
        find_rows(&p->args, s->head_dim, smem - 2048); /* the kernel has static arrays, too */
    tm_status st = p->rows_max > 0 ? upload_plan(dev, p, s) : TM_OK;
    if (st != TM_OK || p->rows_max == 0) {
        tm_cuda_decode_plan_free(dev, p);
        return st == TM_OK ? TM_OK
                           : TM_FAIL(err, st, "the plan of a decode step: no device memory");
    }
    *out = p;
    return TM_OK;
}

int tm_cuda_decode_plan_rows(const tm_decode_plan *plan)
{
    return plan->rows_max;
}

tm_status tm_cuda_decode_run(tm_device *dev, const tm_decode_plan *plan, const tm_batch *b)
{
    tm_cuda_step_args a = plan->args;
    TM_ASSERT(b->n_seqs == b->n_decode && b->n_seqs <= plan->rows_max);
    a.tokens = b->n_seqs;
    a.blocks = b->blocks;
    a.kv_len = b->kv_len;
    a.max_blocks = b->max_blocks;
    return TM_CUDA(dev, tm_cuda_step_launch(&a, plan->head_dim, &dev->ctx));
}
