/* The face of the interpreter: compile once, render with variables and bounds. */
#include "text/jinja/jinja.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "text/jinja/json.h"
#include "text/jinja/parse.h"
#include "text/jinja/run.h"

#define TEMPLATE_MEMORY_MAX ((size_t)64 << 20)
#define STEPS_MAX           1000000
/* Output and memory grow with the request; the constants leave room for what templates say themselves. */
#define OUTPUT_BASE  ((size_t)1 << 20)
#define OUTPUT_TIMES 4
#define MEMORY_BASE  ((size_t)64 << 20)
#define MEMORY_TIMES 64
#define MEMORY_MAX   ((size_t)1 << 30)

static const char *own_name(const tm_jparsed *p, const char *name)
{
    for (size_t i = 0; i < p->name_n; i++)
        if (strcmp(p->names[i], name) == 0)
            return p->names[i];
    return NULL;
}

tm_status tm_jinja_compile(tm_jinja **out, const char *source, size_t len, tm_err *err)
{
    tm_jparsed p;
    if (len > TM_JINJA_SOURCE_MAX)
        return TM_FAIL(err, TM_STATUS_TOO_LARGE, "larger than %d KiB", TM_JINJA_SOURCE_MAX >> 10);
    /* Everything behind this counts characters, by their first bytes. */
    if (!tm_utf8_valid(source, len))
        return TM_FAIL(err, TM_STATUS_DATA, "the template is not valid UTF-8");
    tm_jinja *t = calloc(1, sizeof(*t));
    if (!t || !(t->arena = tm_arena_create(TEMPLATE_MEMORY_MAX))) {
        free(t);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a chat template");
    }
    t->source = tm_arena_memdup(t->arena, source, len);
    t->source_len = len;
    tm_status st = t->source
                       ? tm_jparse(t->arena, source, len, &p, err)
                       : TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a chat template");
    if (st != TM_OK) {
        tm_jinja_destroy(t);
        return st;
    }
    t->root = p.root;
    t->names = p.names;
    t->name_n = p.name_n;
    t->loop = own_name(&p, "loop");
    t->caller = own_name(&p, "caller");
    t->varargs = own_name(&p, "varargs");
    t->kwargs = own_name(&p, "kwargs");
    *out = t;
    return TM_OK;
}

void tm_jinja_destroy(tm_jinja *t)
{
    if (!t)
        return;
    tm_arena_destroy(t->arena);
    free(t);
}

bool tm_jinja_mentions(const tm_jinja *t, const char *text)
{
    return memmem(t->source, t->source_len, text, strlen(text)) != NULL;
}

/* ---- rendering ------------------------------------------------------------------------------------------ */

static bool make_var(tm_jrun *r, const tm_jinja_var *v, tm_jval *out)
{
    bool valid = true;
    if (v->value)
        return tm_jv_from_json(r, v->value, !v->trusted, out);
    if (v->json) {
        if (!tm_jv_parse_json(r, v->json, v->json_len, !v->trusted, out, &valid))
            return false;
        return valid || tm_jrun_fail(r, "the variable %s is not JSON", v->name);
    }
    *out = TM_JV_NONE;
    if (!v->text)
        return true;
    tm_jbuf *b = tm_jbuf_wrap(r, v->text, strlen(v->text), !v->trusted);
    if (b)
        *out = tm_jbuf_value(b);
    return b != NULL;
}

/* Only names that the template mentions become variables. */
static bool set_vars(tm_jrun *r, const tm_jinja_args *args)
{
    tm_jparsed p = {.names = r->tpl->names, .name_n = r->tpl->name_n};
    for (int i = 0; i < args->count; i++) {
        const char *name = own_name(&p, args->vars[i].name);
        tm_jval v;
        if (name && (!make_var(r, &args->vars[i], &v) || !tm_jscope_set(r, r->scope, name, v)))
            return false;
    }
    return true;
}

static tm_status give_result(const tm_jbuf *out, tm_buf *text, tm_text_span **marks,
                             size_t *mark_count, tm_err *err)
{
    tm_text_span *m = NULL;
    if (out->mark_n > 0 && !(m = malloc(out->mark_n * sizeof(*m))))
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a prompt");
    if (!tm_buf_append(text, out->data, out->used)) {
        free(m);
        return TM_FAIL(err, TM_STATUS_TOO_LARGE, "the rendered prompt is too long");
    }
    if (m)
        memcpy(m, out->marks, out->mark_n * sizeof(*m));
    *marks = m;
    *mark_count = out->mark_n;
    return TM_OK;
}

static void set_clock(tm_jrun *r, const struct tm *now)
{
    time_t t = time(NULL);
    if (now)
        r->now = *now;
    else
        localtime_r(&t, &r->now);
}

static tm_status run(tm_jrun *r, const tm_jinja_args *args)
{
    tm_jscope *globals = tm_jrun_alloc(r, sizeof(*globals));
    r->out = globals ? tm_jbuf_new(r, 4096) : NULL;
    if (!r->out)
        return r->status;
    r->scope = globals;
    if (!set_vars(r, args) || !tm_jexec(r, r->tpl->root))
        return r->status == TM_OK
                   ? TM_FAIL(r->err, TM_STATUS_INTERNAL, "a template failed without a reason")
                   : r->status;
    return TM_OK;
}

tm_status tm_jinja_render(const tm_jinja *t, const tm_jinja_args *args, tm_buf *text,
                          tm_text_span **marks, size_t *mark_count, tm_err *err)
{
    size_t grown = TM_MIN(args->input_bytes, MEMORY_MAX / MEMORY_TIMES);
    tm_arena *arena = tm_arena_create(TM_MIN(MEMORY_BASE + grown * MEMORY_TIMES, MEMORY_MAX));
    if (!arena)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a prompt");
    tm_jrun r = {.tpl = t,
                 .arena = arena,
                 .err = err,
                 .work = STEPS_MAX,
                 .out_left = OUTPUT_BASE + grown * OUTPUT_TIMES,
                 .line = 1};
    set_clock(&r, args->now);
    tm_status st = run(&r, args);
    if (st == TM_OK)
        st = give_result(r.out, text, marks, mark_count, err);
    tm_arena_destroy(arena);
    return st;
}
