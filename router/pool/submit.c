/* What goes out on a link: RouterHello, Submit, Cancel. Packed into the pool's one buffer; the transport
 * copies. */
#include "router/pool/state.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/log.h"

typedef Turbomesh__Worker__V1__Submit wire_submit;
typedef Turbomesh__Worker__V1__Sampling wire_sampling;

#define SLOTS_FIRST 64

static tm_status send_message(tm_pool *p, tm_group *group, const tm_wire_router_message *m)
{
    size_t size = protobuf_c_message_get_packed_size(&m->base);
    tm_buf_clear(&p->out);
    if (!tm_buf_reserve(&p->out, size))
        return TM_STATUS_NO_MEMORY;
    protobuf_c_message_pack(&m->base, (uint8_t *)p->out.data);
    const tm_transport *t = &p->opts.transport;
    return t->send(t->ctx, group->link, p->out.data, size);
}

tm_status tm_group_greet(tm_pool *p, tm_group *group)
{
    Turbomesh__Worker__V1__RouterHello h = TURBOMESH__WORKER__V1__ROUTER_HELLO__INIT;
    char version[] = TM_VERSION;
    h.router_id = p->router_id;
    h.version = version;
    tm_wire_router_message m = TURBOMESH__WORKER__V1__ROUTER_MESSAGE__INIT;
    m.m_case = TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_HELLO;
    m.hello = &h;
    return send_message(p, group, &m);
}

static int32_t take_slot(tm_group *group)
{
    if (group->slot_free < 0) {
        int count = TM_MAX(SLOTS_FIRST, group->slot_count * 2);
        tm_slot *slots = realloc(group->slots, (size_t)count * sizeof(*slots));
        if (slots == NULL)
            return -1;
        group->slots = slots;
        for (int i = count - 1; i >= group->slot_count; i--) {
            slots[i] = (tm_slot){((uint64_t)1 << 32) | (uint32_t)i, NULL, group->slot_free};
            group->slot_free = i;
        }
        group->slot_count = count;
    }
    int32_t i = group->slot_free;
    group->slot_free = group->slots[i].next_free;
    return i;
}

/* Prompt log-probabilities are asked for until the last of them was delivered. */
static bool wants_prompt(const tm_gen *g)
{
    return g->sampling.prompt_logprobs >= 0 && g->prompt_next < (int32_t)g->prompt_len;
}

static void fill_sampling(const tm_gen *g, wire_sampling *w)
{
    const tm_sampling *s = &g->sampling;
#define SET(field)                                                                                 \
    w->has_##field = 1;                                                                            \
    w->field = s->field
    SET(temperature);
    SET(top_k);
    SET(top_p);
    SET(min_p);
    SET(repetition_penalty);
    SET(presence_penalty);
    SET(frequency_penalty);
    SET(seed);
    SET(choice);
    SET(logprobs);
    SET(min_tokens);
    SET(ignore_eos);
#undef SET
    w->has_prompt_logprobs = 1;
    w->prompt_logprobs = wants_prompt(g) ? s->prompt_logprobs : -1;
}

/* logit_bias as the generated code wants it: an array of pointers. NULL with count 0. */
static bool fill_bias(const tm_gen *g, wire_sampling *w, void **block)
{
    typedef Turbomesh__Worker__V1__LogitBias bias;
    size_t n = g->sampling.logit_bias_count;
    *block = NULL;
    if (n == 0)
        return true;
    bias **items = malloc(n * (sizeof(bias *) + sizeof(bias)));
    if (items == NULL)
        return false;
    bias *rows = (bias *)(void *)(items + n);
    for (size_t i = 0; i < n; i++) {
        turbomesh__worker__v1__logit_bias__init(&rows[i]);
        rows[i].token = g->sampling.logit_bias[i].token;
        rows[i].bias = g->sampling.logit_bias[i].bias;
        items[i] = &rows[i];
    }
    w->n_logit_bias = n;
    w->logit_bias = items;
    *block = items;
    return true;
}

static tm_status send_submit(tm_gen *g, tm_group *group, uint64_t id)
{
    wire_sampling sampling = TURBOMESH__WORKER__V1__SAMPLING__INIT;
    wire_submit s = TURBOMESH__WORKER__V1__SUBMIT__INIT;
    void *bias;
    fill_sampling(g, &sampling);
    if (!fill_bias(g, &sampling, &bias))
        return TM_STATUS_NO_MEMORY;
    s.id = id;
    s.n_prompt = g->prompt_len;
    s.prompt = g->prompt;
    s.n_generated = (size_t)g->out_len;
    s.generated = g->out;
    s.has_max_tokens = 1;
    s.max_tokens = g->max_tokens;
    s.n_stop_id = g->stop_count;
    s.stop_id = (int32_t *)g->stop_ids;
    s.sampling = &sampling;
    s.has_priority = 1;
    s.priority = g->priority;
    s.has_cache_salt = 1;
    s.cache_salt = g->cache_salt;
    s.has_expected_epoch = 1;
    s.expected_epoch = group->epoch;
    tm_wire_router_message m = TURBOMESH__WORKER__V1__ROUTER_MESSAGE__INIT;
    m.m_case = TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_SUBMIT;
    m.submit = &s;
    tm_status st = send_message(g->pool, group, &m);
    free(bias);
    return st;
}

tm_status tm_gen_submit(tm_gen *g, tm_group *group)
{
    int32_t slot = take_slot(group);
    if (slot < 0)
        return TM_STATUS_NO_MEMORY;
    tm_slot *s = &group->slots[slot];
    tm_status st = send_submit(g, group, s->id);
    if (st != TM_OK) {
        s->next_free = group->slot_free;
        group->slot_free = slot;
        tm_log(TM_LOG_WARN, "submit_failed", "%s: %s", group->label, tm_status_name(st));
        if (st != TM_STATUS_NO_MEMORY)
            group->broken = true;
        return st;
    }
    tm_group_sent(group, (int64_t)g->prompt_len + g->out_len);
    tm_gen_enter(g, group, slot);
    return TM_OK;
}

void tm_gen_withdraw(tm_gen *g)
{
    TM_ASSERT(g->place == TM_GEN_ON_GROUP);
    tm_group *group = g->group;
    Turbomesh__Worker__V1__Cancel c = TURBOMESH__WORKER__V1__CANCEL__INIT;
    c.id = group->slots[g->slot].id;
    tm_wire_router_message m = TURBOMESH__WORKER__V1__ROUTER_MESSAGE__INIT;
    m.m_case = TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_CANCEL;
    m.cancel = &c;
    /* A cancel that cannot be sent would leave the group working for nobody: give the link up. */
    if (send_message(g->pool, group, &m) != TM_OK)
        group->broken = true;
}
