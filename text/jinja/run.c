/* Bounds, failures and scopes of one render. */
#include "text/jinja/run.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "common/check.h"

#define CHARGE_BYTES 4096

/* The first failure counts; what fails while unwinding is not interesting. */
static bool record(tm_jrun *r, tm_status st, const char *text)
{
    if (r->status != TM_OK)
        return false;
    r->status = st;
    (void)TM_FAIL(r->err, st, "%s", text);
    return false;
}

bool tm_jrun_fail(tm_jrun *r, const char *fmt, ...)
{
    char text[400], all[480];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    snprintf(all, sizeof(all), "chat template, line %d: %s", r->line, text);
    return record(r, TM_STATUS_INVALID, all);
}

bool tm_jrun_raise(tm_jrun *r, const char *msg, size_t len)
{
    char text[480];
    size_t n = TM_MIN(len, sizeof(text) - 1);
    memcpy(text, msg, n);
    text[n] = 0;
    return record(r, TM_STATUS_INVALID, text);
}

bool tm_jrun_bound(tm_jrun *r, const char *what)
{
    return tm_jrun_fail(r, "%s", what);
}

bool tm_jrun_undefined(tm_jrun *r, const tm_jval *v)
{
    return tm_jrun_fail(r, "%s", v->u.hint ? v->u.hint : "a value is undefined");
}

void *tm_jrun_alloc(tm_jrun *r, size_t size)
{
    void *p = r->status == TM_OK ? tm_arena_alloc(r->arena, size ? size : 1) : NULL;
    if (!p)
        tm_jrun_fail(r, "the template uses too much memory");
    return p;
}

bool tm_jrun_charge(tm_jrun *r, size_t bytes)
{
    r->work -= (int64_t)(bytes / CHARGE_BYTES);
    return r->work > 0 || tm_jrun_bound(r, "the template takes too many steps");
}

bool tm_jrun_step(tm_jrun *r)
{
    return --r->work > 0 || tm_jrun_bound(r, "the template takes too many steps");
}

bool tm_jrun_enter(tm_jrun *r)
{
    if (r->depth >= TM_JDEPTH_MAX)
        return tm_jrun_bound(r, "nested too deep");
    r->depth++;
    return tm_jrun_step(r);
}

void tm_jrun_leave(tm_jrun *r)
{
    r->depth--;
}

tm_jval tm_jrun_missing(tm_jrun *r, const char *fmt, ...)
{
    char text[200];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    return (tm_jval){.type = TM_J_UNDEFINED,
                     .u.hint = tm_arena_strndup(r->arena, text, strlen(text))};
}

double tm_parse_double(const char *s, size_t len)
{
    char text[400];
    size_t n = TM_MIN(len, sizeof(text) - 1);
    memcpy(text, s, n);
    text[n] = 0;
    return strtod(text, NULL);
}

/* Names are interned by the parser, so pointers are compared. */
const tm_jval *tm_jscope_get(const tm_jscope *s, const char *name)
{
    for (; s; s = s->up)
        for (int i = 0; i < s->n; i++)
            if (s->vars[i].name == name)
                return &s->vars[i].v;
    return NULL;
}

bool tm_jscope_set(tm_jrun *r, tm_jscope *s, const char *name, tm_jval v)
{
    for (int i = 0; i < s->n; i++) {
        if (s->vars[i].name == name) {
            s->vars[i].v = v;
            return true;
        }
    }
    if (s->n == s->cap) {
        int cap = s->cap ? s->cap * 2 : 4;
        void *vars = tm_jrun_alloc(r, (size_t)cap * sizeof(*s->vars));
        if (!vars)
            return false;
        if (s->n)
            memcpy(vars, s->vars, (size_t)s->n * sizeof(*s->vars));
        s->vars = vars;
        s->cap = cap;
    }
    s->vars[s->n].name = name;
    s->vars[s->n++].v = v;
    return true;
}
