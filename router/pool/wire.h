/* Short names for the generated structs of worker.proto. */
#ifndef TM_ROUTER_POOL_WIRE_H
#define TM_ROUTER_POOL_WIRE_H

#include "proto/worker.pb-c.h"

typedef Turbomesh__Worker__V1__WorkerMessage tm_wire_worker_message;
typedef Turbomesh__Worker__V1__RouterMessage tm_wire_router_message;
typedef Turbomesh__Worker__V1__RequestEvent tm_wire_event;
typedef Turbomesh__Worker__V1__TokenLogprob tm_wire_logprob;
typedef Turbomesh__Worker__V1__Hello tm_wire_hello;
typedef Turbomesh__Worker__V1__LoadReport tm_wire_load;

#endif
