/* grpc.health.v1: SERVING while the router serves and at least one group is ready. The timer compares the
 * state with what each watcher was told; a change is told within a tick. */
#include <string.h>

#include "router/grpc/call.h"

typedef Grpc__Health__V1__HealthCheckRequest check_request;
typedef Grpc__Health__V1__HealthCheckResponse check_response;
typedef Grpc__Health__V1__HealthCheckResponse__ServingStatus serving_status;

#define SERVING         GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
#define NOT_SERVING     GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING
#define SERVICE_UNKNOWN GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN

static bool known_service(const ProtobufCMessage *m)
{
    const char *name = ((const check_request *)m)->service;
    return name == NULL || *name == '\0' || strcmp(name, "turbomesh.v1.TurboMesh") == 0;
}

static serving_status current(const tm_public *p)
{
    return p->serving && !p->closing && tm_dispatch_groups_ready(p->opts.dispatch, NULL) > 0
               ? SERVING
               : NOT_SERVING;
}

static void tell(tm_pcall *c, serving_status status)
{
    check_response r = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    if (c->watched == (int)status)
        return;
    c->watched = (int)status;
    r.has_status = 1;
    r.status = status;
    if (tm_pcall_send(c, &r.base) == TM_STATUS_BUSY)
        tm_pcall_abort(c, TM_STATUS_BUSY, "the client does not read");
}

void tm_public_health_check(tm_pcall *c, ProtobufCMessage **m)
{
    if (!known_service(*m)) {
        tm_pcall_finish(c, TM_STATUS_NOT_FOUND, "no such service");
        return;
    }
    tell(c, current(c->owner));
    tm_pcall_finish(c, TM_OK, "%s", "");
}

void tm_public_health_watch(tm_pcall *c, ProtobufCMessage **m)
{
    c->watching = known_service(*m);
    tell(c, c->watching ? current(c->owner) : SERVICE_UNKNOWN);
}

void tm_public_health_tick(tm_public *p)
{
    serving_status status = current(p);
    for (tm_pcall *c = p->calls; c != NULL; c = c->next)
        if (c->watching && !c->closed)
            tell(c, status);
}
