/* Models, health, metrics and the group table: small answers from what dispatch knows. */
#include <string.h>

#include "common/check.h"
#include "router/api/internal.h"

static void put_model(tm_jw *w, const tm_served *s)
{
    tm_jw_obj(w);
    tm_jw_kstr(w, "id", s->name);
    tm_jw_kstr(w, "object", "model");
    tm_jw_kint(w, "created", s->created);
    tm_jw_kstr(w, "owned_by", "turbomesh");
    tm_jw_kstr(w, "root", s->name);
    tm_jw_knull(w, "parent");
    tm_jw_kint(w, "max_model_len", s->max_context);
    tm_jw_key(w, "permission");
    tm_jw_arr(w);
    tm_jw_arr_end(w);
    tm_jw_obj_end(w);
}

void tm_api_handle_models(tm_api_call *c)
{
    const tm_dispatch *d = c->api->opts.dispatch;
    const char *last = "";
    tm_jw w;
    tm_jw_init(&w, &c->api->out);
    tm_jw_obj(&w);
    tm_jw_kstr(&w, "object", "list");
    tm_jw_key(&w, "data");
    tm_jw_arr(&w);
    /* Two versions of one model have one name while a rolling update runs. */
    for (int i = 0; i < tm_dispatch_served_count(d); i++) {
        const tm_served *s = tm_dispatch_served_at(d, i);
        if (strcmp(s->name, last) != 0)
            put_model(&w, s);
        last = s->name;
    }
    tm_jw_arr_end(&w);
    tm_jw_obj_end(&w);
    tm_api_reply(c, 200);
}

void tm_api_handle_model(tm_api_call *c)
{
    tm_served *s;
    tm_api_error e;
    const char *name = tm_http_req_rest(c->http);
    if (!tm_api_find_model(c->api, name ? name : "", &s, &e)) {
        if (e.code == TM_API_LOADING) /* nothing is served: then this one is not either */
            tm_api_fail(&e, TM_API_NO_MODEL, "model", "The model `%.200s` does not exist.", name);
        tm_api_reply_error(c, &e);
        return;
    }
    tm_jw w;
    tm_jw_init(&w, &c->api->out);
    put_model(&w, s);
    tm_api_reply(c, 200);
}

/* The three probes have one body:
 *   {"status": "healthy" | "loading" | "unhealthy" | "draining" | "alive", "groups_ready": 2, "models": 1,
 *    "members_stale": false, "active": 7, "waiting": 0, "groups": [{"name": ..., "state": ...}, ...]}
 * groups is described in router/dispatch.h. The probes need no key, so the groups' addresses are left out once
 * keys are in use; /nodes/status has them. */
static void put_status(tm_api_call *c, int http, const char *status)
{
    const tm_dispatch *d = c->api->opts.dispatch;
    tm_jw w;
    tm_jw_init(&w, &c->api->out);
    tm_jw_obj(&w);
    tm_jw_kstr(&w, "status", status);
    tm_jw_kint(&w, "groups_ready", tm_dispatch_groups_ready(d, NULL));
    tm_jw_kint(&w, "models", tm_dispatch_served_count(d));
    tm_jw_kbool(&w, "members_stale", tm_dispatch_members_stale(d));
    tm_jw_kint(&w, "active", tm_dispatch_active(d));
    tm_jw_kint(&w, "waiting", tm_dispatch_waiting(d));
    tm_jw_key(&w, "groups");
    tm_dispatch_describe_groups(d, &w, !tm_keys_required(c->api->opts.keys));
    tm_jw_obj_end(&w);
    tm_api_reply(c, http);
}

void tm_api_handle_health(tm_api_call *c)
{
    const tm_dispatch *d = c->api->opts.dispatch;
    bool ready = tm_dispatch_groups_ready(d, NULL) > 0 && tm_dispatch_served_count(d) > 0;
    if (c->api->draining)
        put_status(c, 503, "draining");
    else if (ready)
        put_status(c, 200, "healthy");
    else
        put_status(c, 503, tm_dispatch_served_count(d) > 0 ? "unhealthy" : "loading");
}

/* The process answers: that is all a liveness probe may ask, or a cluster-wide fault restarts every router. */
void tm_api_handle_live(tm_api_call *c)
{
    put_status(c, 200, "alive");
}

void tm_api_handle_ready(tm_api_call *c)
{
    tm_api_handle_health(c);
}

void tm_api_handle_metrics(tm_api_call *c)
{
    tm_buf *out = &c->api->out;
    tm_metrics_render(c->api->opts.metrics, out);
    if (out->failed) {
        tm_api_reply(c, 500);
        return;
    }
    tm_api_headers(c);
    tm_http_reply(c->http, 200, "text/plain; version=0.0.4; charset=utf-8", out->data, out->len);
}

void tm_api_handle_groups(tm_api_call *c)
{
    tm_dispatch_describe(c->api->opts.dispatch, &c->api->out);
    tm_api_reply(c, 200);
}
