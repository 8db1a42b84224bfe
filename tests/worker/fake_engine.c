/* The fake engine: one array of live requests, a step thread (or steps by hand), one queue of batches. */
#include "tests/worker/fake_engine.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/file.h"
#include "common/hash.h"
#include "common/json.h"

#define BATCHES_MAX 64 /* undelivered steps before the engine pauses */

typedef struct fake_req {
    uint64_t id, hash;
    size_t prompt_len;
    int32_t pos, max_tokens, prompt_logprobs;
    int logprobs;
    bool admitted, cancelled;
    int32_t *prompt; /* kept only for prompt log-probabilities */
} fake_req;

typedef struct fake_batch {
    struct fake_batch *next;
    tm_step_events ev;
} fake_batch;

struct tm_engine {
    tm_fake_opts o;
    tm_engine_info info;
    pthread_mutex_t lock;
    pthread_cond_t ready, room;
    pthread_t thread;
    bool threaded, closed, lost, woken;
    fake_req *req;
    int count, cap, batches, cancels;
    fake_batch *head, *tail;
    tm_engine_stats stats;
};

tm_fake_opts tm_fake_opts_default(void)
{
    return (tm_fake_opts){.max_batch_size = 4096, .queue_max = 4096, .max_context = 1 << 20};
}

/* The prompt's hash stands for its text; ids below 256 are left to special and stop tokens. */
static int32_t token_at(uint64_t hash, int64_t pos, int vocab)
{
    uint64_t x = hash + (uint64_t)pos * 0x9e3779b97f4a7c15ull;
    x ^= x >> 31;
    x *= 0xbf58476d1ce4e5b9ull;
    x ^= x >> 29;
    int low = vocab > 512 ? 256 : 1;
    return low + (int32_t)(x % (uint64_t)(vocab - low));
}

int32_t tm_fake_token(const int32_t *prompt, size_t len, int64_t pos, int vocab)
{
    return token_at(tm_hash64(prompt, len * sizeof(*prompt), 0), pos, vocab);
}

/* ---- model information ---- */

static tm_status read_info(tm_engine *e, tm_err *err)
{
    tm_model_info *m = &e->info.model;
    char path[4096], *data = NULL;
    size_t len = 0;
    uint8_t sum[32];
    json_t *config = NULL;
    const char *slash = strrchr(e->o.model_dir, '/');
    snprintf(m->name, sizeof(m->name), "%s", slash && slash[1] ? slash + 1 : e->o.model_dir);
    if (!tm_path_join(path, sizeof(path), e->o.model_dir, "config.json"))
        return TM_FAIL(err, TM_STATUS_CONFIG, "path too long");
    TM_TRY(tm_file_read(path, (size_t)1 << 20, &data, &len, err));
    tm_sha256(data, len, sum);
    tm_hex(sum, sizeof(sum), m->digest);
    tm_status st = tm_json_parse(data, len, &config, err);
    free(data);
    if (st != TM_OK)
        return st;
    int64_t vocab = 32000, eos = -1;
    st = tm_json_int(config, "vocab_size", 2, 1 << 24, &vocab, err);
    json_t *ids = tm_json_get(config, "eos_token_id");
    for (size_t i = 0; st == TM_OK && json_is_array(ids) && i < json_array_size(ids); i++)
        if (m->stop_count < (int)TM_ARRAY_LEN(m->stop_ids))
            m->stop_ids[m->stop_count++] = (int32_t)json_integer_value(json_array_get(ids, i));
    if (st == TM_OK && json_is_integer(ids) &&
        tm_json_int(config, "eos_token_id", 0, INT32_MAX, &eos, err) == TM_OK)
        m->stop_ids[m->stop_count++] = (int32_t)eos;
    json_decref(config);
    m->vocab = e->o.vocab ? e->o.vocab : (int)vocab;
    m->max_positions = e->o.max_context;
    m->tp = 1;
    snprintf(m->device, sizeof(m->device), "fake");
    snprintf(m->dtype, sizeof(m->dtype), "none");
    e->info.block_tokens = 64;
    e->info.blocks_total = 65536;
    e->info.max_batch_size = e->o.max_batch_size;
    e->info.queue_max = e->o.queue_max;
    e->info.max_prefill_token_num = 8192;
    return st;
}

/* ---- one step ---- */

typedef struct batch_build {
    tm_event *ev;
    tm_top_logprob *tops;
    int count, cap, top_count, top_cap;
} batch_build;

static tm_event *add_event(batch_build *b, tm_event_kind kind, uint64_t id)
{
    if (b->count == b->cap) {
        b->cap = b->cap ? b->cap * 2 : 64;
        b->ev = realloc(b->ev, (size_t)b->cap * sizeof(*b->ev));
        TM_ASSERT(b->ev != NULL);
    }
    tm_event *e = &b->ev[b->count++];
    memset(e, 0, sizeof(*e));
    e->kind = kind;
    e->request = id;
    return e;
}

static void add_logprob(batch_build *b, tm_event *e, int tops)
{
    e->logprob = -0.5f * (float)(e->pos + 1);
    e->top_first = b->top_count;
    e->top_count = tops;
    while (b->top_count + tops > b->top_cap) {
        b->top_cap = b->top_cap ? b->top_cap * 2 : 64;
        b->tops = realloc(b->tops, (size_t)b->top_cap * sizeof(*b->tops));
        TM_ASSERT(b->tops != NULL);
    }
    for (int i = 0; i < tops; i++)
        b->tops[b->top_count++] = (tm_top_logprob){e->token + i, e->logprob - (float)i};
}

static void add_finish(batch_build *b, uint64_t id, tm_finish f)
{
    add_event(b, TM_EVENT_FINISHED, id)->finish = f;
}

static void admit(batch_build *b, fake_req *r)
{
    tm_event *e = add_event(b, TM_EVENT_ADMITTED, r->id);
    e->prompt_tokens = (int32_t)r->prompt_len;
    r->admitted = true;
    if (r->prompt_logprobs < 0)
        return;
    for (size_t i = 1; i < r->prompt_len; i++) {
        e = add_event(b, TM_EVENT_PROMPT_LOGPROB, r->id);
        e->pos = (int32_t)i;
        e->token = r->prompt[i];
        add_logprob(b, e, r->prompt_logprobs);
    }
}

/* Returns true when the request is over. */
static bool step_request(tm_engine *e, batch_build *b, fake_req *r)
{
    if (r->cancelled) {
        add_finish(b, r->id, TM_FINISH_CANCELLED);
        return true;
    }
    if (!r->admitted)
        admit(b, r);
    if (r->pos < r->max_tokens) {
        tm_event *t = add_event(b, TM_EVENT_TOKEN, r->id);
        t->pos = r->pos;
        t->token = token_at(r->hash, r->pos, e->info.model.vocab);
        if (r->logprobs >= 0)
            add_logprob(b, t, r->logprobs);
        r->pos++;
        e->stats.generated_tokens++;
    }
    if (e->o.tokens_stop > 0 && r->pos >= e->o.tokens_stop)
        add_finish(b, r->id, TM_FINISH_STOP);
    else if (r->pos >= r->max_tokens)
        add_finish(b, r->id, TM_FINISH_LENGTH);
    else
        return false;
    return true;
}

static void push_batch(tm_engine *e, const batch_build *b)
{
    fake_batch *q = calloc(1, sizeof(*q));
    TM_ASSERT(q != NULL);
    q->ev.step = e->stats.steps;
    q->ev.count = b->count;
    q->ev.events = b->ev;
    q->ev.tops = b->tops;
    if (e->tail)
        e->tail->next = q;
    else
        e->head = q;
    e->tail = q;
    e->batches++;
    pthread_cond_broadcast(&e->ready);
}

static void run_step(tm_engine *e)
{
    batch_build b = {0};
    int kept = 0, running = 0;
    e->stats.steps++;
    for (int i = 0; i < e->count; i++) {
        fake_req *r = &e->req[i];
        bool runs = r->admitted || running < e->o.max_batch_size;
        bool over = (runs || r->cancelled) && step_request(e, &b, r);
        if (over) {
            free(r->prompt);
            e->stats.finished++;
        } else {
            running += r->admitted;
            e->req[kept++] = *r;
        }
    }
    e->count = kept;
    e->stats.running = running;
    e->stats.waiting = kept - running;
    if (b.count)
        push_batch(e, &b);
}

static void *step_loop(void *arg)
{
    tm_engine *e = arg;
    int64_t next = tm_clock_ns();
    pthread_mutex_lock(&e->lock);
    while (!e->closed) {
        while (!e->closed && (e->count == 0 || e->batches >= BATCHES_MAX)) {
            pthread_cond_wait(&e->room, &e->lock);
            next = tm_clock_ns();
        }
        if (e->closed)
            break;
        run_step(e);
        pthread_mutex_unlock(&e->lock);
        next += e->o.step_us * 1000;
        if (next < tm_clock_ns() - 100000000) /* far behind: do not run after lost time */
            next = tm_clock_ns();
        struct timespec ts = {next / 1000000000, next % 1000000000};
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL) == EINTR)
            continue;
        pthread_mutex_lock(&e->lock);
    }
    pthread_mutex_unlock(&e->lock);
    return NULL;
}

/* ---- engine.h ---- */

tm_status tm_fake_open(tm_engine **out, const tm_fake_opts *opts, tm_err *err)
{
    tm_engine *e = calloc(1, sizeof(*e));
    if (!e)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    e->o = *opts;
    pthread_mutex_init(&e->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&e->ready, &attr);
    pthread_cond_init(&e->room, &attr);
    pthread_condattr_destroy(&attr);
    tm_status st = read_info(e, err);
    e->stats.blocks_total = e->info.blocks_total;
    e->cap = e->o.queue_max + e->o.max_batch_size;
    e->req = calloc((size_t)e->cap, sizeof(*e->req));
    TM_ASSERT(e->req != NULL);
    if (st == TM_OK && e->o.step_us >= 0) {
        TM_ASSERT(pthread_create(&e->thread, NULL, step_loop, e) == 0);
        e->threaded = true;
    }
    if (st != TM_OK) {
        tm_engine_close(e);
        return st;
    }
    *out = e;
    return TM_OK;
}

void tm_engine_close(tm_engine *e)
{
    if (!e)
        return;
    pthread_mutex_lock(&e->lock);
    e->closed = true;
    pthread_cond_broadcast(&e->ready);
    pthread_cond_broadcast(&e->room);
    pthread_mutex_unlock(&e->lock);
    if (e->threaded)
        pthread_join(e->thread, NULL);
    while (e->head) {
        fake_batch *q = e->head;
        e->head = q->next;
        tm_engine_events_free(&q->ev);
    }
    for (int i = 0; i < e->count; i++)
        free(e->req[i].prompt);
    free(e->req);
    pthread_mutex_destroy(&e->lock);
    pthread_cond_destroy(&e->ready);
    pthread_cond_destroy(&e->room);
    free(e);
}

const tm_engine_info *tm_engine_info_get(const tm_engine *e)
{
    return &e->info;
}

static tm_status check_ids(const tm_engine *e, const int32_t *ids, size_t n, tm_err *err)
{
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= e->info.model.vocab)
            return TM_FAIL(err, TM_STATUS_INVALID, "token id %d is outside the vocabulary of %d",
                           ids[i], e->info.model.vocab);
    return TM_OK;
}

tm_status tm_engine_submit(tm_engine *e, const tm_request *r, tm_err *err)
{
    if (r->prompt_len < 1)
        return TM_FAIL(err, TM_STATUS_INVALID, "the prompt is empty");
    TM_TRY(check_ids(e, r->prompt, r->prompt_len, err));
    TM_TRY(check_ids(e, r->generated, r->generated_len, err));
    fake_req q = {.id = r->id,
                  .prompt_len = r->prompt_len,
                  .pos = (int32_t)r->generated_len,
                  .max_tokens = r->max_tokens,
                  .logprobs = r->sampling.logprobs,
                  .prompt_logprobs = r->sampling.prompt_logprobs};
    q.hash = tm_hash64(r->prompt, r->prompt_len * sizeof(*r->prompt), 0);
    if (q.prompt_logprobs >= 0) {
        q.prompt = malloc(r->prompt_len * sizeof(*q.prompt));
        TM_ASSERT(q.prompt != NULL);
        memcpy(q.prompt, r->prompt, r->prompt_len * sizeof(*q.prompt));
    }
    tm_status st = TM_OK;
    pthread_mutex_lock(&e->lock);
    if (e->lost) {
        st = TM_FAIL(err, TM_STATUS_UNAVAILABLE, "the group is lost");
    } else if (e->stats.waiting >= e->o.queue_max || e->count >= e->cap) {
        st = TM_FAIL(err, TM_STATUS_BUSY, "the queue of %d requests is full", e->o.queue_max);
    } else {
        e->req[e->count++] = q;
        e->stats.waiting++;
        pthread_cond_broadcast(&e->room);
    }
    pthread_mutex_unlock(&e->lock);
    if (st != TM_OK)
        free(q.prompt);
    return st;
}

void tm_engine_cancel(tm_engine *e, uint64_t id)
{
    pthread_mutex_lock(&e->lock);
    for (int i = 0; i < e->count; i++)
        if (e->req[i].id == id && !e->req[i].cancelled) {
            e->req[i].cancelled = true;
            e->cancels++;
        }
    pthread_mutex_unlock(&e->lock);
}

tm_status tm_engine_wait(tm_engine *e, int64_t timeout_ms, tm_step_events **out)
{
    int64_t at = tm_clock_ns() + timeout_ms * 1000000;
    struct timespec ts = {at / 1000000000, at % 1000000000};
    tm_status st = TM_OK;
    pthread_mutex_lock(&e->lock);
    while (!e->head && !e->closed && !e->lost && !e->woken && st == TM_OK)
        if (pthread_cond_timedwait(&e->ready, &e->lock, &ts) == ETIMEDOUT)
            st = TM_STATUS_TIMEOUT;
    if (e->head) {
        fake_batch *q = e->head;
        e->head = q->next;
        if (!e->head)
            e->tail = NULL;
        e->batches--;
        pthread_cond_broadcast(&e->room);
        *out = &q->ev;
        st = TM_OK;
    } else if (e->lost) {
        st = TM_STATUS_UNAVAILABLE;
    } else {
        st = e->closed ? TM_STATUS_CLOSED : TM_STATUS_TIMEOUT;
        e->woken = false;
    }
    pthread_mutex_unlock(&e->lock);
    return st;
}

void tm_engine_events_free(tm_step_events *ev)
{
    if (!ev)
        return;
    free(ev->events);
    free(ev->tops);
    free((char *)ev - offsetof(fake_batch, ev));
}

void tm_engine_wake(tm_engine *e)
{
    pthread_mutex_lock(&e->lock);
    e->woken = true;
    pthread_cond_broadcast(&e->ready);
    pthread_mutex_unlock(&e->lock);
}

void tm_engine_stats_get(tm_engine *e, tm_engine_stats *out)
{
    pthread_mutex_lock(&e->lock);
    *out = e->stats;
    pthread_mutex_unlock(&e->lock);
}

/* ---- controls ---- */

void tm_fake_step(tm_engine *e)
{
    pthread_mutex_lock(&e->lock);
    run_step(e);
    pthread_mutex_unlock(&e->lock);
}

void tm_fake_lose(tm_engine *e)
{
    pthread_mutex_lock(&e->lock);
    e->lost = true;
    pthread_cond_broadcast(&e->ready);
    pthread_mutex_unlock(&e->lock);
}

int tm_fake_live(tm_engine *e)
{
    pthread_mutex_lock(&e->lock);
    int n = e->count;
    pthread_mutex_unlock(&e->lock);
    return n;
}

int tm_fake_cancels(tm_engine *e)
{
    pthread_mutex_lock(&e->lock);
    int n = e->cancels;
    pthread_mutex_unlock(&e->lock);
    return n;
}

uint64_t tm_fake_tokens(tm_engine *e)
{
    pthread_mutex_lock(&e->lock);
    uint64_t n = e->stats.generated_tokens;
    pthread_mutex_unlock(&e->lock);
    return n;
}
