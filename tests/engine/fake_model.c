/* See fake.h. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/hash.h"
#include "tests/engine/fake.h"

#define RANKS     4
#define PICKS_MAX 128

typedef struct slot {
    int32_t token, position;
} slot;

typedef struct flight {
    int n;
    int32_t picked[PICKS_MAX];
} flight;

struct tm_model {
    tm_model_opts opts;
    tm_model_info info;
    int rank, n_blocks;
    slot *kv;
    flight flights[TM_MODEL_FLIGHTS];
    int begun, ended;
    int n_picks; /* of the step before */
    int32_t picks[PICKS_MAX];
};

static struct {
    fake_opts o;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool hold, held;
    int pass; /* forwards that may go although held */
    int steps[RANKS], picks[RANKS], ahead[RANKS];
    long tokens[RANKS];
    int errors;
} g = {.lock = PTHREAD_MUTEX_INITIALIZER, .cond = PTHREAD_COND_INITIALIZER};

void fake_reset(const fake_opts *opts)
{
    pthread_mutex_lock(&g.lock);
    g.o = *opts;
    g.hold = g.held = false;
    g.pass = 0;
    g.errors = 0;
    memset(g.steps, 0, sizeof(g.steps));
    memset(g.tokens, 0, sizeof(g.tokens));
    memset(g.picks, 0, sizeof(g.picks));
    memset(g.ahead, 0, sizeof(g.ahead));
    pthread_mutex_unlock(&g.lock);
}

void fake_logits(const int32_t *tokens, int n, float *row)
{
    uint64_t h = tm_hash64(tokens, (size_t)n * sizeof(*tokens), 1234);
    bool poison = tokens[n - 1] == FAKE_POISON;
    for (int i = 0; i < FAKE_VOCAB; i++) {
        uint64_t z = (h + (uint64_t)i) * 0x9E3779B97F4A7C15u;
        z ^= z >> 29;
        z *= 0xBF58476D1CE4E5B9u;
        row[i] = poison ? NAN : (float)(z >> 40) / 16777216.0f * 8.0f - 4.0f;
    }
    if (!poison)
        row[FAKE_POISON] = -30.0f; /* practically never generated */
}

void fake_hold(bool hold)
{
    pthread_mutex_lock(&g.lock);
    g.hold = hold;
    pthread_cond_broadcast(&g.cond);
    pthread_mutex_unlock(&g.lock);
}

void fake_wait_held(void)
{
    pthread_mutex_lock(&g.lock);
    while (!g.held)
        pthread_cond_wait(&g.cond, &g.lock);
    pthread_mutex_unlock(&g.lock);
}

void fake_let_one_step(void)
{
    pthread_mutex_lock(&g.lock);
    g.pass++;
    g.held = false;
    pthread_cond_broadcast(&g.cond);
    while (!g.held)
        pthread_cond_wait(&g.cond, &g.lock);
    pthread_mutex_unlock(&g.lock);
}

int fake_steps(int rank)
{
    pthread_mutex_lock(&g.lock);
    int n = g.steps[rank];
    pthread_mutex_unlock(&g.lock);
    return n;
}

int fake_picks(int rank)
{
    pthread_mutex_lock(&g.lock);
    int n = g.picks[rank];
    pthread_mutex_unlock(&g.lock);
    return n;
}

int fake_ahead(int rank)
{
    pthread_mutex_lock(&g.lock);
    int n = g.ahead[rank];
    pthread_mutex_unlock(&g.lock);
    return n;
}

long fake_tokens(int rank)
{
    pthread_mutex_lock(&g.lock);
    long n = g.tokens[rank];
    pthread_mutex_unlock(&g.lock);
    return n;
}

int fake_errors(void)
{
    pthread_mutex_lock(&g.lock);
    int n = g.errors;
    pthread_mutex_unlock(&g.lock);
    return n;
}

tm_status tm_model_open(tm_model **out, const tm_model_opts *opts, tm_comm *comm, tm_err *err)
{
    tm_model *m = calloc(1, sizeof(*m));
    TM_ASSERT(m != NULL);
    m->opts = *opts;
    m->rank = tm_comm_rank(comm);
    if (m->rank == 1 && g.o.fail_open_rank1) {
        free(m);
        return TM_FAIL(err, TM_STATUS_DATA, "fake: no weights");
    }
    m->info.vocab = FAKE_VOCAB;
    m->info.max_positions = g.o.max_positions;
    m->info.kv_block_bytes = 1000;
    m->info.stop_ids[0] = FAKE_STOP;
    m->info.stop_count = 1;
    m->info.tp = tm_comm_size(comm);
    snprintf(m->info.digest, sizeof(m->info.digest), "fake");
    snprintf(m->info.name, sizeof(m->info.name), "fake");
    *out = m;
    return TM_OK;
}

void tm_model_close(tm_model *m)
{
    if (m)
        free(m->kv);
    free(m);
}

const tm_model_info *tm_model_info_get(const tm_model *m)
{
    return &m->info;
}

tm_status tm_model_mem_free(tm_model *m, size_t *bytes, tm_err *err)
{
    (void)err;
    int blocks = m->rank > 0 && g.o.blocks_rank1 ? g.o.blocks_rank1 : g.o.blocks;
    *bytes = (size_t)blocks * m->info.kv_block_bytes;
    return TM_OK;
}

tm_status tm_model_kv_alloc(tm_model *m, int n_blocks, tm_err *err)
{
    (void)err;
    m->n_blocks = n_blocks;
    m->kv = malloc((size_t)n_blocks * (size_t)m->opts.block_tokens * sizeof(*m->kv));
    TM_ASSERT(m->kv != NULL);
    memset(m->kv, 0xff, (size_t)n_blocks * (size_t)m->opts.block_tokens * sizeof(*m->kv));
    return TM_OK;
}

tm_status tm_model_warm(tm_model *m, tm_err *err)
{
    (void)err;
    TM_ASSERT(m->kv != NULL && m->begun == 0);
    return TM_OK;
}

static slot *place(const tm_model *m, const tm_batch *b, int i, int p)
{
    int bt = m->opts.block_tokens;
    int32_t block = b->blocks[i * b->max_blocks + p / bt];
    TM_ASSERT(block >= 0 && block < m->n_blocks);
    return &m->kv[block * bt + p % bt];
}

/* The sequence that a row belongs to. */
static int seq_of(const tm_batch *b, int row)
{
    int i = 0;
    while (row >= b->seq_begin[i + 1])
        i++;
    return i;
}

static int read_history(const tm_model *m, const tm_batch *b, int row, int32_t *history)
{
    int errors = 0, i = seq_of(b, row);
    for (int p = 0; p <= b->positions[row]; p++) {
        const slot *s = place(m, b, i, p);
        errors += s->position != p;
        history[p] = s->token;
    }
    return errors;
}

static void wait_gate(const tm_model *m)
{
    pthread_mutex_lock(&g.lock);
    if (m->rank == 0) {
        while (g.hold && g.pass == 0) {
            g.held = true;
            pthread_cond_broadcast(&g.cond);
            pthread_cond_wait(&g.cond, &g.lock);
        }
        g.held = false;
        if (g.pass > 0)
            g.pass--;
    }
    pthread_mutex_unlock(&g.lock);
}

/* The token of a row; one that the step before could not choose is as good as any. */
static int32_t token_of(const tm_model *m, const tm_batch *b, int row)
{
    int32_t token = b->tokens[row];
    TM_ASSERT(token >= TM_TOKEN_PICKED(m->n_picks - 1));
    return token < 0 ? m->picks[-1 - token] : token;
}

static int row_logits(const tm_model *m, const tm_batch *b, int row, float *logits)
{
    int32_t history[8192];
    int errors = read_history(m, b, row, history);
    fake_logits(history, b->positions[row] + 1, logits);
    return errors;
}

/* logits NULL: they are not wanted. */
static tm_status compute(tm_model *m, const tm_batch *b, float *logits)
{
    float row[FAKE_VOCAB];
    int errors = 0;
    wait_gate(m);
    for (int i = 0; i < b->n_seqs; i++)
        for (int r = b->seq_begin[i]; r < b->seq_begin[i + 1]; r++)
            *place(m, b, i, b->positions[r]) = (slot){token_of(m, b, r), b->positions[r]};
    for (int r = 0; r < b->n_logits; r++)
        errors += row_logits(m, b, b->logit_rows[r], logits ? logits + r * FAKE_VOCAB : row);
    pthread_mutex_lock(&g.lock);
    int step = ++g.steps[m->rank];
    g.tokens[m->rank] += b->n_tokens;
    g.errors += errors + (b->n_tokens > m->opts.max_step_tokens) + (b->n_seqs > m->opts.max_seqs);
    bool fails = m->rank == 0 && step == g.o.fail_at_step;
    pthread_mutex_unlock(&g.lock);
    return fails ? TM_STATUS_UNAVAILABLE : TM_OK;
}

tm_status tm_model_forward(tm_model *m, const tm_batch *b, float *logits)
{
    if (m->begun != m->ended)
        return TM_STATUS_INVALID;
    tm_status st = compute(m, b, m->rank == 0 ? logits : NULL);
    m->n_picks = 0;
    return st;
}

bool tm_model_can_pick(const tm_model *m)
{
    (void)m;
    return g.o.pick;
}

/* The step is computed at its begin; what it chose is told at its end, and known to the step behind it as on a device. */
tm_status tm_model_begin(tm_model *m, const tm_batch *b)
{
    float row[FAKE_VOCAB];
    flight *f = &m->flights[m->begun % TM_MODEL_FLIGHTS];
    if (m->begun - m->ended == TM_MODEL_FLIGHTS)
        return TM_STATUS_INVALID;
    tm_status st = compute(m, b, NULL);
    pthread_mutex_lock(&g.lock);
    g.picks[m->rank]++;
    g.ahead[m->rank] += m->begun - m->ended == 1;
    pthread_mutex_unlock(&g.lock);
    m->n_picks = f->n = b->n_logits;
    for (int r = 0; r < b->n_logits; r++) {
        int32_t best = 0;
        row_logits(m, b, b->logit_rows[r], row);
        for (int i = 1; i < FAKE_VOCAB; i++)
            best = row[i] > row[best] ? i : best;
        m->picks[r] = f->picked[r] = isfinite(row[0]) ? best : -1;
    }
    m->begun++;
    return st;
}

tm_status tm_model_end(tm_model *m, int32_t *picked)
{
    const flight *f = &m->flights[m->ended % TM_MODEL_FLIGHTS];
    if (m->begun == m->ended)
        return TM_STATUS_INVALID;
    if (picked)
        memcpy(picked, f->picked, (size_t)f->n * sizeof(*picked));
    m->ended++;
    pthread_mutex_lock(&g.lock);
    bool fails = m->rank == 0 && m->ended == g.o.fail_at_end;
    pthread_mutex_unlock(&g.lock);
    return fails ? TM_STATUS_UNAVAILABLE : TM_OK;
}

/* This device only picks. */
bool tm_model_can_sample(const tm_model *m)
{
    (void)m;
    return false;
}

int tm_model_edits_max(const tm_model *m)
{
    (void)m;
    return 0;
}

tm_status tm_model_begin_sample(tm_model *m, const tm_batch *b, const tm_sample_set *set)
{
    (void)m, (void)b, (void)set;
    return TM_STATUS_INVALID;
}

const tm_sample_detail *tm_model_details(const tm_model *m)
{
    (void)m;
    return NULL;
}

int tm_model_in_flight(const tm_model *m)
{
    return m->begun - m->ended;
}

int32_t tm_model_rope_len(const tm_model *m, size_t prompt_len)
{
    (void)m;
    (void)prompt_len;
    return 0;
}

tm_status tm_model_profile(tm_model *m, tm_profile_row *rows, int max, int *count)
{
    (void)m;
    (void)rows;
    (void)max;
    (void)count;
    return TM_STATUS_UNSUPPORTED;
}
