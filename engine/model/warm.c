/* What the first requests would otherwise wait for, done when a model is opened.
 *
 * Products: a device with linear_tune chooses how it computes them by trying, which takes it ten milliseconds for all
 * products of a step. The sizes of recorded decode steps, and some more for short prompts, are tried in the order of
 * their use until the time is up; a size that is left out is tried in its first decode step. Larger products are only run
 * once each: their kernels are loaded then. This concerns one rank alone, so the time may end it.
 *
 * Steps: a short prompt and decode steps of few sequences, so that kernels of all operators are loaded, and the largest
 * sum, for which ranks may have to connect. Ranks exchange something in each, so all do the same. */
#include "common/check.h"
#include "common/clock.h"
#include "engine/model/model_impl.h"

/* Seconds for products: a share of what loading took, in these limits. */
#define SHARE       0.2
#define SECONDS_MIN 0.2
#define SECONDS_MAX 2.0

#define PROMPT_MAX       64  /* tokens */
#define LARGE_FIRST      512 /* tokens of products */
#define LARGE_LAST       8192
#define WARM_DECODES_MAX 8 /* sequences: up to here kernels of few tokens have variants */

static double seconds_of(int64_t ns)
{
    return (double)ns * 1e-9;
}

static void add_product(tm_workspace *ws, const tm_product *p)
{
    for (int i = 0; i < ws->product_count; i++) {
        const tm_product *have = &ws->products[i];
        if (have->w->n == p->w->n && have->w->k == p->w->k && have->ldo == p->ldo &&
            have->f32_out == p->f32_out)
            return;
    }
    if (ws->product_count < TM_PRODUCTS_MAX)
        ws->products[ws->product_count++] = *p;
}

static void list_layer(tm_model *m, const tm_layer *l)
{
    tm_workspace *ws = &m->ws;
    const bool latent = m->arch.mla.kv_rank > 0;
    const int qkv = (m->shard.heads + 2 * m->shard.kv_heads) * m->arch.head_dim;
    const tm_product all[] = {
        {&l->qkv, ws->normed, ws->qkv, l->qkv.n, false},
        {&l->q_a, ws->normed, ws->q_a, l->q_a.n, false},
        {&l->q_b, m->arch.mla.q_rank > 0 ? ws->q_a : ws->normed, ws->q, l->q_b.n, false},
        {&l->kv_a, ws->normed, ws->qkv, qkv, false},
        {&l->o, latent ? ws->q : ws->attn, ws->delta, l->o.n, false},
        {&l->gate_up, ws->normed, ws->gate_up, l->gate_up.n, false},
        {&l->down, ws->act, ws->delta, l->down.n, false},
        {&l->shared_gate_up, ws->normed, ws->gate_up, l->shared_gate_up.n, false},
        {&l->shared_down, ws->act, ws->shared, l->shared_down.n, false},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(all); i++)
        if (all[i].w->data)
            add_product(ws, &all[i]);
}

/* Of each shape one: the layers' in the order of use, then the head, whose rows are fewer. */
static void list_products(tm_model *m)
{
    const tm_product head = {&m->head, m->ws.rows, m->ws.logits, m->head.n, true};
    m->ws.product_count = 0;
    for (int i = 0; i < m->arch.layers; i++)
        list_layer(m, &m->layers[i]);
    add_product(&m->ws, &head);
}

static tm_linear_args args_of(const tm_product *p, int rows)
{
    return (tm_linear_args){.out = p->out,
                            .x = p->x,
                            .w = p->w,
                            .n_tokens = rows,
                            .ldx = p->w->k,
                            .ldo = p->ldo,
                            .f32_out = p->f32_out};
}

tm_status tm_warm_rows(tm_model *m, int rows, int64_t deadline_ns)
{
    tm_workspace *ws = &m->ws;
    const tm_op_table *ops = m->backend->ops;
    if (!ops->linear_tune || rows > TM_TUNED_ROWS_MAX || ws->tuned[rows])
        return TM_OK;
    for (int i = 0; i < ws->product_count; i++) {
        const tm_product *p = &ws->products[i];
        const tm_linear_args a = args_of(p, rows);
        if (tm_clock_ns() >= deadline_ns)
            return TM_OK;
        if (p->w != &m->head || rows <= ws->rows_max)
            TM_TRY(ops->linear_tune(m->dev, &a));
    }
    ws->tuned[rows] = true;
    return TM_OK;
}

/* A full batch first, which is what a busy server runs; then powers of two, since one also serves what is up to half of
 * it. The others are the sizes of recorded steps. */
static tm_status tune_products(tm_model *m, int64_t deadline_ns)
{
    static const int sizes[] = {16, 32, 64,  128, 256, 24, 48, 96, 192, 40,
                                80, 56, 112, 160, 224, 8,  4,  2,  1};
    TM_TRY(tm_warm_rows(m, m->opts.max_seqs, deadline_ns));
    for (size_t i = 0; i < TM_ARRAY_LEN(sizes); i++)
        if (sizes[i] <= m->opts.max_step_tokens)
            TM_TRY(tm_warm_rows(m, sizes[i], deadline_ns));
    return TM_OK;
}

/* Each in the sizes of long prompts, whose algorithms are not many. */
static tm_status run_large_products(tm_model *m, int64_t deadline_ns)
{
    int most = TM_MIN(m->opts.max_step_tokens, LARGE_LAST);
    for (int rows = LARGE_FIRST; rows <= most; rows *= 2)
        for (int i = 0; i < m->ws.product_count; i++) {
            const tm_product *p = &m->ws.products[i];
            const tm_linear_args a = args_of(p, rows);
            if (tm_clock_ns() >= deadline_ns)
                return TM_OK;
            if (p->w != &m->head)
                TM_TRY(m->backend->ops->linear(m->dev, &a));
        }
    return TM_OK;
}

static tm_status warm_products(tm_model *m)
{
    double seconds = TM_MIN(TM_MAX(SHARE * m->info.times.weights, SECONDS_MIN), SECONDS_MAX);
    int64_t deadline = tm_clock_ns() + (int64_t)(seconds * 1e9);
    list_products(m);
    if (!m->backend->ops->linear_tune)
        return TM_OK;
    TM_TRY(run_large_products(m, deadline));
    TM_TRY(tune_products(m, deadline));
    return m->backend->dev->sync(m->dev);
}

/* One step whose tokens are chosen as `samples` says. Its results are dropped. */
static tm_status run_step(tm_model *m, const tm_batch *b, bool samples)
{
    static const tm_sample_row row = {.scale = 1.0f};
    const tm_sample_set set = {.rows = &row};
    tm_status st = samples ? tm_model_begin_sample(m, b, &set) : tm_model_begin(m, b);
    return st == TM_OK ? tm_model_end(m, NULL) : st;
}

static tm_status warm_prompt(tm_model *m)
{
    int n = TM_MIN(TM_MIN(PROMPT_MAX, m->opts.block_tokens), m->opts.max_step_tokens);
    int32_t tokens[PROMPT_MAX] = {0}, positions[PROMPT_MAX], begin[2] = {0}, block = 0;
    n = TM_MIN(n, m->info.max_positions);
    for (int i = 0; i < n; i++)
        positions[i] = i;
    begin[1] = n;
    const int32_t last = n - 1;
    const tm_batch b = {.n_tokens = n,
                        .n_seqs = 1,
                        .n_decode = n == 1,
                        .tokens = tokens,
                        .positions = positions,
                        .seq_begin = begin,
                        .kv_len = &begin[1],
                        .blocks = &block,
                        .max_blocks = 1,
                        .n_logits = 1,
                        .logit_rows = &last};
    return run_step(m, &b, tm_model_can_sample(m));
}

/* The first of n sequences is one, the others are padding. samples: n is 1. */
static tm_status warm_decode(tm_model *m, int n, bool samples)
{
    static const int32_t zeros[WARM_DECODES_MAX] = {0}, kv_len[WARM_DECODES_MAX] = {1};
    static const int32_t counting[] = {0, 1, 2, 3, 4, 5, 6, 7, 8};
    const tm_batch b = {.n_tokens = n,
                        .n_seqs = n,
                        .n_decode = n,
                        .tokens = zeros,
                        .positions = zeros,
                        .seq_begin = counting,
                        .kv_len = kv_len,
                        .blocks = zeros,
                        .max_blocks = 1,
                        .n_logits = n,
                        .logit_rows = counting};
    return run_step(m, &b, samples);
}

static tm_status warm_steps(tm_model *m)
{
    if (!tm_model_can_pick(m) || !m->backend->dev->graph_begin)
        return TM_OK;
    TM_TRY(tm_run_sum(m, m->ws.x, (size_t)m->opts.max_step_tokens * (size_t)m->arch.hidden));
    TM_TRY(warm_prompt(m));
    for (int n = 1; n <= TM_MIN(WARM_DECODES_MAX, m->opts.max_seqs); n *= 2)
        TM_TRY(warm_decode(m, n, false));
    if (tm_model_can_sample(m))
        TM_TRY(warm_decode(m, 1, true));
    m->ws.n_picks = 0;
    return TM_OK;
}

tm_status tm_model_warm(tm_model *m, tm_err *err)
{
    int64_t from = tm_clock_ns();
    if (m->host_memory)
        return TM_OK;
    tm_status st = warm_products(m);
    if (st != TM_OK)
        st = TM_FAIL(err, st, "the device failed in its first products");
    TM_TRY(tm_comm_agree(m->comm, st, err));
    m->info.times.products = seconds_of(tm_clock_ns() - from);
    st = warm_steps(m);
    if (st != TM_OK)
        st = TM_FAIL(err, st, "the model failed in its first steps");
    m->info.times.steps = seconds_of(tm_clock_ns() - from) - m->info.times.products;
    return tm_comm_agree(m->comm, st, err);
}
