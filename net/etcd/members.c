/* A sorted array: member lists are short, read whole and delivered whole. */
#include "net/etcd/members.h"

#include <stdlib.h>
#include <string.h>

#include "common/json.h"
#include "common/log.h"
#include "net/etcd/link.h"

enum { KEY_MAX = 1024 };

void tm_etcd_members_clear(tm_etcd_members *m)
{
    for (int i = 0; i < m->count; i++) {
        free((char *)m->kvs[i].key);
        free((char *)m->kvs[i].value);
    }
    free(m->kvs);
    *m = (tm_etcd_members){0};
}

/* The place of key, or where it belongs. */
static int find_place(const tm_etcd_members *m, const char *key, bool *found)
{
    int lo = 0, hi = m->count;
    *found = false;
    while (lo < hi) {
        int mid = lo + (hi - lo) / 2;
        int order = strcmp(m->kvs[mid].key, key);
        if (order == 0) {
            *found = true;
            return mid;
        }
        if (order < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static bool make_room(tm_etcd_members *m)
{
    if (m->count < m->cap)
        return true;
    if (m->count >= TM_ETCD_MEMBERS_MAX)
        return false;
    int cap = m->cap ? m->cap * 2 : 16;
    tm_etcd_kv *grown = realloc(m->kvs, (size_t)cap * sizeof(*grown));
    if (!grown)
        return false;
    m->kvs = grown;
    m->cap = cap;
    return true;
}

bool tm_etcd_members_put(tm_etcd_members *m, char *key, char *value, int64_t create_revision,
                         int64_t mod_revision)
{
    bool found;
    int at = find_place(m, key, &found);
    if (found) {
        free((char *)m->kvs[at].key);
        free((char *)m->kvs[at].value);
    } else if (make_room(m)) {
        memmove(&m->kvs[at + 1], &m->kvs[at], (size_t)(m->count - at) * sizeof(*m->kvs));
        m->count++;
    } else {
        free(key);
        free(value);
        return false;
    }
    m->kvs[at] = (tm_etcd_kv){key, value, create_revision, mod_revision};
    return true;
}

void tm_etcd_members_remove(tm_etcd_members *m, const char *key)
{
    bool found;
    int at = find_place(m, key, &found);
    if (!found)
        return;
    free((char *)m->kvs[at].key);
    free((char *)m->kvs[at].value);
    m->count--;
    memmove(&m->kvs[at], &m->kvs[at + 1], (size_t)(m->count - at) * sizeof(*m->kvs));
}

bool tm_etcd_members_put_json(tm_etcd_members *m, const json_t *kv)
{
    char *key = tm_etcd_text(kv, "key", KEY_MAX);
    char *value = tm_etcd_text(kv, "value", TM_ETCD_VALUE_MAX);
    if (!key || !value) {
        tm_log(TM_LOG_WARN, "etcd_key_ignored", "%s: its key or value is too long or not text",
               key ? key : "(unreadable key)");
        if (key)
            tm_etcd_members_remove(m, key);
        free(key);
        free(value);
        return true;
    }
    return tm_etcd_members_put(m, key, value, tm_etcd_int(kv, "create_revision"),
                               tm_etcd_int(kv, "mod_revision"));
}

bool tm_etcd_members_apply(tm_etcd_members *m, const json_t *event)
{
    const json_t *kv = tm_json_get(event, "kv");
    const char *type = json_string_value(tm_json_get(event, "type"));
    /* PUT is the zero value and left out. */
    if (!type || strcmp(type, "PUT") == 0)
        return tm_etcd_members_put_json(m, kv);
    char *key = tm_etcd_text(kv, "key", KEY_MAX);
    if (key)
        tm_etcd_members_remove(m, key);
    free(key);
    return true;
}
