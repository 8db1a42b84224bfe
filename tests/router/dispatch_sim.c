/* The simulated cluster: see dispatch_sim.h. Events are kept in a heap by (time, order of creation). */
#include "tests/router/dispatch_sim.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/check.h"

#define MS INT64_C(1000000)

uint64_t sim_random(sim *s)
{
    uint64_t x = s->rng;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    s->rng = x;
    return (x * 0x2545f4914f6cdd1du) >> 11;
}

int32_t sim_token(uint32_t key, int pos)
{
    uint64_t x = ((uint64_t)key << 32 | (uint32_t)pos) * 0x9e3779b97f4a7c15u;
    x ^= x >> 29;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 32;
    int32_t t = 10 + (int32_t)(x % (SIM_VOCAB - 10));
    return pos > 3 && x % 97 == 0 ? SIM_STOP : t;
}

int sim_expected(uint32_t key, int max_tokens, tm_gen_finish *finish)
{
    *finish = TM_GEN_LENGTH;
    for (int i = 0; i < max_tokens; i++)
        if (sim_token(key, i) == SIM_STOP) {
            *finish = TM_GEN_STOP;
            return i + 1;
        }
    return max_tokens;
}

/* ---- events ---- */

static bool earlier(const sim_event *a, const sim_event *b)
{
    return a->at_ns != b->at_ns ? a->at_ns < b->at_ns : a->order < b->order;
}

static void push_event(sim *s, sim_event e)
{
    if (s->event_count == s->event_cap) {
        s->event_cap = TM_MAX(256, s->event_cap * 2);
        s->events = realloc(s->events, (size_t)s->event_cap * sizeof(*s->events));
        assert_non_null(s->events);
    }
    e.order = ++s->order;
    int i = s->event_count++;
    while (i > 0 && earlier(&e, &s->events[(i - 1) / 2])) {
        s->events[i] = s->events[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    s->events[i] = e;
}

static sim_event pop_event(sim *s)
{
    sim_event top = s->events[0], last = s->events[--s->event_count];
    int i = 0;
    for (;;) {
        int c = 2 * i + 1;
        if (c >= s->event_count)
            break;
        if (c + 1 < s->event_count && earlier(&s->events[c + 1], &s->events[c]))
            c++;
        if (!earlier(&s->events[c], &last))
            break;
        s->events[i] = s->events[c];
        i = c;
    }
    s->events[i] = last;
    return top;
}

static struct sim_link *link_of(sim *s, uint64_t id)
{
    for (int i = s->link_count - 1; i >= 0; i--)
        if (s->links[i].id == id)
            return &s->links[i];
    return NULL;
}

/* In order per link, 0.1 to 1 ms later. */
static void deliver(sim *s, struct sim_link *l, unsigned char *data, size_t len)
{
    int64_t at = s->now_ns + MS / 10 + (int64_t)(sim_random(s) % (9 * MS / 10));
    at = TM_MAX(at, l->last_at_ns);
    l->last_at_ns = at;
    push_event(s, (sim_event){.at_ns = at, .link_id = l->id, .data = data, .len = len});
}

static void send_worker(sim *s, struct sim_link *l, tm_wire_worker_message *m)
{
    m->epoch = s->groups[l->group].hello_old ? 1 : l->epoch;
    size_t len = protobuf_c_message_get_packed_size(&m->base);
    unsigned char *data = malloc(len + 1);
    assert_non_null(data);
    protobuf_c_message_pack(&m->base, data);
    deliver(s, l, data, len);
}

/* ---- a group's side ---- */

static void send_hello(sim *s, struct sim_link *l)
{
    sim_group *g = &s->groups[l->group];
    Turbomesh__Worker__V1__Hello h = TURBOMESH__WORKER__V1__HELLO__INIT;
    tm_wire_worker_message m = TURBOMESH__WORKER__V1__WORKER_MESSAGE__INIT;
    h.epoch = g->hello_old ? 1 : g->epoch;
    h.group = g->name;
    h.model = g->model;
    h.digest = g->digest;
    h.has_max_batch_size = h.has_queue_max = h.has_max_context = h.has_vocab = 1;
    h.max_batch_size = (uint32_t)g->max_batch;
    h.queue_max = (uint32_t)g->queue_max;
    h.max_context = 4096;
    h.vocab = SIM_VOCAB;
    m.m_case = TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_HELLO;
    m.hello = &h;
    send_worker(s, l, &m);
}

static bool link_serves(const sim *s, const struct sim_link *l, const sim_group *g)
{
    return l->open && l->up && &s->groups[l->group] == g && l->epoch == g->epoch;
}

static void send_load(sim *s, sim_group *g)
{
    int running = 0, waiting = 0;
    int64_t tokens = 0;
    for (int i = 0; i < SIM_SEQS; i++) {
        running += g->seqs[i].used && g->seqs[i].admitted;
        waiting += g->seqs[i].used && !g->seqs[i].admitted;
        tokens += g->seqs[i].used && !g->seqs[i].admitted ? g->seqs[i].prompt_len : 0;
    }
    for (int i = 0; i < s->link_count; i++) {
        struct sim_link *l = &s->links[i];
        if (!link_serves(s, l, g))
            continue;
        tm_wire_load r = TURBOMESH__WORKER__V1__LOAD_REPORT__INIT;
        tm_wire_worker_message m = TURBOMESH__WORKER__V1__WORKER_MESSAGE__INIT;
        r.has_state = r.has_last_submit_seq = 1;
        r.state = g->draining ? TURBOMESH__WORKER__V1__LOAD_REPORT__STATE__DRAINING
                              : TURBOMESH__WORKER__V1__LOAD_REPORT__STATE__READY;
        r.has_running = r.has_waiting = r.has_waiting_tokens = r.has_prefill_tps = r.has_step_ms =
            1;
        r.running = (uint32_t)running;
        r.waiting = (uint32_t)waiting;
        r.waiting_tokens = (uint64_t)tokens;
        r.prefill_tps = (float)g->prefill_tps;
        r.step_ms = (float)((double)g->step_ns / 1e6);
        r.has_blocks_total = r.has_blocks_used = 1;
        r.blocks_total = 100;
        r.blocks_used = (uint32_t)running;
        r.last_submit_seq = (uint64_t)l->submits;
        m.m_case = TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_LOAD;
        m.load = &r;
        send_worker(s, l, &m);
    }
}

/* One event of one request, with up to 20 tokens and prompt positions. */
typedef struct wire_step {
    tm_wire_event e;
    int32_t token[20], prompt_token[SIM_PROMPT + 8];
    tm_wire_logprob lp[SIM_PROMPT + 8], *lps[SIM_PROMPT + 8];
} wire_step;

static void send_step(sim *s, struct sim_link *l, wire_step *w)
{
    Turbomesh__Worker__V1__StepEvents st = TURBOMESH__WORKER__V1__STEP_EVENTS__INIT;
    tm_wire_worker_message m = TURBOMESH__WORKER__V1__WORKER_MESSAGE__INIT;
    tm_wire_event *list[1] = {&w->e};
    st.n_event = 1;
    st.event = list;
    m.m_case = TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_STEP;
    m.step = &st;
    send_worker(s, l, &m);
}

static void send_reject(sim *s, struct sim_link *l, uint64_t id, int why)
{
    wire_step w = {.e = TURBOMESH__WORKER__V1__REQUEST_EVENT__INIT};
    w.e.id = id;
    w.e.has_reject = 1;
    w.e.reject = (Turbomesh__Worker__V1__RejectReason)why;
    send_step(s, l, &w);
}

static void add_prompt(wire_step *w, const sim_seq *q)
{
    int n = q->prompt_len - 1;
    for (int i = 0; i < n; i++) {
        turbomesh__worker__v1__token_logprob__init(&w->lp[i]);
        w->lp[i].logprob = -(float)(i + 1);
        w->lps[i] = &w->lp[i];
        w->prompt_token[i] = 100 + i;
    }
    w->e.has_first_prompt_pos = 1;
    w->e.first_prompt_pos = 1;
    w->e.n_prompt_token = w->e.n_prompt_logprob = (size_t)n;
    w->e.prompt_token = w->prompt_token;
    w->e.prompt_logprob = w->lps;
}

/* One step of one sequence: admission at first, then 1 to 3 tokens. */
static void step_seq(sim *s, sim_group *g, sim_seq *q)
{
    struct sim_link *l = link_of(s, q->link_id);
    wire_step w = {.e = TURBOMESH__WORKER__V1__REQUEST_EVENT__INIT};
    w.e.id = q->id;
    if (!q->admitted) {
        q->admitted = true;
        w.e.has_admitted = w.e.has_prompt_tokens = w.e.has_cached_tokens = 1;
        w.e.admitted = 1;
        w.e.prompt_tokens = (uint32_t)q->prompt_len;
        w.e.cached_tokens = 1;
        if (q->want_prompt)
            add_prompt(&w, q);
    }
    tm_gen_finish finish;
    int end = sim_expected(q->key, q->max_tokens, &finish);
    int first = q->have;
    if (g->doubling && first > 0)
        first--;
    int n = q->have >= end ? 0 : 1 + (int)(sim_random(s) % 3);
    n = TM_MIN(n, end - q->have);
    q->have += n;
    if (g->bad_position && q->have > 2) {
        g->bad_position = false;
        first++;
    }
    w.e.has_first_pos = 1;
    w.e.first_pos = (uint32_t)first;
    w.e.n_token = 0;
    for (int p = first; p < q->have; p++)
        w.token[w.e.n_token++] = sim_token(q->key, p);
    w.e.token = w.token;
    if (q->have >= end) {
        w.e.has_finish = 1;
        w.e.finish = finish == TM_GEN_STOP ? TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_STOP
                                           : TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_LENGTH;
        q->used = false;
    }
    send_step(s, l, &w);
}

static void step_group(sim *s, sim_group *g)
{
    int running = 0;
    for (int i = 0; i < SIM_SEQS; i++)
        running += g->seqs[i].used && g->seqs[i].admitted;
    for (int i = 0; i < SIM_SEQS; i++) {
        sim_seq *q = &g->seqs[i];
        if (!q->used || q->held)
            continue;
        if (!q->admitted && running >= g->max_batch)
            continue;
        running += !q->admitted;
        step_seq(s, g, q);
    }
}

static void take_submit(sim *s, sim_group *g, struct sim_link *l,
                        const Turbomesh__Worker__V1__Submit *sub)
{
    l->submits++;
    g->submits++;
    if (g->draining || g->reject_busy) {
        send_reject(s, l, sub->id,
                    g->draining ? TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_DRAINING
                                : TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_BUSY);
        return;
    }
    if (sub->expected_epoch != g->epoch) {
        send_reject(s, l, sub->id, TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_STALE_EPOCH);
        return;
    }
    int live = 0, at = -1;
    for (int i = 0; i < SIM_SEQS; i++) {
        live += g->seqs[i].used;
        if (!g->seqs[i].used && at < 0)
            at = i;
        assert_false(g->seqs[i].used && g->seqs[i].link_id == l->id && g->seqs[i].id == sub->id);
    }
    if (at < 0 || live >= g->max_batch + g->queue_max) {
        send_reject(s, l, sub->id, TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_BUSY);
        return;
    }
    assert_int_equal(sub->n_prompt, SIM_PROMPT);
    sim_seq q = {.used = true, .id = sub->id, .link_id = l->id, .key = (uint32_t)sub->prompt[0]};
    q.prompt_len = (int)sub->n_prompt;
    q.max_tokens = sub->max_tokens;
    q.have = (int)sub->n_generated;
    q.want_prompt = sub->sampling->prompt_logprobs >= 0;
    /* What is to be continued must be exactly the beginning of the one right answer. */
    for (size_t i = 0; i < sub->n_generated; i++)
        assert_int_equal(sub->generated[i], sim_token(q.key, (int)i));
    assert_true(q.have < q.max_tokens);
    g->seqs[at] = q;
}

static void take_cancel(sim_group *g, const struct sim_link *l, uint64_t id)
{
    g->cancels++;
    for (int i = 0; i < SIM_SEQS; i++)
        if (g->seqs[i].used && g->seqs[i].link_id == l->id && g->seqs[i].id == id)
            g->seqs[i].used = false;
}

/* ---- transport ---- */

static int64_t sim_now(void *ctx)
{
    return ((sim *)ctx)->now_ns;
}

static tm_status sim_open(void *ctx, uint64_t link_id, const char *address, void **link)
{
    sim *s = ctx;
    assert_true(s->link_count < SIM_LINKS);
    struct sim_link *l = &s->links[s->link_count++];
    *l = (struct sim_link){.id = link_id, .group = -1, .open = true};
    for (int i = 0; i < s->group_count; i++)
        if (strcmp(s->groups[i].address, address) == 0)
            l->group = i;
    assert_true(l->group >= 0);
    sim_group *g = &s->groups[l->group];
    l->epoch = g->epoch;
    l->up = g->alive;
    if (!g->alive)
        deliver(s, l, NULL, 0);
    else if (!g->frozen)
        send_hello(s, l);
    *link = l;
    return TM_OK;
}

static tm_status sim_send(void *ctx, void *link, const void *data, size_t len)
{
    sim *s = ctx;
    struct sim_link *l = link;
    sim_group *g = &s->groups[l->group];
    assert_true(l->open);
    if (!l->up)
        return TM_OK; /* written into the void */
    tm_wire_router_message *m = turbomesh__worker__v1__router_message__unpack(NULL, len, data);
    assert_non_null(m);
    /* What a frozen group is sent it counts later, but forgets: a lost request must not hang. */
    if (m->m_case == TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_SUBMIT && g->frozen)
        l->submits++;
    else if (m->m_case == TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_SUBMIT)
        take_submit(s, g, l, m->submit);
    if (m->m_case == TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_CANCEL)
        take_cancel(g, l, m->cancel->id);
    turbomesh__worker__v1__router_message__free_unpacked(m, NULL);
    return TM_OK;
}

static void sim_close(void *ctx, void *link)
{
    sim *s = ctx;
    struct sim_link *l = link;
    assert_true(l->open);
    l->open = false;
    if (s->on_close != NULL)
        s->on_close(s, &s->groups[l->group]);
    for (int i = 0; i < SIM_SEQS; i++) {
        sim_seq *q = &s->groups[l->group].seqs[i];
        if (q->used && q->link_id == l->id)
            q->used = false;
    }
}

static tm_status sim_fetch(void *ctx, const char *address, const char *model, const char *digest)
{
    sim *s = ctx;
    (void)address;
    s->fetches++;
    if (s->fetch_due)
        return TM_STATUS_BUSY;
    s->fetch_due = true;
    strncpy(s->fetch_model, model, sizeof(s->fetch_model) - 1);
    strncpy(s->fetch_digest, digest, sizeof(s->fetch_digest) - 1);
    return TM_OK;
}

static void fetch_done(sim *s)
{
    s->fetch_due = false;
    tm_served *v = NULL;
    if (!s->fetch_fails) {
        v = calloc(1, sizeof(*v));
        assert_non_null(v);
        v->refs = 1;
        v->max_context = 4096;
        v->vocab = SIM_VOCAB;
        v->stop_ids[0] = SIM_STOP;
        v->stop_count = 1;
        memcpy(v->name, s->fetch_model, strlen(s->fetch_model) + 1);
        memcpy(v->digest, s->fetch_digest, strlen(s->fetch_digest) + 1);
    }
    tm_pool_on_served(s->pool, s->fetch_model, s->fetch_digest, v);
}

/* ---- running ---- */

void sim_init(sim *s, uint64_t seed)
{
    memset(s, 0, sizeof(*s));
    s->rng = seed * 0x9e3779b97f4a7c15u + 1;
    s->now_ns = 1000 * MS;
    s->metrics = tm_metrics_create();
}

tm_pool_opts sim_pool_opts(sim *s)
{
    return (tm_pool_opts){
        .transport = {s, sim_now, sim_open, sim_send, sim_close, sim_fetch},
        .metrics = s->metrics,
        .policy = TM_POLICY_COST,
        .queue_max = 1000,
        .queue_wait_ms = 10000,
        .dead_ms = 2000,
        .suspect_ms = 500,
        .moves_max = 3,
        .router_id = "sim",
        .seed = 1 + sim_random(s),
    };
}

void sim_deinit(sim *s)
{
    tm_pool_destroy(s->pool);
    tm_metrics_destroy(s->metrics);
    for (int i = 0; i < s->event_count; i++)
        free(s->events[i].data);
    free(s->events);
}

sim_group *sim_add(sim *s, const char *name)
{
    int i = s->group_count++;
    sim_group *g = &s->groups[i];
    *g = (sim_group){.epoch = 10, .alive = true, .max_batch = 8, .queue_max = 8};
    g->step_ns = 20 * MS;
    g->prefill_tps = 10000;
    strncpy(g->name, name, sizeof(g->name) - 1);
    snprintf(g->address, sizeof g->address, "%s", "10.0.0.1:700");
    g->address[strlen(g->address)] = (char)('0' + i);
    snprintf(g->model, sizeof g->model, "%s", "m");
    snprintf(g->digest, sizeof g->digest, "%s", "d1");
    return g;
}

void sim_list_only(sim *s, unsigned mask)
{
    tm_member items[SIM_GROUPS];
    tm_member_list l = {.items = items};
    memset(items, 0, sizeof(items));
    for (int i = 0; i < s->group_count; i++) {
        if (!(mask & 1u << i))
            continue;
        tm_member *m = &items[l.count++];
        snprintf(m->name, sizeof m->name, "%s", s->groups[i].name);
        snprintf(m->address, sizeof m->address, "%s", s->groups[i].address);
        m->epoch = s->groups[i].epoch;
    }
    tm_pool_on_members(s->pool, &l);
}

void sim_list(sim *s)
{
    sim_list_only(s, ~0u);
}

static void groups_due(sim *s)
{
    for (int i = 0; i < s->group_count; i++) {
        sim_group *g = &s->groups[i];
        if (!g->alive || g->frozen)
            continue;
        if (s->now_ns >= g->next_step_ns) {
            g->next_step_ns = s->now_ns + g->step_ns;
            step_group(s, g);
        }
        if (s->now_ns >= g->next_load_ns) {
            g->next_load_ns = s->now_ns + 100 * MS;
            send_load(s, g);
        }
    }
}

static void deliver_due(sim *s)
{
    while (s->event_count > 0 && s->events[0].at_ns <= s->now_ns) {
        sim_event e = pop_event(s);
        if (e.data == NULL) {
            tm_pool_on_closed(s->pool, e.link_id, "closed by the simulation");
            continue;
        }
        tm_wire_worker_message *m =
            turbomesh__worker__v1__worker_message__unpack(NULL, e.len, e.data);
        assert_non_null(m);
        tm_pool_on_message(s->pool, e.link_id, m, s->now_ns);
        turbomesh__worker__v1__worker_message__free_unpacked(m, NULL);
        free(e.data);
    }
}

void sim_run(sim *s, int64_t ms)
{
    int64_t end = s->now_ns + ms * MS;
    while (s->now_ns < end) {
        s->now_ns += MS;
        groups_due(s);
        deliver_due(s);
        if (s->fetch_due)
            fetch_done(s);
        if (s->now_ns >= s->next_tick_ns) {
            s->next_tick_ns = s->now_ns + TM_POOL_TICK_MS * MS;
            tm_pool_tick(s->pool);
        }
        assert_int_equal(tm_pool_in_flight(s->pool) + tm_pool_waiting(s->pool),
                         tm_pool_active(s->pool));
    }
}

void sim_run_until_idle(sim *s, int64_t ms_max)
{
    for (int64_t t = 0; t < ms_max && tm_pool_active(s->pool) > 0; t += 10)
        sim_run(s, 10);
    if (tm_pool_active(s->pool) > 0) {
        tm_buf b;
        tm_buf_init(&b, 0);
        tm_pool_describe(s->pool, &b);
        print_message("%s\n", b.data);
        tm_buf_deinit(&b);
        for (int i = 0; i < s->group_count; i++)
            for (int k = 0; k < SIM_SEQS; k++)
                if (s->groups[i].seqs[k].used)
                    print_message("%s: key %u have %d of %d held %d admitted %d\n",
                                  s->groups[i].name, s->groups[i].seqs[k].key,
                                  s->groups[i].seqs[k].have, s->groups[i].seqs[k].max_tokens,
                                  s->groups[i].seqs[k].held, s->groups[i].seqs[k].admitted);
    }
    assert_int_equal(tm_pool_active(s->pool), 0);
    assert_int_equal(tm_pool_in_flight(s->pool), 0);
    assert_int_equal(tm_pool_waiting(s->pool), 0);
}

void sim_kill(sim *s, sim_group *g)
{
    g->alive = false;
    g->deaths++;
    memset(g->seqs, 0, sizeof(g->seqs));
    for (int i = 0; i < s->link_count; i++) {
        struct sim_link *l = &s->links[i];
        if (l->up && &s->groups[l->group] == g) {
            l->up = false;
            deliver(s, l, NULL, 0);
        }
    }
}

void sim_restart(sim *s, sim_group *g)
{
    if (g->alive)
        sim_kill(s, g);
    g->alive = true;
    g->frozen = g->draining = false;
    g->epoch++;
}

void sim_drain(sim *s, sim_group *g)
{
    g->draining = true;
    for (int i = 0; i < SIM_SEQS; i++) {
        sim_seq *q = &g->seqs[i];
        if (!q->used)
            continue;
        wire_step w = {.e = TURBOMESH__WORKER__V1__REQUEST_EVENT__INIT};
        w.e.id = q->id;
        w.e.has_finish = 1;
        w.e.finish = TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_HANDBACK;
        q->used = false;
        send_step(s, link_of(s, q->link_id), &w);
    }
    send_load(s, g);
}

sim_seq *sim_seq_of(sim *s, const sim_owner *o, sim_group **group)
{
    for (int i = 0; i < s->group_count; i++)
        for (int k = 0; k < SIM_SEQS; k++)
            if (s->groups[i].seqs[k].used && s->groups[i].seqs[k].key == o->key) {
                if (group != NULL)
                    *group = &s->groups[i];
                return &s->groups[i].seqs[k];
            }
    return NULL;
}

/* ---- owners ---- */

static void on_admitted(void *user, int32_t prompt_tokens, int32_t cached_tokens)
{
    sim_owner *o = user;
    assert_false(o->ended || o->failed || o->cancelled);
    assert_int_equal(prompt_tokens, SIM_PROMPT);
    assert_in_range(cached_tokens, 0, SIM_PROMPT);
    o->admitted++;
}

static void on_prompt(void *user, int32_t first_pos, const tm_gen_token *tokens, int count)
{
    sim_owner *o = user;
    assert_false(o->ended || o->failed || o->cancelled);
    assert_true(o->prompt_logprobs);
    assert_int_equal(first_pos, o->prompt_got + 1);
    for (int i = 0; i < count; i++)
        assert_int_equal(tokens[i].token, 100 + first_pos - 1 + i);
    o->prompt_got += count;
}

static void on_tokens(void *user, int32_t first_pos, const tm_gen_token *tokens, int count)
{
    sim_owner *o = user;
    assert_false(o->ended || o->failed || o->cancelled);
    assert_true(o->admitted > 0);
    assert_int_equal(first_pos, o->got);
    assert_true(count > 0);
    for (int i = 0; i < count; i++)
        assert_int_equal(tokens[i].token, sim_token(o->key, first_pos + i));
    if (o->got == 0)
        o->first_ns = o->s->now_ns;
    o->got += count;
    assert_true(o->got <= o->max_tokens);
    if (o->cancel_at > 0 && o->got >= o->cancel_at) {
        o->cancelled = true;
        tm_gen_cancel(o->gen);
        o->gen = NULL;
    }
}

static void on_end(void *user, tm_gen_finish finish)
{
    sim_owner *o = user;
    assert_false(o->ended || o->failed || o->cancelled);
    o->ended = true;
    o->finish = finish;
    o->ended_ns = o->s->now_ns;
    o->gen = NULL;
}

static void on_error(void *user, tm_gen_error error, int64_t retry_after_ms)
{
    sim_owner *o = user;
    assert_false(o->ended || o->failed || o->cancelled);
    o->failed = true;
    o->error = error;
    o->retry_after_ms = retry_after_ms;
    o->ended_ns = o->s->now_ns;
    o->gen = NULL;
}

tm_status sim_start(sim *s, sim_owner *o)
{
    static const tm_gen_ops OPS = {on_admitted, on_prompt, on_tokens, on_end, on_error};
    int32_t prompt[SIM_PROMPT];
    o->s = s;
    o->started_ns = s->now_ns;
    for (int i = 0; i < SIM_PROMPT; i++)
        prompt[i] = i == 0 ? (int32_t)o->key : 99 + i;
    tm_gen_args a = {.served = o->served != NULL ? o->served : tm_pool_served_find(s->pool, NULL),
                     .prompt = prompt,
                     .prompt_len = SIM_PROMPT,
                     .max_tokens = o->max_tokens,
                     .sampling = tm_sampling_default(),
                     .session = o->session,
                     .request_id = "sim",
                     .priority = o->priority,
                     .deadline_ms = o->deadline_ms};
    a.sampling.seed = 1;
    a.sampling.prompt_logprobs = o->prompt_logprobs ? 0 : -1;
    assert_non_null(a.served);
    return tm_pool_start(s->pool, &a, &OPS, o, &o->gen, &o->retry_after_ms);
}

void sim_check_done(const sim_owner *o)
{
    tm_gen_finish finish;
    int n = sim_expected(o->key, o->max_tokens, &finish);
    assert_true(o->ended);
    assert_int_equal(o->got, n);
    assert_int_equal(o->finish, finish);
    if (o->prompt_logprobs)
        assert_int_equal(o->prompt_got, SIM_PROMPT - 1);
}
