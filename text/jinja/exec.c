/* Statements, macros and loops. Output goes to r->out; macros, set blocks and filter blocks put a buffer of
 * their own there for a while. Every loop turn, macro and block has a scope; if has none. */
#include "common/check.h"
#include "text/jinja/run.h"

typedef bool (*exec_fn)(tm_jrun *r, const tm_jnode *n);

static bool exec_any(tm_jrun *r, const tm_jnode *n);

static bool exec_text(tm_jrun *r, const tm_jnode *n)
{
    if (r->out_left < n->value.len)
        return tm_jrun_bound(r, "the output is too long");
    r->out_left -= n->value.len;
    return tm_jbuf_append_str(r, r->out, &n->value);
}

static bool exec_output(tm_jrun *r, const tm_jnode *n)
{
    tm_jval v;
    if (!tm_jeval(r, n->a, &v))
        return false;
    size_t before = r->out->used;
    if (!tm_jv_print(r, r->out, &v))
        return false;
    size_t grown = r->out->used - before;
    if (grown > r->out_left)
        return tm_jrun_bound(r, "the output is too long");
    r->out_left -= grown;
    return true;
}

bool tm_jexec(tm_jrun *r, const tm_jnode *block)
{
    for (int i = 0; i < block->n && r->flow == TM_JFLOW_NEXT; i++)
        if (!exec_any(r, block->list[i]))
            return false;
    return true;
}

static bool exec_if(tm_jrun *r, const tm_jnode *n)
{
    for (int i = 0; i < n->n; i += 2) {
        tm_jval v;
        if (!tm_jeval(r, n->list[i], &v))
            return false;
        if (tm_jv_truth(&v))
            return tm_jexec(r, n->list[i + 1]);
    }
    return !n->c || tm_jexec(r, n->c);
}

/* Scopes live in the arena: a macro or a loop kept in a namespace may use its scope later. */
static tm_jscope *new_scope(tm_jrun *r, tm_jscope *up)
{
    tm_jscope *s = tm_jrun_alloc(r, sizeof(*s));
    if (s)
        s->up = up;
    return s;
}

/* ---- assignment ----------------------------------------------------------------------------------------- */

static bool assign(tm_jrun *r, const tm_jnode *target, tm_jval v)
{
    if (target->kind == TM_JN_NAME)
        return tm_jscope_set(r, r->scope, target->name, v);
    if (target->kind == TM_JN_NSREF) {
        const tm_jval *ns = tm_jscope_get(r->scope, target->name);
        if (!ns || ns->type != TM_J_NAMESPACE)
            return tm_jrun_fail(r, "cannot assign attribute on non-namespace object");
        return tm_jdict_set(r, ns->u.d, &target->value, v);
    }
    tm_jval *items;
    size_t n;
    if (!tm_jv_iterate(r, &v, &items, &n))
        return false;
    if (n != (size_t)target->n)
        return tm_jrun_fail(r, "%s values to unpack (expected %d, got %zu)",
                            n > (size_t)target->n ? "too many" : "not enough", target->n, n);
    for (int i = 0; i < target->n; i++)
        if (!assign(r, target->list[i], items[i]))
            return false;
    return true;
}

static bool exec_set(tm_jrun *r, const tm_jnode *n)
{
    tm_jval v;
    return tm_jeval(r, n->b, &v) && assign(r, n->a, v);
}

/* ---- captured output ------------------------------------------------------------------------------------ */

/* Runs a block in a scope of its own under `up` and gives its output as a string. `flow` of the block stays
 * inside (it cannot leave a macro). */
static bool capture(tm_jrun *r, const tm_jnode *block, tm_jscope *scope, tm_jval *out)
{
    tm_jbuf *outer = r->out;
    tm_jscope *up = r->scope;
    tm_jbuf *b = scope ? tm_jbuf_new(r, 64) : NULL;
    if (!b)
        return false;
    r->out = b;
    r->scope = scope;
    bool ok = tm_jexec(r, block);
    r->out = outer;
    r->scope = up;
    *out = tm_jbuf_value(b);
    /* Captured text is counted again when it is printed. */
    r->out_left += b->used;
    return ok;
}

/* A chain of filters whose innermost input is v. */
static bool apply_filters(tm_jrun *r, const tm_jnode *chain, tm_jval *v)
{
    if (!chain)
        return true;
    if (!apply_filters(r, chain->a, v))
        return false;
    tm_jnode held = {.kind = TM_JN_CONST, .line = chain->line, .value = *v};
    tm_jnode call = *chain;
    call.a = &held;
    return tm_jeval(r, &call, v);
}

static bool exec_set_block(tm_jrun *r, const tm_jnode *n)
{
    tm_jval v;
    return capture(r, n->c, new_scope(r, r->scope), &v) && apply_filters(r, n->b, &v) &&
           assign(r, n->a, v);
}

static bool exec_filter_block(tm_jrun *r, const tm_jnode *n)
{
    tm_jval v;
    if (!capture(r, n->c, new_scope(r, r->scope), &v) || !apply_filters(r, n->b, &v))
        return false;
    tm_jnode text = {.kind = TM_JN_CONST, .value = v}, print = {.kind = TM_JN_OUTPUT, .a = &text};
    return exec_output(r, &print);
}

static bool exec_with(tm_jrun *r, const tm_jnode *n)
{
    tm_jscope *scope = new_scope(r, r->scope);
    if (!scope)
        return false;
    for (int i = 0; i < n->n; i++) {
        tm_jval v;
        if (!tm_jeval(r, n->kw[i], &v))
            return false;
        r->scope = scope;
        bool ok = assign(r, n->list[i], v);
        r->scope = scope->up;
        if (!ok)
            return false;
    }
    r->scope = scope;
    bool ok = tm_jexec(r, n->c);
    r->scope = scope->up;
    return ok;
}

/* ---- macros --------------------------------------------------------------------------------------------- */

static bool define_macro(tm_jrun *r, const tm_jnode *n, tm_jval *out)
{
    tm_jcall *c = tm_jrun_alloc(r, sizeof(*c));
    if (!c)
        return false;
    c->macro = n;
    c->scope = r->scope;
    *out = (tm_jval){.type = TM_J_CALL, .u.call = c};
    return true;
}

static bool exec_macro(tm_jrun *r, const tm_jnode *n)
{
    tm_jval m;
    return define_macro(r, n, &m) && tm_jscope_set(r, r->scope, n->name, m);
}

static const tm_jnode *default_of(const tm_jnode *macro, const char *name)
{
    for (int i = 0; i < macro->kn; i++)
        if (macro->kw[i]->name == name)
            return macro->kw[i]->a;
    return NULL;
}

/* One parameter: given by position, by name, by default, or undefined. */
static bool bind_param(tm_jrun *r, const tm_jnode *m, int i, const tm_jargs *args, bool *used,
                       tm_jscope *scope)
{
    const char *name = m->list[i]->name;
    tm_jval v = TM_JV_ABSENT;
    if (i < args->n)
        v = args->v[i];
    for (int k = 0; k < args->kn; k++) {
        if (strcmp(args->kw[k].name, name) != 0)
            continue;
        if (v.type != TM_J_ABSENT)
            return tm_jrun_fail(r, "macro '%.60s' got multiple values for argument '%.60s'",
                                m->name, name);
        v = args->kw[k].v;
        used[k] = true;
    }
    const tm_jnode *def = default_of(m, name);
    if (v.type == TM_J_ABSENT && def) {
        tm_jscope *up = r->scope;
        r->scope = scope; /* defaults may name earlier parameters */
        bool ok = tm_jeval(r, def, &v);
        r->scope = up;
        if (!ok)
            return false;
    }
    if (v.type == TM_J_ABSENT)
        v = tm_jrun_missing(r, "parameter '%.60s' was not provided", name);
    return tm_jscope_set(r, scope, name, v);
}

/* What no parameter took: varargs, kwargs and caller, if the template mentions those names. */
static bool bind_rest(tm_jrun *r, const tm_jnode *m, const tm_jargs *args, const bool *used,
                      tm_jscope *scope)
{
    const char *varargs = r->tpl->varargs, *kwargs = r->tpl->kwargs, *caller = r->tpl->caller;
    tm_jval list, dict;
    if (args->n > m->n && !varargs)
        return tm_jrun_fail(r, "macro '%.60s' takes not more than %d argument(s)", m->name, m->n);
    if (!tm_jv_list(r, TM_J_TUPLE, 0, &list) || !tm_jv_dict(r, TM_J_DICT, &dict))
        return false;
    for (int i = m->n; i < args->n; i++)
        if (!tm_jlist_push(r, list.u.l, args->v[i]))
            return false;
    for (int k = 0; k < args->kn; k++) {
        if (used[k])
            continue;
        if (caller && strcmp(args->kw[k].name, "caller") == 0) {
            if (!tm_jscope_set(r, scope, caller, args->kw[k].v))
                return false;
            continue;
        }
        if (!kwargs)
            return tm_jrun_fail(r, "macro '%.60s' takes no keyword argument '%.60s'", m->name,
                                args->kw[k].name);
        if (!tm_jdict_sets(r, dict.u.d, args->kw[k].name, args->kw[k].v))
            return false;
    }
    return (!varargs || tm_jscope_set(r, scope, varargs, list)) &&
           (!kwargs || tm_jscope_set(r, scope, kwargs, dict));
}

bool tm_jcall_macro(tm_jrun *r, const tm_jcall *c, const tm_jargs *args, tm_jval *out)
{
    const tm_jnode *m = c->macro;
    tm_jscope *scope = new_scope(r, c->scope);
    if (!scope)
        return false;
    if (r->macros >= TM_JMACRO_MAX)
        return tm_jrun_bound(r, "macros call each other more than 64 deep");
    bool *used = tm_jrun_alloc(r, (size_t)args->kn + 1);
    if (!used)
        return false;
    for (int i = 0; i < m->n; i++)
        if (!bind_param(r, m, i, args, used, scope))
            return false;
    if (!bind_rest(r, m, args, used, scope))
        return false;
    r->macros++;
    int line = r->line;
    bool ok = capture(r, m->c, scope, out);
    r->line = ok ? line : r->line;
    r->macros--;
    return ok;
}

static bool exec_call_block(tm_jrun *r, const tm_jnode *n)
{
    tm_jval caller;
    if (!define_macro(r, n->b, &caller))
        return false;
    tm_jnode value = {.kind = TM_JN_CONST, .value = caller};
    tm_jnode keyword = {.kind = TM_JN_KEYWORD, .name = n->b->name, .a = &value};
    tm_jnode call = *n->a;
    call.kw = tm_jrun_alloc(r, ((size_t)call.kn + 1) * sizeof(*call.kw));
    if (!call.kw)
        return false;
    for (int i = 0; i < call.kn; i++)
        call.kw[i] = n->a->kw[i];
    call.kw[call.kn++] = &keyword;
    tm_jnode print = {.kind = TM_JN_OUTPUT, .a = &call};
    return exec_output(r, &print);
}

/* ---- loops ---------------------------------------------------------------------------------------------- */

static bool run_turn(tm_jrun *r, const tm_jnode *n, tm_jscope *up, tm_jloop *loop)
{
    const char *loop_name = r->tpl->loop;
    tm_jscope *scope = new_scope(r, up), *before = r->scope;
    if (!scope)
        return false;
    r->scope = scope;
    bool ok = assign(r, n->a, loop->items[loop->at]);
    if (ok && loop_name)
        ok = tm_jscope_set(r, scope, loop_name, (tm_jval){.type = TM_J_LOOP, .u.loop = loop});
    ok = ok && tm_jexec(r, n->list[0]);
    r->scope = before;
    if (r->flow == TM_JFLOW_CONTINUE)
        r->flow = TM_JFLOW_NEXT;
    return ok;
}

/* "for x in y if test": the items that pass, found before the first turn, so that loop.length is right. */
static bool filter_items(tm_jrun *r, const tm_jnode *n, tm_jscope *up, tm_jval **items,
                         size_t *count)
{
    tm_jval kept, v;
    if (!tm_jv_list(r, TM_J_LIST, *count, &kept))
        return false;
    for (size_t i = 0; i < *count; i++) {
        tm_jscope *scope = new_scope(r, up), *before = r->scope;
        if (!scope)
            return false;
        r->scope = scope;
        bool ok = assign(r, n->a, (*items)[i]) && tm_jeval(r, n->c, &v);
        r->scope = before;
        if (!ok || (tm_jv_truth(&v) && !tm_jlist_push(r, kept.u.l, (*items)[i])))
            return false;
    }
    *items = kept.u.l->v;
    *count = kept.u.l->n;
    return true;
}

static bool run_loop(tm_jrun *r, const tm_jnode *n, const tm_jval *over, tm_jscope *up, int depth0)
{
    tm_jval *items;
    size_t count;
    if (!tm_jv_iterate(r, over, &items, &count))
        return false;
    if (n->c && !filter_items(r, n, up, &items, &count))
        return false;
    tm_jloop *loop = tm_jrun_alloc(r, sizeof(*loop));
    if (!loop)
        return false;
    *loop = (tm_jloop){.items = items,
                       .n = count,
                       .depth0 = depth0,
                       .node = n,
                       .scope = up,
                       .last_changed = TM_JV_ABSENT};
    for (; loop->at < count && r->flow == TM_JFLOW_NEXT; loop->at++)
        if (!tm_jrun_step(r) || !run_turn(r, n, up, loop))
            return false;
    if (r->flow == TM_JFLOW_BREAK)
        r->flow = TM_JFLOW_NEXT;
    /* Jinja's else runs when no turn did. */
    return count > 0 || n->n < 2 || tm_jexec(r, n->list[1]);
}

static bool exec_for(tm_jrun *r, const tm_jnode *n)
{
    tm_jval over;
    return tm_jeval(r, n->b, &over) && run_loop(r, n, &over, r->scope, 0);
}

bool tm_jcall_loop(tm_jrun *r, const tm_jloop *loop, const tm_jargs *args, tm_jval *out)
{
    if (!loop->node->op)
        return tm_jrun_fail(r, "only a recursive loop can be called");
    if (args->n != 1 || args->kn != 0)
        return tm_jrun_fail(r, "a loop is called with one argument");
    if (r->macros >= TM_JMACRO_MAX)
        return tm_jrun_bound(r, "loops call themselves more than 64 deep");
    tm_jbuf *outer = r->out, *b = tm_jbuf_new(r, 64);
    if (!b)
        return false;
    r->out = b;
    r->macros++;
    bool ok = run_loop(r, loop->node, &args->v[0], loop->scope, loop->depth0 + 1);
    r->macros--;
    r->out = outer;
    r->out_left += b->used;
    *out = tm_jbuf_value(b);
    return ok;
}

static bool exec_jump(tm_jrun *r, const tm_jnode *n)
{
    r->flow = n->kind == TM_JN_BREAK ? TM_JFLOW_BREAK : TM_JFLOW_CONTINUE;
    return true;
}

static const exec_fn execs[] = {
    [TM_JN_TEXT] = exec_text,
    [TM_JN_OUTPUT] = exec_output,
    [TM_JN_BLOCK] = tm_jexec,
    [TM_JN_IF] = exec_if,
    [TM_JN_FOR] = exec_for,
    [TM_JN_SET] = exec_set,
    [TM_JN_SETBLOCK] = exec_set_block,
    [TM_JN_MACRO] = exec_macro,
    [TM_JN_CALLBLOCK] = exec_call_block,
    [TM_JN_FILTERBLOCK] = exec_filter_block,
    [TM_JN_WITH] = exec_with,
    [TM_JN_BREAK] = exec_jump,
    [TM_JN_CONTINUE] = exec_jump,
};

static bool exec_any(tm_jrun *r, const tm_jnode *n)
{
    TM_ASSERT(n->kind < TM_ARRAY_LEN(execs) && execs[n->kind]);
    r->line = n->line;
    if (!tm_jrun_enter(r))
        return false;
    bool ok = execs[n->kind](r, n);
    tm_jrun_leave(r);
    return ok;
}
