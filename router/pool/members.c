/* Members: parsing of what a registration writes, {"epoch":7,"address":"10.0.0.3:7000","state":"READY"},
 * and of static lists. etcd is input like any other: a value that cannot be used is counted and left out,
 * it never stops the rest of the list. */
#include "router/pool/members.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"

#define VALUE_BYTES_MAX ((size_t)64 * 1024)

/* "host:port" with a port of 1..65535; "[::1]:7000" passes too, as the last colon counts. */
static bool address_valid(const char *a, size_t len)
{
    const char *colon = memrchr(a, ':', len);
    if (colon == NULL || colon == a || len >= sizeof(((tm_member *)0)->address))
        return false;
    int port = 0;
    const char *end = a + len;
    if (end - colon < 2 || end - colon > 6)
        return false;
    for (const char *p = colon + 1; p < end; p++) {
        if (*p < '0' || *p > '9')
            return false;
        port = port * 10 + (*p - '0');
    }
    for (const char *p = a; p < colon; p++)
        if ((unsigned char)*p <= ' ' || (unsigned char)*p > '~')
            return false;
    return port >= 1 && port <= 65535;
}

static int compare_members(const void *a, const void *b)
{
    return strcmp(((const tm_member *)a)->name, ((const tm_member *)b)->name);
}

/* Sorts; of equal names the one with the highest epoch stays. */
static void list_finish(tm_member_list *l)
{
    if (l->count == 0)
        return;
    qsort(l->items, (size_t)l->count, sizeof(*l->items), compare_members);
    int n = 1;
    for (int i = 1; i < l->count; i++) {
        tm_member *last = &l->items[n - 1], *m = &l->items[i];
        if (strcmp(last->name, m->name) != 0)
            l->items[n++] = *m;
        else if (m->epoch > last->epoch)
            *last = *m;
    }
    l->count = n;
}

tm_status tm_members_from_static(const char *list, tm_member_list *out, tm_err *err)
{
    tm_member_list l = {0};
    l.items = calloc(TM_MEMBERS_MAX, sizeof(*l.items));
    if (l.items == NULL)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for the member list");
    for (const char *p = list; *p != '\0';) {
        size_t len = strcspn(p, ",");
        const char *a = p;
        size_t n = len;
        while (n > 0 && *a == ' ')
            a++, n--;
        while (n > 0 && a[n - 1] == ' ')
            n--;
        p += len + (p[len] == ',');
        if (n == 0)
            continue;
        if (!address_valid(a, n) || l.count == TM_MEMBERS_MAX) {
            free(l.items);
            return TM_FAIL(err, TM_STATUS_CONFIG, "workers: \"%.*s\" is not host:port",
                           (int)TM_MIN(n, (size_t)100), a);
        }
        tm_member *m = &l.items[l.count++];
        memcpy(m->address, a, n);
        memcpy(m->name, a, TM_MIN(n, sizeof(m->name) - 1));
    }
    list_finish(&l);
    *out = l;
    return TM_OK;
}

static bool member_parse(const tm_etcd_kv *kv, tm_member *out)
{
    tm_member m = {0};
    const char *slash = strrchr(kv->key, '/');
    const char *name = slash != NULL ? slash + 1 : kv->key;
    size_t name_len = strlen(name), value_len = strlen(kv->value);
    if (name_len == 0 || name_len >= sizeof(m.name) || value_len > VALUE_BYTES_MAX)
        return false;
    memcpy(m.name, name, name_len);
    json_t *v = NULL;
    if (tm_json_parse(kv->value, value_len, &v, NULL) != TM_OK)
        return false;
    const char *address = NULL, *state = NULL;
    int64_t epoch = 0;
    bool ok = json_is_object(v) && tm_json_str(v, "address", &address, NULL) == TM_OK &&
              tm_json_str(v, "state", &state, NULL) == TM_OK &&
              tm_json_int(v, "epoch", 0, INT64_MAX, &epoch, NULL) == TM_OK && address != NULL &&
              address_valid(address, strlen(address));
    if (ok) {
        memcpy(m.address, address, strlen(address));
        m.epoch = (uint64_t)epoch;
        m.draining = state != NULL && strcmp(state, "DRAINING") == 0;
        *out = m;
    }
    json_decref(v);
    return ok;
}

tm_status tm_members_from_etcd(const tm_etcd_kv *kvs, int count, tm_member_list *out)
{
    tm_member_list l = {0};
    int n = TM_MIN(count, TM_MEMBERS_MAX);
    l.ignored = count - n;
    l.items = calloc((size_t)TM_MAX(n, 1), sizeof(*l.items));
    if (l.items == NULL)
        return TM_STATUS_NO_MEMORY;
    for (int i = 0; i < n; i++) {
        if (member_parse(&kvs[i], &l.items[l.count]))
            l.count++;
        else
            l.ignored++;
    }
    list_finish(&l);
    *out = l;
    return TM_OK;
}

void tm_member_list_deinit(tm_member_list *l)
{
    free(l->items);
    *l = (tm_member_list){0};
}

const tm_member *tm_member_find(const tm_member_list *l, const char *name)
{
    int lo = 0, hi = l->count;
    while (lo < hi) {
        int mid = lo + (hi - lo) / 2;
        int c = strcmp(l->items[mid].name, name);
        if (c == 0)
            return &l->items[mid];
        if (c < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return NULL;
}
