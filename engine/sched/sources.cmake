list(APPEND TM_ENGINE_SOURCES sched/plan.c sched/sched.c sched/sched_plan.c sched/seq.c)
