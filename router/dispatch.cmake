# Dispatch, pool, policies and the public gRPC face: sources of tm_router.
list(APPEND TM_ROUTER_SOURCES
  policy/policy.c policy/cost.c policy/session.c policy/least_load.c policy/round_robin.c
  pool/heap.c pool/members.c pool/group.c pool/gen.c pool/submit.c pool/place.c pool/model.c
  pool/connect.c pool/events.c pool/watch.c pool/pool.c pool/roster.c pool/describe.c pool/meters.c
  pool/mailbox.c pool/jobs.c pool/assets.c pool/link.c dispatch.c
  grpc/public.c grpc/call.c grpc/request.c grpc/stream.c grpc/health.c grpc/reflect.c)
