/* Keys and limits of the public gRPC service: the same keys, and the same allowance of each, as the HTTP API's. */
#ifndef TM_ROUTER_ACCESS_H
#define TM_ROUTER_ACCESS_H

#include "router/grpc/public.h"
#include "router/limit/keys.h"

typedef struct tm_access {
    tm_keys *keys;
    tm_limit_opts limit;
    tm_metrics *metrics;
} tm_access;

/* *a must outlive the service. */
tm_public_access tm_access_for_grpc(tm_access *a);

#endif
