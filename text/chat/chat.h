/* The inside of chat templates: one record for both kinds, Jinja text and formats of fixed strings.
 *
 * A format is what LMDeploy describes models with: a box around the text of each role. It has no conditions,
 * so a row of a table (builtin.c) or a small JSON file (format.c) is a whole template. */
#ifndef TM_TEXT_CHAT_CHAT_H
#define TM_TEXT_CHAT_CHAT_H

#include "text/jinja/jinja.h"
#include "text/template.h"

#define TM_CHAT_STOPS_MAX TM_TEMPLATE_STOPS_MAX

/* NULL members are empty, but for meta: NULL = no system part unless the conversation brings one. */
typedef struct tm_chat_format {
    const char *name;
    const char *start; /* in front of everything; NULL = what the tokenizer adds to a text */
    const char *first; /* in front of a conversation without a system part */
    const char *system, *meta, *eosys;
    const char *user, *eoh;
    const char *assistant, *eoa;
    const char *separator; /* after eoa */
    const char *prompt;    /* asks for an answer; NULL = `assistant` */
    const char *tool, *eotool;
    const char *tools, *eotools; /* around the list of tools as JSON; NULL = tools have no place */
    const char *call, *eocall;   /* around each call of the assistant; NULL = calls have no place */
    const char *stops[TM_CHAT_STOPS_MAX];
    bool raw;    /* the texts of the messages, nothing around them */
    bool rounds; /* "[Round 1]" and so on before the texts of the user */
    bool
        infill; /* capability "infilling": text with <FILL> becomes a question for what is missing */
} tm_chat_format;

/* A named special token, a variable of Jinja templates. */
typedef struct tm_chat_name {
    char *name, *value;
} tm_chat_name;

struct tm_template {
    tm_jinja *plain, *with_tools; /* Jinja; with_tools may be NULL */
    const tm_chat_format *format; /* otherwise: static or `owned` */
    json_t *owned;                /* the JSON file behind `made`: owns its strings */
    tm_chat_format made;
    bool infilling; /* the prompt is the text around <FILL> */
    char *
        prefix; /* what formats begin with: BOS and its like, as the tokenizer would add it; or NULL */
    char *meta; /* the user's system message for conversations that bring none; or NULL */
    tm_chat_name *names;
    int name_count;
};

/* A row by its name; NULL = none. */
const tm_chat_format *tm_chat_builtin_find(const char *name);
/* The row for a model's path by LMDeploy's rules; NULL = none. Base models have none. */
const tm_chat_format *tm_chat_builtin_match(const char *path);
/* "chatml, vicuna, qwen": the names closest to one that is none, for messages. */
void tm_chat_builtin_closest(const char *name, char *out, size_t size);

/* Reads LMDeploy's JSON form. Fields that are absent come from the row that model_name names. */
tm_status tm_chat_format_read(tm_template *t, const char *data, size_t len, tm_err *err);
tm_status tm_chat_format_render(const tm_template *t, const tm_render_args *args, tm_rendered *out,
                                tm_err *err);
tm_status tm_chat_jinja_render(const tm_template *t, const tm_render_args *args, tm_rendered *out,
                               tm_err *err);

/* The text of a message: a string, none, or parts of type text joined by newlines. false: something else.
 * The text is put into `room` when it has to be made. */
bool tm_chat_text(const json_t *content, tm_buf *room, const char **text, size_t *len);

#endif
