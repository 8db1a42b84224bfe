/* One step's events, sorted to routers and packed: one message per (step, stream).
 *
 * Two passes over the flat event list. The first finds the live request of each event and counts what each
 * (request, step) pair, a slot, will hold; the second fills arrays whose places are known then. Nothing is
 * allocated per event: the scratch arrays grow to the largest step and stay. */
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/log.h"
#include "worker/internal.h"

typedef struct slot {
    worker_live *live;
    PB(RequestEvent) ev;
    size_t tokens, token_lps, prompts, prompt_lps; /* counts of pass one */
    int next;                                      /* of the same session */
    bool finished;
} slot;

struct worker_scratch {
    size_t events_cap, tops_cap, slots_cap;
    int slots;
    int *slot_of; /* per event, -1 = nobody waits for it */
    slot *slot;
    PB(RequestEvent) * *event_ptr;
    int32_t *ids;
    PB(TokenLogprob) * lp;
    PB(TokenLogprob) * *lp_ptr;
    PB(TopLogprob) * top;
    PB(TopLogprob) * *top_ptr;
};

worker_scratch *worker_scratch_create(void)
{
    return calloc(1, sizeof(worker_scratch));
}

void worker_scratch_destroy(worker_scratch *x)
{
    if (!x)
        return;
    void *all[] = {x->slot_of, x->slot, x->event_ptr, x->ids, x->lp, x->lp_ptr, x->top, x->top_ptr};
    for (size_t i = 0; i < TM_ARRAY_LEN(all); i++)
        free(all[i]);
    free(x);
}

static void *regrow(void *old, size_t n, size_t size)
{
    free(old);
    void *p = calloc(n, size);
    TM_ASSERT(p != NULL); /* bounded by the batch size; without it no event could be delivered */
    return p;
}

static void scratch_reserve(worker_scratch *x, size_t events, size_t tops)
{
    if (events > x->events_cap) {
        size_t n = x->events_cap = events * 2;
        x->slot_of = regrow(x->slot_of, n, sizeof(*x->slot_of));
        x->slot = regrow(x->slot, n, sizeof(*x->slot));
        x->event_ptr = regrow(x->event_ptr, n, sizeof(*x->event_ptr));
        x->ids = regrow(x->ids, n, sizeof(*x->ids));
        x->lp = regrow(x->lp, n, sizeof(*x->lp));
        x->lp_ptr = regrow(x->lp_ptr, n, sizeof(*x->lp_ptr));
    }
    if (tops > x->tops_cap) {
        size_t n = x->tops_cap = tops * 2;
        x->top = regrow(x->top, n, sizeof(*x->top));
        x->top_ptr = regrow(x->top_ptr, n, sizeof(*x->top_ptr));
    }
}

/* The slot of this request in this step, made on first sight and chained to its session. */
static int slot_for(tm_worker_service *s, worker_live *l)
{
    worker_scratch *x = s->scratch;
    if (l->slot_step == s->step_count)
        return l->slot;
    int i = x->slots++;
    memset(&x->slot[i], 0, sizeof(x->slot[i]));
    turbomesh__worker__v1__request_event__init(&x->slot[i].ev);
    x->slot[i].ev.id = l->id;
    x->slot[i].live = l;
    x->slot[i].next = -1;
    l->slot = i;
    l->slot_step = s->step_count;
    worker_session *n = l->session;
    if (n->slot_tail >= 0)
        x->slot[n->slot_tail].next = i;
    else
        n->slot_head = i;
    n->slot_tail = i;
    return i;
}

static void count_events(tm_worker_service *s, const tm_step_events *ev)
{
    worker_scratch *x = s->scratch;
    for (int i = 0; i < ev->count; i++) {
        const tm_event *e = &ev->events[i];
        worker_live *l = worker_table_engine(&s->table, e->request);
        x->slot_of[i] = -1;
        if (!l)
            continue;
        if (!l->session) { /* its router left */
            if (e->kind == TM_EVENT_FINISHED)
                worker_table_remove(&s->table, l);
            continue;
        }
        slot *t = &x->slot[x->slot_of[i] = slot_for(s, l)];
        if (e->kind == TM_EVENT_TOKEN) {
            t->tokens++;
            t->token_lps += l->logprobs;
        } else if (e->kind == TM_EVENT_PROMPT_LOGPROB) {
            t->prompts++;
            t->prompt_lps += l->prompt_logprobs;
        }
    }
}

/* Gives every slot its ranges of the flat arrays. */
static void place_slots(worker_scratch *x)
{
    size_t ids = 0, lps = 0;
    for (int i = 0; i < x->slots; i++) {
        slot *t = &x->slot[i];
        t->ev.token = x->ids + ids;
        ids += t->tokens;
        t->ev.prompt_token = x->ids + ids;
        ids += t->prompts;
        t->ev.logprob = x->lp_ptr + lps;
        lps += t->token_lps;
        t->ev.prompt_logprob = x->lp_ptr + lps;
        lps += t->prompt_lps;
    }
}

static size_t fill_logprob(worker_scratch *x, const tm_step_events *ev, const tm_event *e,
                           size_t at, PB(TokenLogprob) * lp)
{
    turbomesh__worker__v1__token_logprob__init(lp);
    lp->logprob = e->logprob;
    lp->n_top = e->top_count > 0 ? (size_t)e->top_count : 0;
    lp->top = x->top_ptr + at;
    for (size_t k = 0; k < lp->n_top; k++) {
        const tm_top_logprob *from = &ev->tops[(size_t)e->top_first + k];
        turbomesh__worker__v1__top_logprob__init(&x->top[at + k]);
        x->top[at + k].token = from->token;
        x->top[at + k].logprob = from->logprob;
        x->top_ptr[at + k] = &x->top[at + k];
    }
    return at + lp->n_top;
}

static PB(FinishReason) finish_reason(const worker_live *l, tm_finish f)
{
    static const PB(FinishReason) table[] = {
        [TM_FINISH_STOP] = TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_STOP,
        [TM_FINISH_LENGTH] = TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_LENGTH,
        [TM_FINISH_CANCELLED] = TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_CANCELLED,
        [TM_FINISH_ERROR] = TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_ERROR,
    };
    if (f == TM_FINISH_CANCELLED && l->handback)
        return TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_HANDBACK;
    return table[f];
}

static void fill_finish(slot *t, const tm_event *e)
{
    t->finished = true;
    t->ev.has_finish = 1;
    t->ev.finish = finish_reason(t->live, e->finish);
    if (e->finish == TM_FINISH_ERROR) {
        union {
            const char *text;
            char *field;
        } name = {tm_status_name(e->status)}; /* protobuf-c's struct only reads it */
        t->ev.detail = name.field;
    }
}

static void fill_events(worker_scratch *x, const tm_step_events *ev)
{
    size_t tops = 0;
    for (int i = 0; i < ev->count; i++) {
        if (x->slot_of[i] < 0)
            continue;
        const tm_event *e = &ev->events[i];
        slot *t = &x->slot[x->slot_of[i]];
        PB(RequestEvent) *r = &t->ev;
        PB(TokenLogprob) *lp = &x->lp[i];
        switch (e->kind) {
        case TM_EVENT_ADMITTED:
            r->has_admitted = r->admitted = 1;
            r->has_prompt_tokens = r->has_cached_tokens = 1;
            r->prompt_tokens = (uint32_t)e->prompt_tokens;
            r->cached_tokens = (uint32_t)e->cached_tokens;
            break;
        case TM_EVENT_PROMPT_LOGPROB:
            if (!r->n_prompt_token) {
                r->has_first_prompt_pos = 1;
                r->first_prompt_pos = (uint32_t)e->pos;
            }
            r->prompt_token[r->n_prompt_token++] = e->token;
            if (t->live->prompt_logprobs) {
                tops = fill_logprob(x, ev, e, tops, lp);
                r->prompt_logprob[r->n_prompt_logprob++] = lp;
            }
            break;
        case TM_EVENT_TOKEN:
            if (!r->n_token) {
                r->has_first_pos = 1;
                r->first_pos = (uint32_t)e->pos;
            }
            r->token[r->n_token++] = e->token;
            if (t->live->logprobs) {
                tops = fill_logprob(x, ev, e, tops, lp);
                r->logprob[r->n_logprob++] = lp;
            }
            break;
        case TM_EVENT_FINISHED:
            fill_finish(t, e);
            break;
        case TM_EVENT_LOGITS: /* never asked for over the wire */
            break;
        }
    }
    TM_ASSERT(tops <= x->tops_cap);
}

static void send_session(worker_session *n, worker_scratch *x, uint64_t step)
{
    PB(StepEvents) events = TURBOMESH__WORKER__V1__STEP_EVENTS__INIT;
    PB(WorkerMessage) m = TURBOMESH__WORKER__V1__WORKER_MESSAGE__INIT;
    for (int i = n->slot_head; i >= 0; i = x->slot[i].next)
        x->event_ptr[events.n_event++] = &x->slot[i].ev;
    n->slot_head = n->slot_tail = -1;
    events.event = x->event_ptr;
    events.has_step = 1;
    events.step = step;
    m.m_case = TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_STEP;
    m.step = &events;
    worker_session_send(n, &m);
}

void worker_deliver(tm_worker_service *s, const tm_step_events *ev)
{
    worker_scratch *x = s->scratch;
    size_t tops = 0;
    for (int i = 0; i < ev->count; i++)
        tops += ev->events[i].top_count > 0 ? (size_t)ev->events[i].top_count : 0;
    scratch_reserve(x, (size_t)ev->count, tops);
    pthread_mutex_lock(&s->lock);
    s->step_count++;
    x->slots = 0;
    count_events(s, ev);
    place_slots(x);
    fill_events(x, ev);
    for (worker_session *n = s->sessions; n; n = n->next)
        if (n->slot_head >= 0)
            send_session(n, x, ev->step);
    for (int i = 0; i < x->slots; i++) {
        if (!x->slot[i].finished)
            continue;
        s->handed_back +=
            x->slot[i].ev.finish == TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_HANDBACK;
        worker_table_remove(&s->table, x->slot[i].live);
        s->load_dirty = true;
    }
    pthread_mutex_unlock(&s->lock);
}
