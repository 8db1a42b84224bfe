/* See args.h. */
#include "router/api/args.h"

#include <string.h>

#include "common/check.h"
#include "common/hash.h"
#include "router/observe.h"

#define COMPLETION_TOKENS 16 /* the old API's default */

bool tm_api_gen_args(const tm_api_params *p, tm_served *served, const tm_api_limits *limits,
                     tm_logit_bias *bias, tm_gen_args *out, tm_api_error *e)
{
    const char *affinity = p->session[0]         ? p->session
                           : p->prompt_cache_key ? p->prompt_cache_key
                                                 : p->user;
    tm_gen_args args = {.served = served,
                        .stop_ids = p->stop_ids,
                        .stop_count = (size_t)p->stop_id_count,
                        .session = affinity && *affinity ? affinity : NULL,
                        .priority = (int32_t)p->priority};
    if (!tm_api_params_sampling(p, served, bias, &args.sampling, e))
        return false;
    if (p->cache_salt)
        args.cache_salt = tm_hash64(p->cache_salt, strlen(p->cache_salt), 0);
    if (p->timeout_s > 0)
        args.deadline_ms = TM_MIN((int64_t)(p->timeout_s * 1000) + 1, limits->timeout_max_ms);
    *out = args;
    return true;
}

int32_t tm_api_max_tokens(const tm_api_params *p, const tm_served *served, bool chat,
                          size_t prompt_len)
{
    int64_t room = (int64_t)served->max_context - (int64_t)prompt_len;
    int64_t want = p->max_completion_tokens >= 0 ? p->max_completion_tokens : p->max_tokens;
    if (want < 0)
        want = chat ? room : COMPLETION_TOKENS;
    return (int32_t)TM_MIN(room, want);
}

static void fail(tm_api_error *e, tm_metrics *m, tm_api_code code, int64_t retry_after_ms)
{
    tm_api_fail(e, code, NULL,
                code == TM_API_INVALID_VALUE ? "The worker refused the request." : NULL);
    e->retry_after_ms = retry_after_ms;
    if (code == TM_API_QUEUE_FULL || code == TM_API_NO_WORKER)
        tm_observe_shed(m, tm_api_code_get(code)->code);
}

void tm_api_fail_start(tm_api_error *e, tm_metrics *m, tm_status st, int64_t retry_after_ms)
{
    tm_api_code code = st == TM_STATUS_BUSY          ? TM_API_QUEUE_FULL
                       : st == TM_STATUS_UNAVAILABLE ? TM_API_NO_WORKER
                                                     : TM_API_INTERNAL;
    fail(e, m, code, retry_after_ms);
}

void tm_api_fail_gen(tm_api_error *e, tm_metrics *m, tm_gen_error error, int64_t retry_after_ms)
{
    static const tm_api_code codes[] = {
        [TM_GEN_ERR_INVALID] = TM_API_INVALID_VALUE, [TM_GEN_ERR_TOO_LONG] = TM_API_CONTEXT_LENGTH,
        [TM_GEN_ERR_BUSY] = TM_API_QUEUE_FULL,       [TM_GEN_ERR_NO_WORKER] = TM_API_NO_WORKER,
        [TM_GEN_ERR_POISON] = TM_API_POISON,         [TM_GEN_ERR_TIMEOUT] = TM_API_TIMEOUT,
        [TM_GEN_ERR_INTERNAL] = TM_API_INTERNAL,
    };
    fail(e, m, (size_t)error < TM_ARRAY_LEN(codes) ? codes[error] : TM_API_INTERNAL,
         retry_after_ms);
}
