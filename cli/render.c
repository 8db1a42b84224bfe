/* turbomesh render: a conversation through a chat template, for scripts and tests.
 *
 * With MODEL the messages go the way of a request to the server: checked, parts joined, arguments of tool calls
 * turned into objects, then the model's template (or --chat-template in its place), again in another form where it
 * refuses the first. Without MODEL the template alone is at work: messages reach it as they are, and there are no
 * special tokens but those in --kwargs. The prompt goes to standard output without a newline of our own. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cli/cmd.h"
#include "common/check.h"
#include "common/json.h"
#include "common/log.h"
#include "router/api/field_parse.h"
#include "router/api/messages.h"
#include "router/api/render.h"
#include "router/served.h"
#include "text/template.h"
#include "text/tokenizer.h"

#define MESSAGES_BYTES_MAX ((size_t)64 << 20)

typedef struct render_opts {
    const char *template, *messages, *kwargs, *tools, *now;
    bool add_generation_prompt, continue_final_message, raw, ids, json;
} render_opts;

#define OFF(f) offsetof(render_opts, f)
static const tm_opt_row ROWS[] = {
    {"messages", NULL, TM_OPT_STR, OFF(messages), NULL, 0, 0, NULL,
     "JSON file: an array of messages, or a chat request."},
    {"chat-template", NULL, TM_OPT_STR, OFF(template), NULL, 0, 0, NULL,
     "In place of the model's: a file, template text, or the name of a built-in one."},
    {"kwargs", "chat-template-kwargs", TM_OPT_STR, OFF(kwargs), NULL, 0, 0, NULL,
     "JSON object: further variables of the template."},
    {"tools", NULL, TM_OPT_STR, OFF(tools), NULL, 0, 0, NULL, "JSON file: an array of tools."},
    {"add-generation-prompt", NULL, TM_OPT_BOOL, OFF(add_generation_prompt), "false", 0, 0, NULL,
     "End with the beginning of an answer, as a server does."},
    {"continue-final-message", NULL, TM_OPT_BOOL, OFF(continue_final_message), "false", 0, 0, NULL,
     "End inside the last message."},
    {"raw", NULL, TM_OPT_BOOL, OFF(raw), "false", 0, 0, NULL,
     "With MODEL: messages reach the template as they are."},
    {"now", NULL, TM_OPT_STR, OFF(now), NULL, 0, 0, NULL,
     "Local time for templates that ask, 2024-07-26T12:00:00; default: the clock."},
    {"ids", NULL, TM_OPT_BOOL, OFF(ids), "false", 0, 0, NULL,
     "With MODEL: the prompt's token ids instead of its text."},
    {"json", NULL, TM_OPT_BOOL, OFF(json), "false", 0, 0, NULL,
     "The text as a JSON string, the ids as a JSON array, and a newline."},
};
const tm_opt_table TM_RENDER_OPTIONS = {
    "turbomesh render",
    "turbomesh render (MODEL | --chat-template FILE) --messages FILE.json [options]",
    "The prompt that a chat template makes of a conversation.",
    ROWS,
    TM_ARRAY_LEN(ROWS),
    1};

/* What a render is made of; everything that is not NULL is owned. */
typedef struct job {
    tm_tokenizer *tokenizer;
    tm_template *template;
    json_t *messages, *tools, *kwargs;
    struct tm now;
    tm_rendered out;
} job;

static void job_deinit(job *j)
{
    tm_rendered_deinit(&j->out);
    tm_template_destroy(j->template);
    tm_tokenizer_destroy(j->tokenizer);
    json_decref(j->messages);
    json_decref(j->tools);
    json_decref(j->kwargs);
}

static tm_status load_text(job *j, const char *model, const render_opts *o, tm_err *err)
{
    if (!model)
        return tm_template_create(&j->template, NULL, 0, o->template, NULL, err);
    TM_TRY(tm_tokenizer_load(&j->tokenizer, model, err));
    return tm_template_load(&j->template, model, o->template, j->tokenizer, err);
}

/* The array, or of a request its messages and tools. */
static tm_status load_messages(job *j, const render_opts *o, tm_err *err)
{
    json_t *root;
    TM_TRY(tm_json_load_file(o->messages, MESSAGES_BYTES_MAX, &root, err));
    bool request = json_is_object(root);
    j->messages = request ? json_incref(tm_json_get(root, "messages")) : json_incref(root);
    if (request && !o->tools)
        j->tools = json_incref(tm_json_get(root, "tools"));
    tm_status st = TM_OK;
    if (!json_is_array(j->messages))
        st = TM_FAIL(err, TM_STATUS_CONFIG, "%s: expected an array of messages%s, got %s",
                     o->messages, request ? " under \"messages\"" : "",
                     tm_json_type_name(request ? tm_json_get(root, "messages") : root));
    json_decref(root);
    return st;
}

static tm_status load_rest(job *j, const render_opts *o, tm_err *err)
{
    if (o->tools)
        TM_TRY(tm_json_load_file(o->tools, MESSAGES_BYTES_MAX, &j->tools, err));
    if (j->tools && !json_is_array(j->tools))
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: expected an array of tools, got %s",
                       o->tools ? o->tools : o->messages, tm_json_type_name(j->tools));
    if (o->kwargs) {
        tm_status st = tm_json_parse(o->kwargs, strlen(o->kwargs), &j->kwargs, err);
        if (st == TM_OK && !json_is_object(j->kwargs))
            st = TM_FAIL(err, TM_STATUS_INVALID, "expected a JSON object, got %s",
                         tm_json_type_name(j->kwargs));
        if (st != TM_OK) {
            tm_err_prefix(err, "--kwargs");
            return st;
        }
    }
    const char *end = o->now ? strptime(o->now, "%Y-%m-%dT%H:%M:%S", &j->now) : NULL;
    if (o->now && (!end || *end))
        return TM_FAIL(err, TM_STATUS_INVALID, "--now: expected 2024-07-26T12:00:00, got '%.40s'",
                       o->now);
    if (o->now) {
        j->now.tm_isdst = -1;
        mktime(&j->now); /* the day of the week */
    }
    return TM_OK;
}

static tm_status refuse(const tm_api_error *e, tm_err *err)
{
    return TM_FAIL(err, TM_STATUS_INVALID, "%s", e->message);
}

/* The tools as the server reads them out of a request. */
static tm_status read_tools(const job *j, tm_prep *p, tm_err *err)
{
    static const tm_api_field field = {.name = "tools"};
    tm_api_error e = {0};
    if ((j->tools && !tm_api_parse_tools(&p->params, &field, j->tools, p->limits, &e)) ||
        !tm_api_tools_read(&p->params, &p->tools, &e))
        return refuse(&e, err);
    if (p->tools.list && !tm_template_takes_tools(j->template))
        return TM_FAIL(err, TM_STATUS_INVALID, "the chat template has no place for tools");
    return TM_OK;
}

/* The way of a request to the server. */
static tm_status render_request(job *j, const render_opts *o, tm_err *err)
{
    const tm_api_limits limits = tm_api_limits_default();
    tm_served served = {.tokenizer = j->tokenizer, .template = j->template};
    tm_prep p = {.kind = TM_PREP_CHAT, .served = &served, .limits = &limits};
    tm_api_error e = {0};
    json_t *messages = NULL;
    p.params.add_generation_prompt = o->add_generation_prompt;
    p.params.continue_final_message = o->continue_final_message;
    tm_status st = read_tools(j, &p, err);
    if (st == TM_OK && !tm_api_messages(j->messages, &limits, &messages, &e))
        st = refuse(&e, err);
    if (st == TM_OK)
        st = tm_api_render(&p, messages, j->kwargs, &j->out, err);
    json_decref(messages);
    tm_api_tools_deinit(&p.tools);
    return st;
}

static tm_status render_raw(job *j, const render_opts *o, tm_err *err)
{
    const tm_render_args args = {.messages = j->messages,
                                 .tools = j->tools,
                                 .kwargs = j->kwargs,
                                 .add_generation_prompt = o->add_generation_prompt,
                                 .continue_final_message = o->continue_final_message,
                                 .now = o->now ? &j->now : NULL};
    return tm_template_render(j->template, &args, &j->out, err);
}

static tm_status put_ids(const job *j, bool json, tm_buf *b, tm_err *err)
{
    /* As the server does: the template writes BOS itself, and text of the request is never a control token. */
    const tm_encode_opts opts = {.input = j->out.input, .input_count = j->out.input_count};
    const char *text = j->out.text.data ? j->out.text.data : "";
    int32_t *ids;
    size_t n;
    TM_TRY(tm_tokenizer_encode(j->tokenizer, text, j->out.text.len, &opts, &ids, &n, err));
    tm_buf_puts(b, json ? "[" : "");
    for (size_t i = 0; i < n; i++)
        tm_buf_printf(b, "%s%d", i == 0 ? "" : json ? ", " : " ", ids[i]);
    tm_buf_puts(b, json ? "]\n" : "\n");
    free(ids);
    return TM_OK;
}

static tm_status print(const job *j, const render_opts *o, tm_err *err)
{
    const char *text = j->out.text.data ? j->out.text.data : "";
    tm_status st = TM_OK;
    tm_buf b;
    tm_buf_init(&b, 0);
    if (o->ids) {
        st = put_ids(j, o->json, &b, err);
    } else if (o->json) {
        tm_jw w;
        tm_jw_init(&w, &b);
        tm_jw_strn(&w, text, j->out.text.len);
        tm_buf_putc(&b, '\n');
    } else {
        tm_buf_append(&b, text, j->out.text.len);
    }
    if (st == TM_OK && b.failed)
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    if (st == TM_OK && (fwrite(b.data ? b.data : "", 1, b.len, stdout) != b.len || fflush(stdout)))
        st = TM_FAIL(err, TM_STATUS_IO, "standard output: %m");
    tm_buf_deinit(&b);
    return st;
}

int tm_cmd_render(int argc, char **argv)
{
    render_opts o = {0};
    const char *model = NULL;
    int n = 0, code;
    if (!tm_cmd_parse(&TM_RENDER_OPTIONS, argc, argv, &o, &model, &n, &code))
        return code;
    tm_err err = TM_ERR_INIT;
    tm_log_init("turbomesh", TM_LOG_WARN, TM_LOG_AUTO);
    if (o.now && n == 1 && !o.raw) {
        TM_FAIL(&err, TM_STATUS_INVALID, "--now: a server takes the clock; give --raw with it");
        return tm_cmd_fail("render", &err);
    }
    if ((n != 1 && !o.template) || !o.messages || (o.ids && n != 1)) {
        TM_FAIL(&err, TM_STATUS_INVALID, "give MODEL or --chat-template, and --messages%s",
                o.ids ? "; --ids needs MODEL" : "");
        return tm_cmd_fail("render", &err);
    }
    job j = {0};
    tm_status st = load_text(&j, n == 1 ? model : NULL, &o, &err);
    if (st == TM_OK)
        st = load_messages(&j, &o, &err);
    if (st == TM_OK)
        st = load_rest(&j, &o, &err);
    if (st == TM_OK)
        st = n == 1 && !o.raw ? render_request(&j, &o, &err) : render_raw(&j, &o, &err);
    if (st == TM_OK)
        st = print(&j, &o, &err);
    job_deinit(&j);
    return st == TM_OK ? 0 : tm_cmd_fail("render", &err);
}
