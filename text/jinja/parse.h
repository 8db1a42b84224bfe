/* Tokens to the syntax tree. Internal to the parser's two files, but for tm_jparse. */
#ifndef TM_TEXT_JINJA_PARSE_H
#define TM_TEXT_JINJA_PARSE_H

#include "common/arena.h"
#include "text/jinja/ast.h"
#include "text/jinja/lex.h"

typedef struct tm_jparsed {
    const tm_jnode *root;
    const char **names; /* every name of the template, once */
    size_t name_n;
} tm_jparsed;

tm_status tm_jparse(tm_arena *arena, const char *source, size_t len, tm_jparsed *out, tm_err *err);

typedef struct tm_jparser {
    tm_arena *arena;
    tm_err *err;
    tm_jtoken *tok;
    size_t pos;
    int depth;
    struct {
        const char **v;
        size_t n, cap;
    } names;
    int loops; /* nested for statements: break needs one */
} tm_jparser;

/* A growing array of nodes. */
typedef struct tm_jnodes {
    const tm_jnode **v;
    int n, cap;
} tm_jnodes;

/* These return NULL or false after recording the failure. */
tm_jnode *tm_jnode_new(tm_jparser *p, tm_jkind kind);
bool tm_jnodes_push(tm_jparser *p, tm_jnodes *a, const tm_jnode *n);
const char *tm_jname(tm_jparser *p, const char *s, size_t len);
bool tm_jparse_fail(tm_jparser *p, const char *what);
const tm_jnode *tm_jparse_expr(tm_jparser *p, bool with_cond);
/* a or a, b ... ; end: a name that ends the list. simple: targets only. */
const tm_jnode *tm_jparse_tuple(tm_jparser *p, bool simple, bool with_cond, bool parens,
                                const char *end);
const tm_jnode *tm_jparse_primary(tm_jparser *p);
const tm_jnode *tm_jparse_filters(tm_jparser *p, const tm_jnode *node, bool first_is_name);
bool tm_jparse_args(tm_jparser *p, tm_jnode *call);

static inline const tm_jtoken *tm_jpeek(const tm_jparser *p)
{
    return &p->tok[p->pos];
}

static inline bool tm_jat_op(const tm_jparser *p, int op)
{
    return p->tok[p->pos].type == TM_JT_OP && p->tok[p->pos].op == op;
}

static inline bool tm_jat_name(const tm_jparser *p, const char *name)
{
    return p->tok[p->pos].type == TM_JT_NAME && strcmp(p->tok[p->pos].s, name) == 0;
}

bool tm_jaccept_op(tm_jparser *p, int op);
bool tm_jaccept_name(tm_jparser *p, const char *name);
bool tm_jexpect_op(tm_jparser *p, int op);
const char *tm_jexpect_any_name(tm_jparser *p);

#endif
