/* The request fields of the OpenAI routes: one table of {name, routes, type, bounds, default, place}.
 *
 * Parsing walks the body's keys, checks each against its row and stores it in tm_api_params. Everything
 * borrowed (strings, arrays) belongs to the JSON document. Checks that need the model come later
 * (tm_api_params_check_model). */
#ifndef TM_ROUTER_API_FIELDS_H
#define TM_ROUTER_API_FIELDS_H

#include <jansson.h>

#include "common/sampling.h"
#include "router/api/error.h"
#include "router/served.h"
#include "text/detok.h"

#define TM_API_STOPS_MAX      16 /* what the detokeniser can hold; the option may say less */
#define TM_API_STOP_BYTES_MAX 256
#define TM_API_STOP_IDS_MAX   64
#define TM_API_STOP_IDS_ROOM  (TM_API_STOP_IDS_MAX + TM_TEMPLATE_STOPS_MAX) /* with the template's */
#define TM_API_BIAS_MAX       1024
#define TM_API_N_MAX          128

/* Routes, as bits. */
#define TM_API_CHAT       1
#define TM_API_COMPLETION 2
#define TM_API_BOTH       3

typedef struct tm_api_limits {
    int64_t stop_max;     /* 4, up to TM_API_STOPS_MAX */
    int64_t messages_max; /* 4096 */
    int64_t parts_max;    /* 64 */
    int64_t choices_max;  /* prompts x n of one request */
    int64_t timeout_max_ms;
} tm_api_limits;
tm_api_limits tm_api_limits_default(void);

typedef struct tm_api_params {
    const char *model;
    /* NaN: the model's own default */
    double temperature, top_p, repetition_penalty;
    double min_p, frequency_penalty, presence_penalty;
    double timeout_s; /* 0 = none */
    int64_t top_k;    /* -2: the model's own default; -1 and 0: off */
    int64_t seed;
    bool has_seed;
    int64_t n, best_of, priority;
    int64_t max_tokens, max_completion_tokens; /* -1 = absent */
    int64_t min_tokens, min_new_tokens;
    bool logprobs;          /* chat: switch */
    int64_t top_logprobs;   /* chat: -1 = absent */
    int64_t logprobs_count; /* completions: -1 = none */
    bool stream, include_usage, has_stream_options;
    bool ignore_eos, skip_special_tokens, include_stop, return_token_ids, echo;
    bool add_generation_prompt, has_add_generation_prompt, continue_final_message;
    const char *stops[TM_DETOK_STOPS_MAX]; /* the request's, then the template's */
    int stop_count;
    int32_t stop_ids[TM_API_STOP_IDS_ROOM];
    int stop_id_count;
    const json_t *logit_bias; /* object, its shape checked */
    char session[256];        /* affinity key, "" = none */
    const char *prompt_cache_key, *user, *cache_salt, *reasoning_effort;
    const json_t *messages, *prompt, *input_ids, *template_kwargs, *enable_thinking;
    const json_t *tools, *functions, *tool_choice, *function_call; /* NULL = absent or empty */
    bool parallel_tool_calls;
} tm_api_params;

typedef struct tm_api_field tm_api_field;
typedef bool (*tm_api_field_fn)(tm_api_params *p, const tm_api_field *f, const json_t *v,
                                const tm_api_limits *limits, tm_api_error *e);

typedef enum tm_api_kind {
    TM_API_BOOL,
    TM_API_INT,
    TM_API_NUM,
    TM_API_STR,    /* min..max bytes */
    TM_API_CUSTOM, /* parse */
    TM_API_ANY,    /* accepted, without effect */
    TM_API_REFUSE  /* only null, false, "" and empty lists and objects are accepted: not offered */
} tm_api_kind;

#define TM_API_NOWHERE ((size_t)-1)

struct tm_api_field {
    const char *name;
    int routes;
    tm_api_kind kind;
    double min, max;
    double def;
    size_t offset;         /* in tm_api_params; NOWHERE = checked only */
    const char *says;      /* "must be ..." when the range in figures would mislead */
    tm_api_field_fn parse; /* CUSTOM */
    bool open_min;         /* min itself is not allowed */
};

const tm_api_field *tm_api_fields(int *count);

/* unknown: called for every key without a row; may be NULL. */
bool tm_api_params_parse(tm_api_params *p, const json_t *root, int route,
                         const tm_api_limits *limits, void (*unknown)(void *user, const char *key),
                         void *user, tm_api_error *e);

/* The parameters as the engine takes them. bias has room for TM_API_BIAS_MAX entries and is referred to by
 * *out. Fails when a token id is not in the model's vocabulary. */
bool tm_api_params_sampling(const tm_api_params *p, const tm_served *served, tm_logit_bias *bias,
                            tm_sampling *out, tm_api_error *e);

/* "Invalid type for 'x': expected a string, got null." */
bool tm_api_fail_type(tm_api_error *e, const char *param, const char *want, const json_t *got);

#endif
