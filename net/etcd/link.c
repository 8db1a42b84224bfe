/* libcurl's multi interface drives every call, also single ones: a wait can then be ended from another thread
 * (curl_multi_wakeup), so that stopping never waits for a time-out, and a watch and its probe share a thread.
 *
 * HTTP/1.1 is forced (with prior knowledge the port would be taken for native gRPC), proxies of the
 * environment are ignored, redirects are not followed, and "hasleader" makes a member without a quorum answer at
 * once instead of holding the call. */
#include "net/etcd/link.h"

#include <curl/curl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/hash.h"
#include "common/json.h"

enum { ENDPOINTS_MAX = 16, ENDPOINT_LEN_MAX = 256, TOKEN_LEN_MAX = 512 };

struct tm_etcd_link {
    char endpoints[ENDPOINTS_MAX][ENDPOINT_LEN_MAX];
    int count, current;
    CURLM *multi;
    struct curl_slist *headers;
    char token[TOKEN_LEN_MAX]; /* of the user, "" = none or no longer good */
    tm_etcd_call *unary;
    atomic_bool stop; /* set by stop, read by the owner's waits */
    bool last_allowed;
    int64_t backoff_ms;
};

struct tm_etcd_call {
    tm_etcd_link *link;
    CURL *easy;
    tm_buf body, reply;
    int endpoint;
    bool active, done, too_large;
    CURLcode rc;
    char why[CURL_ERROR_SIZE];
};

/* ---- the link ----------------------------------------------------------------------------------------- */

static void init_curl(void)
{
    curl_global_init(CURL_GLOBAL_ALL);
}

static tm_status add_endpoint(tm_etcd_link *l, const char *text, size_t len, tm_err *err)
{
    while (len && (text[len - 1] == '/' || text[len - 1] == ' '))
        len--;
    while (len && *text == ' ')
        text++, len--;
    if (len == 0)
        return TM_OK;
    if (l->count == ENDPOINTS_MAX)
        return TM_FAIL(err, TM_STATUS_CONFIG, "etcd: more than %d endpoints", ENDPOINTS_MAX);
    bool has_scheme = len > 7 && (!strncmp(text, "http://", 7) || !strncmp(text, "https://", 8));
    if (!has_scheme && memmem(text, len, "://", 3))
        return TM_FAIL(err, TM_STATUS_CONFIG, "etcd: endpoint %.*s: expected http:// or https://",
                       (int)len, text);
    int n = snprintf(l->endpoints[l->count], ENDPOINT_LEN_MAX, "%s%.*s",
                     has_scheme ? "" : "http://", (int)len, text);
    if (n >= ENDPOINT_LEN_MAX)
        return TM_FAIL(err, TM_STATUS_CONFIG, "etcd: an endpoint is longer than %d bytes",
                       ENDPOINT_LEN_MAX - 1);
    l->count++;
    return TM_OK;
}

static tm_status read_endpoints(tm_etcd_link *l, const char *text, tm_err *err)
{
    for (const char *p = text ? text : ""; *p;) {
        size_t n = strcspn(p, ",");
        TM_TRY(add_endpoint(l, p, n, err));
        p += n + (p[n] == ',');
    }
    if (l->count == 0)
        return TM_FAIL(err, TM_STATUS_CONFIG, "etcd: no endpoint given");
    return TM_OK;
}

static uint32_t random_u32(void)
{
    uint32_t v;
    tm_random_bytes(&v, sizeof(v));
    return v;
}

/* NULL when out of memory. */
static struct curl_slist *build_headers(const char *token)
{
    char authorization[TOKEN_LEN_MAX + 32];
    /* The gateway wants the bare token, without "Bearer". */
    snprintf(authorization, sizeof(authorization), "Authorization: %s", token);
    const char *const lines[] = {"Content-Type: application/json", "Grpc-Metadata-hasleader: true",
                                 "Expect:", *token ? authorization : NULL};
    struct curl_slist *list = NULL;
    for (size_t i = 0; i < TM_ARRAY_LEN(lines) && lines[i]; i++) {
        struct curl_slist *longer = curl_slist_append(list, lines[i]);
        if (!longer) {
            curl_slist_free_all(list);
            return NULL;
        }
        list = longer;
    }
    return list;
}

tm_status tm_etcd_link_create(tm_etcd_link **out, const char *endpoints, tm_err *err)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, init_curl);
    tm_status st;
    tm_etcd_link *l = calloc(1, sizeof(*l));
    if (!l)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "etcd: out of memory");
    TM_TRY_GOTO(read_endpoints(l, endpoints, err), err_destroy);
    /* Many processes with one list must not all start at its head. */
    l->current = (int)(random_u32() % (uint32_t)l->count);
    l->multi = curl_multi_init();
    l->headers = build_headers(l->token);
    if (!l->multi || !l->headers) {
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "etcd: out of memory");
        goto err_destroy;
    }
    TM_TRY_GOTO(tm_etcd_call_create(&l->unary, l, err), err_destroy);
    *out = l;
    return TM_OK;

err_destroy:
    tm_etcd_link_destroy(l);
    return st;
}

void tm_etcd_link_destroy(tm_etcd_link *l)
{
    if (!l)
        return;
    tm_etcd_call_destroy(l->unary);
    if (l->multi)
        curl_multi_cleanup(l->multi);
    curl_slist_free_all(l->headers);
    free(l);
}

int tm_etcd_link_endpoints(const tm_etcd_link *l)
{
    return l->count;
}

void tm_etcd_link_stop(tm_etcd_link *l)
{
    atomic_store(&l->stop, true);
    curl_multi_wakeup(l->multi);
}

bool tm_etcd_link_stopped(const tm_etcd_link *l)
{
    return atomic_load(&l->stop) && !l->last_allowed;
}

void tm_etcd_link_allow_last(tm_etcd_link *l)
{
    l->last_allowed = true;
}

void tm_etcd_link_wake(tm_etcd_link *l)
{
    curl_multi_wakeup(l->multi);
}

void tm_etcd_link_sleep(tm_etcd_link *l, int64_t ms)
{
    if (ms > 0 && !tm_etcd_link_stopped(l))
        curl_multi_poll(l->multi, NULL, 0, (int)TM_MIN(ms, 60000), NULL);
}

int64_t tm_etcd_link_jitter(tm_etcd_link *l, int64_t ms)
{
    (void)l;
    return ms * (int64_t)(900 + random_u32() % 201) / 1000;
}

void tm_etcd_link_backoff(tm_etcd_link *l)
{
    l->backoff_ms =
        l->backoff_ms ? TM_MIN(l->backoff_ms * 2, TM_ETCD_BACKOFF_MAX_MS) : TM_ETCD_BACKOFF_MIN_MS;
    int64_t end =
        tm_clock_ms() + l->backoff_ms / 2 + random_u32() % (uint32_t)(l->backoff_ms / 2 + 1);
    int64_t now;
    while ((now = tm_clock_ms()) < end && !tm_etcd_link_stopped(l))
        tm_etcd_link_sleep(l, end - now);
}

void tm_etcd_link_reset_backoff(tm_etcd_link *l)
{
    l->backoff_ms = 0;
}

void tm_etcd_link_rotate(tm_etcd_link *l)
{
    l->current = (l->current + 1) % l->count;
}

tm_status tm_etcd_thread_start(pthread_t *out, void *(*run)(void *arg), void *arg, tm_err *err)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    int rc = pthread_create(out, NULL, run, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return rc == 0 ? TM_OK : TM_FAIL(err, TM_STATUS_IO, "etcd: no thread: %s", strerror(rc));
}

/* ---- calls -------------------------------------------------------------------------------------------- */

static size_t take_bytes(char *data, size_t size, size_t n, void *user)
{
    tm_etcd_call *c = user;
    if (!tm_buf_append(&c->reply, data, size * n)) {
        c->too_large = true;
        return 0;
    }
    return size * n;
}

/* A peer that vanished without a word is given up after 10 s, also on a silent stream. */
static int set_up_socket(void *user, curl_socket_t fd, curlsocktype purpose)
{
    int idle_s = 5, interval_s = 2, probes = 2, timeout_ms = 10000;
    (void)user, (void)purpose;
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof(idle_s));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof(interval_s));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout_ms, sizeof(timeout_ms));
    return CURL_SOCKOPT_OK;
}

static void set_up_tls(CURL *easy)
{
    const tm_etcd_secrets *secrets = tm_etcd_secrets_borrow();
    curl_easy_setopt(easy, CURLOPT_SSLVERSION, (long)CURL_SSLVERSION_TLSv1_2);
    if (secrets->ca_file[0])
        curl_easy_setopt(easy, CURLOPT_CAINFO, secrets->ca_file);
    if (secrets->cert_file[0]) {
        curl_easy_setopt(easy, CURLOPT_SSLCERT, secrets->cert_file);
        curl_easy_setopt(easy, CURLOPT_SSLKEY, secrets->key_file);
    }
}

tm_status tm_etcd_call_create(tm_etcd_call **out, tm_etcd_link *l, tm_err *err)
{
    tm_etcd_call *c = calloc(1, sizeof(*c));
    CURL *easy = c ? curl_easy_init() : NULL;
    if (!easy) {
        free(c);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "etcd: out of memory");
    }
    c->link = l;
    c->easy = easy;
    tm_buf_init(&c->body, 0);
    tm_buf_init(&c->reply, TM_ETCD_REPLY_MAX);
    curl_easy_setopt(easy, CURLOPT_PRIVATE, c);
    curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(easy, CURLOPT_NOPROXY, "*");
    curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(easy, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
    curl_easy_setopt(easy, CURLOPT_ERRORBUFFER, c->why);
    curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, take_bytes);
    curl_easy_setopt(easy, CURLOPT_WRITEDATA, c);
    curl_easy_setopt(easy, CURLOPT_CONNECTTIMEOUT_MS, (long)TM_ETCD_CALL_MS);
    curl_easy_setopt(easy, CURLOPT_TCP_KEEPALIVE, 1L);
    curl_easy_setopt(easy, CURLOPT_SOCKOPTFUNCTION, set_up_socket);
    set_up_tls(easy);
    *out = c;
    return TM_OK;
}

void tm_etcd_call_drop(tm_etcd_call *c)
{
    if (c->active)
        curl_multi_remove_handle(c->link->multi, c->easy);
    c->active = c->done = false;
}

void tm_etcd_call_destroy(tm_etcd_call *c)
{
    if (!c)
        return;
    tm_etcd_call_drop(c);
    curl_easy_cleanup(c->easy);
    tm_buf_deinit(&c->body);
    tm_buf_deinit(&c->reply);
    free(c);
}

tm_status tm_etcd_call_begin(tm_etcd_call *c, const char *path, const tm_buf *body,
                             int64_t timeout_ms, tm_err *err)
{
    char url[ENDPOINT_LEN_MAX + 64];
    tm_etcd_link *l = c->link;
    tm_etcd_call_drop(c);
    snprintf(url, sizeof(url), "%s%s", l->endpoints[l->current], path);
    c->endpoint = l->current;
    c->too_large = false;
    c->why[0] = '\0';
    tm_buf_clear(&c->reply);
    tm_buf_clear(&c->body);
    curl_easy_setopt(c->easy, CURLOPT_URL, url);
    curl_easy_setopt(c->easy, CURLOPT_HTTPHEADER, l->headers);
    curl_easy_setopt(c->easy, CURLOPT_TIMEOUT_MS, (long)timeout_ms);
    if (body) {
        if (body->failed || !tm_buf_append(&c->body, body->data, body->len))
            return TM_FAIL(err, TM_STATUS_NO_MEMORY, "etcd: out of memory");
        curl_easy_setopt(c->easy, CURLOPT_POST, 1L);
        curl_easy_setopt(c->easy, CURLOPT_POSTFIELDS, c->body.data);
        curl_easy_setopt(c->easy, CURLOPT_POSTFIELDSIZE, (long)c->body.len);
    } else {
        curl_easy_setopt(c->easy, CURLOPT_HTTPGET, 1L);
    }
    if (curl_multi_add_handle(l->multi, c->easy) != CURLM_OK)
        return TM_FAIL(err, TM_STATUS_INTERNAL, "etcd: curl refused a call");
    c->active = true;
    return TM_OK;
}

/* True when a call has ended. */
static bool collect_done(tm_etcd_link *l)
{
    CURLMsg *msg;
    int left;
    bool any = false;
    while ((msg = curl_multi_info_read(l->multi, &left))) {
        tm_etcd_call *c = NULL;
        if (msg->msg != CURLMSG_DONE)
            continue;
        CURL *easy = msg->easy_handle;
        CURLcode rc = msg->data.result; /* msg is gone after remove_handle */
        curl_easy_getinfo(easy, CURLINFO_PRIVATE, (char **)&c);
        curl_multi_remove_handle(l->multi, easy);
        c->active = false;
        c->done = true;
        c->rc = rc;
        any = true;
    }
    return any;
}

void tm_etcd_link_pump(tm_etcd_link *l, int64_t ms)
{
    int running;
    curl_multi_perform(l->multi, &running);
    if (collect_done(l))
        return;
    tm_etcd_link_sleep(l, ms);
    curl_multi_perform(l->multi, &running);
    collect_done(l);
}

bool tm_etcd_call_active(const tm_etcd_call *c)
{
    return c->active;
}

bool tm_etcd_call_done(const tm_etcd_call *c)
{
    return c->done;
}

tm_buf *tm_etcd_call_reply(tm_etcd_call *c)
{
    return &c->reply;
}

/* The endpoint is left only if nobody else has moved on since this call began. */
static void leave_endpoint(tm_etcd_call *c)
{
    if (c->endpoint == c->link->current)
        tm_etcd_link_rotate(c->link);
}

tm_status tm_etcd_call_end(tm_etcd_call *c, json_t **reply, tm_err *err)
{
    const char *endpoint = c->link->endpoints[c->endpoint];
    long http = 0;
    c->done = false;
    curl_easy_getinfo(c->easy, CURLINFO_RESPONSE_CODE, &http);
    if (c->too_large)
        return TM_FAIL(err, TM_STATUS_TOO_LARGE, "etcd: %s: reply over %d bytes", endpoint,
                       TM_ETCD_REPLY_MAX);
    if (c->rc != CURLE_OK) {
        leave_endpoint(c);
        return TM_FAIL(err, TM_STATUS_UNAVAILABLE, "etcd: %s: %.200s", endpoint,
                       c->why[0] ? c->why : curl_easy_strerror(c->rc));
    }
    if (http != 200) {
        tm_status st = tm_etcd_refusal(http, c->reply.data ? c->reply.data : "", c->reply.len, err);
        if (st == TM_STATUS_UNAVAILABLE)
            leave_endpoint(c);
        if (st == TM_STATUS_DENIED)
            c->link->token[0] = '\0'; /* expired, or etcd was restarted: the next ask logs in */
        return st;
    }
    return tm_json_parse(c->reply.data ? c->reply.data : "", c->reply.len, reply, err);
}

static tm_status ask(tm_etcd_link *l, const char *path, const tm_buf *body, int64_t timeout_ms,
                     json_t **reply, tm_err *err)
{
    tm_etcd_call *c = l->unary;
    TM_TRY(tm_etcd_call_begin(c, path, body, timeout_ms, err));
    while (tm_etcd_call_active(c) && !tm_etcd_link_stopped(l))
        tm_etcd_link_pump(l, timeout_ms);
    if (!tm_etcd_call_done(c)) {
        tm_etcd_call_drop(c);
        return TM_FAIL(err, TM_STATUS_CANCELLED, "etcd: stopped");
    }
    return tm_etcd_call_end(c, reply, err);
}

/* No other call of the link is under way: they borrow the header list. */
static tm_status use_token(tm_etcd_link *l, const char *token, tm_err *err)
{
    struct curl_slist *headers = build_headers(token);
    if (!headers)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "etcd: out of memory");
    snprintf(l->token, sizeof(l->token), "%s", token);
    curl_slist_free_all(l->headers);
    l->headers = headers;
    return TM_OK;
}

/* Fetches a token. The old one must not go along: etcd may refuse the question because of it. */
static tm_status log_in(tm_etcd_link *l, int64_t timeout_ms, tm_err *err)
{
    const tm_etcd_secrets *secrets = tm_etcd_secrets_borrow();
    json_t *reply = NULL;
    TM_TRY(use_token(l, "", err));
    tm_buf body;
    tm_jw w;
    tm_buf_init(&body, 4096);
    tm_jw_init(&w, &body);
    tm_jw_obj(&w);
    tm_jw_kstr(&w, "name", secrets->user);
    tm_jw_kstr(&w, "password", secrets->password);
    tm_jw_obj_end(&w);
    tm_status st = ask(l, "/v3/auth/authenticate", &body, timeout_ms, &reply, err);
    tm_buf_deinit(&body);
    TM_TRY(st);
    const char *token = json_string_value(tm_json_get(reply, "token"));
    if (!token || strlen(token) >= TOKEN_LEN_MAX || strpbrk(token, "\r\n"))
        st = TM_FAIL(err, TM_STATUS_DATA, "etcd: an unusable token was given");
    else
        st = use_token(l, token, err);
    json_decref(reply);
    return st;
}

tm_status tm_etcd_link_ask(tm_etcd_link *l, const char *path, const tm_buf *body,
                           int64_t timeout_ms, json_t **reply, tm_err *err)
{
    if (tm_etcd_secrets_borrow()->user[0] && !l->token[0] && body)
        TM_TRY(log_in(l, timeout_ms, err));
    return ask(l, path, body, timeout_ms, reply, err);
}
