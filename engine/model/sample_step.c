/* Sampling as part of a step: the parameters of its rows go to the device in front of it, in memory of their own, so that
 * a recorded step finds them at a fixed place. Of several ranks the first samples, from the columns of all of them, and
 * sends the tokens to the others, whose next step may need them. */
#include <string.h>

#include "common/check.h"
#include "engine/model/model_impl.h"

/* Edits of a step for each sequence that it may have: the distinct tokens of some thousand. What has more is sampled on
 * the host. */
#define EDITS_PER_SEQ 2048

bool tm_model_can_sample(const tm_model *m)
{
    const tm_op_table *o = m->backend->ops;
    return tm_model_can_pick(m) && o->sample && m->arch.vocab <= TM_SAMPLE_VOCAB_MAX &&
           (m->shard.tp == 1 || (o->gather_cols && o->spread));
}

int tm_model_edits_max(const tm_model *m)
{
    return m->ws.edits_max;
}

const tm_sample_detail *tm_model_details(const tm_model *m)
{
    return m->ws.details_ended;
}

static tm_status open_flight(tm_model *m, tm_flight *f, size_t rows, size_t edits, tm_err *err)
{
    const tm_device_ops *dev = m->backend->dev;
    void *p = NULL;
    TM_TRY(dev->alloc_host(m->dev, rows * sizeof(*f->sample_rows), &p, err));
    f->sample_rows = p;
    TM_TRY(dev->alloc_host(m->dev, edits * sizeof(*f->edits), &p, err));
    f->edits = p;
    TM_TRY(dev->alloc_host(m->dev, rows * sizeof(*f->details), &p, err));
    f->details = p;
    return TM_OK;
}

tm_status tm_sample_step_open(tm_model *m, tm_err *err)
{
    tm_workspace *ws = &m->ws;
    size_t rows = (size_t)m->opts.max_seqs, edits = rows * EDITS_PER_SEQ;
    void *p = NULL;
    if (m->shard.rank > 0)
        return TM_OK;
    TM_TRY(tm_model_take(m, rows * sizeof(*ws->sample_rows), &p, err));
    ws->sample_rows = p;
    TM_TRY(tm_model_take(m, edits * sizeof(*ws->edits), &p, err));
    ws->edits = p;
    TM_TRY(tm_model_take(m, rows * sizeof(*ws->details), &p, err));
    ws->details = p;
    for (int i = 0; i < TM_MODEL_FLIGHTS; i++)
        TM_TRY(open_flight(m, &ws->flights[i], rows, edits, err));
    ws->edits_max = (int)edits;
    return TM_OK;
}

void tm_sample_step_close(tm_model *m)
{
    for (int i = 0; i < TM_MODEL_FLIGHTS; i++) {
        const tm_flight *f = &m->ws.flights[i];
        void *all[] = {f->sample_rows, f->edits, f->details};
        for (size_t k = 0; k < TM_ARRAY_LEN(all); k++)
            if (all[k])
                m->backend->dev->free_host(m->dev, all[k]);
    }
}

/* A recorded step may have more rows: those behind are padding, and take the largest logit of what is there. */
tm_status tm_sample_step_upload(tm_model *m, const tm_flight *f, const tm_sample_set *set, int n)
{
    const tm_device_ops *dev = m->backend->dev;
    size_t rows = (size_t)m->opts.max_seqs, edits = (size_t)set->n_edits * sizeof(*set->edits);
    if (set->n_edits > m->ws.edits_max)
        return TM_STATUS_INVALID;
    memset(f->sample_rows, 0, rows * sizeof(*f->sample_rows));
    if (n > 0)
        memcpy(f->sample_rows, set->rows, (size_t)n * sizeof(*set->rows));
    TM_TRY(dev->upload(m->dev, m->ws.sample_rows, f->sample_rows, rows * sizeof(*set->rows)));
    if (edits == 0)
        return TM_OK;
    memcpy(f->edits, set->edits, edits);
    return dev->upload(m->dev, m->ws.edits, f->edits, edits);
}

tm_status tm_forward_sample(tm_model *m, int first, int rows)
{
    const tm_workspace *ws = &m->ws;
    const tm_op_table *ops = m->backend->ops;
    bool ranks = m->shard.tp > 1;
    const tm_gather_cols_args g = {
        .x = ws->logits, .n_rows = rows, .cols = m->shard.vocab, .n = m->arch.vocab};
    const tm_spread_args s = {.x = ws->picked + first, .n = rows};
    if (ranks)
        TM_TRY(ops->gather_cols(m->dev, &g));
    if (m->shard.rank == 0) {
        const tm_sample_args a = {.out = ws->picked + first,
                                  .details = ws->details + first,
                                  .x = ranks ? ws->joined : ws->logits,
                                  .rows = ws->sample_rows + first,
                                  .edits = ws->edits,
                                  .n_rows = rows,
                                  .n = m->arch.vocab,
                                  .ld = ranks ? m->arch.vocab : m->shard.vocab};
        TM_TRY(ops->sample(m->dev, &a));
    }
    return ranks ? ops->spread(m->dev, &s) : TM_OK;
}
