/* Between a face and dispatch: checked parameters into generation arguments, and dispatch's refusals into API
 * errors. Used by the HTTP API and the public gRPC service, so that both mean the same by every field. */
#ifndef TM_ROUTER_API_ARGS_H
#define TM_ROUTER_API_ARGS_H

#include "router/api/fields.h"
#include "router/dispatch.h"

/* Everything but the prompt, max_tokens, the choice and the request id. *out borrows from p, served and bias,
 * which has room for TM_API_BIAS_MAX entries. */
bool tm_api_gen_args(const tm_api_params *p, tm_served *served, const tm_api_limits *limits,
                     tm_logit_bias *bias, tm_gen_args *out, tm_api_error *e);
/* What was asked for, within the room that the prompt leaves. */
int32_t tm_api_max_tokens(const tm_api_params *p, const tm_served *served, bool chat,
                          size_t prompt_len);

/* The status of tm_dispatch_start, the error of on_error; what was shed is counted. */
void tm_api_fail_start(tm_api_error *e, tm_metrics *m, tm_status st, int64_t retry_after_ms);
void tm_api_fail_gen(tm_api_error *e, tm_metrics *m, tm_gen_error error, int64_t retry_after_ms);

#endif
