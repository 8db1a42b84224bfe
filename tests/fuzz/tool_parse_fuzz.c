/* Fuzz entry of the parsers of tool calls and reasoning: "AB C D\n"-like head of four bytes (parser of calls,
 * parser of reasoning, flags, pieces), then what a model wrote. The same text in other pieces must give the
 * same events, complete calls must have objects as arguments, and what is no call must come back whole. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "text/parse/parse.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define HEAD 5

static const char functions_text[] =
    "[{\"type\":\"function\",\"function\":{\"name\":\"weather\",\"parameters\":{\"type\":"
    "\"object\","
    "\"properties\":{\"city\":{\"type\":\"string\"},\"days\":{\"type\":\"integer\"}}}}},"
    "{\"type\":\"function\",\"function\":{\"name\":\"now\"}}]";

typedef struct record {
    tm_buf all, content, args; /* every event; content; arguments of the call at hand */
    int last;                  /* kind of the last event */
    int reasoning;             /* bytes */
} record;

static void on_event(void *user, const tm_parse_event *e)
{
    record *r = user;
    if (r->last != (int)e->kind || e->kind == TM_PARSE_CALL)
        tm_buf_printf(&r->all, "\n%d %d ", (int)e->kind, e->call);
    r->last = (int)e->kind;
    tm_buf_append(&r->all, e->text, e->len);
    if (e->kind == TM_PARSE_CONTENT)
        tm_buf_append(&r->content, e->text, e->len);
    if (e->kind == TM_PARSE_REASONING)
        r->reasoning += (int)e->len;
    if (e->kind == TM_PARSE_CALL) {
        TM_ASSERT(e->len >= 1 && e->len <= TM_PARSE_NAME_MAX);
        tm_buf_clear(&r->args);
    }
    if (e->kind == TM_PARSE_ARGUMENTS)
        tm_buf_append(&r->args, e->text, e->len);
    if (e->kind == TM_PARSE_CALL_END) {
        json_t *v = NULL;
        const char *s = r->args.data ? r->args.data : "";
        /* What \u names, and the characters, are the client's to judge. */
        if (tm_utf8_valid(s, r->args.len) && !strstr(s, "\\u")) {
            tm_err err = TM_ERR_INIT;
            tm_status st = tm_json_parse(s, r->args.len, &v, &err);
            /* Numbers beyond a double and NUL in keys are JSON, though not everybody's. */
            TM_ASSERT(st != TM_OK || json_is_object(v));
            TM_ASSERT(st == TM_OK || strpbrk(s, "0123456789"));
        }
        json_decref(v);
    }
}

static const tm_tool_parser *tool_parser(int n)
{
    static const char *const names[] = {"hermes",   "llama3",      "mistral",      "mistral-v11",
                                        "internlm", "deepseek-v3", "deepseek-v31", "glm4",
                                        "glm47",    "qwen3coder",  "granite",      "phi4",
                                        "react",    "chatglm3",    "pythonic",     "deepseek-v32"};
    return n >= 0 && n < (int)TM_ARRAY_LEN(names) ? tm_tool_parser_find(names[n]) : NULL;
}

static const tm_reason_parser *reason_parser(int n)
{
    static const char *const names[] = {"think", "granite"};
    return n >= 0 && n < (int)TM_ARRAY_LEN(names) ? tm_reason_parser_find(names[n]) : NULL;
}

/* pieces 0: whole. */
static void play(const tm_parse_opts *o, const char *text, size_t len, bool cut, unsigned pieces,
                 record *r)
{
    tm_parse *p;
    *r = (record){.last = -1};
    tm_buf_init(&r->all, 0);
    tm_buf_init(&r->content, 0);
    tm_buf_init(&r->args, 0);
    TM_ASSERT(tm_parse_create(&p, o, on_event, r, NULL) == TM_OK);
    for (size_t at = 0, n; at < len; at += n) {
        n = pieces ? 1 + (at * 7 + pieces) % pieces : len;
        n = TM_MIN(n, len - at);
        tm_parse_push(p, text + at, n);
    }
    tm_parse_finish(p, cut);
    TM_ASSERT(!tm_parse_failed(p));
    if (!o->reason && tm_parse_complete(p) == 0 && !tm_parse_in_call(p)) {
        TM_ASSERT(r->content.len == len);
        TM_ASSERT(len == 0 || memcmp(r->content.data, text, len) == 0);
    }
    tm_parse_destroy(p);
}

static void drop(record *r)
{
    tm_buf_deinit(&r->all);
    tm_buf_deinit(&r->content);
    tm_buf_deinit(&r->args);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static json_t *functions;
    record whole, cut;
    if (!functions)
        TM_ASSERT(tm_json_parse(functions_text, sizeof(functions_text) - 1, &functions, NULL) ==
                  TM_OK);
    if (size < HEAD)
        return 0;
    const tm_parse_opts o = {.tools = tool_parser((data[0] & 31) - 1),
                             .reason = reason_parser((data[1] & 3) - 1),
                             .inside = data[2] & 1,
                             .known_only = data[2] & 2,
                             .calls_max = data[2] & 4 ? 2 : 0,
                             .functions = functions};
    const char *text = (const char *)data + HEAD;
    play(&o, text, size - HEAD, data[2] & 8, 0, &whole);
    play(&o, text, size - HEAD, data[2] & 8, 1 + data[3] % 13, &cut);
    TM_ASSERT(whole.all.len == cut.all.len);
    TM_ASSERT(whole.all.len == 0 || memcmp(whole.all.data, cut.all.data, cut.all.len) == 0);
    drop(&whole);
    drop(&cut);
    return 0;
}
