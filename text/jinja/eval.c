/* Expressions: one function per kind of node, chosen by a table. */
#include "common/check.h"
#include "text/jinja/run.h"

typedef bool (*eval_fn)(tm_jrun *r, const tm_jnode *n, tm_jval *out);

static bool eval_const(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    (void)r;
    *out = n->value;
    return true;
}

static bool eval_name(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    const tm_jval *v = tm_jscope_get(r->scope, n->name);
    if (v) {
        *out = *v;
        return true;
    }
    const tm_jfn_row *row = tm_jglobal_find(n->name);
    if (!row) {
        *out = tm_jrun_missing(r, "'%.100s' is undefined", n->name);
        return true;
    }
    tm_jcall *c = tm_jrun_alloc(r, sizeof(*c));
    if (!c)
        return false;
    c->row = row;
    *out = (tm_jval){.type = TM_J_CALL, .u.call = c};
    return true;
}

static bool eval_list(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    tm_jval l, v;
    if (!tm_jv_list(r, n->kind == TM_JN_LIST ? TM_J_LIST : TM_J_TUPLE, (size_t)n->n, &l))
        return false;
    for (int i = 0; i < n->n; i++)
        if (!tm_jeval(r, n->list[i], &v) || !tm_jlist_push(r, l.u.l, v))
            return false;
    *out = l;
    return true;
}

static bool eval_dict(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    tm_jval d, key, v;
    if (!tm_jv_dict(r, TM_J_DICT, &d))
        return false;
    for (int i = 0; i < n->n; i += 2)
        if (!tm_jeval(r, n->list[i], &key) || !tm_jeval(r, n->list[i + 1], &v) ||
            !tm_jdict_set(r, d.u.d, &key, v))
            return false;
    *out = d;
    return true;
}

static bool eval_attr(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    tm_jval v;
    return tm_jeval(r, n->a, &v) && tm_jattr(r, &v, n->name, strlen(n->name), out);
}

static bool eval_item(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    tm_jval v, key;
    return tm_jeval(r, n->a, &v) && tm_jeval(r, n->b, &key) && tm_jitem(r, &v, &key, out);
}

static bool eval_slice(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    tm_jval v, part[3];
    const tm_jval *parts[3] = {NULL, NULL, NULL};
    if (!tm_jeval(r, n->a, &v))
        return false;
    for (int i = 0; i < 3; i++) {
        if (!n->list[i])
            continue;
        if (!tm_jeval(r, n->list[i], &part[i]))
            return false;
        parts[i] = &part[i];
    }
    return tm_jslice(r, &v, parts, out);
}

/* ---- calls ---------------------------------------------------------------------------------------------- */

static bool push_star(tm_jrun *r, const tm_jval *v, tm_jlist *pos)
{
    tm_jval *items;
    size_t n;
    if (!tm_jv_iterate(r, v, &items, &n))
        return false;
    for (size_t i = 0; i < n; i++)
        if (!tm_jlist_push(r, pos, items[i]))
            return false;
    return true;
}

static bool add_keyword(tm_jrun *r, tm_jargs *args, int *cap, const char *name, tm_jval v)
{
    if (args->kn == *cap) {
        int more = *cap ? *cap * 2 : 8;
        tm_jkw *kw = tm_jrun_alloc(r, (size_t)more * sizeof(*kw));
        if (!kw)
            return false;
        if (args->kn)
            memcpy(kw, args->kw, (size_t)args->kn * sizeof(*kw));
        args->kw = kw;
        *cap = more;
    }
    args->kw[args->kn++] = (tm_jkw){name, v};
    return true;
}

static bool push_star_star(tm_jrun *r, const tm_jval *v, tm_jargs *args, int *cap)
{
    if (v->type != TM_J_DICT)
        return tm_jrun_fail(r, "argument after ** must be a mapping, not %s", tm_jv_type_name(v));
    for (size_t i = 0; i < v->u.d->n; i++) {
        const tm_jval *key = &v->u.d->key[i];
        if (key->type != TM_J_STR)
            return tm_jrun_fail(r, "keywords must be strings");
        const char *name = tm_arena_strndup(r->arena, tm_jv_text(key), key->len);
        if (!name || !add_keyword(r, args, cap, name, v->u.d->val[i]))
            return false;
    }
    return true;
}

static bool eval_args(tm_jrun *r, const tm_jnode *n, tm_jargs *args)
{
    tm_jlist pos = {0};
    tm_jval v;
    int cap = 0;
    *args = (tm_jargs){0};
    for (int i = 0; i < n->n; i++) {
        bool star = n->list[i]->kind == TM_JN_STAR;
        if (!tm_jeval(r, star ? n->list[i]->a : n->list[i], &v))
            return false;
        if (star ? !push_star(r, &v, &pos) : !tm_jlist_push(r, &pos, v))
            return false;
    }
    for (int i = 0; i < n->kn; i++) {
        if (!tm_jeval(r, n->kw[i]->a, &v))
            return false;
        if (n->kw[i]->kind == TM_JN_STAR ? !push_star_star(r, &v, args, &cap)
                                         : !add_keyword(r, args, &cap, n->kw[i]->name, v))
            return false;
    }
    args->v = pos.v;
    args->n = (int)pos.n;
    return true;
}

static int param_index(const char *params, const char *name)
{
    size_t len = strlen(name);
    for (int i = 0; *params; i++) {
        size_t n = strcspn(params, ",");
        if (n == len && memcmp(params, name, n) == 0)
            return i;
        params += n + (params[n] == ',');
    }
    return -1;
}

static int param_count(const char *params)
{
    int n = *params != 0;
    for (; *params; params++)
        n += *params == ',';
    return n;
}

bool tm_jcall_row(tm_jrun *r, const tm_jfn_row *row, const tm_jval *self, const tm_jargs *args,
                  tm_jval *out)
{
    tm_jval arg[TM_JPARAMS_MAX];
    for (int i = 0; i < TM_JPARAMS_MAX; i++)
        arg[i] = TM_JV_ABSENT;
    if (row->params[0] == '*')
        return row->fn(r, self, arg, args, out);
    int count = param_count(row->params);
    if (args->n > count)
        return tm_jrun_fail(r, "%s() takes at most %d arguments (%d given)", row->name, count,
                            args->n);
    for (int i = 0; i < args->n; i++)
        arg[i] = args->v[i];
    for (int i = 0; i < args->kn; i++) {
        int at = param_index(row->params, args->kw[i].name);
        if (at < 0)
            return tm_jrun_fail(r, "%s() got an unexpected keyword argument '%.60s'", row->name,
                                args->kw[i].name);
        if (arg[at].type != TM_J_ABSENT)
            return tm_jrun_fail(r, "%s() got multiple values for argument '%.60s'", row->name,
                                args->kw[i].name);
        arg[at] = args->kw[i].v;
    }
    for (int i = 0; i < row->required; i++)
        if (arg[i].type == TM_J_ABSENT)
            return tm_jrun_fail(r, "%s() misses argument %d", row->name, i + 1);
    return row->fn(r, self, arg, args, out);
}

bool tm_jcall_value(tm_jrun *r, const tm_jval *fn, const tm_jargs *args, tm_jval *out)
{
    if (fn->type == TM_J_UNDEFINED)
        return tm_jrun_undefined(r, fn);
    if (fn->type == TM_J_LOOP)
        return tm_jcall_loop(r, fn->u.loop, args, out);
    if (fn->type != TM_J_CALL)
        return tm_jrun_fail(r, "'%s' object is not callable", tm_jv_type_name(fn));
    const tm_jcall *c = fn->u.call;
    return c->row ? tm_jcall_row(r, c->row, &c->self, args, out) : tm_jcall_macro(r, c, args, out);
}

static bool eval_call(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    tm_jval fn;
    tm_jargs args;
    return tm_jeval(r, n->a, &fn) && eval_args(r, n, &args) && tm_jcall_value(r, &fn, &args, out);
}

bool tm_jrun_filter(tm_jrun *r, const char *name, const tm_jval *v, const tm_jargs *args,
                    tm_jval *out)
{
    const tm_jfn_row *row = tm_jfilter_find(name);
    if (!row)
        return tm_jrun_fail(r, "no filter named '%.60s'", name);
    return tm_jcall_row(r, row, v, args, out);
}

bool tm_jrun_test(tm_jrun *r, const char *name, const tm_jval *v, const tm_jargs *args, bool *out)
{
    const tm_jfn_row *row = tm_jtest_find(name);
    tm_jval res;
    if (!row)
        return tm_jrun_fail(r, "no test named '%.60s'", name);
    if (!tm_jcall_row(r, row, v, args, &res))
        return false;
    *out = tm_jv_truth(&res);
    return true;
}

static bool eval_filter(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    tm_jval v;
    tm_jargs args;
    return tm_jeval(r, n->a, &v) && eval_args(r, n, &args) &&
           tm_jrun_filter(r, n->name, &v, &args, out);
}

static bool eval_test(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    tm_jval v;
    tm_jargs args;
    bool yes;
    if (!tm_jeval(r, n->a, &v) || !eval_args(r, n, &args) ||
        !tm_jrun_test(r, n->name, &v, &args, &yes))
        return false;
    *out = tm_jv_bool(yes);
    return true;
}

/* ---- operators ------------------------------------------------------------------------------------------ */

static bool eval_not(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    tm_jval v;
    if (!tm_jeval(r, n->a, &v))
        return false;
    *out = tm_jv_bool(!tm_jv_truth(&v));
    return true;
}

static bool eval_sign(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    tm_jval v, zero = tm_jv_int(0);
    if (!tm_jeval(r, n->a, &v))
        return false;
    if (v.type == TM_J_UNDEFINED)
        return tm_jrun_undefined(r, &v);
    if (!tm_jv_is_number(&v))
        return tm_jrun_fail(r, "bad operand type for unary %s: '%s'",
                            n->kind == TM_JN_NEG ? "-" : "+", tm_jv_type_name(&v));
    if (v.type == TM_J_FLOAT) {
        *out = tm_jv_float(n->kind == TM_JN_NEG ? -v.u.f : v.u.f);
        return true;
    }
    return tm_jbinary(r, n->kind == TM_JN_NEG ? TM_JOP_SUB : TM_JOP_ADD, &zero, &v, out);
}

static bool eval_binary(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    tm_jval a, b;
    return tm_jeval(r, n->a, &a) && tm_jeval(r, n->b, &b) && tm_jbinary(r, n->op, &a, &b, out);
}

static bool eval_and_or(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    if (!tm_jeval(r, n->a, out))
        return false;
    return tm_jv_truth(out) == (n->kind == TM_JN_OR) || tm_jeval(r, n->b, out);
}

static bool eval_concat(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    tm_jval all, v, s;
    for (int i = 0; i < n->n; i++) {
        if (!tm_jeval(r, n->list[i], &v) || !tm_jv_to_str(r, &v, &s))
            return false;
        if (i > 0 && !tm_jv_concat(r, &all, &s, &s))
            return false;
        all = s;
    }
    all.flags = 0;
    *out = all;
    return true;
}

static bool compare_op(tm_jrun *r, int op, const tm_jval *a, const tm_jval *b, bool *out)
{
    int order = 0;
    bool in;
    switch (op) {
    case TM_JOP_EQ:
    case TM_JOP_NE:
        *out = tm_jv_equal(r, a, b) == (op == TM_JOP_EQ);
        return r->status == TM_OK;
    case TM_JOP_IN:
    case TM_JOP_NOT_IN:
        if (!tm_jcontains(r, a, b, &in))
            return false;
        *out = in == (op == TM_JOP_IN);
        return true;
    default:
        break;
    }
    if (!tm_jv_compare(r, a, b, &order))
        return false;
    *out = (op == TM_JOP_LT && order < 0) || (op == TM_JOP_LE && order <= 0) ||
           (op == TM_JOP_GT && order > 0) || (op == TM_JOP_GE && order >= 0);
    return true;
}

static bool eval_compare(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    tm_jval left, right;
    bool yes = true;
    if (!tm_jeval(r, n->a, &left))
        return false;
    for (int i = 0; i < n->n && yes; i++) {
        if (!tm_jeval(r, n->list[i]->a, &right) ||
            !compare_op(r, n->list[i]->op, &left, &right, &yes))
            return false;
        left = right;
    }
    *out = tm_jv_bool(yes);
    return true;
}

static bool eval_cond(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    tm_jval v;
    if (!tm_jeval(r, n->a, &v))
        return false;
    if (tm_jv_truth(&v))
        return tm_jeval(r, n->b, out);
    if (n->c)
        return tm_jeval(r, n->c, out);
    *out = tm_jrun_missing(
        r, "the inline if-expression evaluated to false and no else section was defined.");
    return true;
}

static const eval_fn evals[] = {
    [TM_JN_CONST] = eval_const,     [TM_JN_NAME] = eval_name,   [TM_JN_LIST] = eval_list,
    [TM_JN_TUPLE] = eval_list,      [TM_JN_DICT] = eval_dict,   [TM_JN_ATTR] = eval_attr,
    [TM_JN_ITEM] = eval_item,       [TM_JN_SLICE] = eval_slice, [TM_JN_CALL] = eval_call,
    [TM_JN_FILTER] = eval_filter,   [TM_JN_TEST] = eval_test,   [TM_JN_NOT] = eval_not,
    [TM_JN_NEG] = eval_sign,        [TM_JN_POS] = eval_sign,    [TM_JN_BINARY] = eval_binary,
    [TM_JN_AND] = eval_and_or,      [TM_JN_OR] = eval_and_or,   [TM_JN_CONCAT] = eval_concat,
    [TM_JN_COMPARE] = eval_compare, [TM_JN_COND] = eval_cond,
};

bool tm_jeval(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    TM_ASSERT(n->kind < TM_ARRAY_LEN(evals) && evals[n->kind]);
    if (!tm_jrun_enter(r))
        return false;
    bool ok = evals[n->kind](r, n, out);
    tm_jrun_leave(r);
    return ok;
}
