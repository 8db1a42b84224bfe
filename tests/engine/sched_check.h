/* Walks a scheduler and fails the test when an invariant is broken. Call it between retire and plan. */
#ifndef TM_TESTS_ENGINE_SCHED_CHECK_H
#define TM_TESTS_ENGINE_SCHED_CHECK_H

#include "engine/sched/sched.h"

void sched_check(const tm_sched *s);

#endif
