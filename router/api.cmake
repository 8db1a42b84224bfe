# The HTTP API, limits and served models: sources of tm_router.
list(APPEND TM_ROUTER_SOURCES
  options.c router.c access.c process.c served.c observe.c limit/limit.c limit/keys.c
  api/api.c api/args.c api/call.c api/choice.c api/error.c api/field_parse.c api/fields.c api/info.c api/job.c api/logprobs.c
  api/messages.c api/prep.c api/prep_pool.c api/reply.c api/routes.c api/stream.c api/tokens.c
  api/tools.c api/answer.c api/render.c)
