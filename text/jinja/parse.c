/* Statements. What a chat template has no use for (include, import, extends, block, autoescape) is refused by
 * name when the template is loaded. */
#include "text/jinja/parse.h"

#include "common/check.h"

#define DEPTH_MAX 60

static const tm_jnode *parse_block(tm_jparser *p, const char *const *ends);

/* "%}" */
static bool block_end(tm_jparser *p)
{
    if (tm_jpeek(p)->type != TM_JT_BLOCK_END)
        return tm_jparse_fail(p, "expected the end of the tag");
    p->pos++;
    return true;
}

/* A body up to one of the names, the tag's end behind that name included. */
static const tm_jnode *body_until(tm_jparser *p, const char *end)
{
    const char *ends[] = {end, NULL};
    const tm_jnode *b = block_end(p) ? parse_block(p, ends) : NULL;
    if (!b)
        return NULL;
    p->pos++;
    return block_end(p) ? b : NULL;
}

static bool is_target(const tm_jnode *n)
{
    if (n->kind == TM_JN_NAME || n->kind == TM_JN_NSREF)
        return true;
    if (n->kind != TM_JN_TUPLE)
        return false;
    for (int i = 0; i < n->n; i++)
        if (!is_target(n->list[i]))
            return false;
    return n->n > 0;
}

static const tm_jnode *parse_target(tm_jparser *p, const char *end, bool with_namespace)
{
    const tm_jtoken *t = tm_jpeek(p), *dot = t + 1;
    if (with_namespace && t->type == TM_JT_NAME && dot->type == TM_JT_OP && dot->op == '.') {
        tm_jnode *n = tm_jnode_new(p, TM_JN_NSREF);
        if (!n)
            return NULL;
        n->name = tm_jname(p, t->s, t->len);
        p->pos += 2;
        const tm_jtoken *attr = tm_jpeek(p);
        tm_jbuf *b = tm_arena_alloc(p->arena, sizeof(*b));
        if (!b || !n->name || !tm_jexpect_any_name(p))
            return NULL;
        *b = (tm_jbuf){.data = (char *)(uintptr_t)attr->s, .used = attr->len};
        n->value = tm_jbuf_value(b);
        return n;
    }
    const tm_jnode *n = tm_jparse_tuple(p, true, true, false, end);
    if (n && !is_target(n)) {
        tm_jparse_fail(p, "cannot assign to this");
        return NULL;
    }
    return n;
}

static const tm_jnode *parse_if(tm_jparser *p, tm_jnode *n)
{
    static const char *const ends[] = {"elif", "else", "endif", NULL};
    tm_jnodes parts = {0};
    for (;;) {
        if (!tm_jnodes_push(p, &parts, tm_jparse_tuple(p, false, false, false, NULL)) ||
            !block_end(p) || !tm_jnodes_push(p, &parts, parse_block(p, ends)))
            return NULL;
        if (!tm_jaccept_name(p, "elif"))
            break;
    }
    if (tm_jaccept_name(p, "else")) {
        if (!(n->c = body_until(p, "endif")))
            return NULL;
    } else {
        p->pos++;
        if (!block_end(p))
            return NULL;
    }
    n->list = parts.v;
    n->n = parts.n;
    return n;
}

static const tm_jnode *parse_for(tm_jparser *p, tm_jnode *n)
{
    static const char *const ends[] = {"else", "endfor", NULL};
    tm_jnodes parts = {0};
    if (!(n->a = parse_target(p, "in", false)))
        return NULL;
    if (!tm_jaccept_name(p, "in")) {
        tm_jparse_fail(p, "expected \"in\"");
        return NULL;
    }
    if (!(n->b = tm_jparse_tuple(p, false, false, false, "recursive")))
        return NULL;
    if (tm_jaccept_name(p, "if") && !(n->c = tm_jparse_expr(p, true)))
        return NULL;
    n->op = tm_jaccept_name(p, "recursive");
    p->loops++;
    if (!block_end(p) || !tm_jnodes_push(p, &parts, parse_block(p, ends)))
        return NULL;
    p->loops--;
    if (tm_jaccept_name(p, "else")) {
        if (!tm_jnodes_push(p, &parts, body_until(p, "endfor")))
            return NULL;
    } else {
        p->pos++;
        if (!block_end(p))
            return NULL;
    }
    n->list = parts.v;
    n->n = parts.n;
    return n;
}

static const tm_jnode *parse_set(tm_jparser *p, tm_jnode *n)
{
    if (!(n->a = parse_target(p, NULL, true)))
        return NULL;
    if (tm_jaccept_op(p, '=')) {
        n->b = tm_jparse_tuple(p, false, true, false, NULL);
        return n->b && block_end(p) ? n : NULL;
    }
    n->kind = TM_JN_SETBLOCK;
    if (tm_jat_op(p, '|') && !(n->b = tm_jparse_filters(p, NULL, false)))
        return NULL;
    n->c = body_until(p, "endset");
    return n->c ? n : NULL;
}

/* Behind "(": parameters up to ")". */
static bool parse_params(tm_jparser *p, tm_jnode *n)
{
    tm_jnodes names = {0}, defaults = {0};
    while (!tm_jat_op(p, ')')) {
        if (names.n > 0 && !tm_jexpect_op(p, ','))
            return false;
        if (tm_jat_op(p, ')'))
            break;
        tm_jnode *name = tm_jnode_new(p, TM_JN_NAME);
        if (!name || !(name->name = tm_jexpect_any_name(p)) || !tm_jnodes_push(p, &names, name))
            return false;
        if (tm_jaccept_op(p, '=')) {
            tm_jnode *d = tm_jnode_new(p, TM_JN_KEYWORD);
            if (!d || !(d->a = tm_jparse_expr(p, true)))
                return false;
            d->name = name->name;
            if (!tm_jnodes_push(p, &defaults, d))
                return false;
        } else if (defaults.n > 0) {
            return tm_jparse_fail(p, "a parameter without default behind one with a default");
        }
    }
    p->pos++;
    n->list = names.v;
    n->n = names.n;
    n->kw = defaults.v;
    n->kn = defaults.n;
    return true;
}

static const tm_jnode *parse_macro(tm_jparser *p, tm_jnode *n)
{
    if (!(n->name = tm_jexpect_any_name(p)) || !tm_jexpect_op(p, '(') || !parse_params(p, n))
        return NULL;
    int loops = p->loops;
    p->loops = 0;
    n->c = body_until(p, "endmacro");
    p->loops = loops;
    return n->c ? n : NULL;
}

static const tm_jnode *parse_call_block(tm_jparser *p, tm_jnode *n)
{
    tm_jnode *caller = tm_jnode_new(p, TM_JN_MACRO);
    if (!caller || !(caller->name = tm_jname(p, "caller", 6)))
        return NULL;
    if (tm_jaccept_op(p, '(') && !parse_params(p, caller))
        return NULL;
    if (!(n->a = tm_jparse_expr(p, true)))
        return NULL;
    if (n->a->kind != TM_JN_CALL) {
        tm_jparse_fail(p, "expected a call");
        return NULL;
    }
    int loops = p->loops;
    p->loops = 0;
    caller->c = body_until(p, "endcall");
    p->loops = loops;
    n->b = caller;
    return caller->c ? n : NULL;
}

static const tm_jnode *parse_filter_block(tm_jparser *p, tm_jnode *n)
{
    n->b = tm_jparse_filters(p, NULL, true);
    n->c = n->b ? body_until(p, "endfilter") : NULL;
    return n->c ? n : NULL;
}

static const tm_jnode *parse_with(tm_jparser *p, tm_jnode *n)
{
    tm_jnodes targets = {0}, values = {0};
    while (tm_jpeek(p)->type != TM_JT_BLOCK_END) {
        if (targets.n > 0 && !tm_jexpect_op(p, ','))
            return NULL;
        const tm_jnode *name = tm_jparse_primary(p);
        if (!name || !is_target(name)) {
            tm_jparse_fail(p, "cannot assign to this");
            return NULL;
        }
        if (!tm_jnodes_push(p, &targets, name) || !tm_jexpect_op(p, '=') ||
            !tm_jnodes_push(p, &values, tm_jparse_expr(p, true)))
            return NULL;
    }
    n->list = targets.v;
    n->n = targets.n;
    n->kw = values.v;
    n->kn = values.n;
    n->c = body_until(p, "endwith");
    return n->c ? n : NULL;
}

static const tm_jnode *parse_jump(tm_jparser *p, tm_jnode *n)
{
    if (p->loops == 0) {
        tm_jparse_fail(p, "break or continue outside of a loop");
        return NULL;
    }
    return block_end(p) ? n : NULL;
}

/* {% generation %} marks what a trainer would learn from; it prints its body. */
static const tm_jnode *parse_generation(tm_jparser *p, tm_jnode *n)
{
    (void)n;
    return body_until(p, "endgeneration");
}

static const struct {
    const char *name;
    tm_jkind kind;
    const tm_jnode *(*parse)(tm_jparser *p, tm_jnode *n);
} statements[] = {
    {"if", TM_JN_IF, parse_if},
    {"for", TM_JN_FOR, parse_for},
    {"set", TM_JN_SET, parse_set},
    {"macro", TM_JN_MACRO, parse_macro},
    {"call", TM_JN_CALLBLOCK, parse_call_block},
    {"filter", TM_JN_FILTERBLOCK, parse_filter_block},
    {"with", TM_JN_WITH, parse_with},
    {"break", TM_JN_BREAK, parse_jump},
    {"continue", TM_JN_CONTINUE, parse_jump},
    {"generation", TM_JN_BLOCK, parse_generation},
};

static const tm_jnode *parse_statement(tm_jparser *p)
{
    const tm_jtoken *t = tm_jpeek(p);
    if (t->type != TM_JT_NAME) {
        tm_jparse_fail(p, "expected a statement");
        return NULL;
    }
    for (size_t i = 0; i < TM_ARRAY_LEN(statements); i++) {
        if (strcmp(statements[i].name, t->s) != 0)
            continue;
        tm_jnode *n = tm_jnode_new(p, statements[i].kind);
        p->pos++;
        return n ? statements[i].parse(p, n) : NULL;
    }
    (void)TM_FAIL(p->err, TM_STATUS_UNSUPPORTED,
                  "line %d: the statement \"%.40s\" is not supported here", t->line, t->s);
    return NULL;
}

static const tm_jnode *parse_text(tm_jparser *p)
{
    const tm_jtoken *t = tm_jpeek(p);
    tm_jnode *n = tm_jnode_new(p, TM_JN_TEXT);
    tm_jbuf *b = n ? tm_arena_alloc(p->arena, sizeof(*b)) : NULL;
    if (!b)
        return NULL;
    *b = (tm_jbuf){.data = (char *)(uintptr_t)t->s, .used = t->len};
    n->value = tm_jbuf_value(b);
    p->pos++;
    return n;
}

static const tm_jnode *parse_output(tm_jparser *p)
{
    tm_jnode *n = tm_jnode_new(p, TM_JN_OUTPUT);
    p->pos++;
    if (!n || !(n->a = tm_jparse_tuple(p, false, true, false, NULL)))
        return NULL;
    if (tm_jpeek(p)->type != TM_JT_VAR_END) {
        tm_jparse_fail(p, "expected \"}}\"");
        return NULL;
    }
    p->pos++;
    return n;
}

static bool at_end(const tm_jparser *p, const char *const *ends)
{
    for (; ends && *ends; ends++)
        if (tm_jat_name(p, *ends))
            return true;
    return false;
}

/* Up to a tag that begins with one of `ends`, which is left to be read; NULL: up to the end of the text. */
static const tm_jnode *parse_block(tm_jparser *p, const char *const *ends)
{
    tm_jnode *n = tm_jnode_new(p, TM_JN_BLOCK);
    tm_jnodes items = {0};
    if (!n)
        return NULL;
    if (++p->depth > DEPTH_MAX) {
        tm_jparse_fail(p, "nested too deep");
        return NULL;
    }
    for (;;) {
        const tm_jnode *item = NULL;
        switch (tm_jpeek(p)->type) {
        case TM_JT_DATA:
            item = parse_text(p);
            break;
        case TM_JT_VAR_BEGIN:
            item = parse_output(p);
            break;
        case TM_JT_BLOCK_BEGIN:
            p->pos++;
            if (at_end(p, ends))
                goto done;
            item = parse_statement(p);
            break;
        default:
            if (!ends)
                goto done;
            tm_jparse_fail(p, "the template ends inside of a block");
            return NULL;
        }
        if (!tm_jnodes_push(p, &items, item))
            return NULL;
    }
done:
    p->depth--;
    n->list = items.v;
    n->n = items.n;
    return n;
}

tm_status tm_jparse(tm_arena *arena, const char *source, size_t len, tm_jparsed *out, tm_err *err)
{
    tm_err why = TM_ERR_INIT;
    tm_jparser p = {.arena = arena, .err = &why};
    size_t count;
    TM_TRY(tm_jlex(arena, source, len, &p.tok, &count, err));
    const tm_jnode *n = parse_block(&p, NULL);
    if (!n && why.status == TM_OK)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a chat template");
    if (!n)
        return TM_FAIL(err, why.status, "%s", why.msg);
    *out = (tm_jparsed){n, p.names.v, p.names.n};
    return TM_OK;
}
