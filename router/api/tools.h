/* The tools of a request: the functions that the model may call, and whether it may, must or must not. The old
 * fields `functions` and `function_call` mean the same and are answered in their own form. */
#ifndef TM_ROUTER_API_TOOLS_H
#define TM_ROUTER_API_TOOLS_H

#include "router/api/fields.h"

#define TM_API_TOOLS_MAX 128

typedef enum tm_api_tool_mode {
    TM_API_TOOLS_NONE, /* none were given, or tool_choice is none */
    TM_API_TOOLS_AUTO,
    TM_API_TOOLS_REQUIRED,
    TM_API_TOOLS_NAMED
} tm_api_tool_mode;

typedef struct tm_api_tools {
    tm_api_tool_mode mode;
    json_t *list;     /* owned: [{type, function}]; NULL with mode NONE */
    const char *name; /* NAMED; borrowed from the body */
    bool one;         /* at most one call */
    bool old;         /* function_call instead of tool_calls */
} tm_api_tools;

/* The shapes were checked by the field table; here fields are put together. */
bool tm_api_tools_read(const tm_api_params *p, tm_api_tools *out, tm_api_error *e);
void tm_api_tools_deinit(tm_api_tools *t);
/* Rules between the fields, for the walk over the table. */
bool tm_api_tools_check(const tm_api_params *p, tm_api_error *e);

#endif
