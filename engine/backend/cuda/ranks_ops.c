/* Operators over the ranks of a joined device: each picks a way by the size of its message. */
#include "common/check.h"
#include "engine/backend/cuda/device.h"

tm_peer_way tm_ranks_way(const tm_ranks *r, size_t bytes, bool fused)
{
    const size_t *most = fused ? r->rule->fused : r->rule->most;
    int last = 0;
    if (!r->peer)
        return TM_PEER_WAYS;
    if (r->forced != TM_PEER_WAYS)
        return r->forced;
    for (int w = 0; w < TM_PEER_WAYS; w++) {
        if (bytes <= most[w])
            return (tm_peer_way)w;
        last = most[w] > 0 ? w : last;
    }
    return r->nccl ? TM_PEER_WAYS : (tm_peer_way)last;
}

static tm_status usable(const tm_device *dev)
{
    if (!dev->ranks)
        return TM_STATUS_INTERNAL; /* not joined */
    return dev->ranks->lost ? TM_STATUS_UNAVAILABLE : TM_OK;
}

static tm_status lost_unless(tm_device *dev, tm_status st)
{
    if (st != TM_OK)
        dev->ranks->lost = true;
    return st;
}

/* In pieces of what the way can take at once. */
static tm_status sum_peers(tm_device *dev, const tm_peer_sum *s, tm_peer_way way)
{
    size_t most = tm_peer_capacity(&dev->ranks->peers, way, s->dtype);
    for (size_t at = 0; at < s->n; at += most) {
        tm_peer_sum part = *s;
        part.x = (char *)s->x + at * tm_dtype_size(s->dtype);
        part.n = TM_MIN(s->n - at, most);
        TM_TRY(TM_CUDA(dev, tm_peer_sum_launch(&dev->ranks->peers, &part, way, &dev->ctx)));
    }
    return TM_OK;
}

tm_status tm_cuda_op_sum(tm_device *dev, const tm_sum_args *a)
{
    tm_dtype dtype = a->f32 ? TM_DTYPE_F32 : dev->ctx.act;
    TM_TRY(usable(dev));
    if (a->n == 0)
        return TM_OK;
    tm_peer_way way = tm_ranks_way(dev->ranks, a->n * tm_dtype_size(dtype), false);
    if (way == TM_PEER_WAYS)
        return lost_unless(dev, tm_nccl_sum(dev->ranks->nccl, a->x, a->n, dtype, dev->ctx.stream));
    const tm_peer_sum s = {.x = a->x, .n = a->n, .dtype = dtype};
    return sum_peers(dev, &s, way);
}

/* Rows first .. first + n of the same norm. */
static tm_norm_args rows_of(const tm_device *dev, const tm_norm_args *a, int first, int n)
{
    size_t at = (size_t)first * (size_t)a->h * tm_dtype_size(dev->ctx.act);
    tm_norm_args part = *a;
    part.n_tokens = n;
    part.residual = (char *)a->residual + at;
    part.delta = (const char *)a->delta + at;
    part.out = a->out ? (char *)a->out + at : NULL;
    part.residual_out = a->residual_out ? (char *)a->residual_out + at : NULL;
    return part;
}

tm_status tm_cuda_op_sum_norm(tm_device *dev, const tm_norm_args *a)
{
    TM_TRY(usable(dev));
    if (a->n_tokens == 0)
        return TM_OK;
    size_t n = (size_t)a->n_tokens * (size_t)a->h, size = tm_dtype_size(dev->ctx.act);
    tm_peer_way way = tm_ranks_way(dev->ranks, n * size, true);
    if (way == TM_PEER_WAYS || !tm_peer_norm_fits(a->h, dev->ctx.act)) {
        const tm_sum_args s = {.x = (void *)(uintptr_t)a->delta, .n = n};
        TM_TRY(tm_cuda_op_sum(dev, &s));
        return TM_CUDA(dev, tm_cuda_norm_launch(a, &dev->ctx));
    }
    int most = (int)(tm_peer_capacity(&dev->ranks->peers, way, dev->ctx.act) / (size_t)a->h);
    for (int i = 0; i < a->n_tokens; i += most) {
        const tm_norm_args part = rows_of(dev, a, i, TM_MIN(most, a->n_tokens - i));
        const tm_peer_sum s = {
            .x = (void *)(uintptr_t)part.delta, .dtype = dev->ctx.act, .norm = &part};
        TM_TRY(TM_CUDA(dev, tm_peer_sum_launch(&dev->ranks->peers, &s, way, &dev->ctx)));
    }
    return TM_OK;
}

/* The columns of one rank that are part of the vocabulary. */
static tm_peer_copy columns(const tm_device *dev, const tm_gather_cols_args *a, int rank,
                            const float *x)
{
    int first = rank * a->cols;
    return (tm_peer_copy){.out = dev->ranks->gathered + first,
                          .x = x,
                          .rows = a->n_rows,
                          .cols = TM_MIN(a->cols, a->n - first),
                          .ldo = a->n,
                          .ldx = a->cols};
}

/* Every rank writes its columns to rank 0, once rank 0 is through with those before. */
static tm_status gather_peers(tm_device *dev, const tm_gather_cols_args *a)
{
    const tm_ranks *r = dev->ranks;
    const tm_peer_copy c = columns(dev, a, r->rank, a->x);
    TM_TRY(TM_CUDA(dev, tm_peer_meet_launch(&r->peers, &dev->ctx)));
    TM_TRY(TM_CUDA(dev, tm_peer_copy_launch(&c, &dev->ctx)));
    return TM_CUDA(dev, tm_peer_meet_launch(&r->peers, &dev->ctx));
}

static tm_status gather_nccl(tm_device *dev, const tm_gather_cols_args *a)
{
    tm_ranks *r = dev->ranks;
    size_t each = (size_t)a->n_rows * (size_t)a->cols;
    TM_TRY(lost_unless(dev, tm_nccl_gather(r->nccl, a->x, each, r->inbox, dev->ctx.stream)));
    for (int i = 0; r->rank == 0 && i < r->size; i++) {
        const tm_peer_copy c = columns(dev, a, i, i == 0 ? a->x : r->inbox + (size_t)i * each);
        TM_TRY(TM_CUDA(dev, tm_peer_copy_launch(&c, &dev->ctx)));
    }
    return TM_OK;
}

tm_status tm_cuda_op_gather_cols(tm_device *dev, const tm_gather_cols_args *a)
{
    TM_TRY(usable(dev));
    size_t all = (size_t)a->n_rows * (size_t)a->cols * (size_t)dev->ranks->size;
    if (all * sizeof(float) > dev->ranks->gather_bytes || a->n > a->cols * dev->ranks->size)
        return TM_STATUS_INVALID;
    if (a->n_rows == 0)
        return TM_OK;
    return dev->ranks->peer ? gather_peers(dev, a) : gather_nccl(dev, a);
}

/* The largest key of each row over the ranks. */
static tm_status best_of_ranks(tm_device *dev, const tm_argmax_args *a)
{
    tm_ranks *r = dev->ranks;
    if (r->peer)
        return TM_CUDA(dev, tm_peer_pick_launch(&r->peers, a, &dev->ctx));
    TM_TRY(TM_CUDA(dev, tm_peer_keys_launch(r->keys, a, &dev->ctx)));
    TM_TRY(
        lost_unless(dev, tm_nccl_max_keys(r->nccl, r->keys, (size_t)a->n_rows, dev->ctx.stream)));
    return TM_CUDA(dev, tm_peer_unkey_launch(r->keys, a, &dev->ctx));
}

tm_status tm_cuda_op_argmax_ranks(tm_device *dev, const tm_argmax_args *a)
{
    TM_TRY(usable(dev));
    if (a->n_rows == 0)
        return TM_OK;
    TM_TRY(TM_CUDA(dev, tm_cuda_argmax_launch(a, &dev->ctx)));
    return best_of_ranks(dev, a);
}

tm_status tm_cuda_op_spread(tm_device *dev, const tm_spread_args *a)
{
    TM_TRY(usable(dev));
    if (a->n == 0)
        return TM_OK;
    const tm_argmax_args given = {.out = a->x, .n_rows = a->n, .v0 = dev->ranks->rank};
    return best_of_ranks(dev, &given);
}
