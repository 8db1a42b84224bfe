/* Chat templates: messages to a prompt, with a mark on every byte that came from the request.
 *
 * The template is the checkpoint's Jinja text (sandboxed interpreter: no I/O, bounds on steps, depth and
 * output) or a built-in builder by name ("chatml"). Immutable after loading, usable from any thread. */
#ifndef TM_TEXT_TEMPLATE_H
#define TM_TEXT_TEMPLATE_H

#include <jansson.h>
#include <time.h>

#include "common/buf.h"
#include "text/tokenizer.h"

typedef struct tm_template tm_template;

#define TM_TEMPLATE_STOPS_MAX 8

/* t NULL: a template without a model, which knows no special tokens.
 * Choice: `override` (a built-in name, template text, LMDeploy's JSON form, or a file with one of them;
 * NULL = none), chat_template.jinja, tokenizer_config.chat_template, chat_template.json, the built-in that a
 * workspace names, the built-in for the model's name (the folder, or config.json's _name_or_path). NOT_FOUND when the
 * model has none. */
tm_status tm_template_create(tm_template **out, const tm_text_file *files, int count,
                             const char *override, const tm_tokenizer *t, tm_err *err);
tm_status tm_template_load(tm_template **out, const char *dir, const char *override,
                           const tm_tokenizer *t, tm_err *err);
void tm_template_destroy(tm_template *t);
const char *tm_template_name(const tm_template *t); /* "chatml", "jinja" */
/* Texts that end an answer besides the model's stop ids: index 0, 1, ... until NULL. */
const char *tm_template_stop(const tm_template *t, int index);

/* A system message for conversations that bring none (LMDeploy's meta instruction). Before the template is
 * used; NULL or "" keeps what the template does by itself. */
tm_status tm_template_set_meta(tm_template *t, const char *text, tm_err *err);
/* Whether the template's source, or a text of the built-in format, holds `text`. */
bool tm_template_mentions(const tm_template *t, const char *text);
/* Whether tools given to a render reach the prompt. */
bool tm_template_takes_tools(const tm_template *t);

typedef struct tm_render_args {
    const json_t *messages; /* array of {role, content, ...}, already validated */
    const json_t *tools;    /* or NULL */
    const json_t *kwargs;   /* chat_template_kwargs or NULL */
    bool add_generation_prompt;
    bool
        continue_final_message; /* the text ends inside the last message; not with the prompt above */
    const struct tm *now;       /* local time for templates that ask; NULL = the clock */
} tm_render_args;

typedef struct tm_rendered {
    tm_buf text;
    tm_text_span *input; /* byte ranges that came from the request */
    size_t input_count;
} tm_rendered;

/* INVALID: the template refused the conversation (its message), or a bound was passed. */
tm_status tm_template_render(const tm_template *t, const tm_render_args *args, tm_rendered *out,
                             tm_err *err);
void tm_rendered_deinit(tm_rendered *r);

#endif
