/* See dispatch_worker.h. One lock guards everything; the generator thread makes a step of all sequences at a
 * time and sends one message per stream, as a real group does. */
#include "tests/router/dispatch_worker.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/file.h"
#include "net/rpc/rpc.h"
#include "proto/worker.pb-c.h"

#define PB(name)      Turbomesh__Worker__V1__##name
#define SEQS_MAX      4096
#define SESSIONS_MAX  16
#define QUEUE_MAX     ((size_t)4 << 20) /* a generator without pause waits here */
#define LOAD_EVERY_MS 80

typedef struct seq {
    uint64_t id;
    int32_t first, have, max_tokens, prompt_len;
    bool admitted, logprobs, prompt_logprobs;
} seq;

typedef struct session {
    fake_worker *w;
    tm_rpc_call *call; /* NULL = free */
    seq *seqs;
    int count;
    uint64_t submits;
} session;

struct fake_worker {
    fake_worker_opts o;
    char address[64];
    tm_rpc_server *server;
    pthread_mutex_t lock;
    pthread_t thread;
    bool stop, frozen, draining;
    session sessions[SESSIONS_MAX];
    uint64_t cancels;
    int64_t load_ms;
    uint8_t *pack;
    size_t pack_cap;
    PB(RequestEvent) events[SEQS_MAX];
    PB(RequestEvent) * ptrs[SEQS_MAX];
    int32_t tokens[SEQS_MAX];
    PB(TokenLogprob) lps[SEQS_MAX], *lpp[SEQS_MAX];
};

int32_t fake_worker_token(int vocab, int32_t first, int pos)
{
    uint64_t x = ((uint64_t)(uint32_t)first << 32 | (uint32_t)pos) * 0x9e3779b97f4a7c15u;
    return (int32_t)((x >> 33) % (uint64_t)vocab);
}

static void send_packed(fake_worker *w, tm_rpc_call *call, const ProtobufCMessage *m)
{
    size_t size = protobuf_c_message_get_packed_size(m);
    if (size > w->pack_cap) {
        w->pack = realloc(w->pack, size);
        TM_ASSERT(w->pack != NULL);
        w->pack_cap = size;
    }
    protobuf_c_message_pack(m, w->pack);
    (void)tm_rpc_call_send(call, w->pack, size);
}

static void send_hello(fake_worker *w, session *s)
{
    PB(Hello) h = TURBOMESH__WORKER__V1__HELLO__INIT;
    PB(WorkerMessage) m = TURBOMESH__WORKER__V1__WORKER_MESSAGE__INIT;
    char digest[] = "feed";
    m.epoch = h.epoch = w->o.epoch;
    h.group = (char *)w->o.group;
    h.model = (char *)w->o.model;
    h.digest = digest;
    h.has_max_batch_size = h.has_queue_max = h.has_max_context = h.has_vocab = 1;
    h.max_batch_size = (uint32_t)w->o.max_batch;
    h.queue_max = (uint32_t)w->o.max_batch;
    h.max_context = 1 << 20;
    h.vocab = (uint32_t)w->o.vocab;
    m.m_case = TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_HELLO;
    m.hello = &h;
    send_packed(w, s->call, &m.base);
}

static void send_load(fake_worker *w, session *s)
{
    PB(LoadReport) l = TURBOMESH__WORKER__V1__LOAD_REPORT__INIT;
    PB(WorkerMessage) m = TURBOMESH__WORKER__V1__WORKER_MESSAGE__INIT;
    l.has_state = l.has_running = l.has_prefill_tps = l.has_step_ms = l.has_last_submit_seq = 1;
    l.state = w->draining ? TURBOMESH__WORKER__V1__LOAD_REPORT__STATE__DRAINING
                          : TURBOMESH__WORKER__V1__LOAD_REPORT__STATE__READY;
    l.running = (uint32_t)s->count;
    l.prefill_tps = 1e5f;
    l.step_ms = 1.0f;
    l.last_submit_seq = s->submits;
    m.epoch = w->o.epoch;
    m.m_case = TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_LOAD;
    m.load = &l;
    send_packed(w, s->call, &m.base);
}

static void send_events(fake_worker *w, session *s, size_t n)
{
    PB(StepEvents) st = TURBOMESH__WORKER__V1__STEP_EVENTS__INIT;
    PB(WorkerMessage) m = TURBOMESH__WORKER__V1__WORKER_MESSAGE__INIT;
    st.n_event = n;
    st.event = w->ptrs;
    m.epoch = w->o.epoch;
    m.m_case = TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_STEP;
    m.step = &st;
    send_packed(w, s->call, &m.base);
}

static bool step_seq(fake_worker *w, seq *q, size_t i)
{
    PB(RequestEvent) *e = w->ptrs[i] = &w->events[i];
    turbomesh__worker__v1__request_event__init(e);
    e->id = q->id;
    if (!q->admitted) {
        q->admitted = true;
        e->has_admitted = e->has_prompt_tokens = e->has_cached_tokens = 1;
        e->admitted = 1;
        e->prompt_tokens = (uint32_t)q->prompt_len;
    }
    w->tokens[i] = fake_worker_token(w->o.vocab, q->first, q->have);
    e->has_first_pos = 1;
    e->first_pos = (uint32_t)q->have++;
    e->n_token = 1;
    e->token = &w->tokens[i];
    if (q->logprobs) {
        turbomesh__worker__v1__token_logprob__init(&w->lps[i]);
        w->lps[i].logprob = -1.5f;
        w->lpp[i] = &w->lps[i];
        e->n_logprob = 1;
        e->logprob = &w->lpp[i];
    }
    bool stop = w->tokens[i] == w->o.stop_id;
    if (!stop && q->have < q->max_tokens)
        return true;
    e->has_finish = 1;
    e->finish = stop ? TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_STOP
                     : TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_LENGTH;
    return false;
}

static void step_session(fake_worker *w, session *s)
{
    size_t n = 0;
    int kept = 0;
    if (tm_rpc_call_queued(s->call) > QUEUE_MAX)
        return;
    for (int i = 0; i < s->count; i++) {
        seq q = s->seqs[i];
        if ((int)n >= w->o.max_batch || step_seq(w, &q, n++))
            s->seqs[kept++] = q;
    }
    s->count = kept;
    if (n > 0)
        send_events(w, s, n);
}

static void *generate(void *arg)
{
    fake_worker *w = arg;
    pthread_mutex_lock(&w->lock);
    while (!w->stop) {
        int64_t now = tm_clock_ms();
        bool load = now - w->load_ms >= LOAD_EVERY_MS, busy = false;
        if (load)
            w->load_ms = now;
        for (int i = 0; i < SESSIONS_MAX && !w->frozen; i++) {
            session *s = &w->sessions[i];
            if (s->call == NULL)
                continue;
            if (load)
                send_load(w, s);
            step_session(w, s);
            busy = busy || s->count > 0;
        }
        pthread_mutex_unlock(&w->lock);
        if (w->o.step_us > 0 || !busy)
            usleep((useconds_t)(w->o.step_us > 0 ? w->o.step_us : 1000));
        pthread_mutex_lock(&w->lock);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

/* ---- Attach ---- */

static void *attach_open(void *service, tm_rpc_call *call)
{
    fake_worker *w = service;
    pthread_mutex_lock(&w->lock);
    session *s = NULL;
    for (int i = 0; i < SESSIONS_MAX && s == NULL; i++)
        if (w->sessions[i].call == NULL)
            s = &w->sessions[i];
    TM_ASSERT(s != NULL);
    if (s->seqs == NULL)
        s->seqs = calloc(SEQS_MAX, sizeof(seq));
    TM_ASSERT(s->seqs != NULL);
    *s = (session){w, call, s->seqs, 0, 0};
    if (!w->frozen)
        send_hello(w, s);
    pthread_mutex_unlock(&w->lock);
    return s;
}

static void reject(fake_worker *w, session *s, uint64_t id, PB(RejectReason) why)
{
    PB(RequestEvent) *e = w->ptrs[0] = &w->events[0];
    turbomesh__worker__v1__request_event__init(e);
    e->id = id;
    e->has_reject = 1;
    e->reject = why;
    send_events(w, s, 1);
}

static void submit(fake_worker *w, session *s, const PB(Submit) * sub)
{
    s->submits++;
    if (w->draining || s->count == SEQS_MAX) {
        reject(w, s, sub->id,
               w->draining ? TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_DRAINING
                           : TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_BUSY);
        return;
    }
    seq q = {.id = sub->id, .first = sub->prompt[0], .have = (int32_t)sub->n_generated};
    q.max_tokens = sub->max_tokens;
    q.prompt_len = (int32_t)sub->n_prompt;
    q.logprobs = sub->sampling->logprobs >= 0;
    for (int i = 0; i < q.have; i++)
        TM_ASSERT(sub->generated[i] == fake_worker_token(w->o.vocab, q.first, i));
    s->seqs[s->count++] = q;
}

static void attach_message(void *user, tm_rpc_call *call, const void *data, size_t len)
{
    session *s = user;
    fake_worker *w = s->w;
    (void)call;
    PB(RouterMessage) *m = turbomesh__worker__v1__router_message__unpack(NULL, len, data);
    TM_ASSERT(m != NULL);
    pthread_mutex_lock(&w->lock);
    if (m->m_case == TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_SUBMIT)
        submit(w, s, m->submit);
    if (m->m_case == TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_CANCEL) {
        w->cancels++;
        for (int i = 0; i < s->count; i++)
            if (s->seqs[i].id == m->cancel->id)
                s->seqs[i--] = s->seqs[--s->count];
    }
    pthread_mutex_unlock(&w->lock);
    turbomesh__worker__v1__router_message__free_unpacked(m, NULL);
}

static void attach_half_close(void *user, tm_rpc_call *call)
{
    (void)user;
    tm_rpc_call_finish(call, TM_OK, NULL);
}

static void attach_close(void *user, tm_rpc_call *call, bool cancelled)
{
    session *s = user;
    (void)call;
    (void)cancelled;
    pthread_mutex_lock(&s->w->lock);
    s->call = NULL;
    s->count = 0;
    pthread_mutex_unlock(&s->w->lock);
}

/* ---- GetModelAssets ---- */

static void *assets_open(void *service, tm_rpc_call *call)
{
    (void)call;
    return service;
}

static void assets_message(void *user, tm_rpc_call *call, const void *data, size_t len)
{
    static const char *const NAMES[] = {"config.json", "generation_config.json", "tokenizer.json",
                                        "tokenizer_config.json"};
    fake_worker *w = user;
    (void)data;
    (void)len;
    PB(AssetsReply) r = TURBOMESH__WORKER__V1__ASSETS_REPLY__INIT;
    PB(Asset) asset[4], *ptr[4];
    char digest[] = "feed", path[512];
    char *text[4] = {NULL};
    r.digest = digest;
    r.asset = ptr;
    for (size_t i = 0; w->o.model_dir != NULL && i < TM_ARRAY_LEN(NAMES); i++) {
        size_t n;
        snprintf(path, sizeof(path), "%s/%s", w->o.model_dir, NAMES[i]);
        if (tm_file_read(path, (size_t)32 << 20, &text[i], &n, NULL) != TM_OK)
            continue;
        turbomesh__worker__v1__asset__init(&asset[i]);
        asset[i].name = (char *)NAMES[i];
        asset[i].data.data = (uint8_t *)text[i];
        asset[i].data.len = n;
        ptr[r.n_asset++] = &asset[i];
    }
    pthread_mutex_lock(&w->lock);
    send_packed(w, call, &r.base);
    pthread_mutex_unlock(&w->lock);
    tm_rpc_call_finish(call, TM_OK, NULL);
    for (int i = 0; i < 4; i++)
        free(text[i]);
}

static void assets_close(void *user, tm_rpc_call *call, bool cancelled)
{
    (void)user;
    (void)call;
    (void)cancelled;
}

/* ---- life ---- */

fake_worker *fake_worker_start(const fake_worker_opts *opts)
{
    static const tm_rpc_method METHODS[] = {
        {"/turbomesh.worker.v1.Worker/Attach", attach_open, attach_message, attach_half_close,
         attach_close},
        {"/turbomesh.worker.v1.Worker/GetModelAssets", assets_open, assets_message, NULL,
         assets_close},
    };
    fake_worker *w = calloc(1, sizeof(*w));
    TM_ASSERT(w != NULL);
    w->o = *opts;
    snprintf(w->address, sizeof(w->address), "127.0.0.1:%d", opts->port);
    pthread_mutex_init(&w->lock, NULL);
    tm_rpc_server_opts so = {
        .address = w->address, .methods = METHODS, .method_count = 2, .service = w};
    tm_err err = TM_ERR_INIT;
    if (tm_rpc_server_create(&w->server, &so, &err) != TM_OK) {
        fprintf(stderr, "fake worker: %s\n", err.msg);
        abort();
    }
    TM_ASSERT(pthread_create(&w->thread, NULL, generate, w) == 0);
    return w;
}

int fake_worker_port(const fake_worker *w)
{
    return tm_rpc_server_port(w->server);
}

void fake_worker_stop(fake_worker *w)
{
    pthread_mutex_lock(&w->lock);
    w->stop = true;
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    tm_rpc_server_destroy(w->server, 0);
    for (int i = 0; i < SESSIONS_MAX; i++)
        free(w->sessions[i].seqs);
    pthread_mutex_destroy(&w->lock);
    free(w->pack);
    free(w);
}

void fake_worker_drain(fake_worker *w)
{
    pthread_mutex_lock(&w->lock);
    w->draining = true;
    for (int k = 0; k < SESSIONS_MAX; k++) {
        session *s = &w->sessions[k];
        for (int i = 0; s->call != NULL && i < s->count; i++) {
            PB(RequestEvent) *e = w->ptrs[i] = &w->events[i];
            turbomesh__worker__v1__request_event__init(e);
            e->id = s->seqs[i].id;
            e->has_finish = 1;
            e->finish = TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_HANDBACK;
        }
        if (s->call != NULL && s->count > 0)
            send_events(w, s, (size_t)s->count);
        s->count = 0;
    }
    pthread_mutex_unlock(&w->lock);
}

void fake_worker_freeze(fake_worker *w, bool frozen)
{
    pthread_mutex_lock(&w->lock);
    w->frozen = frozen;
    pthread_mutex_unlock(&w->lock);
}

int fake_worker_running(fake_worker *w)
{
    pthread_mutex_lock(&w->lock);
    int n = 0;
    for (int i = 0; i < SESSIONS_MAX; i++)
        n += w->sessions[i].call != NULL ? w->sessions[i].count : 0;
    pthread_mutex_unlock(&w->lock);
    return n;
}

uint64_t fake_worker_cancels(fake_worker *w)
{
    pthread_mutex_lock(&w->lock);
    uint64_t n = w->cancels;
    pthread_mutex_unlock(&w->lock);
    return n;
}
