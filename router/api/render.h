/* The prompt of a conversation, in whichever form of it the model's template takes. */
#ifndef TM_ROUTER_API_RENDER_H
#define TM_ROUTER_API_RENDER_H

#include "router/api/prep.h"

/* INVALID: the template refused the conversation. r changes only on TM_OK. */
tm_status tm_api_render(const tm_prep *p, const json_t *messages, const json_t *kwargs,
                        tm_rendered *r, tm_err *err);

#endif
