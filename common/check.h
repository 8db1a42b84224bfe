/* The few macros that a function cannot replace. */
#ifndef TM_COMMON_CHECK_H
#define TM_COMMON_CHECK_H

#include "common/status.h"

/* Passes a failure on. */
#define TM_TRY(expr)                                                                               \
    do {                                                                                           \
        tm_status tm_try_st_ = (expr);                                                             \
        if (tm_try_st_ != TM_OK)                                                                   \
            return tm_try_st_;                                                                     \
    } while (0)

/* Passes a failure on through a clean-up label; the function has a variable `tm_status st`. */
#define TM_TRY_GOTO(expr, label)                                                                   \
    do {                                                                                           \
        st = (expr);                                                                               \
        if (st != TM_OK)                                                                           \
            goto label;                                                                            \
    } while (0)

/* For impossible states: prints the expression and aborts, in every build. */
#define TM_ASSERT(cond) ((cond) ? (void)0 : tm_assert_fail(#cond, __FILE__, __LINE__))

void tm_assert_fail(const char *expr, const char *file, int line) __attribute__((noreturn));

#define TM_ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))
#define TM_MIN(a, b)    ((a) < (b) ? (a) : (b))
#define TM_MAX(a, b)    ((a) > (b) ? (a) : (b))

#endif
