/* The syntax tree of a template. Built once, constant afterwards, shared by all renders. */
#ifndef TM_TEXT_JINJA_AST_H
#define TM_TEXT_JINJA_AST_H

#include "text/jinja/value.h"

typedef enum tm_jkind {
    /* expressions */
    TM_JN_CONST,   /* value */
    TM_JN_NAME,    /* name */
    TM_JN_LIST,    /* list */
    TM_JN_TUPLE,   /* list */
    TM_JN_DICT,    /* list: key, value, key, value ... */
    TM_JN_ATTR,    /* a.name */
    TM_JN_ITEM,    /* a[b] */
    TM_JN_SLICE,   /* a[list[0]:list[1]:list[2]], entries may be NULL */
    TM_JN_CALL,    /* a(list, kw) */
    TM_JN_FILTER,  /* a | name(list, kw); a NULL in filter blocks */
    TM_JN_TEST,    /* a is name(list, kw) */
    TM_JN_NOT,     /* a */
    TM_JN_NEG,     /* a */
    TM_JN_POS,     /* a */
    TM_JN_BINARY,  /* a op b */
    TM_JN_AND,     /* a, b */
    TM_JN_OR,      /* a, b */
    TM_JN_CONCAT,  /* list */
    TM_JN_COMPARE, /* a, list of TM_JN_OPERAND */
    TM_JN_OPERAND, /* op, a */
    TM_JN_COND,    /* b if a else c (NULL) */
    TM_JN_KEYWORD, /* name = a */
    TM_JN_STAR,    /* *a or **a (op 2) in a call */
    TM_JN_NSREF,   /* name.attr as a target: name, value = attr */
    /* statements */
    TM_JN_TEXT,   /* value */
    TM_JN_OUTPUT, /* a */
    TM_JN_BLOCK,  /* list */
    TM_JN_IF,     /* list: condition, block, condition, block ...; c = else block or NULL */
    TM_JN_FOR, /* a target, b iterable, c test; list[0] body, list[1] else or NULL; op = recursive */
    TM_JN_SET,         /* a target, b value */
    TM_JN_SETBLOCK,    /* a target, b filter chain or NULL, c block */
    TM_JN_MACRO,       /* name; list parameters (NAME), kw defaults (KEYWORD), c block */
    TM_JN_CALLBLOCK,   /* a call, b macro "caller" */
    TM_JN_FILTERBLOCK, /* b filter chain, c block */
    TM_JN_WITH,        /* list targets, kw values, c block */
    TM_JN_BREAK,
    TM_JN_CONTINUE
} tm_jkind;

typedef enum tm_jop {
    TM_JOP_ADD,
    TM_JOP_SUB,
    TM_JOP_MUL,
    TM_JOP_DIV,
    TM_JOP_FLOORDIV,
    TM_JOP_MOD,
    TM_JOP_POW,
    TM_JOP_EQ,
    TM_JOP_NE,
    TM_JOP_LT,
    TM_JOP_LE,
    TM_JOP_GT,
    TM_JOP_GE,
    TM_JOP_IN,
    TM_JOP_NOT_IN
} tm_jop;

typedef struct tm_jnode tm_jnode;
struct tm_jnode {
    uint8_t kind, op;
    int line;
    const char *name; /* interned: equal names are equal pointers */
    tm_jval value;
    const tm_jnode *a, *b, *c;
    const tm_jnode **list;
    int n;
    const tm_jnode **kw;
    int kn;
};

#endif
