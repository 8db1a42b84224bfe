/* Values of the template language: Python's data model as far as chat templates see it.
 *
 * Everything lives in the arena of one render (or of the template, for its constants) and is dropped with it.
 * Strings are slices of buffers, and a buffer knows which of its bytes came from the request (marks). */
#ifndef TM_TEXT_JINJA_VALUE_H
#define TM_TEXT_JINJA_VALUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "text/tokenizer.h"

typedef struct tm_jrun tm_jrun; /* one render, see run.h */

typedef enum tm_jtype {
    TM_J_UNDEFINED, /* hint: why; flag UNSAFE: what the sandbox hides */
    TM_J_NONE,
    TM_J_BOOL,
    TM_J_INT,
    TM_J_BIGINT, /* an integer beyond 64 bits, kept as its digits (str) */
    TM_J_FLOAT,
    TM_J_STR,
    TM_J_LIST,
    TM_J_TUPLE,
    TM_J_DICT,
    TM_J_NAMESPACE, /* dict */
    TM_J_ITER,      /* list that can be walked once (generators) */
    TM_J_VIEW,      /* list: keys(), values(), items() of a dictionary */
    TM_J_RANGE,     /* list */
    TM_J_CALL,      /* call: a function, a bound method, a macro */
    TM_J_LOOP,      /* the variable `loop` */
    TM_J_ABSENT     /* an argument that was not given; never seen by templates */
} tm_jtype;

enum { TM_JF_MARKUP = 1, TM_JF_UNSAFE = 2 };

/* Growing bytes with marks. cap 0: the bytes belong to somebody else and are never written. */
typedef struct tm_jbuf {
    char *data;
    size_t used, cap;
    tm_text_span *marks; /* ascending, not touching */
    size_t mark_n, mark_cap;
} tm_jbuf;

typedef struct tm_jlist tm_jlist;
typedef struct tm_jdict tm_jdict;
typedef struct tm_jcall tm_jcall;
typedef struct tm_jloop tm_jloop;

typedef struct tm_jval {
    uint8_t type; /* tm_jtype */
    uint8_t flags;
    uint32_t off, len; /* of a string in its buffer */
    union {
        bool b;
        int64_t i;
        double f;
        tm_jbuf *s;
        tm_jlist *l;
        tm_jdict *d;
        tm_jcall *call;
        tm_jloop *loop;
        const char *hint;
    } u;
} tm_jval;

struct tm_jlist {
    tm_jval *v;
    size_t n, cap;
};

struct tm_jdict {
    tm_jval *key, *val;
    size_t n, cap;
    uint32_t *index; /* open addressing, entry + 1; only from 8 entries on */
    size_t mask;
};

#define TM_JV_NONE   ((tm_jval){.type = TM_J_NONE})
#define TM_JV_ABSENT ((tm_jval){.type = TM_J_ABSENT})

static inline tm_jval tm_jv_bool(bool b)
{
    return (tm_jval){.type = TM_J_BOOL, .u.b = b};
}

static inline tm_jval tm_jv_int(int64_t i)
{
    return (tm_jval){.type = TM_J_INT, .u.i = i};
}

static inline tm_jval tm_jv_float(double f)
{
    return (tm_jval){.type = TM_J_FLOAT, .u.f = f};
}

static inline const char *tm_jv_text(const tm_jval *v)
{
    return v->u.s->data + v->off;
}

static inline bool tm_jv_is(const tm_jval *v, const char *text)
{
    return v->type == TM_J_STR && v->len == strlen(text) &&
           memcmp(tm_jv_text(v), text, v->len) == 0;
}

static inline bool tm_jv_has_list(const tm_jval *v)
{
    return v->type == TM_J_LIST || v->type == TM_J_TUPLE || v->type == TM_J_ITER ||
           v->type == TM_J_VIEW || v->type == TM_J_RANGE;
}

/* Functions below return false after a failure, which is then recorded in the run. */

/* ---- strings ---- */
tm_jbuf *tm_jbuf_new(tm_jrun *r, size_t cap);
/* A buffer over foreign bytes that outlive the run; marked = all of it came from the request. */
tm_jbuf *tm_jbuf_wrap(tm_jrun *r, const char *s, size_t len, bool marked);
bool tm_jbuf_append(tm_jrun *r, tm_jbuf *b, const char *s, size_t len, bool marked);
bool tm_jbuf_puts(tm_jrun *r, tm_jbuf *b, const char *s);
bool tm_jbuf_append_str(tm_jrun *r, tm_jbuf *b, const tm_jval *str); /* with its marks */
tm_jval tm_jbuf_value(tm_jbuf *b);
bool tm_jv_str(tm_jrun *r, const char *s, size_t len, tm_jval *out); /* a copy, unmarked */
tm_jval tm_jv_slice(const tm_jval *str, size_t off, size_t len);
bool tm_jv_concat(tm_jrun *r, const tm_jval *a, const tm_jval *b, tm_jval *out);
bool tm_jv_marked(const tm_jval *str, size_t at); /* the byte at this place of the string */
bool tm_jv_any_mark(const tm_jval *str);
size_t tm_jv_chars(const tm_jval *str); /* code points */

/* ---- containers ---- */
bool tm_jv_list(tm_jrun *r, tm_jtype type, size_t cap, tm_jval *out);
bool tm_jlist_push(tm_jrun *r, tm_jlist *l, tm_jval v);
bool tm_jv_dict(tm_jrun *r, tm_jtype type, tm_jval *out);
bool tm_jdict_set(tm_jrun *r, tm_jdict *d, const tm_jval *key, tm_jval v);
tm_jval *tm_jdict_get(const tm_jdict *d, const tm_jval *key); /* NULL = none */
tm_jval *tm_jdict_gets(const tm_jdict *d, const char *key);
bool tm_jdict_sets(tm_jrun *r, tm_jdict *d, const char *key, tm_jval v); /* key outlives the run */

/* ---- meaning ---- */
bool tm_jv_truth(const tm_jval *v);
bool tm_jv_equal(tm_jrun *r, const tm_jval *a, const tm_jval *b);
/* *order < 0, 0, > 0; a type error when the two cannot be ordered. */
bool tm_jv_compare(tm_jrun *r, const tm_jval *a, const tm_jval *b, int *order);
bool tm_jv_is_number(const tm_jval *v); /* int, bigint, float, bool */
double tm_jv_double(const tm_jval *v);
const char *tm_jv_type_name(const tm_jval *v); /* Python's: "str", "NoneType" ... */
bool tm_jv_hashable(const tm_jval *v);

/* The elements of anything that can be walked. Iterators are empty afterwards. */
bool tm_jv_iterate(tm_jrun *r, const tm_jval *v, tm_jval **items, size_t *n);

/* ---- text forms (print.c) ---- */
bool tm_jv_print(tm_jrun *r, tm_jbuf *out, const tm_jval *v); /* str(v) */
bool tm_jv_repr(tm_jrun *r, tm_jbuf *out, const tm_jval *v);
bool tm_jv_to_str(tm_jrun *r, const tm_jval *v, tm_jval *out); /* strings stay as they are */

typedef struct tm_jjson_opts {
    bool ensure_ascii, sort_keys;
    const char *item_sep, *key_sep;
    const tm_jval *indent; /* NULL, int or string */
} tm_jjson_opts;
bool tm_jv_json(tm_jrun *r, tm_jbuf *out, const tm_jval *v, const tm_jjson_opts *o);

#endif
