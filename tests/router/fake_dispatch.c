/* The scripted dispatch. */
#include <event2/event.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "tests/router/api_harness.h"

fake_dispatch fake;
tm_served *fake_served;
struct event_base *fake_base;

void fake_reset(void)
{
    for (int i = 0; i < fake.gen_count; i++) {
        tm_gen *g = fake.gens[i];
        assert_true(g->over); /* nobody may forget a generation */
        free(g->prompt);
        free(g);
    }
    memset(&fake, 0, sizeof fake);
    fake.batch = 1;
    fake.error_after = -1;
    fake.start_fail_at = -1;
    fake.groups_ready = 1;
    fake.served_count = 1;
}

int fake_encode(const char *text, int32_t *ids, int max)
{
    int32_t *list;
    size_t count;
    const tm_encode_opts o = {0};
    assert_int_equal(
        tm_tokenizer_encode(fake_served->tokenizer, text, strlen(text), &o, &list, &count, NULL),
        TM_OK);
    assert_true((int)count <= max);
    memcpy(ids, list, count * sizeof *ids);
    free(list);
    return (int)count;
}

void fake_answer(const char *text, bool eos)
{
    fake.count = fake_encode(text, fake.tokens, 4000);
    fake.finish = eos ? TM_GEN_STOP : TM_GEN_LENGTH;
    if (eos)
        fake.tokens[fake.count++] = fake_served->stop_ids[0];
}

char *fake_prompt(int i)
{
    char *text;
    size_t len;
    const tm_gen *g = fake.gens[i];
    assert_int_equal(tm_tokenizer_decode(fake_served->tokenizer, g->prompt, g->prompt_len, false,
                                         &text, &len, NULL),
                     TM_OK);
    return text;
}

static void close_gen(tm_gen *g)
{
    assert_false(g->over);
    g->over = true;
    fake.active--;
    event_free(g->ev);
    g->ev = NULL;
}

void fake_admit(tm_gen *g)
{
    g->ops->on_admitted(g->user, (int32_t)g->prompt_len, fake.cached);
}

/* Log-probabilities that a test can predict: -0.5 for the token, then -1, -2, ... for ids 1, 2, ... */
static void deliver(tm_gen *g, void (*fn)(void *, int32_t, const tm_gen_token *, int), int32_t pos,
                    const int32_t *ids, int count)
{
    static tm_gen_token list[4096];
    static tm_top tops[32];
    for (int i = 0; i < fake.top_count; i++)
        tops[i] = (tm_top){i + 1, -1.0f - (float)i};
    for (int i = 0; i < count; i++)
        list[i] = (tm_gen_token){ids[i], -0.5f, tops, fake.top_count};
    fn(g->user, pos, list, count);
}

void fake_tokens(tm_gen *g, const int32_t *ids, int count)
{
    int pos = g->sent;
    g->sent += count;
    deliver(g, g->ops->on_tokens, pos, ids, count);
}

void fake_end(tm_gen *g, tm_gen_finish finish)
{
    close_gen(g);
    g->ops->on_end(g->user, finish);
}

void fake_error(tm_gen *g, tm_gen_error error, int64_t retry_after_ms)
{
    close_gen(g);
    g->ops->on_error(g->user, error, retry_after_ms);
}

/* One event of the script per turn. */
static void on_turn(evutil_socket_t fd, short what, void *user)
{
    (void)fd;
    (void)what;
    static const struct timeval now = {0, 0};
    tm_gen *g = user;
    int limit = TM_MIN(fake.count, (int)g->max_tokens);
    event_add(g->ev, &now);
    if (g->step++ == 0) {
        fake_admit(g);
    } else if (g->step == 2 && g->sampling.prompt_logprobs >= 0 && g->prompt_len > 1) {
        deliver(g, g->ops->on_prompt, 1, g->prompt + 1, (int)g->prompt_len - 1);
    } else if (fake.error_after >= 0 && g->sent >= fake.error_after) {
        fake_error(g, fake.error, fake.retry_after_ms);
    } else if (g->sent < limit) {
        fake_tokens(g, fake.tokens + g->sent, TM_MIN(fake.batch, limit - g->sent));
    } else {
        fake_end(g, g->sent < fake.count ? TM_GEN_LENGTH : fake.finish);
    }
}

tm_status tm_dispatch_start(tm_dispatch *d, const tm_gen_args *a, const tm_gen_ops *ops, void *user,
                            tm_gen **out, int64_t *retry_after_ms)
{
    static const struct timeval now = {0, 0};
    (void)d;
    if (fake.start_status != TM_OK && fake.start_fail_at <= fake.gen_count) {
        *retry_after_ms = fake.retry_after_ms;
        return fake.start_status;
    }
    assert_true(fake.gen_count < FAKE_GENS_MAX);
    assert_ptr_equal(a->served, fake_served);
    assert_true(a->prompt_len > 0);
    assert_true((int64_t)a->prompt_len + a->max_tokens <= a->served->max_context);
    tm_gen *g = calloc(1, sizeof *g);
    fake.gens[fake.gen_count++] = g;
    fake.active++;
    g->ops = ops;
    g->user = user;
    g->prompt = malloc(a->prompt_len * sizeof *g->prompt);
    memcpy(g->prompt, a->prompt, a->prompt_len * sizeof *g->prompt);
    g->prompt_len = a->prompt_len;
    g->max_tokens = a->max_tokens;
    g->stop_count = a->stop_count;
    memcpy(g->stop_ids, a->stop_ids, a->stop_count * sizeof g->stop_ids[0]);
    g->sampling = a->sampling;
    memcpy(g->bias, a->sampling.logit_bias ? a->sampling.logit_bias : g->bias,
           TM_MIN(a->sampling.logit_bias_count, TM_ARRAY_LEN(g->bias)) * sizeof g->bias[0]);
    g->sampling.logit_bias = g->bias;
    if (a->session)
        memcpy(g->session, a->session, strlen(a->session) + 1);
    assert_non_null(a->request_id);
    g->priority = a->priority;
    g->cache_salt = a->cache_salt;
    g->deadline_ms = a->deadline_ms;
    g->ev = event_new(fake_base, -1, 0, on_turn, g);
    if (!fake.manual)
        event_add(g->ev, &now);
    *out = g;
    return TM_OK;
}

void tm_gen_cancel(tm_gen *g)
{
    g->cancelled = true;
    fake.cancels++;
    close_gen(g);
}

const char *tm_gen_group(const tm_gen *g)
{
    (void)g;
    return "group-a";
}

int tm_dispatch_served_count(const tm_dispatch *d)
{
    (void)d;
    return fake.served_count;
}

tm_served *tm_dispatch_served_at(const tm_dispatch *d, int i)
{
    (void)d;
    (void)i;
    return fake_served;
}

tm_served *tm_dispatch_served_find(const tm_dispatch *d, const char *name)
{
    (void)d;
    if (fake.served_count == 0 || (name && strcmp(name, fake_served->name) != 0))
        return NULL;
    return fake_served;
}

int tm_dispatch_groups_ready(const tm_dispatch *d, const char *model)
{
    (void)d;
    (void)model;
    return fake.groups_ready;
}

int tm_dispatch_active(const tm_dispatch *d)
{
    (void)d;
    return fake.active;
}

bool tm_dispatch_members_stale(const tm_dispatch *d)
{
    (void)d;
    return false;
}

int tm_dispatch_waiting(const tm_dispatch *d)
{
    (void)d;
    return 0;
}

void tm_dispatch_describe_groups(const tm_dispatch *d, tm_jw *w, bool addresses)
{
    (void)d;
    tm_jw_arr(w);
    for (int i = 0; i < fake.groups_ready; i++) {
        tm_jw_obj(w);
        tm_jw_kstr(w, "name", "group-a");
        if (addresses)
            tm_jw_kstr(w, "address", "127.0.0.1:1");
        tm_jw_kstr(w, "state", "ready");
        tm_jw_obj_end(w);
    }
    tm_jw_arr_end(w);
}

void tm_dispatch_describe(const tm_dispatch *d, tm_buf *json)
{
    (void)d;
    tm_buf_puts(json, "[]");
}
