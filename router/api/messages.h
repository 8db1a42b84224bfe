/* Chat messages: from the request's JSON to what a template reads.
 *
 * Roles and parts are checked, text parts are joined, `developer` becomes `system`, arguments of tool calls
 * become objects. Errors name the place: messages[3].content[0].type. */
#ifndef TM_ROUTER_API_MESSAGES_H
#define TM_ROUTER_API_MESSAGES_H

#include <jansson.h>

#include "router/api/fields.h"

/* *out is a new array owned by the caller; set only on true. */
bool tm_api_messages(const json_t *messages, const tm_api_limits *limits, json_t **out,
                     tm_api_error *e);

#endif
