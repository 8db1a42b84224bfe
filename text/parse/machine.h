/* Inside text/parse: the machine that all families share, and what one way of writing calls (a syntax) sees of
 * it.
 *
 * Outside of calls the machine looks for the row's opening marks. Behind one it gives every byte to the row's
 * syntax, which finds names and arguments in `raw`, the text since the mark or since the last complete call. */
#ifndef TM_TEXT_PARSE_MACHINE_H
#define TM_TEXT_PARSE_MACHINE_H

#include "text/parse/jscan.h"
#include "text/parse/parse.h"

#define TM_PARSE_OPEN_MAX  4
#define TM_PARSE_MARK_MAX  64
#define TM_PARSE_WHITE_MAX 256

typedef enum tm_step {
    TM_STEP_MORE,
    TM_STEP_DONE,  /* the byte was the last of this stretch of calls */
    TM_STEP_LEAVE, /* calls are over, `raw` is ordinary text again */
    TM_STEP_BAD    /* malformed: `raw` is content, but for its last byte, which is ordinary text */
} tm_step;

typedef struct tm_syntax {
    void (*begin)(tm_parse *p);           /* raw holds the mark */
    tm_step (*byte)(tm_parse *p, char c); /* c is the last byte of raw */
    /* Whether a first byte without any mark could begin a call; NULL: never. */
    bool (*bare)(const tm_parse *p, char c);
} tm_syntax;

struct tm_tool_parser {
    const char *name, *aliases[5];
    const tm_syntax *syntax;
    const char *open[TM_PARSE_OPEN_MAX]; /* opening marks */
    const char *close;                   /* closing mark, where there is one */
    bool bare;                           /* calls of known functions need no mark */
    bool semicolons;                     /* between JSON objects */
    bool array;                          /* JSON objects stand in an array */
    bool short_ids;
    /* named calls: [call_open] NAME sep [gap] {arguments} [call_close] */
    const char *call_open, *sep, *gap, *call_close;
    bool typed; /* "function" and another sep stand in front of the name */
    /* tagged calls: name_open NAME name_close (key_open KEY key_close value_open VALUE value_close)* end */
    const char *name_open, *name_close, *key_open, *key_close, *value_open, *value_close, *end;
    bool text_values;     /* values of unknown type are text */
    const char *key_attr; /* between KEY and "true" (the value is text) or "false" (JSON) */
    /* how a forced call begins, in front of the name and behind it; NULL: not without a name */
    const char *force, *force_name;
    const char *stop;
    /* special tokens among the marks */
    const char *keep[8];
    /* detection: the template has all of `with` and none of `without`, or is the built-in `format` */
    const char *with[2], *without[2], *format;
    const char *model_types[3];
};

struct tm_reason_parser {
    const char *name, *aliases[6];
    const char *open, *close;
    bool always; /* answers begin inside whatever the prompt says */
    bool detect;
};

typedef enum tm_part { TM_PART_BEFORE, TM_PART_REASONING, TM_PART_BEHIND, TM_PART_ANSWER } tm_part;

struct tm_parse {
    const tm_tool_parser *row; /* NULL: no more calls */
    const tm_reason_parser *reason;
    const json_t *functions;
    bool known_only;
    int calls_max;
    tm_parse_fn fn;
    void *user;
    bool failed;

    tm_part part;
    char hold[TM_PARSE_MARK_MAX]; /* may become a mark */
    size_t hold_len;
    char white[TM_PARSE_WHITE_MAX]; /* space that is dropped when a mark follows */
    size_t white_len;
    bool fresh;      /* nothing but white space since the beginning or since a call */
    bool after_call; /* the same, since a call */

    bool in_section;
    bool is_bare; /* this section has no mark */
    bool tail;    /* behind a complete call of this section */
    tm_buf raw;
    int next;     /* number of the next call */
    bool open;    /* call `next` has begun */
    int complete; /* calls that are */

    /* the syntax's own */
    int at; /* its state */
    tm_jscan js;
    bool in_list, by_name;
    size_t begin; /* in raw: of what is being read */
    char name[TM_PARSE_NAME_MAX];
    size_t name_len; /* 0 = not known */
    int key;
    bool has_args, sending;         /* arguments were seen; they go out as they come */
    size_t args_at, args_end, sent; /* in raw */
    tm_buf text;                    /* arguments that are not verbatim in raw */
    int members;                    /* of arguments made so far */
    char quote;
    bool escaped;
    int depth;
};

/* Begins call `next` with p->name. false: the name is no name, or not one of the request. */
bool tm_parse_begin_call(tm_parse *p);
void tm_parse_arguments(tm_parse *p, const char *s, size_t len);
/* Verbatim arguments: those in raw up to `end` that were not sent yet. */
void tm_parse_send(tm_parse *p, size_t end);
/* The call is complete; raw is empty behind it. */
void tm_parse_end_call(tm_parse *p);
/* Forgets the call at hand, keeps raw. */
void tm_parse_reset(tm_parse *p);
bool tm_parse_set_name(tm_parse *p, const char *s, size_t len);
/* The function of the request with that name, or the first whose name begins so; NULL = none. */
const json_t *tm_parse_function(const tm_parse *p, const char *name, size_t len);
bool tm_parse_name_prefix(const tm_parse *p, const char *s, size_t len);
bool tm_parse_strict(const tm_parse *p); /* only known functions count */

bool tm_parse_is_white(char c);
bool tm_parse_is_name(char c);
bool tm_parse_all_name(const char *s, size_t len);
/* Whether the text ends in / begins with / is a beginning of the mark; a NULL mark never fits. */
bool tm_parse_ends(const char *s, size_t len, const char *mark);
bool tm_parse_begins(const char *s, size_t len, const char *mark);
bool tm_parse_starts_mark(const char *s, size_t len, const char *mark);

extern const tm_syntax tm_syntax_json, tm_syntax_named, tm_syntax_tags, tm_syntax_mistral,
    tm_syntax_llama, tm_syntax_python, tm_syntax_code;

#endif
