/* turbomesh chat: a read-eval-print loop on a local engine. A line is a message; """ opens and closes a
 * message of several lines; /clear (or `end`) forgets the conversation, /bye (or `exit`) leaves. Ctrl-C stops
 * the answer, not the program. With --prompt: one question, the answer, the end. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cmd.h"
#include "cli/local.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/hash.h"
#include "text/detok.h"

#ifdef TM_HAVE_LIBEDIT
#include <editline/readline.h>
#endif

typedef struct chat_opts {
    tm_local_opts local;
    const char *prompt, *system;
    double temperature, top_p, repetition_penalty;
    int64_t top_k, max_tokens, seed;
} chat_opts;

#define OFF(f) offsetof(chat_opts, f)
static const tm_opt_row ROWS[] = {
    {"prompt", NULL, TM_OPT_STR, OFF(prompt), NULL, 0, 0, NULL, "Ask this and leave."},
    {"system", "meta-instruction", TM_OPT_STR, OFF(system), NULL, 0, 0, NULL, "System message."},
    {"temperature", NULL, TM_OPT_NUM, OFF(temperature), "0.7", 0, 2, NULL, "0 is greedy."},
    {"top-p", NULL, TM_OPT_NUM, OFF(top_p), "0.95", 0, 1, NULL, "Nucleus."},
    {"top-k", NULL, TM_OPT_INT, OFF(top_k), "0", 0, 1 << 20, NULL, "Best k only; 0 is off."},
    {"repetition-penalty", NULL, TM_OPT_NUM, OFF(repetition_penalty), "1", 0.01, 10, NULL,
     "1 is off."},
    {"max-tokens", "max-new-tokens", TM_OPT_INT, OFF(max_tokens), "512", 1, 1 << 24, NULL,
     "Tokens of an answer at most."},
    {"seed", NULL, TM_OPT_INT, OFF(seed), "-1", -1, 9e18, NULL,
     "Seed of the sampling; -1 draws one."},
    TM_LOCAL_ROWS(chat_opts, local),
};
const tm_opt_table TM_CHAT_OPTIONS = {"turbomesh chat",
                                      "turbomesh chat MODEL [options]",
                                      "Talk to a model on a local engine.",
                                      ROWS,
                                      TM_ARRAY_LEN(ROWS),
                                      1};

typedef struct session {
    tm_local l;
    const chat_opts *o;
    json_t *messages;
    uint64_t next_id;
} session;

static volatile sig_atomic_t g_interrupted;

static void on_sigint(int sig)
{
    (void)sig;
    g_interrupted = 1;
}

static tm_status add_message(session *s, const char *role, const char *text, size_t len,
                             tm_err *err)
{
    json_t *content = json_stringn(text, len); /* NULL when not UTF-8 */
    if (!content)
        return TM_FAIL(err, TM_STATUS_INVALID, "the text is not valid UTF-8");
    json_t *m = json_pack("{s:s, s:o}", "role", role, "content", content);
    if (!m || json_array_append_new(s->messages, m) != 0)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    return TM_OK;
}

/* The conversation as token ids; without a template, the last message alone as raw text. */
static tm_status encode(session *s, int32_t **ids, size_t *n, tm_err *err)
{
    if (!s->l.template) {
        json_t *last = json_array_get(s->messages, json_array_size(s->messages) - 1);
        json_t *c = json_object_get(last, "content");
        tm_encode_opts eo = {.add_special = true};
        return tm_tokenizer_encode(s->l.tokenizer, json_string_value(c), json_string_length(c), &eo,
                                   ids, n, err);
    }
    tm_rendered r = {0};
    tm_render_args a = {.messages = s->messages, .add_generation_prompt = true};
    TM_TRY(tm_template_render(s->l.template, &a, &r, err));
    tm_encode_opts eo = {.input = r.input, .input_count = r.input_count};
    tm_status st = tm_tokenizer_encode(s->l.tokenizer, r.text.data, r.text.len, &eo, ids, n, err);
    tm_rendered_deinit(&r);
    return st;
}

static void emit(tm_buf *chunk, tm_buf *answer)
{
    if (chunk->len == 0)
        return;
    fwrite(chunk->data, 1, chunk->len, stdout);
    fflush(stdout);
    tm_buf_append(answer, chunk->data, chunk->len);
    tm_buf_clear(chunk);
}

/* Streams one answer to stdout and into `answer`. */
static tm_status generate(session *s, const int32_t *ids, size_t n, tm_buf *answer, tm_err *err)
{
    const chat_opts *o = s->o;
    tm_request r = {
        .id = ++s->next_id, .prompt = ids, .prompt_len = n, .sampling = tm_sampling_default()};
    int64_t room = s->l.info->model.max_positions - (int64_t)n;
    if (room < 1)
        return TM_FAIL(err, TM_STATUS_INVALID,
                       "the conversation has %zu tokens, the context is %d: /clear starts anew", n,
                       s->l.info->model.max_positions);
    r.max_tokens = (int32_t)TM_MIN(o->max_tokens, room);
    r.sampling.temperature = (float)o->temperature;
    r.sampling.top_p = (float)o->top_p;
    r.sampling.top_k = (int32_t)o->top_k;
    r.sampling.repetition_penalty = (float)o->repetition_penalty;
    if (o->seed >= 0)
        r.sampling.seed = (uint64_t)o->seed;
    else
        tm_random_bytes(&r.sampling.seed, sizeof r.sampling.seed);
    tm_detok *d = NULL;
    bool after_text =
        !s->l.template && n > 0 && !tm_tokenizer_is_special(s->l.tokenizer, ids[n - 1]);
    tm_detok_opts dop = {.skip_special = true, .continues = after_text};
    TM_TRY(tm_detok_create(&d, s->l.tokenizer, &dop, err));
    tm_status st = tm_engine_submit(s->l.engine, &r, err);
    bool done = st != TM_OK;
    tm_buf chunk;
    tm_buf_init(&chunk, 0);
    while (!done) {
        tm_step_events *b;
        if (g_interrupted) {
            tm_engine_cancel(s->l.engine, r.id);
            g_interrupted = 0;
        }
        st = tm_engine_wait(s->l.engine, 100, &b);
        if (st == TM_STATUS_TIMEOUT)
            continue;
        if (st != TM_OK) {
            TM_FAIL(err, st, "the engine ended");
            break;
        }
        for (int i = 0; i < b->count; i++) {
            if (b->events[i].kind == TM_EVENT_TOKEN)
                tm_detok_push(d, b->events[i].token, &chunk);
            if (b->events[i].kind != TM_EVENT_FINISHED)
                continue;
            done = true;
            tm_detok_finish(d, &chunk);
            if (b->events[i].finish == TM_FINISH_ERROR)
                st = TM_FAIL(err, TM_STATUS_INTERNAL, "the engine could not go on with the answer");
        }
        tm_engine_events_free(b);
        emit(&chunk, answer);
    }
    tm_buf_deinit(&chunk);
    tm_detok_destroy(d);
    printf("\n");
    return st;
}

static tm_status ask(session *s, const char *text, size_t len, tm_err *err)
{
    int32_t *ids = NULL;
    size_t n = 0;
    tm_buf answer;
    tm_buf_init(&answer, 0);
    tm_status st = add_message(s, "user", text, len, err);
    if (st == TM_OK)
        st = encode(s, &ids, &n, err);
    g_interrupted = 0;
    if (st == TM_OK)
        st = generate(s, ids, n, &answer, err);
    if (st == TM_OK)
        st = add_message(s, "assistant", answer.data ? answer.data : "", answer.len, err);
    else if (json_array_size(s->messages) > 0)
        json_array_remove(s->messages, json_array_size(s->messages) - 1);
    free(ids);
    tm_buf_deinit(&answer);
    return st;
}

static tm_status clear(session *s, tm_err *err)
{
    json_array_clear(s->messages);
    return s->o->system ? add_message(s, "system", s->o->system, strlen(s->o->system), err) : TM_OK;
}

/* One line without its newline, malloc'ed; NULL at the end of input. */
static char *read_line(const char *prompt)
{
#ifdef TM_HAVE_LIBEDIT
    if (isatty(0)) {
        char *line = readline(prompt);
        if (line && *line)
            add_history(line);
        return line;
    }
#endif
    char *line = NULL;
    size_t cap = 0;
    if (isatty(0))
        fputs(prompt, stderr);
    ssize_t n = getline(&line, &cap, stdin);
    if (n < 0) {
        free(line);
        return NULL;
    }
    if (n > 0 && line[n - 1] == '\n')
        line[n - 1] = '\0';
    return line;
}

/* A message: one line, or the lines between two """. False at the end of input. */
static bool read_message(tm_buf *m)
{
    tm_buf_clear(m);
    char *line = read_line("> ");
    if (!line)
        return false;
    bool many = strncmp(line, "\"\"\"", 3) == 0;
    tm_buf_puts(m, many ? line + 3 : line);
    free(line);
    while (many) {
        line = read_line("... ");
        if (!line)
            return true;
        char *end = strstr(line, "\"\"\"");
        tm_buf_putc(m, '\n');
        tm_buf_append(m, line, end ? (size_t)(end - line) : strlen(line));
        free(line);
        many = !end;
    }
    return true;
}

static bool is_one_of(const char *word, const char *a, const char *b)
{
    return strcmp(word, a) == 0 || strcmp(word, b) == 0;
}

static int repl(session *s)
{
    tm_err err = TM_ERR_INIT;
    tm_buf m;
    tm_buf_init(&m, (size_t)8 << 20);
    fprintf(stderr,
            "%s, %d tokens of context. /clear forgets, /bye leaves, \"\"\" for several lines.\n",
            s->l.info->model.name, s->l.info->model.max_positions);
    while (read_message(&m)) {
        const char *text = m.data ? m.data : "";
        if (is_one_of(text, "/bye", "exit"))
            break;
        tm_status st = TM_OK;
        if (is_one_of(text, "/clear", "end"))
            st = clear(s, &err);
        else if (is_one_of(text, "/?", "/help"))
            fprintf(stderr,
                    "/clear forgets the conversation, /bye leaves, Ctrl-C stops an answer.\n");
        else if (m.len > 0)
            st = ask(s, text, m.len, &err);
        if (st != TM_OK)
            fprintf(stderr, "turbomesh chat: %s\n", err.msg);
        if (st == TM_STATUS_UNAVAILABLE || st == TM_STATUS_CLOSED)
            break;
    }
    tm_buf_deinit(&m);
    return 0;
}

int tm_cmd_chat(int argc, char **argv)
{
    chat_opts o = {0};
    const char *model;
    int n = 0, code;
    if (!tm_cmd_parse(&TM_CHAT_OPTIONS, argc, argv, &o, &model, &n, &code))
        return code;
    tm_err err = TM_ERR_INIT;
    if (n != 1) {
        TM_FAIL(&err, TM_STATUS_INVALID,
                "give MODEL, a Hugging Face folder such as models/demo-20m");
        return tm_cmd_fail("chat", &err);
    }
    session s = {.o = &o, .messages = json_array()};
    tm_status st = tm_local_open(&s.l, model, &o.local, true, argc, argv, &err);
    if (st == TM_OK)
        st = clear(&s, &err);
    if (st != TM_OK) {
        json_decref(s.messages);
        return tm_cmd_fail("chat", &err);
    }
    struct sigaction sa = {.sa_handler = on_sigint};
    sigaction(SIGINT, &sa, NULL);
    code = 0;
    if (o.prompt) {
        st = ask(&s, o.prompt, strlen(o.prompt), &err);
        code = st == TM_OK ? 0 : tm_cmd_fail("chat", &err);
    } else {
        code = repl(&s);
    }
    tm_local_close(&s.l);
    json_decref(s.messages);
    return code;
}
