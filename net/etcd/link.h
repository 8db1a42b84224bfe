/* Inside net/etcd: JSON calls over libcurl for one thread, with endpoint rotation and backoff.
 *
 * A link belongs to one thread; only tm_etcd_link_stop and tm_etcd_link_wake may come from others. Several
 * calls of one link can be under way at once (a watch and its probe). */
#ifndef TM_NET_ETCD_LINK_H
#define TM_NET_ETCD_LINK_H

#include <jansson.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/buf.h"
#include "common/status.h"

enum {
    TM_ETCD_CALL_MS = 2000,
    TM_ETCD_BACKOFF_MIN_MS = 100,
    TM_ETCD_BACKOFF_MAX_MS = 5000,
    TM_ETCD_REPLY_MAX = 4 << 20,
    TM_ETCD_VALUE_MAX = 64 << 10
};

typedef struct tm_etcd_link tm_etcd_link;
typedef struct tm_etcd_call tm_etcd_call;

tm_status tm_etcd_link_create(tm_etcd_link **out, const char *endpoints, tm_err *err);
void tm_etcd_link_destroy(tm_etcd_link *l);
int tm_etcd_link_endpoints(const tm_etcd_link *l);
/* Ends the wait of any call and every later one with CANCELLED, until allow_last. */
void tm_etcd_link_stop(tm_etcd_link *l);
bool tm_etcd_link_stopped(const tm_etcd_link *l);
/* Lets calls through again, for the farewell of a stopped thread. */
void tm_etcd_link_allow_last(tm_etcd_link *l);
void tm_etcd_link_wake(tm_etcd_link *l);
void tm_etcd_link_sleep(tm_etcd_link *l, int64_t ms); /* or until woken or stopped */
/* Sleeps 100 ms, 200 ms ... 5 s, each with jitter; an early wake-up does not shorten it. */
void tm_etcd_link_backoff(tm_etcd_link *l);
void tm_etcd_link_reset_backoff(tm_etcd_link *l);
/* Moves on to the next endpoint. */
void tm_etcd_link_rotate(tm_etcd_link *l);
int64_t tm_etcd_link_jitter(tm_etcd_link *l, int64_t ms); /* 90 to 110 per cent of ms */

/* A thread with all signals blocked: they are the main thread's. */
tm_status tm_etcd_thread_start(pthread_t *out, void *(*run)(void *arg), void *arg, tm_err *err);

/* One unary call. UNAVAILABLE (endpoint rotated): no connection, no answer in time, 5xx or no leader.
 * NOT_FOUND, STALE (compacted), DENIED, INVALID: etcd's own verdict. body NULL = GET. */
tm_status tm_etcd_link_ask(tm_etcd_link *l, const char *path, const tm_buf *body,
                           int64_t timeout_ms, json_t **reply, tm_err *err);

/* Calls in pieces. The body is copied. timeout_ms 0 = a stream without end. */
tm_status tm_etcd_call_create(tm_etcd_call **out, tm_etcd_link *l, tm_err *err);
void tm_etcd_call_destroy(tm_etcd_call *c);
tm_status tm_etcd_call_begin(tm_etcd_call *c, const char *path, const tm_buf *body,
                             int64_t timeout_ms, tm_err *err);
void tm_etcd_link_pump(tm_etcd_link *l, int64_t ms); /* until something moves, at most ms */
bool tm_etcd_call_active(const tm_etcd_call *c);
bool tm_etcd_call_done(const tm_etcd_call *c);
tm_buf *
tm_etcd_call_reply(tm_etcd_call *c); /* what has come so far; a stream's reader empties it */
tm_status tm_etcd_call_end(tm_etcd_call *c, json_t **reply, tm_err *err); /* of a done call */
void tm_etcd_call_drop(tm_etcd_call *c);

/* access.c */
typedef struct tm_etcd_secrets {
    char ca_file[512], cert_file[512], key_file[512]; /* "" = not used */
    char user[128], password[256];
} tm_etcd_secrets;
const tm_etcd_secrets *tm_etcd_secrets_borrow(void); /* until the next set_access */

/* message.c: the gateway's JSON */
void tm_etcd_put_b64(tm_buf *body, const char *key, const char *text); /* "key":"base64" */
/* Range over a prefix from `from` (inclusive, or the prefix itself) at a revision (0 = newest). */
void tm_etcd_range_prefix(tm_buf *body, const char *prefix, const char *from, int limit,
                          int64_t revision);
void tm_etcd_watch_prefix(tm_buf *body, const char *prefix, int64_t start_revision);
int64_t tm_etcd_int(const json_t *obj, const char *key); /* string or number, absent = 0 */
/* Base64 member as a NUL-terminated string; NULL when absent, malformed, over max or holding a NUL. */
char *tm_etcd_text(const json_t *obj, const char *key, size_t max);
/* The error of a refused call, from HTTP status (0 = told inside a stream) and body. */
tm_status tm_etcd_refusal(long http, const char *body, size_t len, tm_err *err);

#endif
