/* One-shot calls: every endpoint is tried once, each for two seconds. */
#include "net/etcd/etcd.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "net/etcd/link.h"

/* body NULL = GET */
static tm_status ask_once(const char *endpoints, const char *path, const tm_buf *body,
                          json_t **reply, tm_err *err)
{
    tm_etcd_link *l;
    TM_TRY(tm_etcd_link_create(&l, endpoints, err));
    tm_status st = TM_STATUS_UNAVAILABLE;
    for (int i = 0; i < tm_etcd_link_endpoints(l) && st == TM_STATUS_UNAVAILABLE; i++)
        st = tm_etcd_link_ask(l, path, body, TM_ETCD_CALL_MS, reply, err);
    tm_etcd_link_destroy(l);
    return st;
}

static tm_status ask_key(const char *endpoints, const char *path, const char *key,
                         const char *value, json_t **reply, tm_err *err)
{
    tm_buf body;
    tm_buf_init(&body, 0);
    tm_buf_putc(&body, '{');
    tm_etcd_put_b64(&body, "key", key);
    if (value) {
        tm_buf_putc(&body, ',');
        tm_etcd_put_b64(&body, "value", value);
    }
    tm_buf_putc(&body, '}');
    tm_status st = ask_once(endpoints, path, &body, reply, err);
    tm_buf_deinit(&body);
    return st;
}

tm_status tm_etcd_put(const char *endpoints, const char *key, const char *value, tm_err *err)
{
    json_t *reply = NULL;
    TM_TRY(ask_key(endpoints, "/v3/kv/put", key, value, &reply, err));
    json_decref(reply);
    return TM_OK;
}

tm_status tm_etcd_get(const char *endpoints, const char *key, char **value, tm_err *err)
{
    json_t *reply = NULL;
    TM_TRY(ask_key(endpoints, "/v3/kv/range", key, NULL, &reply, err));
    const json_t *kv = json_array_get(tm_json_get(reply, "kvs"), 0);
    char *text = kv ? tm_etcd_text(kv, "value", TM_ETCD_REPLY_MAX) : NULL;
    tm_status st = TM_OK;
    if (!kv)
        st = TM_FAIL(err, TM_STATUS_NOT_FOUND, "etcd: no key %s", key);
    else if (!text)
        st = TM_FAIL(err, TM_STATUS_DATA, "etcd: the value of %s is not text", key);
    else
        *value = text;
    json_decref(reply);
    return st;
}

tm_status tm_etcd_delete(const char *endpoints, const char *key, tm_err *err)
{
    json_t *reply = NULL;
    TM_TRY(ask_key(endpoints, "/v3/kv/deleterange", key, NULL, &reply, err));
    json_decref(reply);
    return TM_OK;
}

tm_status tm_etcd_health(const char *endpoints, tm_err *err)
{
    json_t *reply = NULL;
    TM_TRY(ask_once(endpoints, "/health", NULL, &reply, err));
    const json_t *health = tm_json_get(reply, "health");
    const char *text = json_string_value(health);
    bool healthy = json_is_true(health) || (text && strcmp(text, "true") == 0);
    json_decref(reply);
    return healthy ? TM_OK : TM_FAIL(err, TM_STATUS_UNAVAILABLE, "etcd: not healthy");
}
