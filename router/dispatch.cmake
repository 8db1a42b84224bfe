# Dispatch, pool, policies and the public gRPC face: sources and libraries of tm_router.
list(APPEND TM_ROUTER_SOURCES
  policy/policy.c policy/cost.c policy/session.c policy/least_load.c policy/round_robin.c)
