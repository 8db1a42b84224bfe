/* What every test file of common/ includes: cmocka in the order it wants its headers. */
#ifndef TM_TESTS_COMMON_TEST_H
#define TM_TESTS_COMMON_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#endif
