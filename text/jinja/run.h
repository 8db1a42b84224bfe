/* One render: memory, bounds, scopes, the output at hand; and the tables of filters, tests, methods and
 * functions. Nothing here outlives the render. */
#ifndef TM_TEXT_JINJA_RUN_H
#define TM_TEXT_JINJA_RUN_H

#include <time.h>

#include "common/arena.h"
#include "common/status.h"
#include "text/jinja/ast.h"
#include "text/jinja/jinja.h"
#include "text/jinja/value.h"

#define TM_JSTR_MAX   ((size_t)1 << 30)
#define TM_JDEPTH_MAX 1500 /* nested evaluations: bounds the C stack (measured below 1 MiB) */
#define TM_JMACRO_MAX 64
#define TM_JRANGE_MAX 100000

struct tm_jinja {
    tm_arena *arena;
    const char *source;
    size_t source_len;
    const tm_jnode *root;
    /* Names with a meaning of their own, NULL when the template does not mention them. */
    const char *loop, *caller, *varargs, *kwargs;
    const char **names; /* every name, interned */
    size_t name_n;
};

typedef struct tm_jscope {
    struct tm_jscope *up;
    struct {
        const char *name; /* interned */
        tm_jval v;
    } * vars;
    int n, cap;
} tm_jscope;

typedef enum tm_jflow { TM_JFLOW_NEXT, TM_JFLOW_BREAK, TM_JFLOW_CONTINUE } tm_jflow;

struct tm_jrun {
    const tm_jinja *tpl;
    tm_arena *arena;
    tm_err *err;
    tm_status status; /* first failure */
    int64_t work;     /* steps left; each 4 KiB of moved text is one more */
    size_t out_left;  /* bytes of output left */
    int depth, macros;
    int line; /* of the statement at hand */
    tm_jbuf *out;
    tm_jscope *scope;
    tm_jflow flow;
    struct tm now;
};

/* ---- failures and bounds: all return false ---- */
bool tm_jrun_fail(tm_jrun *r, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
bool tm_jrun_bound(tm_jrun *r, const char *what);
bool tm_jrun_undefined(tm_jrun *r, const tm_jval *v); /* using it is an error */
bool tm_jrun_raise(tm_jrun *r, const char *msg,
                   size_t len); /* raise_exception: the text as it is */

void *tm_jrun_alloc(tm_jrun *r, size_t size); /* zeroed; NULL after recording the failure */
bool tm_jrun_charge(tm_jrun *r, size_t bytes);
bool tm_jrun_step(tm_jrun *r);
bool tm_jrun_enter(tm_jrun *r); /* recursion; to be paired with leave */
void tm_jrun_leave(tm_jrun *r);
/* An undefined value with a reason in Python's words. */
tm_jval tm_jrun_missing(tm_jrun *r, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

double tm_parse_double(const char *s, size_t len);

/* ---- calls ---- */
typedef struct tm_jkw {
    const char *name;
    tm_jval v;
} tm_jkw;

typedef struct tm_jargs {
    tm_jval *v;
    int n;
    tm_jkw *kw;
    int kn;
} tm_jargs;

#define TM_JPARAMS_MAX 8

/* arg: the parameters of `params` in order, ABSENT where not given. */
typedef bool (*tm_jfn)(tm_jrun *r, const tm_jval *self, const tm_jval *arg, const tm_jargs *all,
                       tm_jval *out);

typedef struct tm_jfn_row {
    const char *name;
    const char *params; /* "a,b,c"; "*" = takes anything, nothing is bound */
    int required;
    tm_jfn fn;
} tm_jfn_row;

struct tm_jcall {
    const tm_jfn_row *row; /* NULL = a macro */
    tm_jval self;
    const tm_jnode *macro;
    tm_jscope *scope; /* where the macro was defined */
};

struct tm_jloop {
    tm_jval *items;
    size_t n, at; /* at: index of the current item */
    int depth0;
    const tm_jnode *node; /* recursive loops call it again */
    tm_jscope *scope;
    tm_jval last_changed;
};

bool tm_jcall_row(tm_jrun *r, const tm_jfn_row *row, const tm_jval *self, const tm_jargs *args,
                  tm_jval *out);
bool tm_jcall_value(tm_jrun *r, const tm_jval *fn, const tm_jargs *args, tm_jval *out);
bool tm_jrun_filter(tm_jrun *r, const char *name, const tm_jval *v, const tm_jargs *args,
                    tm_jval *out);
bool tm_jrun_test(tm_jrun *r, const char *name, const tm_jval *v, const tm_jargs *args, bool *out);

/* NULL = no such name. */
const tm_jfn_row *tm_jfilter_find(const char *name);
const tm_jfn_row *tm_jtest_find(const char *name);
const tm_jfn_row *tm_jglobal_find(const char *name);
/* A method of this value; *unsafe: it exists, but the sandbox forbids it. */
const tm_jfn_row *tm_jmethod_find(const tm_jval *v, const char *name, size_t len, bool *unsafe);

/* The tables behind filter_find, by file. */
extern const tm_jfn_row tm_jfilters_str[], tm_jfilters_list[];

/* ---- evaluation ---- */
bool tm_jeval(tm_jrun *r, const tm_jnode *n, tm_jval *out);
bool tm_jexec(tm_jrun *r, const tm_jnode *block);
bool tm_jattr(tm_jrun *r, const tm_jval *v, const char *name, size_t len,
              tm_jval *out);                                                   /* v.name */
bool tm_jitem(tm_jrun *r, const tm_jval *v, const tm_jval *key, tm_jval *out); /* v[key] */
/* v[part:part:part]; parts may be NULL */
bool tm_jslice(tm_jrun *r, const tm_jval *v, const tm_jval *const part[3], tm_jval *out);
bool tm_jcall_loop(tm_jrun *r, const tm_jloop *loop, const tm_jargs *args, tm_jval *out);
bool tm_jcall_macro(tm_jrun *r, const tm_jcall *m, const tm_jargs *args, tm_jval *out);
bool tm_jbinary(tm_jrun *r, int op, const tm_jval *a, const tm_jval *b, tm_jval *out);
bool tm_jcontains(tm_jrun *r, const tm_jval *item, const tm_jval *in, bool *out);
bool tm_jscope_set(tm_jrun *r, tm_jscope *s, const char *name, tm_jval v);
const tm_jval *tm_jscope_get(const tm_jscope *s, const char *name);

/* printf-style and str.format formatting (format.c). */
bool tm_jformat_percent(tm_jrun *r, const tm_jval *fmt, const tm_jargs *args, const tm_jval *map,
                        tm_jval *out);
bool tm_jformat_braces(tm_jrun *r, const tm_jval *fmt, const tm_jargs *args, tm_jval *out);

#endif
