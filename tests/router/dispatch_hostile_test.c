/* Workers that say anything: random messages, well-formed on the wire and wrong in every other way, on live links.
 * The pool must never assert, never deliver a token out of order, out of range or beyond max_tokens, and end every
 * generation exactly once. The groups themselves only say Hello; all the rest comes from here.
 *
 * A failing seed is printed; TM_SEED=n runs that one alone. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/log.h"
#include "tests/router/dispatch_sim.h"

#define SCHEDULES  200
#define MESSAGES   800
#define OWNERS     24
#define GROUPS     3
#define EVENTS_MAX 4
#define TOKENS_MAX 6

static sim S;
static sim_owner g_owners[OWNERS];
static uint64_t g_messages, g_tokens, g_ended, g_failed;

static uint64_t below(uint64_t n)
{
    return sim_random(&S) % n;
}

static bool one_in(uint64_t n)
{
    return below(n) == 0;
}

/* Numbers that are at home at edges. */
static int64_t edge(void)
{
    static const int64_t values[] = {0,         1,         -1,        2,         63,
                                     64,        SIM_VOCAB, INT32_MAX, INT32_MIN, UINT32_MAX,
                                     INT64_MAX, INT64_MIN, 1000000};
    return values[below(TM_ARRAY_LEN(values))];
}

static float edge_float(void)
{
    static const float values[] = {0,      -0.0f, 1,        -1,        1e-30f, 3e38f,
                                   -3e38f, 20,    INFINITY, -INFINITY, NAN};
    return values[below(TM_ARRAY_LEN(values))];
}

/* ---- messages ---- */

typedef Turbomesh__Worker__V1__RequestEvent wire_event;
typedef Turbomesh__Worker__V1__StepEvents wire_steps;
typedef Turbomesh__Worker__V1__TokenLogprob wire_lp;
typedef Turbomesh__Worker__V1__TopLogprob wire_top;

typedef struct event_room {
    int32_t tokens[TOKENS_MAX], prompt[TOKENS_MAX];
    wire_lp lps[TOKENS_MAX], *lp_list[TOKENS_MAX];
    wire_top top, *top_list[1];
} event_room;

static void fill_lps(event_room *r, size_t *n, wire_lp ***list)
{
    turbomesh__worker__v1__top_logprob__init(&r->top);
    r->top.token = (int32_t)edge();
    r->top.logprob = edge_float();
    r->top_list[0] = &r->top;
    *n = below(TOKENS_MAX + 1);
    for (size_t i = 0; i < *n; i++) {
        turbomesh__worker__v1__token_logprob__init(&r->lps[i]);
        r->lps[i].logprob = edge_float();
        r->lps[i].n_top = below(2);
        r->lps[i].top = r->top_list;
        r->lp_list[i] = &r->lps[i];
    }
    *list = r->lp_list;
}

/* Tokens of a live sequence are the right ones for the position that is claimed, or impossible ones: a group that
 * lies within the rules cannot be told from one that does not. */
static void fill_tokens(wire_event *e, event_room *r, const sim_seq *q)
{
    int64_t pos = q ? (int64_t)below(40) - 2 : edge();
    const sim_owner *o = NULL;
    for (int i = 0; q && i < OWNERS; i++)
        if (g_owners[i].gen && g_owners[i].key == q->key)
            o = &g_owners[i];
    if (o && !one_in(4))
        pos = o->got;
    e->has_first_pos = !one_in(20);
    e->first_pos = (uint32_t)pos;
    e->n_token = below(TOKENS_MAX + 1);
    for (size_t i = 0; i < e->n_token; i++)
        r->tokens[i] = q && pos >= 0 ? sim_token(q->key, (int)pos + (int)i) : -1;
    if (e->n_token > 0 && one_in(12))
        r->tokens[below(e->n_token)] = one_in(2) ? SIM_VOCAB + (int32_t)below(5) : -1;
    e->token = r->tokens;
    if (one_in(5))
        fill_lps(r, &e->n_logprob, &e->logprob);
}

static const sim_seq *some_seq(const sim_group *g, uint64_t link)
{
    const sim_seq *found = NULL;
    int n = 0;
    for (int i = 0; i < SIM_SEQS; i++)
        if (g->seqs[i].used && g->seqs[i].link_id == link && below((uint64_t)++n) == 0)
            found = &g->seqs[i];
    return found;
}

static void fill_event(wire_event *e, event_room *r, const sim_group *g, uint64_t link)
{
    const sim_seq *q = one_in(6) ? NULL : some_seq(g, link);
    turbomesh__worker__v1__request_event__init(e);
    e->id = q ? q->id : one_in(2) ? below(70) | below(3) << 32 : (uint64_t)edge();
    e->has_admitted = !one_in(3);
    e->admitted = !one_in(4);
    e->has_prompt_tokens = e->has_cached_tokens = one_in(2);
    e->prompt_tokens = (uint32_t)edge();
    e->cached_tokens = (uint32_t)edge();
    if (one_in(6)) {
        e->has_first_prompt_pos = one_in(2);
        e->first_prompt_pos = one_in(2) ? (uint32_t)below(20) : (uint32_t)edge();
        e->n_prompt_token = below(TOKENS_MAX + 1);
        for (size_t i = 0; i < e->n_prompt_token; i++)
            r->prompt[i] = (int32_t)edge();
        e->prompt_token = r->prompt;
        fill_lps(r, &e->n_prompt_logprob, &e->prompt_logprob);
    }
    if (!one_in(4))
        fill_tokens(e, r, q);
    e->has_finish = one_in(12);
    e->finish = (Turbomesh__Worker__V1__FinishReason)below(8);
    e->has_reject = one_in(15);
    e->reject = (Turbomesh__Worker__V1__RejectReason)below(9);
}

static void fill_load(Turbomesh__Worker__V1__LoadReport *l)
{
    turbomesh__worker__v1__load_report__init(l);
    l->has_state = one_in(2);
    l->state = (Turbomesh__Worker__V1__LoadReport__State)(one_in(10) ? below(6) : 2);
    l->running = !one_in(8) ? (uint32_t)below(4) : (uint32_t)edge();
    l->waiting = !one_in(8) ? 0 : (uint32_t)edge();
    l->waiting_tokens = (uint64_t)edge();
    l->blocks_total = (uint32_t)edge();
    l->blocks_used = (uint32_t)edge();
    l->prefill_tps = edge_float();
    l->step_ms = edge_float();
    l->step_age_ms = !one_in(8) ? 0 : (uint32_t)edge();
    l->has_last_submit_seq = one_in(2);
    l->last_submit_seq = (uint64_t)edge();
}

static void fill_hello(Turbomesh__Worker__V1__Hello *h, const sim_group *g)
{
    static char m[] = "m", other[] = "other", none[] = "", d1[] = "d1", d2[] = "d2", long_name[300];
    static char *const models[] = {m, other, none, m};
    memset(long_name, 'x', sizeof long_name - 1);
    turbomesh__worker__v1__hello__init(h);
    h->epoch = one_in(20) ? (uint64_t)edge() : g->epoch;
    h->group = one_in(8) ? long_name : (char *)(uintptr_t)S.groups[below(GROUPS)].name;
    h->model = one_in(12) ? long_name : models[below(TM_ARRAY_LEN(models))];
    h->digest = one_in(12) ? long_name : one_in(6) ? d2 : d1;
    h->has_max_batch_size = h->has_max_context = h->has_queue_max = one_in(2);
    h->has_vocab = 1;
    h->max_batch_size = (uint32_t)edge();
    h->max_context = (uint32_t)edge();
    h->vocab = SIM_VOCAB;
    h->queue_max = (uint32_t)edge();
}

/* Packed and unpacked, so that only what the wire can carry arrives. */
static void send(uint64_t link, tm_wire_worker_message *m)
{
    size_t len = protobuf_c_message_get_packed_size(&m->base);
    uint8_t *data = malloc(len + 1);
    assert_non_null(data);
    protobuf_c_message_pack(&m->base, data);
    /* Bits that flipped and still parse; not in steps, where they would make tokens that are merely wrong. */
    bool step = m->m_case == TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_STEP;
    if (!step && len > 0 && one_in(60))
        data[below(len)] ^= (uint8_t)(1u << below(8));
    tm_wire_worker_message *got = turbomesh__worker__v1__worker_message__unpack(NULL, len, data);
    if (got)
        tm_pool_on_message(S.pool, link, got, S.now_ns - (int64_t)below(1000));
    turbomesh__worker__v1__worker_message__free_unpacked(got, NULL);
    free(data);
    g_messages++;
}

static void say_something(const sim_group *g, uint64_t link)
{
    Turbomesh__Worker__V1__Hello h;
    Turbomesh__Worker__V1__LoadReport l;
    wire_steps step = TURBOMESH__WORKER__V1__STEP_EVENTS__INIT;
    wire_event events[EVENTS_MAX], *list[EVENTS_MAX];
    event_room rooms[EVENTS_MAX];
    tm_wire_worker_message m = TURBOMESH__WORKER__V1__WORKER_MESSAGE__INIT;
    m.epoch = one_in(400) ? (uint64_t)edge() : g->epoch;
    uint64_t kind = below(60);
    if (kind == 0) {
        fill_hello(&h, g);
        m.m_case = TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_HELLO;
        m.hello = &h;
    } else if (kind < 8) {
        fill_load(&l);
        m.m_case = TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_LOAD;
        m.load = &l;
    } else if (kind < 59) {
        step.n_event = below(EVENTS_MAX + 1);
        for (size_t i = 0; i < step.n_event; i++) {
            fill_event(&events[i], &rooms[i], g, link);
            list[i] = &events[i];
        }
        step.event = list;
        m.m_case = TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_STEP;
        m.step = &step;
    } /* else: none of them */
    send(link, &m);
}

/* The newest link of a group, or 0. */
static uint64_t link_of(int group)
{
    for (int i = S.link_count - 1; i >= 0; i--)
        if (S.links[i].group == group && S.links[i].open && S.links[i].up)
            return S.links[i].id;
    return 0;
}

/* An honest beginning, so that the rest is heard at all. */
static void greet(int group, uint64_t link)
{
    Turbomesh__Worker__V1__Hello h = TURBOMESH__WORKER__V1__HELLO__INIT;
    tm_wire_worker_message m = TURBOMESH__WORKER__V1__WORKER_MESSAGE__INIT;
    h.epoch = m.epoch = S.groups[group].epoch;
    h.group = S.groups[group].name;
    h.model = S.groups[group].model;
    h.digest = S.groups[group].digest;
    h.has_max_batch_size = h.has_vocab = h.has_queue_max = 1;
    h.max_batch_size = 8;
    h.queue_max = 8;
    h.vocab = SIM_VOCAB;
    m.m_case = TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_HELLO;
    m.hello = &h;
    tm_pool_on_message(S.pool, link, &m, S.now_ns);
}

/* ---- schedules ---- */

static void keep_busy(void)
{
    static uint32_t next_key;
    for (int i = 0; i < OWNERS; i++) {
        sim_owner *o = &g_owners[i];
        if (o->gen) {
            if (one_in(60)) {
                o->cancelled = true;
                tm_gen_cancel(o->gen);
                o->gen = NULL;
            }
            continue;
        }
        g_tokens += (uint64_t)o->got;
        g_ended += o->ended;
        g_failed += o->failed;
        *o = (sim_owner){.key = ++next_key % 800 + 1,
                         .max_tokens = 1 + (int)below(30),
                         .prompt_logprobs = false};
        if (tm_pool_served_find(S.pool, "m") == NULL)
            continue;
        o->served = tm_pool_served_find(S.pool, "m");
        if (sim_start(&S, o) != TM_OK)
            o->gen = NULL;
        o->served = NULL;
    }
}

static void schedule(uint64_t seed)
{
    static const char *const names[GROUPS] = {"evil-0", "evil-1", "evil-2"};
    sim_init(&S, seed);
    memset(g_owners, 0, sizeof g_owners);
    for (int i = 0; i < GROUPS; i++) {
        sim_group *g = sim_add(&S, names[i]);
        g->next_step_ns = g->next_load_ns = INT64_MAX;
    }
    tm_pool_opts o = sim_pool_opts(&S);
    o.policy = (int)below(4);
    o.queue_wait_ms = 2000;
    assert_int_equal(tm_pool_create(&S.pool, &o, NULL), TM_OK);
    sim_list(&S);
    uint64_t greeted[GROUPS] = {0};
    for (int n = 0; n < MESSAGES; n++) {
        int g = (int)below(GROUPS);
        uint64_t link = link_of(g);
        if (link && (greeted[g] != link || one_in(50)) && !one_in(8)) {
            greeted[g] = link;
            greet(g, link);
        } else if (link) {
            say_something(&S.groups[g], link);
        }
        keep_busy();
        sim_run(&S, (int64_t)below(40));
    }
    for (int i = 0; i < GROUPS; i++)
        sim_kill(&S, &S.groups[i]);
    sim_run_until_idle(&S, 60000);
    for (int i = 0; i < OWNERS; i++)
        assert_null(g_owners[i].gen);
    sim_deinit(&S);
}

static void hostile(void **state)
{
    (void)state;
    const char *only = getenv("TM_SEED");
    uint64_t first = only ? strtoull(only, NULL, 10) : 1;
    uint64_t last = only ? first : SCHEDULES;
    for (uint64_t seed = first; seed <= last; seed++) {
        fprintf(stderr, "\rTM_SEED=%llu ", (unsigned long long)seed);
        schedule(seed);
    }
    fprintf(stderr, "\n");
    print_message("%llu messages, %llu tokens; %llu generations ended, %llu failed\n",
                  (unsigned long long)g_messages, (unsigned long long)g_tokens,
                  (unsigned long long)g_ended, (unsigned long long)g_failed);
    /* It was heard, and not all was refused. */
    if (!only)
        assert_true(g_tokens > 1000 && g_ended > 100 && g_failed > 100);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(hostile)};
    tm_log_init("dispatch_hostile_test", getenv("TM_TEST_LOG") ? TM_LOG_DEBUG : TM_LOG_ERROR + 1,
                TM_LOG_TEXT);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
