/* Parsers of the fields that a type and two bounds do not describe; each is named by rows of the table in
 * fields.c. They check shape and limits; nothing here needs the model. */
#ifndef TM_ROUTER_API_FIELD_PARSE_H
#define TM_ROUTER_API_FIELD_PARSE_H

#include "router/api/fields.h"

#define TM_API_PARSER(fn)                                                                          \
    bool fn(tm_api_params *p, const tm_api_field *f, const json_t *v, const tm_api_limits *limits, \
            tm_api_error *e)

TM_API_PARSER(tm_api_check_n);
TM_API_PARSER(tm_api_parse_messages);
TM_API_PARSER(tm_api_parse_input_ids);
TM_API_PARSER(tm_api_parse_prompt);
TM_API_PARSER(tm_api_parse_seed);
TM_API_PARSER(tm_api_parse_logit_bias);
TM_API_PARSER(tm_api_parse_stop);
TM_API_PARSER(tm_api_parse_stop_ids);
TM_API_PARSER(tm_api_parse_stream_options);
TM_API_PARSER(tm_api_parse_session);
TM_API_PARSER(tm_api_parse_add_prompt);
TM_API_PARSER(tm_api_parse_kwargs);
TM_API_PARSER(tm_api_parse_thinking);
TM_API_PARSER(tm_api_parse_effort);
TM_API_PARSER(tm_api_parse_metadata);
TM_API_PARSER(tm_api_parse_modalities);
TM_API_PARSER(tm_api_parse_response_format);
TM_API_PARSER(tm_api_parse_tools);
TM_API_PARSER(tm_api_parse_functions);
TM_API_PARSER(tm_api_parse_tool_choice);
TM_API_PARSER(tm_api_parse_function_call);

/* A string without NUL characters. */
bool tm_api_plain_string(const json_t *v);
/* A decimal token id as an object key ("50256"): digits only, up to INT32_MAX. */
bool tm_api_token_key(const char *key, int64_t *id);

#endif
