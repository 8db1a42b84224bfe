/* See model_run.h. Blocks are handed out in a scrambled order, so that a mistake in block addressing cannot
 * hide behind consecutive ids. */
#include "tests/engine/model_run.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STEP_TOKENS  512
#define TOTAL_BLOCKS 512

static void must(tm_status st, const tm_err *err)
{
    if (st == TM_OK)
        return;
    fprintf(stderr, "model_run: %s: %s\n", tm_status_name(st), err->msg);
    exit(9);
}

tm_status run_open_with(run *r, tm_comm *comm, const char *dir, const char *dtype, const char *isa,
                        int session_len, int block_tokens, tm_err *err)
{
    return run_open_at(r, comm, "cpu", dir, dtype, isa, session_len, block_tokens, err);
}

tm_status run_open_at(run *r, tm_comm *comm, const char *backend, const char *dir,
                      const char *dtype, const char *isa, int session_len, int block_tokens,
                      tm_err *err)
{
    *r = (run){.comm = comm, .block_tokens = block_tokens, .total_blocks = TOTAL_BLOCKS};
    tm_model_opts o = {
        .dir = dir,
        .dtype = dtype,
        .backend = backend,
        .device = {.threads = tm_comm_size(comm) > 1 ? 1 : 2, .isa = isa ? isa : getenv("TM_ISA")},
        .block_tokens = block_tokens,
        .max_step_tokens = STEP_TOKENS,
        .max_seqs = RUN_SEQS_MAX,
        .session_len = session_len};
    tm_status st = tm_model_open(&r->model, &o, comm, err);
    if (st != TM_OK)
        return st;
    st = tm_model_kv_alloc(r->model, TOTAL_BLOCKS, err);
    if (st != TM_OK)
        tm_model_close(r->model);
    return st;
}

void run_open(run *r, const char *dir, const char *dtype, int block_tokens, int tp)
{
    tm_err err = TM_ERR_INIT;
    tm_comm *comm = NULL;
    tm_comm_opts co = tm_comm_opts_default();
    co.step_timeout_ms = 60000; /* the machine may be loaded; faults have their own test */
    must(tm_comm_create(&comm, tp, &co, &err), &err);
    must(run_open_with(r, comm, dir, dtype, NULL, 0, block_tokens, &err), &err);
    r->own = comm;
}

bool run_open_on(run *r, const char *backend, const char *dir, const char *dtype, int block_tokens)
{
    tm_err err = TM_ERR_INIT;
    tm_device *dev = NULL;
    const tm_device_opts none = {0};
    const tm_backend *b = tm_backend_find(backend);
    if (!b || b->dev->open(&dev, &none, &err) != TM_OK) {
        printf("skipped: %s\n", b ? err.msg : "the backend is not in this build");
        return false;
    }
    b->dev->close(dev);
    *r = (run){.block_tokens = block_tokens, .total_blocks = TOTAL_BLOCKS, .on_device = true};
    must(tm_comm_create(&r->own, 1, NULL, &err), &err);
    r->comm = r->own;
    tm_model_opts o = {.dir = dir,
                       .dtype = dtype,
                       .backend = backend,
                       .block_tokens = block_tokens,
                       .max_step_tokens = STEP_TOKENS,
                       .max_seqs = RUN_SEQS_MAX};
    must(tm_model_open(&r->model, &o, r->comm, &err), &err);
    must(tm_model_kv_alloc(r->model, TOTAL_BLOCKS, &err), &err);
    return true;
}

void run_close(run *r)
{
    tm_model_close(r->model);
    if (r->own)
        tm_comm_destroy(r->own);
}

static void grow(run *r, run_seq *s, int tokens)
{
    while (s->n_blocks * r->block_tokens < tokens) {
        if (s->n_blocks == RUN_BLOCKS_MAX || r->next_block == r->total_blocks) {
            fprintf(stderr, "model_run: out of blocks\n");
            exit(9);
        }
        s->blocks[s->n_blocks++] =
            (r->next_block++ * 167) % r->total_blocks; /* 167 is odd: all ids */
    }
}

void run_step(run *r, const run_item *items, int n_items, float *logits)
{
    static int32_t tokens[STEP_TOKENS], positions[STEP_TOKENS], rows[STEP_TOKENS];
    static int32_t begin[RUN_SEQS_MAX + 1], kv_len[RUN_SEQS_MAX], rope_len[RUN_SEQS_MAX];
    static int32_t blocks[RUN_SEQS_MAX * RUN_BLOCKS_MAX];
    int t = 0, n_rows = 0, n_decode = 0, max_blocks = 1;
    for (int i = 0; i < n_items; i++) {
        run_seq *s = items[i].seq;
        grow(r, s, s->done + items[i].n);
        max_blocks = s->n_blocks > max_blocks ? s->n_blocks : max_blocks;
        n_decode += items[i].n == 1 && n_decode == i;
    }
    for (int i = 0; i < n_items; i++) {
        run_seq *s = items[i].seq;
        begin[i] = t;
        for (int j = 0; j < items[i].n; j++, t++) {
            tokens[t] = r->fed && j == items[i].n - 1 ? TM_TOKEN_PICKED(i) : s->ids[s->done];
            positions[t] = s->done++;
            if (j >= items[i].n - items[i].want)
                rows[n_rows++] = t;
        }
        kv_len[i] = s->done;
        rope_len[i] = tm_model_rope_len(r->model, (size_t)(s->rope_len ? s->rope_len : s->len));
        for (int b = 0; b < max_blocks; b++)
            blocks[i * max_blocks + b] = b < s->n_blocks ? s->blocks[b] : -1;
    }
    begin[n_items] = t;
    const tm_batch batch = {.n_tokens = t,
                            .n_seqs = n_items,
                            .n_decode = n_decode,
                            .tokens = tokens,
                            .positions = positions,
                            .seq_begin = begin,
                            .kv_len = kv_len,
                            .blocks = blocks,
                            .max_blocks = max_blocks,
                            .n_logits = n_rows,
                            .logit_rows = rows,
                            .rope_len = rope_len};
    tm_status st;
    if (!r->picks)
        st = tm_model_forward(r->model, &batch, logits);
    else if (r->set)
        st = tm_model_begin_sample(r->model, &batch, r->set);
    else
        st = tm_model_begin(r->model, &batch);
    if (st == TM_OK && r->picks && !r->ahead)
        st = tm_model_end(r->model, r->picked);
    if (st != TM_OK) {
        fprintf(stderr, "model_run: forward: %s\n", tm_status_name(st));
        exit(9);
    }
}

double run_nmse(const float *x, const float *g, size_t n)
{
    double mean = 0, num = 0, den = 0;
    for (size_t i = 0; i < n; i++)
        mean += g[i];
    mean /= (double)n;
    for (size_t i = 0; i < n; i++) {
        num += ((double)x[i] - g[i]) * ((double)x[i] - g[i]);
        den += (g[i] - mean) * (g[i] - mean);
    }
    return num / den;
}

double run_logsumexp(const float *x, int n)
{
    double top = x[run_argmax(x, n)], sum = 0;
    for (int i = 0; i < n; i++)
        sum += exp(x[i] - top);
    return top + log(sum);
}

int run_argmax(const float *x, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}
