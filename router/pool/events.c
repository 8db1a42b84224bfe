/* What a worker says about one generation: admitted, prompt log-probabilities, tokens, finish or reject.
 *
 * A worker is input. Positions make delivery exact: what was delivered already is dropped, a hole or an id
 * outside the vocabulary means that this stream cannot be trusted, and the generation goes on elsewhere. */
#include "router/pool/state.h"

#include <math.h>
#include <stdlib.h>

#include "common/check.h"
#include "common/log.h"

#define ITL_GAIN  0.2
#define BUSY_MS   200 /* a group that refused is asked again after its next report or this */
#define EJECT_MS  5000
#define OUT_FIRST 64

/* Room for `tokens` rows and `tops` alternatives in the scratch arrays of the pool. */
static bool reserve_scratch(tm_pool *p, size_t tokens, size_t tops)
{
    if (tokens > (size_t)p->tokens_cap) {
        tm_gen_token *t = realloc(p->tokens, tokens * sizeof(*t));
        if (t == NULL)
            return false;
        p->tokens = t;
        p->tokens_cap = (int)tokens;
    }
    if (tops > (size_t)p->tops_cap) {
        tm_top *t = realloc(p->tops, tops * sizeof(*t));
        if (t == NULL)
            return false;
        p->tops = t;
        p->tops_cap = (int)tops;
    }
    return true;
}

/* From the wire into the scratch rows; false for what no worker may send. lp is NULL when log-probabilities
 * were not asked for. */
static bool convert(tm_pool *p, const tm_gen *g, const int32_t *ids, size_t n,
                    tm_wire_logprob *const *lp)
{
    int32_t vocab = g->group->vocab > 0 ? g->group->vocab : g->served->vocab;
    size_t tops = 0;
    for (size_t i = 0; lp != NULL && i < n; i++)
        tops += lp[i]->n_top;
    if (n > INT32_MAX || tops > INT32_MAX || !reserve_scratch(p, n, tops))
        return false;
    tm_top *top = p->tops;
    for (size_t i = 0; i < n; i++) {
        if (ids[i] < 0 || (vocab > 0 && ids[i] >= vocab))
            return false;
        p->tokens[i] = (tm_gen_token){.token = ids[i]};
        if (lp == NULL)
            continue;
        p->tokens[i].logprob = lp[i]->logprob;
        p->tokens[i].top = top;
        p->tokens[i].top_count = (int)lp[i]->n_top;
        for (size_t k = 0; k < lp[i]->n_top; k++)
            *top++ = (tm_top){lp[i]->top[k]->token, lp[i]->top[k]->logprob};
    }
    return true;
}

static bool append_out(tm_gen *g, const tm_gen_token *tokens, int count)
{
    if (g->out_len + count > g->out_cap) {
        int cap = TM_MAX(TM_MAX(OUT_FIRST, g->out_cap * 2), g->out_len + count);
        int32_t *out = realloc(g->out, (size_t)cap * sizeof(*out));
        if (out == NULL)
            return false;
        g->out = out;
        g->out_cap = cap;
    }
    for (int i = 0; i < count; i++)
        g->out[g->out_len + i] = tokens[i].token;
    g->out_len += count;
    return true;
}

/* Away from this group: what comes from it for this generation is ignored from now on. */
static void give_up(tm_gen *g, tm_move_kind kind, const char *why)
{
    tm_group *group = g->group;
    if (kind == TM_MOVE_GAP) {
        tm_log(TM_LOG_ERROR, "bad_stream", "%s: %s at position %d", group->label, why, g->out_len);
        group->eject_until_ns = tm_pool_now(g->pool) + EJECT_MS * NS_PER_MS;
        tm_gen_withdraw(g);
    }
    if (kind != TM_MOVE_REJECT)
        g->avoid_link = group->link_id;
    tm_gen_leave(g);
    tm_gen_orphan(g, kind);
}

static void take_prompt(tm_pool *p, tm_gen *g, const tm_wire_event *e)
{
    size_t n = e->n_prompt_token;
    if (g->sampling.prompt_logprobs < 0)
        return;
    int64_t first = e->has_first_prompt_pos ? (int64_t)e->first_prompt_pos : -1;
    bool order = g->prompt_next < 0 ? first == 0 || first == 1 : first <= g->prompt_next;
    if (first < 0 || !order || first + (int64_t)n > (int64_t)g->prompt_len ||
        e->n_prompt_logprob != n || !convert(p, g, e->prompt_token, n, e->prompt_logprob)) {
        give_up(g, TM_MOVE_GAP, "prompt log-probabilities out of order");
        return;
    }
    int64_t skip = g->prompt_next > first ? g->prompt_next - first : 0;
    if (skip >= (int64_t)n)
        return;
    g->prompt_next = (int32_t)(first + (int64_t)n);
    if (g->ops.on_prompt != NULL)
        g->ops.on_prompt(g->user, (int32_t)(first + skip), p->tokens + skip,
                         (int)((int64_t)n - skip));
}

static void note_pace(tm_gen *g, int count)
{
    int64_t now = tm_pool_now(g->pool);
    if (g->last_token_ns != 0) {
        double s = (double)(now - g->last_token_ns) / (double)NS_PER_S / (double)count;
        g->itl_s += g->itl_s > 0 ? ITL_GAIN * (s - g->itl_s) : s;
    }
    g->last_token_ns = now;
}

static void take_tokens(tm_pool *p, tm_gen *g, const tm_wire_event *e)
{
    int64_t first = e->has_first_pos ? (int64_t)e->first_pos : -1;
    int64_t n = (int64_t)e->n_token;
    bool logprobs = g->sampling.logprobs >= 0;
    if (first < 0 || first > g->out_len || first + n > g->max_tokens ||
        (logprobs && e->n_logprob != e->n_token) ||
        !convert(p, g, e->token, e->n_token, logprobs ? e->logprob : NULL)) {
        give_up(g, TM_MOVE_GAP, "tokens out of order or out of range");
        return;
    }
    int skip = (int)(g->out_len - first);
    int fresh = (int)n - skip;
    if (fresh <= 0)
        return;
    int32_t pos = g->out_len;
    if (!append_out(g, p->tokens + skip, fresh)) {
        give_up(g, TM_MOVE_GAP, "no memory");
        return;
    }
    note_pace(g, fresh);
    if (pos == 0)
        tm_series_observe(p->metrics.prefill_s,
                          (double)(g->last_token_ns - g->sent_ns) / (double)NS_PER_S);
    tm_series_add(p->metrics.tokens, fresh);
    g->ops.on_tokens(g->user, pos, p->tokens + skip, fresh);
}

static void take_finish(tm_gen *g, const tm_wire_event *e)
{
    /* A finish may say at which position it came: tokens before it that are not here were lost. */
    if (e->n_token == 0 && e->has_first_pos && (int64_t)e->first_pos > g->out_len) {
        give_up(g, TM_MOVE_GAP, "finished after tokens that did not come");
        return;
    }
    switch (e->finish) {
    case TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_STOP:
        tm_gen_finish_with(g, TM_GEN_STOP);
        return;
    case TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_LENGTH:
        tm_gen_finish_with(g, TM_GEN_LENGTH);
        return;
    case TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_CANCELLED:
    case TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_HANDBACK:
        give_up(g, TM_MOVE_HANDBACK, "handed back");
        return;
    default:
        tm_log(TM_LOG_WARN, "engine_error", "%s, request %s: %s", g->group->label, g->request_id,
               e->detail != NULL ? e->detail : "no detail");
        give_up(g, TM_MOVE_ERROR, "engine error");
    }
}

static void take_reject(tm_pool *p, tm_gen *g, const tm_wire_event *e)
{
    tm_group *group = g->group;
    tm_log(TM_LOG_DEBUG, "reject", "%s, request %s, reason %d: %s", group->label, g->request_id,
           (int)e->reject, e->detail != NULL ? e->detail : "");
    switch (e->reject) {
    case TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_BUSY:
        group->busy_until_ns = tm_pool_now(p) + BUSY_MS * NS_PER_MS;
        break;
    case TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_DRAINING:
        group->draining = true;
        tm_group_publish(group);
        break;
    case TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_STALE_EPOCH:
        break; /* the new epoch came with this very message */
    default:
        /* Somebody already took this request once: then the fault is not the client's. */
        if (g->out_len > 0) {
            give_up(g, TM_MOVE_ERROR, "refused to go on");
            return;
        }
        tm_gen_leave(g);
        tm_gen_fail(g,
                    e->reject == TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_TOO_LONG
                        ? TM_GEN_ERR_TOO_LONG
                        : TM_GEN_ERR_INVALID,
                    0);
        return;
    }
    give_up(g, TM_MOVE_REJECT, "refused");
}

/* True while the generation is still on the group the event came from. */
static bool still_there(const tm_gen *g, const tm_group *group)
{
    return !g->ended && g->group == group;
}

void tm_gen_event(tm_pool *p, tm_group *group, const tm_wire_event *e)
{
    uint32_t index = (uint32_t)e->id;
    if (index >= (uint32_t)group->slot_count || group->slots[index].id != e->id ||
        group->slots[index].gen == NULL)
        return; /* cancelled, ended or moved */
    tm_gen *g = group->slots[index].gen;
    tm_gen_hold(g);
    if (e->has_admitted && e->admitted) {
        int32_t cached = (int32_t)TM_MIN((uint64_t)e->cached_tokens, (uint64_t)g->prompt_len);
        g->admitted = true;
        g->ops.on_admitted(g->user, (int32_t)g->prompt_len, cached);
    }
    if (still_there(g, group) && !g->admitted && (e->n_prompt_token > 0 || e->n_token > 0))
        give_up(g, TM_MOVE_GAP, "tokens before it was admitted");
    if (still_there(g, group) && e->n_prompt_token > 0)
        take_prompt(p, g, e);
    if (still_there(g, group) && e->n_token > 0)
        take_tokens(p, g, e);
    if (still_there(g, group) && e->has_finish)
        take_finish(g, e);
    else if (still_there(g, group) && e->has_reject)
        take_reject(p, g, e);
    tm_gen_unhold(g);
}
