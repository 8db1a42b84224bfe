/* See access.h. */
#include "router/access.h"

#include <string.h>

#include "common/clock.h"
#include "router/observe.h"

static tm_status find_owner(tm_access *a, const char *authorization, tm_key_owner **out,
                            const char **text)
{
    const char *key = authorization ? tm_keys_bearer(authorization) : NULL;
    tm_key_owner *o = NULL;
    if (!tm_keys_required(a->keys))
        o = tm_keys_anonymous(a->keys);
    else if (key && *key)
        o = tm_keys_find(a->keys, key, strlen(key));
    if (!o) {
        tm_api_code code = key && *key ? TM_API_KEY_INVALID : TM_API_KEY_MISSING;
        *text = tm_api_code_get(code)->text;
        return TM_STATUS_DENIED;
    }
    *out = o;
    return TM_OK;
}

static tm_status enter(void *user, const char *authorization, bool generates, tm_public_entry *out)
{
    tm_access *a = user;
    tm_key_owner *o;
    tm_status st = find_owner(a, authorization, &o, &out->text);
    if (st != TM_OK || !generates)
        return st;
    tm_limit_verdict v = tm_limit_enter(&o->limit, &a->limit, tm_clock_ms(), &out->retry_after_ms);
    if (v != TM_LIMIT_OK) {
        tm_observe_shed(a->metrics, v == TM_LIMIT_RATE ? "key_rate" : "key_concurrency");
        out->text = tm_api_code_get(TM_API_RATE_LIMIT)->text;
        return TM_STATUS_BUSY;
    }
    out->ticket = tm_key_owner_acquire(o);
    out->key = o->name;
    return TM_OK;
}

static void leave(void *user, void *ticket)
{
    (void)user;
    tm_key_owner *o = ticket;
    tm_limit_leave(&o->limit);
    tm_key_owner_release(o);
}

tm_public_access tm_access_for_grpc(tm_access *a)
{
    return (tm_public_access){enter, leave, a};
}
