/* Steps on a device with memory of its own: the batch as one copy, decode steps as recorded graphs, steps in flight.
 *
 * A decode step is the same sequence of some hundred small operators every time, and enqueueing them one by one
 * costs more than a small model needs to run them. So it is recorded once per size and replayed: every number that
 * changes lies in the flat batch, which is at a fixed place, filled on the host in pinned memory and copied
 * in front of the recording. The number of sequences is rounded up (the rows behind are padding with kv_len 0), and
 * so is the width of the block tables, so that few recordings serve all steps. The recording ends with the logits
 * and the picks of all rows; what the caller does not want of them is not copied.
 *
 * Two steps may be in flight. The device's buffers are one set, because its stream runs one step after the other;
 * host memory is two sets, because the host fills the next batch while the device still reads the one before. */
#include <string.h>

#include "common/check.h"
#include "engine/model/model_impl.h"

/* Offsets of the flat batch. */
typedef struct flat {
    size_t tokens, positions, seq_begin, kv_len, logit_rows, blocks, end;
} flat;

static flat flat_of(const tm_batch *b)
{
    flat f = {0};
    f.positions = (size_t)b->n_tokens;
    f.seq_begin = f.positions + (size_t)b->n_tokens;
    f.kv_len = f.seq_begin + (size_t)b->n_seqs + 1;
    f.logit_rows = f.kv_len + (size_t)b->n_seqs;
    f.blocks = f.logit_rows + (size_t)b->n_logits;
    f.end = f.blocks + (size_t)b->n_seqs * (size_t)b->max_blocks;
    return f;
}

static void point(tm_batch *b, const flat *f, int32_t *base)
{
    b->tokens = base + f->tokens;
    b->positions = base + f->positions;
    b->seq_begin = base + f->seq_begin;
    b->kv_len = base + f->kv_len;
    b->logit_rows = base + f->logit_rows;
    b->blocks = base + f->blocks;
}

static tm_status open_flight(tm_model *m, tm_flight *f, size_t batch_bytes, size_t picked_bytes,
                             tm_err *err)
{
    const tm_device_ops *dev = m->backend->dev;
    void *p = NULL;
    TM_TRY(dev->alloc_host(m->dev, batch_bytes, &p, err));
    f->batch = p;
    TM_TRY(dev->alloc_host(m->dev, picked_bytes, &p, err));
    f->picked = p;
    return dev->event_create(m->dev, &f->done, err);
}

tm_status tm_device_step_open(tm_model *m, tm_err *err)
{
    tm_workspace *ws = &m->ws;
    int bt = m->opts.block_tokens;
    void *batch = NULL, *picked = NULL;
    ws->blocks_max = (m->info.max_positions + bt - 1) / bt;
    const tm_batch largest = {.n_tokens = m->opts.max_step_tokens,
                              .n_seqs = m->opts.max_seqs,
                              .n_logits = m->opts.max_step_tokens,
                              .max_blocks = ws->blocks_max};
    size_t bytes = flat_of(&largest).end * sizeof(int32_t);
    size_t picks = (size_t)m->opts.max_step_tokens * sizeof(int32_t);
    TM_TRY(tm_model_take(m, bytes, &batch, err));
    TM_TRY(tm_model_take(m, picks, &picked, err));
    ws->batch = batch;
    ws->picked = picked;
    for (int i = 0; i < TM_MODEL_FLIGHTS; i++)
        TM_TRY(open_flight(m, &ws->flights[i], bytes, picks, err));
    return tm_model_can_sample(m) ? tm_sample_step_open(m, err) : TM_OK;
}

void tm_device_step_close(tm_model *m)
{
    tm_workspace *ws = &m->ws;
    const tm_device_ops *dev = m->backend->dev;
    if (ws->in_flight > 0)
        (void)dev->sync(m->dev); /* where it fails the device is lost and says so itself */
    for (int i = 0; i < ws->graph_count; i++)
        if (ws->graphs[i].graph)
            dev->graph_free(m->dev, ws->graphs[i].graph);
    for (int i = 0; i < TM_MODEL_FLIGHTS; i++) {
        if (ws->flights[i].batch)
            dev->free_host(m->dev, ws->flights[i].batch);
        if (ws->flights[i].picked)
            dev->free_host(m->dev, ws->flights[i].picked);
        if (ws->flights[i].done)
            dev->event_free(m->dev, ws->flights[i].done);
    }
    tm_sample_step_close(m);
}

static void put(int32_t *to, const int32_t *from, int n)
{
    memcpy(to, from, (size_t)n * sizeof(*to));
}

tm_status tm_device_step_upload(tm_model *m, const tm_batch *b, int32_t *host, tm_batch *out)
{
    flat f = flat_of(b);
    put(host + f.tokens, b->tokens, b->n_tokens);
    put(host + f.positions, b->positions, b->n_tokens);
    put(host + f.seq_begin, b->seq_begin, b->n_seqs + 1);
    put(host + f.kv_len, b->kv_len, b->n_seqs);
    put(host + f.logit_rows, b->logit_rows, b->n_logits);
    put(host + f.blocks, b->blocks, b->n_seqs * b->max_blocks);
    *out = *b;
    point(out, &f, m->ws.batch);
    return m->backend->dev->upload(m->dev, m->ws.batch, host, f.end * sizeof(int32_t));
}

/* Sizes that are recorded: 1, 2, 4, 8, then every 8 to 64, every 16 to 128, every 32 to 256, every 128. */
static int rows_of(int n)
{
    static const struct {
        int to, unit;
    } units[] = {{64, 8}, {128, 16}, {256, 32}};
    for (int i = 1; i <= 8; i *= 2)
        if (n <= i)
            return i;
    for (size_t i = 0; i < TM_ARRAY_LEN(units); i++)
        if (n <= units[i].to)
            return (n + units[i].unit - 1) / units[i].unit * units[i].unit;
    return (n + 127) / 128 * 128;
}

static int stride_of(int n)
{
    int stride = 16;
    while (stride < n)
        stride *= 2;
    return stride;
}

bool tm_device_step_is_decode(const tm_model *m, const tm_batch *b)
{
    if (m->host_memory || !m->backend->dev->graph_begin)
        return false;
    if (b->n_decode != b->n_seqs || b->n_logits != b->n_seqs || b->n_tokens != b->n_seqs)
        return false;
    for (int i = 0; i < b->n_logits; i++)
        if (b->logit_rows[i] != i)
            return false;
    return true;
}

/* The padded batch in pinned memory; *out has its sizes and the places of its copy. */
static size_t fill_decode(tm_model *m, const tm_batch *b, int32_t *host, tm_batch *out)
{
    int rows = TM_MIN(rows_of(b->n_seqs), m->opts.max_seqs), n = b->n_seqs;
    int stride = TM_MIN(stride_of(b->max_blocks), m->ws.blocks_max);
    *out = (tm_batch){
        .n_tokens = rows, .n_seqs = rows, .n_decode = rows, .n_logits = rows, .max_blocks = stride};
    flat f = flat_of(out);
    memset(host, 0, f.end * sizeof(*host));
    put(host + f.tokens, b->tokens, n);
    put(host + f.positions, b->positions, n);
    put(host + f.kv_len, b->kv_len, n);
    for (int i = 0; i < rows; i++)
        host[f.seq_begin + (size_t)i + 1] = i + 1;
    for (int i = 0; i < n; i++)
        put(host + f.blocks + (size_t)i * (size_t)stride, b->blocks + i * b->max_blocks,
            b->max_blocks);
    point(out, &f, m->ws.batch);
    return f.end * sizeof(*host);
}

static tm_status enqueue(tm_model *m, const tm_batch *b, bool samples)
{
    TM_TRY(tm_forward_layers(m, b));
    TM_TRY(tm_forward_decode_head(m, b->n_seqs));
    return tm_model_can_pick(m) ? tm_forward_choose(m, 0, b->n_seqs, samples) : TM_OK;
}

static tm_decode_graph *find_graph(tm_workspace *ws, const tm_batch *b, bool samples)
{
    for (int i = 0; i < ws->graph_count; i++)
        if (ws->graphs[i].rows == b->n_seqs && ws->graphs[i].stride == b->max_blocks &&
            ws->graphs[i].samples == samples)
            return &ws->graphs[i];
    return NULL;
}

tm_status tm_device_step_decode(tm_model *m, const tm_batch *batch, int32_t *host, bool samples)
{
    tm_workspace *ws = &m->ws;
    const tm_device_ops *dev = m->backend->dev;
    tm_batch b;
    TM_TRY(tm_extras_begin_step(m, batch)); /* not part of the recording */
    size_t bytes = fill_decode(m, batch, host, &b);
    TM_TRY(dev->upload(m->dev, ws->batch, host, bytes));
    tm_decode_graph *g = m->opts.no_graphs ? NULL : find_graph(ws, &b, samples);
    if (!g) {
        TM_TRY(tm_warm_rows(m, b.n_seqs, INT64_MAX));
        if (!m->opts.no_graphs && ws->graph_count < TM_DECODE_GRAPHS_MAX)
            ws->graphs[ws->graph_count++] =
                (tm_decode_graph){.rows = b.n_seqs, .stride = b.max_blocks, .samples = samples};
        return enqueue(m, &b, samples);
    }
    if (!g->graph) {
        TM_TRY(dev->graph_begin(m->dev));
        tm_status st = enqueue(m, &b, samples);
        tm_graph *graph = NULL;
        tm_status ended = dev->graph_end(m->dev, &graph);
        if (st != TM_OK || ended != TM_OK)
            return st != TM_OK ? st : ended;
        g->graph = graph;
    }
    return dev->graph_launch(m->dev, g->graph);
}
