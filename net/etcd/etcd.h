/* etcd v3 over its JSON gateway (libcurl, HTTP/1.1). Facts: lease ids exceed 2^53 (kept as strings), a
 * keepalive of a dead lease answers 200 without a TTL, a watch on a compacted revision stays open after
 * `canceled`; all of this is handled here.
 *
 * Two independent helpers, each with one thread of its own: a registration keeps one key alive under a
 * lease and registers again under a new value when the lease was lost; a watcher keeps a list of the keys
 * under a prefix, re-lists on every reconnect and after compaction, and keeps the last known list while
 * etcd is away. endpoints: comma-separated URLs; on an error the next is tried, backoff 100 ms to 5 s with
 * jitter, 2 s per call. */
#ifndef TM_NET_ETCD_ETCD_H
#define TM_NET_ETCD_ETCD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

typedef struct tm_etcd_reg tm_etcd_reg;
typedef struct tm_etcd_watch tm_etcd_watch;

/* How a protected etcd is reached: PEM files for TLS (https:// endpoints), a user for its authentication. NULL
 * or "" = not used; cert_file and key_file go together. */
typedef struct tm_etcd_access {
    const char *ca_file, *cert_file, *key_file;
    const char *user, *password;
} tm_etcd_access;

/* For the whole process, copied; before the first other call of this header. NULL = none. */
tm_status tm_etcd_set_access(const tm_etcd_access *access, tm_err *err);

typedef struct tm_etcd_reg_opts {
    const char *endpoints;
    const char *key;
    int64_t ttl_ms; /* 10 s; renewed every third of it */
    /* Gives the value for a (re-)registration into buf (NUL-terminated, < size); called on the helper's
     * thread. attempt counts registrations from 0, for a new epoch. */
    void (*value)(void *user, uint64_t attempt, char *buf, size_t size);
    /* Told when the registration came into force or was lost. May be NULL. */
    void (*on_state)(void *user, bool registered, const char *why);
    void *user;
} tm_etcd_reg_opts;

/* Starts the thread and returns at once; registration goes on in the background for ever. */
tm_status tm_etcd_reg_create(tm_etcd_reg **out, const tm_etcd_reg_opts *opts, tm_err *err);
/* Puts a new value under the same lease (state DRAINING). */
void tm_etcd_reg_update(tm_etcd_reg *r);
bool tm_etcd_reg_active(const tm_etcd_reg *r);
/* Revokes the lease (the key goes at once), bounded by timeout_ms, and frees. */
void tm_etcd_reg_destroy(tm_etcd_reg *r, int64_t timeout_ms);

typedef struct tm_etcd_kv {
    const char *key;
    const char *value;
    int64_t create_revision, mod_revision;
} tm_etcd_kv;

typedef struct tm_etcd_watch_opts {
    const char *endpoints;
    const char *prefix;
    /* The complete present list, after every change and every re-list; on the helper's thread. */
    void (*on_list)(void *user, const tm_etcd_kv *kvs, int count, int64_t revision);
    /* etcd reachable or not; the last list stays in force. */
    void (*on_state)(void *user, bool connected, const char *why);
    void *user;
    int64_t reconcile_ms; /* full re-list at least this often, 60 s */
} tm_etcd_watch_opts;

tm_status tm_etcd_watch_create(tm_etcd_watch **out, const tm_etcd_watch_opts *opts, tm_err *err);
void tm_etcd_watch_destroy(tm_etcd_watch *w);
uint64_t tm_etcd_watch_relists(const tm_etcd_watch *w);

/* One-shot calls, blocking up to 2 s per endpoint: for tests and the CLI. */
tm_status tm_etcd_put(const char *endpoints, const char *key, const char *value, tm_err *err);
tm_status tm_etcd_get(const char *endpoints, const char *key, char **value, tm_err *err);
tm_status tm_etcd_delete(const char *endpoints, const char *key, tm_err *err);
tm_status tm_etcd_health(const char *endpoints, tm_err *err);

#endif
