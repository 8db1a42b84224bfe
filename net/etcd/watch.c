/* List, then follow; list again on every reconnect, after compaction and every reconcile_ms.
 *
 * A watch alone is not believed for ever: a member without a quorum or behind a dead link keeps it open and
 * silent. A small range every few seconds on the same endpoint shows that the endpoint still answers; when it
 * does not, the watch is given up and the next endpoint is asked. The list that was delivered last stays in
 * force until etcd itself gives another one. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/json.h"
#include "common/log.h"
#include "net/etcd/etcd.h"
#include "net/etcd/link.h"
#include "net/etcd/members.h"

enum {
    PAGE_KEYS = 256,
    PROBE_MS = 5000,
    STEADY_MS = 1000, /* a watch that lived this long resets the backoff */
    RECONCILE_MS = 60000
};

struct tm_etcd_watch {
    tm_etcd_watch_opts opts;
    char *prefix;
    tm_etcd_link *link;
    tm_etcd_call *stream, *probe;
    pthread_t thread;
    tm_etcd_members members;
    int64_t revision; /* the list is complete up to here */
    bool told, connected, listed;
    _Atomic uint64_t relists; /* written by the thread, read by anyone */
};

static void report(tm_etcd_watch *w, bool connected, const char *why)
{
    if (w->told && w->connected == connected)
        return;
    w->told = true;
    w->connected = connected;
    tm_log(connected ? TM_LOG_INFO : TM_LOG_WARN, connected ? "etcd_connected" : "etcd_lost",
           "watching %s%s%s", w->prefix, *why ? ": " : "", why);
    if (w->opts.on_state)
        w->opts.on_state(w->opts.user, connected, why);
}

static void deliver(tm_etcd_watch *w)
{
    w->opts.on_list(w->opts.user, w->members.kvs, w->members.count, w->revision);
}

/* ---- listing ------------------------------------------------------------------------------------------ */

/* One page into m; *from becomes the next page's first key or NULL. */
static tm_status list_page(tm_etcd_watch *w, tm_etcd_members *m, char **from, int64_t *revision,
                           tm_err *err)
{
    json_t *reply = NULL;
    tm_buf body;
    tm_buf_init(&body, 0);
    tm_etcd_range_prefix(&body, w->prefix, *from, PAGE_KEYS, *revision);
    tm_status st = tm_etcd_link_ask(w->link, "/v3/kv/range", &body, TM_ETCD_CALL_MS, &reply, err);
    tm_buf_deinit(&body);
    TM_TRY(st);
    if (*revision == 0)
        *revision = tm_etcd_int(tm_json_get(reply, "header"), "revision");
    const json_t *kvs = tm_json_get(reply, "kvs");
    size_t n = json_array_size(kvs);
    for (size_t i = 0; i < n && st == TM_OK; i++)
        if (!tm_etcd_members_put_json(m, json_array_get(kvs, i)))
            st = TM_FAIL(err, TM_STATUS_TOO_LARGE, "etcd: more than %d keys under %s",
                         TM_ETCD_MEMBERS_MAX, w->prefix);
    free(*from);
    *from = NULL;
    if (st == TM_OK && n && json_is_true(tm_json_get(reply, "more"))) {
        /* The page starts with its last key again, which is put twice to no effect. */
        *from = tm_etcd_text(json_array_get(kvs, n - 1), "key", TM_ETCD_VALUE_MAX);
        if (!*from || n < 2)
            st = TM_FAIL(err, TM_STATUS_DATA, "etcd: unusable key under %s", w->prefix);
    }
    json_decref(reply);
    return st;
}

static tm_status list(tm_etcd_watch *w, tm_err *err)
{
    tm_etcd_members m = {0};
    char *from = NULL;
    int64_t revision = 0;
    tm_status st;
    do
        st = list_page(w, &m, &from, &revision, err);
    while (st == TM_OK && from);
    free(from);
    if (st == TM_OK && revision < 1)
        st = TM_FAIL(err, TM_STATUS_DATA, "etcd: a list came without a revision");
    if (st != TM_OK) {
        tm_etcd_members_clear(&m);
        return st;
    }
    tm_etcd_members_clear(&w->members);
    w->members = m;
    w->revision = revision;
    if (w->listed)
        atomic_fetch_add(&w->relists, 1);
    w->listed = true;
    return TM_OK;
}

/* ---- following ---------------------------------------------------------------------------------------- */

static tm_status take_message(tm_etcd_watch *w, const json_t *msg, tm_err *err)
{
    const json_t *result = tm_json_get(msg, "result");
    if (!result) {
        char *text = json_dumps(msg, JSON_ENCODE_ANY);
        tm_status st = tm_etcd_refusal(0, text ? text : "", text ? strlen(text) : 0, err);
        free(text);
        return st;
    }
    if (json_is_true(tm_json_get(result, "canceled"))) {
        const char *why = json_string_value(tm_json_get(result, "cancel_reason"));
        int64_t compacted = tm_etcd_int(result, "compact_revision");
        return TM_FAIL(err, compacted ? TM_STATUS_STALE : TM_STATUS_UNAVAILABLE,
                       "etcd: watch cancelled: %.200s",
                       why         ? why
                       : compacted ? "compacted"
                                   : "");
    }
    const json_t *events = tm_json_get(result, "events");
    size_t n = json_array_size(events);
    for (size_t i = 0; i < n; i++)
        if (!tm_etcd_members_apply(&w->members, json_array_get(events, i)))
            return TM_FAIL(err, TM_STATUS_TOO_LARGE, "etcd: more than %d keys under %s",
                           TM_ETCD_MEMBERS_MAX, w->prefix);
    if (n) {
        w->revision = tm_etcd_int(tm_json_get(result, "header"), "revision");
        deliver(w);
    }
    return TM_OK;
}

/* Takes the complete lines that have come. */
static tm_status take_lines(tm_etcd_watch *w, tm_err *err)
{
    tm_buf *in = tm_etcd_call_reply(w->stream);
    size_t at = 0;
    tm_status st = TM_OK;
    while (st == TM_OK && at < in->len) {
        const char *line = in->data + at;
        const char *nl = memchr(line, '\n', in->len - at);
        json_t *msg = NULL;
        if (!nl)
            break;
        at += (size_t)(nl - line) + 1;
        if (nl == line)
            continue;
        st = tm_json_parse(line, (size_t)(nl - line), &msg, err);
        if (st == TM_OK)
            st = take_message(w, msg, err);
        json_decref(msg);
    }
    if (at) {
        memmove(in->data, in->data + at, in->len - at);
        in->len -= at;
    }
    return st;
}

static tm_status begin_probe(tm_etcd_watch *w, tm_err *err)
{
    tm_buf body;
    tm_buf_init(&body, 0);
    tm_etcd_range_prefix(&body, w->prefix, NULL, 1, 0);
    tm_status st = tm_etcd_call_begin(w->probe, "/v3/kv/range", &body, TM_ETCD_CALL_MS, err);
    tm_buf_deinit(&body);
    return st;
}

/* TM_OK: time to reconcile. STALE: compacted. Anything else: the watch broke. */
static tm_status follow(tm_etcd_watch *w, tm_err *err)
{
    int64_t start = tm_clock_ms(), next_probe = start + PROBE_MS;
    int64_t end = start + tm_etcd_link_jitter(w->link, w->opts.reconcile_ms);
    bool steady = false;
    tm_buf body;
    tm_buf_init(&body, 0);
    tm_etcd_watch_prefix(&body, w->prefix, w->revision + 1);
    tm_status st = tm_etcd_call_begin(w->stream, "/v3/watch", &body, 0, err);
    tm_buf_deinit(&body);
    while (st == TM_OK && !tm_etcd_link_stopped(w->link)) {
        int64_t now = tm_clock_ms();
        if (now >= end)
            break;
        if (!steady && now - start >= STEADY_MS) {
            steady = true;
            tm_etcd_link_reset_backoff(w->link);
        }
        if (now >= next_probe && !tm_etcd_call_active(w->probe))
            TM_TRY_GOTO(begin_probe(w, err), out);
        int64_t wait = TM_MIN(end, tm_etcd_call_active(w->probe) ? end : next_probe) - now;
        tm_etcd_link_pump(w->link, steady ? wait : TM_MIN(wait, STEADY_MS));
        st = take_lines(w, err);
        if (st == TM_OK && tm_etcd_call_done(w->probe)) {
            json_t *reply = NULL;
            st = tm_etcd_call_end(w->probe, &reply, err);
            json_decref(reply);
            next_probe = tm_clock_ms() + PROBE_MS;
        }
        if (st == TM_OK && tm_etcd_call_done(w->stream)) {
            json_t *rest = NULL;
            st = tm_etcd_call_end(w->stream, &rest, err);
            json_decref(rest);
            if (st == TM_OK)
                st = TM_FAIL(err, TM_STATUS_UNAVAILABLE, "etcd: the watch ended");
        }
    }
out:
    tm_etcd_call_drop(w->stream);
    tm_etcd_call_drop(w->probe);
    return st;
}

/* ---- the thread --------------------------------------------------------------------------------------- */

static void *run_watch(void *arg)
{
    tm_etcd_watch *w = arg;
    pthread_setname_np(pthread_self(), "tm-etcd-watch");
    while (!tm_etcd_link_stopped(w->link)) {
        tm_err err = TM_ERR_INIT;
        tm_status st = list(w, &err);
        if (st != TM_OK && tm_etcd_link_stopped(w->link))
            break;
        if (st != TM_OK) {
            /* STALE: compacted between two pages; etcd is well. */
            if (st != TM_STATUS_STALE)
                report(w, false, err.msg);
            tm_etcd_link_backoff(w->link);
            continue;
        }
        report(w, true, "");
        deliver(w);
        st = follow(w, &err);
        if (st != TM_OK && !tm_etcd_link_stopped(w->link)) {
            tm_log(TM_LOG_INFO, "etcd_relist", "%s: %s", w->prefix, err.msg);
            tm_etcd_link_backoff(w->link);
        }
    }
    return NULL;
}

static void free_watch(tm_etcd_watch *w)
{
    tm_etcd_call_destroy(w->stream);
    tm_etcd_call_destroy(w->probe);
    tm_etcd_link_destroy(w->link);
    tm_etcd_members_clear(&w->members);
    free(w->prefix);
    free(w);
}

tm_status tm_etcd_watch_create(tm_etcd_watch **out, const tm_etcd_watch_opts *opts, tm_err *err)
{
    tm_status st;
    if (!opts->prefix || !*opts->prefix || !opts->on_list)
        return TM_FAIL(err, TM_STATUS_INVALID, "etcd: a watch needs a prefix and a receiver");
    tm_etcd_watch *w = calloc(1, sizeof(*w));
    if (!w)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "etcd: out of memory");
    w->opts = *opts;
    w->opts.endpoints = NULL;
    if (w->opts.reconcile_ms <= 0)
        w->opts.reconcile_ms = RECONCILE_MS;
    w->prefix = strdup(opts->prefix);
    w->opts.prefix = w->prefix;
    if (!w->prefix) {
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "etcd: out of memory");
        goto err_free;
    }
    TM_TRY_GOTO(tm_etcd_link_create(&w->link, opts->endpoints, err), err_free);
    TM_TRY_GOTO(tm_etcd_call_create(&w->stream, w->link, err), err_free);
    TM_TRY_GOTO(tm_etcd_call_create(&w->probe, w->link, err), err_free);
    TM_TRY_GOTO(tm_etcd_thread_start(&w->thread, run_watch, w, err), err_free);
    *out = w;
    return TM_OK;

err_free:
    free_watch(w);
    return st;
}

void tm_etcd_watch_destroy(tm_etcd_watch *w)
{
    if (!w)
        return;
    tm_etcd_link_stop(w->link);
    pthread_join(w->thread, NULL);
    free_watch(w);
}

uint64_t tm_etcd_watch_relists(const tm_etcd_watch *w)
{
    return atomic_load(&w->relists);
}
