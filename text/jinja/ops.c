/* Operators on values, as Python defines them. Integers are 64 bits wide; what would not fit is an error. */
#include <math.h>
#include <stdio.h>

#include "common/check.h"
#include "text/jinja/run.h"

static const char *const op_names[] = {"+", "-", "*", "/", "//", "%", "** or pow()"};

static bool type_error(tm_jrun *r, int op, const tm_jval *a, const tm_jval *b)
{
    if (a->type == TM_J_UNDEFINED || b->type == TM_J_UNDEFINED)
        return tm_jrun_undefined(r, a->type == TM_J_UNDEFINED ? a : b);
    if (op == TM_JOP_ADD && (a->type == TM_J_STR || a->type == TM_J_LIST || a->type == TM_J_TUPLE))
        return tm_jrun_fail(r, "can only concatenate %s (not \"%s\") to %s", tm_jv_type_name(a),
                            tm_jv_type_name(b), tm_jv_type_name(a));
    return tm_jrun_fail(r, "unsupported operand type(s) for %s: '%s' and '%s'", op_names[op],
                        tm_jv_type_name(a), tm_jv_type_name(b));
}

static bool overflow(tm_jrun *r)
{
    return tm_jrun_fail(r, "an integer is out of range");
}

static int64_t as_int(const tm_jval *v)
{
    return v->type == TM_J_BOOL ? v->u.b : v->u.i;
}

static bool is_small_int(const tm_jval *v)
{
    return v->type == TM_J_INT || v->type == TM_J_BOOL;
}

static bool int_pow(tm_jrun *r, int64_t a, int64_t b, tm_jval *out)
{
    int64_t res = 1;
    if (b < 0) {
        *out = tm_jv_float(pow((double)a, (double)b));
        return true;
    }
    for (; b > 0; b >>= 1) {
        if ((b & 1) && __builtin_mul_overflow(res, a, &res))
            return overflow(r);
        if (b > 1 && __builtin_mul_overflow(a, a, &a))
            return overflow(r);
    }
    *out = tm_jv_int(res);
    return true;
}

static bool int_op(tm_jrun *r, int op, int64_t a, int64_t b, tm_jval *out)
{
    int64_t v = 0;
    if ((op == TM_JOP_DIV || op == TM_JOP_FLOORDIV || op == TM_JOP_MOD) && b == 0)
        return tm_jrun_fail(r, "division by zero");
    if ((op == TM_JOP_FLOORDIV || op == TM_JOP_MOD) && b == -1) {
        if (op == TM_JOP_FLOORDIV && a == INT64_MIN)
            return overflow(r);
        *out = tm_jv_int(op == TM_JOP_FLOORDIV ? -a : 0);
        return true;
    }
    switch (op) {
    case TM_JOP_ADD:
        if (__builtin_add_overflow(a, b, &v))
            return overflow(r);
        break;
    case TM_JOP_SUB:
        if (__builtin_sub_overflow(a, b, &v))
            return overflow(r);
        break;
    case TM_JOP_MUL:
        if (__builtin_mul_overflow(a, b, &v))
            return overflow(r);
        break;
    case TM_JOP_DIV:
        *out = tm_jv_float((double)a / (double)b);
        return true;
    case TM_JOP_FLOORDIV:
        v = a / b - (a % b != 0 && (a < 0) != (b < 0));
        break;
    case TM_JOP_MOD:
        v = a % b;
        v += v != 0 && (v < 0) != (b < 0) ? b : 0;
        break;
    default:
        return int_pow(r, a, b, out);
    }
    *out = tm_jv_int(v);
    return true;
}

static bool float_op(tm_jrun *r, int op, double a, double b, tm_jval *out)
{
    double v = 0;
    if ((op == TM_JOP_DIV || op == TM_JOP_FLOORDIV || op == TM_JOP_MOD) && b == 0)
        return tm_jrun_fail(r, "float division by zero");
    switch (op) {
    case TM_JOP_ADD:
        v = a + b;
        break;
    case TM_JOP_SUB:
        v = a - b;
        break;
    case TM_JOP_MUL:
        v = a * b;
        break;
    case TM_JOP_DIV:
        v = a / b;
        break;
    case TM_JOP_FLOORDIV:
        v = floor(a / b);
        break;
    case TM_JOP_MOD:
        v = fmod(a, b);
        v += v != 0 && (v < 0) != (b < 0) ? b : 0;
        break;
    default:
        v = pow(a, b);
        break;
    }
    *out = tm_jv_float(v);
    return true;
}

static bool repeat(tm_jrun *r, const tm_jval *v, int64_t times, tm_jval *out)
{
    times = times < 0 ? 0 : times;
    if (v->type == TM_J_STR) {
        size_t total;
        if (!tm_size_mul(v->len, (size_t)times, &total) || total > TM_JSTR_MAX)
            return tm_jrun_bound(r, "a string is longer than 1 GiB");
        tm_jbuf *b = tm_jbuf_new(r, total);
        for (int64_t i = 0; b && i < times && v->len > 0; i++)
            if (!tm_jrun_step(r) || !tm_jbuf_append_str(r, b, v))
                return false;
        if (b)
            *out = tm_jbuf_value(b);
        return b != NULL;
    }
    size_t n = v->u.l->n;
    tm_jlist src = *v->u.l;
    if (!tm_jv_list(r, (tm_jtype)v->type, 0, out))
        return false;
    for (int64_t i = 0; i < times && n > 0; i++)
        for (size_t k = 0; k < n; k++)
            if (!tm_jrun_step(r) || !tm_jlist_push(r, out->u.l, src.v[k]))
                return false;
    return true;
}

static bool is_sequence(const tm_jval *v)
{
    return v->type == TM_J_STR || v->type == TM_J_LIST || v->type == TM_J_TUPLE;
}

static bool join_lists(tm_jrun *r, const tm_jval *a, const tm_jval *b, tm_jval *out)
{
    if (!tm_jv_list(r, (tm_jtype)a->type, a->u.l->n + b->u.l->n, out))
        return false;
    for (size_t i = 0; i < a->u.l->n; i++)
        if (!tm_jlist_push(r, out->u.l, a->u.l->v[i]))
            return false;
    for (size_t i = 0; i < b->u.l->n; i++)
        if (!tm_jlist_push(r, out->u.l, b->u.l->v[i]))
            return false;
    return tm_jrun_charge(r, (a->u.l->n + b->u.l->n) * sizeof(tm_jval));
}

/* Markup (the result of |safe and |escape) escapes what is added to it. */
static bool add_strings(tm_jrun *r, const tm_jval *a, const tm_jval *b, tm_jval *out)
{
    tm_jval x = *a, y = *b;
    bool markup = (a->flags | b->flags) & TM_JF_MARKUP;
    if (markup && !(a->flags & TM_JF_MARKUP) && !tm_jrun_filter(r, "escape", a, &(tm_jargs){0}, &x))
        return false;
    if (markup && !(b->flags & TM_JF_MARKUP) && !tm_jrun_filter(r, "escape", b, &(tm_jargs){0}, &y))
        return false;
    if (!tm_jv_concat(r, &x, &y, out))
        return false;
    out->flags = markup ? TM_JF_MARKUP : 0;
    return true;
}

static bool percent(tm_jrun *r, const tm_jval *a, const tm_jval *b, tm_jval *out)
{
    tm_jval one = *b;
    tm_jargs args = {.v = &one, .n = 1};
    if (b->type == TM_J_TUPLE)
        args = (tm_jargs){.v = b->u.l->v, .n = (int)b->u.l->n};
    return tm_jformat_percent(r, a, &args, b->type == TM_J_DICT ? b : NULL, out);
}

bool tm_jbinary(tm_jrun *r, int op, const tm_jval *a, const tm_jval *b, tm_jval *out)
{
    if (is_small_int(a) && is_small_int(b))
        return int_op(r, op, as_int(a), as_int(b), out);
    if (tm_jv_is_number(a) && tm_jv_is_number(b)) {
        if ((a->type == TM_J_BIGINT || b->type == TM_J_BIGINT) && a->type != TM_J_FLOAT &&
            b->type != TM_J_FLOAT)
            return overflow(r);
        return float_op(r, op, tm_jv_double(a), tm_jv_double(b), out);
    }
    if (op == TM_JOP_ADD && a->type == TM_J_STR && b->type == TM_J_STR)
        return add_strings(r, a, b, out);
    if (op == TM_JOP_ADD && a->type == b->type && (a->type == TM_J_LIST || a->type == TM_J_TUPLE))
        return join_lists(r, a, b, out);
    if (op == TM_JOP_MUL && is_sequence(a) && is_small_int(b))
        return repeat(r, a, as_int(b), out);
    if (op == TM_JOP_MUL && is_small_int(a) && is_sequence(b))
        return repeat(r, b, as_int(a), out);
    if (op == TM_JOP_MOD && a->type == TM_J_STR)
        return percent(r, a, b, out);
    return type_error(r, op, a, b);
}

bool tm_jcontains(tm_jrun *r, const tm_jval *item, const tm_jval *in, bool *out)
{
    *out = false;
    if (in->type == TM_J_STR) {
        if (item->type == TM_J_UNDEFINED)
            return tm_jrun_undefined(r, item);
        if (item->type != TM_J_STR)
            return tm_jrun_fail(r, "'in <string>' requires string as left operand, not %s",
                                tm_jv_type_name(item));
        *out = item->len == 0 ||
               (in->len && memmem(tm_jv_text(in), in->len, tm_jv_text(item), item->len));
        return tm_jrun_charge(r, in->len);
    }
    if (in->type == TM_J_DICT) {
        if (!tm_jv_hashable(item))
            return tm_jrun_fail(r, "unhashable type: '%s'", tm_jv_type_name(item));
        *out = tm_jdict_get(in->u.d, item) != NULL;
        return true;
    }
    if (!tm_jv_has_list(in) && in->type != TM_J_UNDEFINED)
        return tm_jrun_fail(r, "argument of type '%s' is not iterable", tm_jv_type_name(in));
    tm_jval *v;
    size_t n;
    if (!tm_jv_iterate(r, in, &v, &n))
        return false;
    for (size_t i = 0; i < n && !*out; i++) {
        if (!tm_jrun_step(r))
            return false;
        *out = tm_jv_equal(r, item, &v[i]);
    }
    return r->status == TM_OK;
}
