/* How values look as text: str() and repr() of Python, and json.dumps. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <utf8proc.h>

#include "common/check.h"
#include "text/jinja/run.h"
#include "text/tok/unicode.h"

/* The shortest digits that read back as the same number, laid out as Python does. */
static void format_float(double f, char out[40])
{
    char e[40];
    if (isnan(f) || isinf(f)) {
        snprintf(out, 40, "%s", isnan(f) ? "nan" : f < 0 ? "-inf" : "inf");
        return;
    }
    int prec = 0;
    do {
        snprintf(e, sizeof(e), "%.*e", prec, f);
    } while (strtod(e, NULL) != f && ++prec < 17);
    int exp = (int)strtol(strchr(e, 'e') + 1, NULL, 10);
    if (exp < -4 || exp >= 16) {
        char digits[40];
        snprintf(digits, sizeof(digits), "%.*s", (int)(strchr(e, 'e') - e), e);
        snprintf(out, 40, "%.26se%c%02d", digits, exp < 0 ? '-' : '+', abs(exp));
        return;
    }
    snprintf(out, 40, "%.*f", prec > exp ? prec - exp : 1, f);
}

static bool put_number(tm_jrun *r, tm_jbuf *out, const tm_jval *v)
{
    char text[40];
    if (v->type == TM_J_BIGINT)
        return tm_jbuf_append_str(r, out, v);
    if (v->type == TM_J_INT)
        snprintf(text, sizeof(text), "%lld", (long long)v->u.i);
    else
        format_float(v->u.f, text);
    return tm_jbuf_puts(r, out, text);
}

/* ---- repr ----------------------------------------------------------------------------------------------- */

static bool is_printable(uint32_t cp)
{
    if (cp < 128)
        return cp >= 32 && cp < 127;
    switch (utf8proc_category((utf8proc_int32_t)cp)) {
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
    case UTF8PROC_CATEGORY_ZS:
        return false;
    default:
        return true;
    }
}

static bool repr_char(tm_jrun *r, tm_jbuf *out, const tm_jval *s, size_t from, size_t to,
                      uint32_t cp, char quote)
{
    char text[16];
    const char *named = cp == '\n'   ? "\\n"
                        : cp == '\r' ? "\\r"
                        : cp == '\t' ? "\\t"
                        : cp == '\\' ? "\\\\"
                                     : NULL;
    if (named)
        snprintf(text, sizeof(text), "%s", named);
    else if (cp == (unsigned char)quote)
        snprintf(text, sizeof(text), "\\%c", quote);
    else if (is_printable(cp))
        return tm_jbuf_append(r, out, tm_jv_text(s) + from, to - from, tm_jv_marked(s, from));
    else
        snprintf(text, sizeof(text),
                 cp < 0x100     ? "\\x%02x"
                 : cp < 0x10000 ? "\\u%04x"
                                : "\\U%08x",
                 (unsigned)cp);
    return tm_jbuf_append(r, out, text, strlen(text), tm_jv_marked(s, from));
}

static bool repr_string(tm_jrun *r, tm_jbuf *out, const tm_jval *s)
{
    const char *t = tm_jv_text(s);
    char quote = s->len && memchr(t, '\'', s->len) && !memchr(t, '"', s->len) ? '"' : '\'';
    if (!tm_jbuf_append(r, out, &quote, 1, false))
        return false;
    for (size_t pos = 0; pos < s->len;) {
        size_t from = pos;
        uint32_t cp = tm_utf8_next(t, &pos);
        if (!repr_char(r, out, s, from, pos, cp, quote))
            return false;
    }
    return tm_jbuf_append(r, out, &quote, 1, false);
}

static bool repr_items(tm_jrun *r, tm_jbuf *out, const tm_jlist *l)
{
    for (size_t i = 0; i < l->n; i++)
        if ((i > 0 && !tm_jbuf_puts(r, out, ", ")) || !tm_jv_repr(r, out, &l->v[i]))
            return false;
    return true;
}

static bool repr_dict(tm_jrun *r, tm_jbuf *out, const tm_jdict *d)
{
    for (size_t i = 0; i < d->n; i++)
        if ((i > 0 && !tm_jbuf_puts(r, out, ", ")) || !tm_jv_repr(r, out, &d->key[i]) ||
            !tm_jbuf_puts(r, out, ": ") || !tm_jv_repr(r, out, &d->val[i]))
            return false;
    return true;
}

static bool repr_container(tm_jrun *r, tm_jbuf *out, const tm_jval *v)
{
    switch (v->type) {
    case TM_J_LIST:
        return tm_jbuf_puts(r, out, "[") && repr_items(r, out, v->u.l) && tm_jbuf_puts(r, out, "]");
    case TM_J_TUPLE:
        return tm_jbuf_puts(r, out, "(") && repr_items(r, out, v->u.l) &&
               tm_jbuf_puts(r, out, v->u.l->n == 1 ? ",)" : ")");
    case TM_J_VIEW:
        return tm_jbuf_puts(r, out, "dict_view([") && repr_items(r, out, v->u.l) &&
               tm_jbuf_puts(r, out, "])");
    case TM_J_NAMESPACE:
        return tm_jbuf_puts(r, out, "<Namespace {") && repr_dict(r, out, v->u.d) &&
               tm_jbuf_puts(r, out, "}>");
    case TM_J_DICT:
        return tm_jbuf_puts(r, out, "{") && repr_dict(r, out, v->u.d) && tm_jbuf_puts(r, out, "}");
    case TM_J_RANGE: {
        char text[64];
        size_t n = v->u.l->n;
        long long first = n ? (long long)v->u.l->v[0].u.i : 0;
        snprintf(text, sizeof(text), "range(%lld, %lld)", first,
                 n ? (long long)v->u.l->v[n - 1].u.i + 1 : 0);
        return tm_jbuf_puts(r, out, text);
    }
    default:
        return tm_jbuf_puts(r, out, "<") && tm_jbuf_puts(r, out, tm_jv_type_name(v)) &&
               tm_jbuf_puts(r, out, " object>");
    }
}

bool tm_jv_repr(tm_jrun *r, tm_jbuf *out, const tm_jval *v)
{
    if (!tm_jrun_enter(r))
        return false;
    bool ok;
    if (v->type == TM_J_STR)
        ok = repr_string(r, out, v);
    else if (v->type == TM_J_UNDEFINED)
        ok = tm_jbuf_puts(r, out, "Undefined");
    else if (v->type == TM_J_NONE)
        ok = tm_jbuf_puts(r, out, "None");
    else if (v->type == TM_J_BOOL)
        ok = tm_jbuf_puts(r, out, v->u.b ? "True" : "False");
    else if (tm_jv_is_number(v))
        ok = put_number(r, out, v);
    else
        ok = repr_container(r, out, v);
    tm_jrun_leave(r);
    return ok;
}

bool tm_jv_print(tm_jrun *r, tm_jbuf *out, const tm_jval *v)
{
    if (v->type == TM_J_STR)
        return tm_jbuf_append_str(r, out, v);
    return v->type == TM_J_UNDEFINED || tm_jv_repr(r, out, v);
}

bool tm_jv_to_str(tm_jrun *r, const tm_jval *v, tm_jval *out)
{
    if (v->type == TM_J_STR) {
        *out = *v;
        return true;
    }
    tm_jbuf *b = tm_jbuf_new(r, 32);
    if (!b || !tm_jv_print(r, b, v))
        return false;
    *out = tm_jbuf_value(b);
    return true;
}

/* ---- json.dumps ----------------------------------------------------------------------------------------- */

typedef struct json_writer {
    tm_jrun *r;
    tm_jbuf *out;
    const tm_jjson_opts *o;
} json_writer;

static bool write_value(json_writer *w, const tm_jval *v, int level);

static bool put(json_writer *w, const char *s)
{
    return tm_jbuf_puts(w->r, w->out, s);
}

static bool write_char(json_writer *w, const tm_jval *s, size_t from, size_t to, uint32_t cp)
{
    static const char short_of[] = "\"\\\b\f\n\r\t", letter[] = "\"\\bfnrt";
    char text[16];
    const char *known = cp < 128 && cp > 0 ? strchr(short_of, (int)cp) : NULL;
    bool marked = tm_jv_marked(s, from);
    if (known)
        snprintf(text, sizeof(text), "\\%c", letter[known - short_of]);
    else if (cp < 32 || (cp < 0x10000 && cp > 126 && w->o->ensure_ascii))
        snprintf(text, sizeof(text), "\\u%04x", (unsigned)cp);
    else if (cp >= 0x10000 && w->o->ensure_ascii)
        snprintf(text, sizeof(text), "\\u%04x\\u%04x", 0xD800 + (unsigned)((cp - 0x10000) >> 10),
                 0xDC00 + (unsigned)(cp & 0x3FF));
    else
        return tm_jbuf_append(w->r, w->out, tm_jv_text(s) + from, to - from, marked);
    return tm_jbuf_append(w->r, w->out, text, strlen(text), marked);
}

static bool write_string(json_writer *w, const tm_jval *s)
{
    if (!put(w, "\""))
        return false;
    for (size_t pos = 0; pos < s->len;) {
        size_t from = pos;
        uint32_t cp = tm_utf8_next(tm_jv_text(s), &pos);
        if (!write_char(w, s, from, pos, cp))
            return false;
    }
    return put(w, "\"");
}

static bool write_number(json_writer *w, const tm_jval *v)
{
    if (v->type == TM_J_FLOAT && (isnan(v->u.f) || isinf(v->u.f)))
        return put(w, isnan(v->u.f) ? "NaN" : v->u.f < 0 ? "-Infinity" : "Infinity");
    return put_number(w->r, w->out, v);
}

static bool newline(json_writer *w, int level)
{
    const tm_jval *indent = w->o->indent;
    if (!indent)
        return true;
    if (!put(w, "\n"))
        return false;
    int64_t spaces = indent->type == TM_J_INT ? indent->u.i * level : 0;
    if (indent->type == TM_J_STR)
        for (int i = 0; i < level; i++)
            if (!tm_jbuf_append_str(w->r, w->out, indent))
                return false;
    if (spaces > 100000)
        return tm_jrun_fail(w->r, "the indentation is too wide");
    for (int64_t i = 0; i < spaces; i++)
        if (!put(w, " "))
            return false;
    return true;
}

static bool write_list(json_writer *w, const tm_jlist *l, int level)
{
    if (l->n == 0)
        return put(w, "[]");
    if (!put(w, "["))
        return false;
    for (size_t i = 0; i < l->n; i++)
        if ((i > 0 && !put(w, w->o->item_sep)) || !newline(w, level + 1) ||
            !write_value(w, &l->v[i], level + 1))
            return false;
    return newline(w, level) && put(w, "]");
}

static bool write_key(json_writer *w, const tm_jval *key)
{
    if (key->type == TM_J_STR)
        return write_string(w, key);
    if (key->type == TM_J_NONE || key->type == TM_J_BOOL)
        return put(w, key->type == TM_J_NONE ? "\"null\"" : key->u.b ? "\"true\"" : "\"false\"");
    if (!tm_jv_is_number(key))
        return tm_jrun_fail(w->r, "keys must be str, int, float, bool or None, not %s",
                            tm_jv_type_name(key));
    return put(w, "\"") && write_number(w, key) && put(w, "\"");
}

/* The order in which entries are written: as they are, or by key. */
static bool entry_order(json_writer *w, const tm_jdict *d, size_t **order)
{
    *order = tm_jrun_alloc(w->r, (d->n + 1) * sizeof(**order));
    if (!*order)
        return false;
    for (size_t i = 0; i < d->n; i++) {
        size_t at = i;
        while (w->o->sort_keys && at > 0) {
            int c;
            if (!tm_jv_compare(w->r, &d->key[i], &d->key[(*order)[at - 1]], &c))
                return false;
            if (c >= 0)
                break;
            (*order)[at] = (*order)[at - 1];
            at--;
        }
        (*order)[at] = i;
    }
    return true;
}

static bool write_dict(json_writer *w, const tm_jdict *d, int level)
{
    size_t *order;
    if (d->n == 0)
        return put(w, "{}");
    if (!entry_order(w, d, &order) || !put(w, "{"))
        return false;
    for (size_t i = 0; i < d->n; i++) {
        size_t k = order[i];
        if ((i > 0 && !put(w, w->o->item_sep)) || !newline(w, level + 1) ||
            !write_key(w, &d->key[k]) || !put(w, w->o->key_sep) ||
            !write_value(w, &d->val[k], level + 1))
            return false;
    }
    return newline(w, level) && put(w, "}");
}

static bool write_any(json_writer *w, const tm_jval *v, int level)
{
    switch (v->type) {
    case TM_J_NONE:
        return put(w, "null");
    case TM_J_BOOL:
        return put(w, v->u.b ? "true" : "false");
    case TM_J_INT:
    case TM_J_BIGINT:
    case TM_J_FLOAT:
        return write_number(w, v);
    case TM_J_STR:
        return write_string(w, v);
    case TM_J_LIST:
    case TM_J_TUPLE:
        return write_list(w, v->u.l, level);
    case TM_J_DICT:
        return write_dict(w, v->u.d, level);
    default:
        return tm_jrun_fail(w->r, "Object of type %s is not JSON serializable", tm_jv_type_name(v));
    }
}

static bool write_value(json_writer *w, const tm_jval *v, int level)
{
    if (!tm_jrun_enter(w->r))
        return false;
    bool ok = write_any(w, v, level);
    tm_jrun_leave(w->r);
    return ok;
}

bool tm_jv_json(tm_jrun *r, tm_jbuf *out, const tm_jval *v, const tm_jjson_opts *o)
{
    json_writer w = {r, out, o};
    return write_value(&w, v, 0);
}
