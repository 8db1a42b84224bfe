/* The watcher's list: keys with their values, sorted by key. Plain data, one thread. */
#ifndef TM_NET_ETCD_MEMBERS_H
#define TM_NET_ETCD_MEMBERS_H

#include <jansson.h>
#include <stdbool.h>

#include "net/etcd/etcd.h"

enum { TM_ETCD_MEMBERS_MAX = 16384 };

typedef struct tm_etcd_members {
    tm_etcd_kv *kvs; /* strings owned */
    int count, cap;
} tm_etcd_members;

void tm_etcd_members_clear(tm_etcd_members *m);
/* Takes over key and value (both malloc'ed). False and freed when full or out of memory. */
bool tm_etcd_members_put(tm_etcd_members *m, char *key, char *value, int64_t create_revision,
                         int64_t mod_revision);
void tm_etcd_members_remove(tm_etcd_members *m, const char *key);
/* Applies one "kv" object of the gateway; a key or value that is not acceptable is skipped with a log line. */
bool tm_etcd_members_put_json(tm_etcd_members *m, const json_t *kv);
/* Applies one event of a watch. */
bool tm_etcd_members_apply(tm_etcd_members *m, const json_t *event);

#endif
