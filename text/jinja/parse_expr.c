/* Expressions, by recursive descent with Jinja's precedences: inline if, or, and, not, comparison, + -, ~,
 * * / // %, **, unary minus, postfix, filters and tests. Depth is bounded, so a hostile template cannot use
 * up the stack. */
#include <errno.h>
#include <stdlib.h>

#include "common/check.h"
#include "text/jinja/parse.h"

#define DEPTH_MAX 120

bool tm_jparse_fail(tm_jparser *p, const char *what)
{
    (void)TM_FAIL(p->err, TM_STATUS_DATA, "line %d: %s", tm_jpeek(p)->line, what);
    return false;
}

tm_jnode *tm_jnode_new(tm_jparser *p, tm_jkind kind)
{
    tm_jnode *n = tm_arena_alloc(p->arena, sizeof(*n));
    if (!n) {
        (void)TM_FAIL(p->err, TM_STATUS_NO_MEMORY, "out of memory for a chat template");
        return NULL;
    }
    n->kind = (uint8_t)kind;
    n->line = tm_jpeek(p)->line;
    return n;
}

bool tm_jnodes_push(tm_jparser *p, tm_jnodes *a, const tm_jnode *n)
{
    if (!n)
        return false;
    if (a->n == a->cap) {
        int cap = a->cap ? a->cap * 2 : 8;
        const tm_jnode **v = tm_arena_alloc(p->arena, (size_t)cap * sizeof(*v));
        if (!v) {
            (void)TM_FAIL(p->err, TM_STATUS_NO_MEMORY, "out of memory for a chat template");
            return false;
        }
        if (a->n)
            memcpy(v, a->v, (size_t)a->n * sizeof(*v));
        a->v = v;
        a->cap = cap;
    }
    a->v[a->n++] = n;
    return true;
}

const char *tm_jname(tm_jparser *p, const char *s, size_t len)
{
    for (size_t i = 0; i < p->names.n; i++)
        if (strlen(p->names.v[i]) == len && memcmp(p->names.v[i], s, len) == 0)
            return p->names.v[i];
    if (p->names.n == p->names.cap) {
        size_t cap = p->names.cap ? p->names.cap * 2 : 64;
        const char **v = tm_arena_alloc(p->arena, cap * sizeof(*v));
        if (!v)
            return NULL;
        if (p->names.n)
            memcpy(v, p->names.v, p->names.n * sizeof(*v));
        p->names.v = v;
        p->names.cap = cap;
    }
    return p->names.v[p->names.n++] = tm_arena_strndup(p->arena, s, len);
}

bool tm_jaccept_op(tm_jparser *p, int op)
{
    if (!tm_jat_op(p, op))
        return false;
    p->pos++;
    return true;
}

bool tm_jaccept_name(tm_jparser *p, const char *name)
{
    if (!tm_jat_name(p, name))
        return false;
    p->pos++;
    return true;
}

bool tm_jexpect_op(tm_jparser *p, int op)
{
    if (tm_jaccept_op(p, op))
        return true;
    char what[32] = "expected 'x'";
    what[10] = (char)(op & 0xFF);
    return tm_jparse_fail(p, what);
}

const char *tm_jexpect_any_name(tm_jparser *p)
{
    const tm_jtoken *t = tm_jpeek(p);
    if (t->type != TM_JT_NAME) {
        tm_jparse_fail(p, "expected a name");
        return NULL;
    }
    p->pos++;
    return tm_jname(p, t->s, t->len);
}

/* ---- leaves --------------------------------------------------------------------------------------------- */

static tm_jnode *string_node(tm_jparser *p, const char *s, size_t len)
{
    tm_jnode *n = tm_jnode_new(p, TM_JN_CONST);
    tm_jbuf *b = n ? tm_arena_alloc(p->arena, sizeof(*b)) : NULL;
    if (!b)
        return NULL;
    b->data = (char *)(uintptr_t)s;
    b->used = len;
    n->value = tm_jbuf_value(b);
    return n;
}

/* Strings side by side are one string. */
static const tm_jnode *parse_string(tm_jparser *p)
{
    const tm_jtoken *t = &p->tok[p->pos++];
    if (tm_jpeek(p)->type != TM_JT_STRING)
        return string_node(p, t->s, t->len);
    size_t len = 0, first = p->pos - 1, last = first;
    while (p->tok[last].type == TM_JT_STRING)
        len += p->tok[last++].len;
    char *all = tm_arena_alloc(p->arena, len + 1);
    if (!all)
        return NULL;
    len = 0;
    for (size_t i = first; i < last; i++) {
        memcpy(all + len, p->tok[i].s, p->tok[i].len);
        len += p->tok[i].len;
    }
    p->pos = last;
    return string_node(p, all, len);
}

static const tm_jnode *parse_number(tm_jparser *p)
{
    const tm_jtoken *t = tm_jpeek(p);
    tm_jnode *n = tm_jnode_new(p, TM_JN_CONST);
    if (!n)
        return NULL;
    errno = 0;
    if (t->type == TM_JT_FLOAT)
        n->value = tm_jv_float(strtod(t->s, NULL));
    else
        n->value = tm_jv_int(strtoll(t->s, NULL, 10));
    if (errno) {
        tm_jparse_fail(p, "a number is out of range");
        return NULL;
    }
    p->pos++;
    return n;
}

static const tm_jnode *parse_name(tm_jparser *p)
{
    static const struct {
        const char *name;
        tm_jval v;
    } consts[] = {
        {"true", {.type = TM_J_BOOL, .u.b = true}},
        {"True", {.type = TM_J_BOOL, .u.b = true}},
        {"false", {.type = TM_J_BOOL, .u.b = false}},
        {"False", {.type = TM_J_BOOL, .u.b = false}},
        {"none", {.type = TM_J_NONE}},
        {"None", {.type = TM_J_NONE}},
    };
    const tm_jtoken *t = tm_jpeek(p);
    tm_jnode *n = tm_jnode_new(p, TM_JN_NAME);
    if (!n)
        return NULL;
    p->pos++;
    for (size_t i = 0; i < TM_ARRAY_LEN(consts); i++) {
        if (strcmp(consts[i].name, t->s) == 0) {
            n->kind = TM_JN_CONST;
            n->value = consts[i].v;
            return n;
        }
    }
    n->name = tm_jname(p, t->s, t->len);
    return n->name ? n : NULL;
}

static const tm_jnode *finish_list(tm_jnode *n, const tm_jnodes *items)
{
    n->list = items->v;
    n->n = items->n;
    return n;
}

static const tm_jnode *parse_list(tm_jparser *p)
{
    tm_jnode *n = tm_jnode_new(p, TM_JN_LIST);
    tm_jnodes items = {0};
    if (!n)
        return NULL;
    p->pos++;
    while (!tm_jat_op(p, ']')) {
        if (items.n > 0 && !tm_jexpect_op(p, ','))
            return NULL;
        if (tm_jat_op(p, ']'))
            break;
        if (!tm_jnodes_push(p, &items, tm_jparse_expr(p, true)))
            return NULL;
    }
    p->pos++;
    return finish_list(n, &items);
}

static const tm_jnode *parse_dict(tm_jparser *p)
{
    tm_jnode *n = tm_jnode_new(p, TM_JN_DICT);
    tm_jnodes items = {0};
    if (!n)
        return NULL;
    p->pos++;
    while (!tm_jat_op(p, '}')) {
        if (items.n > 0 && !tm_jexpect_op(p, ','))
            return NULL;
        if (tm_jat_op(p, '}'))
            break;
        if (!tm_jnodes_push(p, &items, tm_jparse_expr(p, true)) || !tm_jexpect_op(p, ':') ||
            !tm_jnodes_push(p, &items, tm_jparse_expr(p, true)))
            return NULL;
    }
    p->pos++;
    return finish_list(n, &items);
}

const tm_jnode *tm_jparse_primary(tm_jparser *p)
{
    const tm_jtoken *t = tm_jpeek(p);
    if (t->type == TM_JT_NAME)
        return parse_name(p);
    if (t->type == TM_JT_STRING)
        return parse_string(p);
    if (t->type == TM_JT_INT || t->type == TM_JT_FLOAT)
        return parse_number(p);
    if (tm_jat_op(p, '[') || tm_jat_op(p, '{'))
        return tm_jat_op(p, '[') ? parse_list(p) : parse_dict(p);
    if (tm_jaccept_op(p, '(')) {
        const tm_jnode *n = tm_jparse_tuple(p, false, true, true, NULL);
        return n && tm_jexpect_op(p, ')') ? n : NULL;
    }
    tm_jparse_fail(p, "expected an expression");
    return NULL;
}

static bool tuple_ends(const tm_jparser *p, const char *end)
{
    const tm_jtoken *t = tm_jpeek(p);
    return t->type == TM_JT_VAR_END || t->type == TM_JT_BLOCK_END || tm_jat_op(p, ')') ||
           (end && tm_jat_name(p, end));
}

const tm_jnode *tm_jparse_tuple(tm_jparser *p, bool simple, bool with_cond, bool parens,
                                const char *end)
{
    tm_jnode *n = tm_jnode_new(p, TM_JN_TUPLE);
    tm_jnodes items = {0};
    bool comma = false;
    if (!n)
        return NULL;
    for (;;) {
        if (tuple_ends(p, end))
            break;
        if (!tm_jnodes_push(p, &items,
                            simple ? tm_jparse_primary(p) : tm_jparse_expr(p, with_cond)))
            return NULL;
        if (!tm_jaccept_op(p, ','))
            break;
        comma = true;
    }
    if (!comma && items.n == 1)
        return items.v[0];
    if (items.n == 0 && !parens) {
        tm_jparse_fail(p, "expected an expression");
        return NULL;
    }
    return finish_list(n, &items);
}

/* ---- postfix -------------------------------------------------------------------------------------------- */

/* Behind "(": arguments up to ")". */
bool tm_jparse_args(tm_jparser *p, tm_jnode *call)
{
    tm_jnodes pos = {0}, kw = {0};
    bool first = true;
    while (!tm_jat_op(p, ')')) {
        if (!first && !tm_jexpect_op(p, ','))
            return false;
        first = false;
        if (tm_jat_op(p, ')'))
            break;
        bool star = tm_jat_op(p, '*'), two = tm_jat_op(p, TM_JOPC('*', '*'));
        bool named = !star && !two && tm_jpeek(p)->type == TM_JT_NAME &&
                     p->tok[p->pos + 1].type == TM_JT_OP && p->tok[p->pos + 1].op == '=';
        tm_jnode *n = star || two ? tm_jnode_new(p, TM_JN_STAR)
                      : named     ? tm_jnode_new(p, TM_JN_KEYWORD)
                                  : NULL;
        if ((star || two || named) && !n)
            return false;
        if (star || two)
            n->op = two ? 2 : 1;
        if (named)
            n->name = tm_jname(p, tm_jpeek(p)->s, tm_jpeek(p)->len);
        p->pos += named ? 2 : (star || two);
        const tm_jnode *value = tm_jparse_expr(p, true);
        if (!value)
            return false;
        if (n)
            n->a = value;
        if (!n && kw.n > 0)
            return tm_jparse_fail(p, "a positional argument behind a keyword argument");
        if (!tm_jnodes_push(p, named || two ? &kw : &pos, n ? n : value))
            return false;
    }
    p->pos++;
    call->list = pos.v;
    call->n = pos.n;
    call->kw = kw.v;
    call->kn = kw.n;
    return true;
}

static const tm_jnode *parse_call(tm_jparser *p, const tm_jnode *fn)
{
    tm_jnode *n = tm_jnode_new(p, TM_JN_CALL);
    if (!n)
        return NULL;
    p->pos++;
    n->a = fn;
    return tm_jparse_args(p, n) ? n : NULL;
}

/* a.name or a.0 */
static const tm_jnode *parse_attr(tm_jparser *p, const tm_jnode *of)
{
    tm_jnode *n = tm_jnode_new(p, TM_JN_ATTR);
    if (!n)
        return NULL;
    p->pos++;
    n->a = of;
    if (tm_jpeek(p)->type == TM_JT_INT) {
        n->kind = TM_JN_ITEM;
        n->b = parse_number(p);
        return n->b ? n : NULL;
    }
    n->name = tm_jexpect_any_name(p);
    return n->name ? n : NULL;
}

static bool parse_slice_part(tm_jparser *p, const tm_jnode **out)
{
    *out = NULL;
    if (tm_jat_op(p, ':') || tm_jat_op(p, ']') || tm_jat_op(p, ','))
        return true;
    *out = tm_jparse_expr(p, true);
    return *out != NULL;
}

static const tm_jnode *parse_item(tm_jparser *p, const tm_jnode *of)
{
    tm_jnode *n = tm_jnode_new(p, TM_JN_ITEM);
    const tm_jnode *part[3] = {0};
    int colons = 0;
    if (!n)
        return NULL;
    p->pos++;
    n->a = of;
    if (!parse_slice_part(p, &part[0]))
        return NULL;
    while (colons < 2 && tm_jaccept_op(p, ':'))
        if (!parse_slice_part(p, &part[++colons]))
            return NULL;
    if (!tm_jexpect_op(p, ']'))
        return NULL;
    if (colons == 0 && !part[0]) {
        tm_jparse_fail(p, "expected an expression");
        return NULL;
    }
    n->b = part[0];
    if (colons == 0)
        return n;
    n->kind = TM_JN_SLICE;
    n->list = tm_arena_memdup(p->arena, part, sizeof(part));
    n->n = 3;
    return n->list ? n : NULL;
}

static const tm_jnode *parse_postfix(tm_jparser *p, const tm_jnode *n)
{
    while (n) {
        if (tm_jat_op(p, '.'))
            n = parse_attr(p, n);
        else if (tm_jat_op(p, '['))
            n = parse_item(p, n);
        else if (tm_jat_op(p, '('))
            n = parse_call(p, n);
        else
            break;
    }
    return n;
}

const tm_jnode *tm_jparse_filters(tm_jparser *p, const tm_jnode *node, bool first_is_name)
{
    while (first_is_name || tm_jaccept_op(p, '|')) {
        first_is_name = false;
        tm_jnode *n = tm_jnode_new(p, TM_JN_FILTER);
        if (!n)
            return NULL;
        n->a = node;
        n->name = tm_jexpect_any_name(p);
        if (!n->name || (tm_jaccept_op(p, '(') && !tm_jparse_args(p, n)))
            return NULL;
        node = n;
    }
    return node;
}

/* Behind "is". */
static const tm_jnode *parse_test(tm_jparser *p, const tm_jnode *of)
{
    bool negated = tm_jaccept_name(p, "not");
    tm_jnode *n = tm_jnode_new(p, TM_JN_TEST);
    if (!n)
        return NULL;
    n->a = of;
    n->name = tm_jexpect_any_name(p);
    if (!n->name)
        return NULL;
    const tm_jtoken *t = tm_jpeek(p);
    bool literal = t->type == TM_JT_STRING || t->type == TM_JT_INT || t->type == TM_JT_FLOAT ||
                   tm_jat_op(p, '[') || tm_jat_op(p, '{');
    bool name = t->type == TM_JT_NAME && !tm_jat_name(p, "else") && !tm_jat_name(p, "or") &&
                !tm_jat_name(p, "and");
    if (tm_jaccept_op(p, '(')) {
        if (!tm_jparse_args(p, n))
            return NULL;
    } else if (literal || name) {
        tm_jnodes args = {0};
        if (tm_jat_name(p, "is")) {
            tm_jparse_fail(p, "tests cannot be chained");
            return NULL;
        }
        const tm_jnode *arg = tm_jparse_primary(p);
        if (!arg || !tm_jnodes_push(p, &args, parse_postfix(p, arg)))
            return NULL;
        n->list = args.v;
        n->n = args.n;
    }
    if (!negated)
        return n;
    tm_jnode *not = tm_jnode_new(p, TM_JN_NOT);
    if (not )
        not ->a = n;
    return not ;
}

static const tm_jnode *parse_filters_and_tests(tm_jparser *p, const tm_jnode *n)
{
    while (n) {
        if (tm_jat_op(p, '|'))
            n = tm_jparse_filters(p, n, false);
        else if (tm_jaccept_name(p, "is"))
            n = parse_test(p, n);
        else if (tm_jat_op(p, '('))
            n = parse_call(p, n);
        else
            break;
    }
    return n;
}

/* ---- operators ------------------------------------------------------------------------------------------ */

static const tm_jnode *unary_node(tm_jparser *p, tm_jkind kind, const tm_jnode *a)
{
    tm_jnode *n = a ? tm_jnode_new(p, kind) : NULL;
    if (n)
        n->a = a;
    return n;
}

static const tm_jnode *binary_node(tm_jparser *p, tm_jkind kind, int op, const tm_jnode *a,
                                   const tm_jnode *b)
{
    tm_jnode *n = a && b ? tm_jnode_new(p, kind) : NULL;
    if (!n)
        return NULL;
    n->op = (uint8_t)op;
    n->a = a;
    n->b = b;
    return n;
}

static const tm_jnode *parse_unary(tm_jparser *p, bool with_filter)
{
    const tm_jnode *n;
    if (++p->depth > DEPTH_MAX) {
        tm_jparse_fail(p, "nested too deep");
        return NULL;
    }
    if (tm_jaccept_op(p, '-'))
        n = unary_node(p, TM_JN_NEG, parse_unary(p, false));
    else if (tm_jaccept_op(p, '+'))
        n = unary_node(p, TM_JN_POS, parse_unary(p, false));
    else
        n = tm_jparse_primary(p);
    n = n ? parse_postfix(p, n) : NULL;
    p->depth--;
    return n && with_filter ? parse_filters_and_tests(p, n) : n;
}

static const tm_jnode *parse_pow(tm_jparser *p)
{
    const tm_jnode *n = parse_unary(p, true);
    while (n && tm_jaccept_op(p, TM_JOPC('*', '*')))
        n = binary_node(p, TM_JN_BINARY, TM_JOP_POW, n, parse_unary(p, true));
    return n;
}

static const tm_jnode *parse_product(tm_jparser *p)
{
    static const struct {
        int op, to;
    } ops[] = {{'*', TM_JOP_MUL},
               {'/', TM_JOP_DIV},
               {TM_JOPC('/', '/'), TM_JOP_FLOORDIV},
               {'%', TM_JOP_MOD}};
    const tm_jnode *n = parse_pow(p);
    for (size_t i = 0; n && i < TM_ARRAY_LEN(ops);) {
        if (tm_jaccept_op(p, ops[i].op)) {
            n = binary_node(p, TM_JN_BINARY, ops[i].to, n, parse_pow(p));
            i = 0;
        } else {
            i++;
        }
    }
    return n;
}

static const tm_jnode *parse_concat(tm_jparser *p)
{
    const tm_jnode *first = parse_product(p);
    if (!first || !tm_jat_op(p, '~'))
        return first;
    tm_jnode *n = tm_jnode_new(p, TM_JN_CONCAT);
    tm_jnodes items = {0};
    if (!n || !tm_jnodes_push(p, &items, first))
        return NULL;
    while (tm_jaccept_op(p, '~'))
        if (!tm_jnodes_push(p, &items, parse_product(p)))
            return NULL;
    return finish_list(n, &items);
}

static const tm_jnode *parse_sum(tm_jparser *p)
{
    const tm_jnode *n = parse_concat(p);
    while (n && (tm_jat_op(p, '+') || tm_jat_op(p, '-'))) {
        int op = tm_jat_op(p, '+') ? TM_JOP_ADD : TM_JOP_SUB;
        p->pos++;
        n = binary_node(p, TM_JN_BINARY, op, n, parse_concat(p));
    }
    return n;
}

static int accept_comparison(tm_jparser *p)
{
    static const struct {
        int op, to;
    } ops[] = {{TM_JOPC('=', '='), TM_JOP_EQ},
               {TM_JOPC('!', '='), TM_JOP_NE},
               {'<', TM_JOP_LT},
               {TM_JOPC('<', '='), TM_JOP_LE},
               {'>', TM_JOP_GT},
               {TM_JOPC('>', '='), TM_JOP_GE}};
    for (size_t i = 0; i < TM_ARRAY_LEN(ops); i++)
        if (tm_jaccept_op(p, ops[i].op))
            return ops[i].to;
    if (tm_jaccept_name(p, "in"))
        return TM_JOP_IN;
    const tm_jtoken *next = &p->tok[p->pos + 1];
    if (tm_jat_name(p, "not") && next->type == TM_JT_NAME && strcmp(next->s, "in") == 0) {
        p->pos += 2;
        return TM_JOP_NOT_IN;
    }
    return -1;
}

static const tm_jnode *parse_compare(tm_jparser *p)
{
    const tm_jnode *first = parse_sum(p);
    tm_jnodes ops = {0};
    int op;
    while (first && (op = accept_comparison(p)) >= 0) {
        tm_jnode *n = tm_jnode_new(p, TM_JN_OPERAND);
        if (!n || !(n->a = parse_sum(p)))
            return NULL;
        n->op = (uint8_t)op;
        if (!tm_jnodes_push(p, &ops, n))
            return NULL;
    }
    if (!first || ops.n == 0)
        return first;
    tm_jnode *n = tm_jnode_new(p, TM_JN_COMPARE);
    if (!n)
        return NULL;
    n->a = first;
    return finish_list(n, &ops);
}

static const tm_jnode *parse_not(tm_jparser *p)
{
    int nots = 0;
    while (tm_jaccept_name(p, "not"))
        nots++;
    const tm_jnode *n = parse_compare(p);
    for (nots = nots > 2 ? 2 - nots % 2 : nots; n && nots > 0; nots--)
        n = unary_node(p, TM_JN_NOT, n);
    return n;
}

static const tm_jnode *parse_and(tm_jparser *p)
{
    const tm_jnode *n = parse_not(p);
    while (n && tm_jaccept_name(p, "and"))
        n = binary_node(p, TM_JN_AND, 0, n, parse_not(p));
    return n;
}

static const tm_jnode *parse_or(tm_jparser *p)
{
    const tm_jnode *n = parse_and(p);
    while (n && tm_jaccept_name(p, "or"))
        n = binary_node(p, TM_JN_OR, 0, n, parse_and(p));
    return n;
}

static const tm_jnode *parse_cond(tm_jparser *p)
{
    const tm_jnode *value = parse_or(p);
    while (value && tm_jaccept_name(p, "if")) {
        tm_jnode *n = tm_jnode_new(p, TM_JN_COND);
        if (!n || !(n->a = parse_or(p)))
            return NULL;
        n->b = value;
        if (tm_jaccept_name(p, "else") && !(n->c = tm_jparse_expr(p, true)))
            return NULL;
        value = n;
    }
    return value;
}

const tm_jnode *tm_jparse_expr(tm_jparser *p, bool with_cond)
{
    if (++p->depth > DEPTH_MAX) {
        tm_jparse_fail(p, "nested too deep");
        return NULL;
    }
    const tm_jnode *n = with_cond ? parse_cond(p) : parse_or(p);
    p->depth--;
    return n;
}
