/* The gateway's JSON: base64 keys and values, 64-bit numbers as strings, zero-valued fields left out. */
#include "net/etcd/link.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/hash.h"
#include "common/json.h"

static void put_b64_bytes(tm_buf *body, const char *key, const char *bytes, size_t len)
{
    tm_buf_printf(body, "\"%s\":\"", key);
    tm_base64_encode(body, bytes, len);
    tm_buf_putc(body, '"');
}

void tm_etcd_put_b64(tm_buf *body, const char *key, const char *text)
{
    put_b64_bytes(body, key, text, strlen(text));
}

/* The first key after all keys with this prefix: the last byte that can be raised, raised. */
static void put_range_end(tm_buf *body, const char *prefix)
{
    tm_buf end;
    tm_buf_init(&end, 0);
    tm_buf_puts(&end, prefix);
    while (end.len && (unsigned char)end.data[end.len - 1] == 0xff)
        end.len--;
    if (end.len)
        end.data[end.len - 1]++;
    else
        tm_buf_putc(&end, '\0'); /* "\0" stands for the end of all keys */
    put_b64_bytes(body, "range_end", end.data, end.len);
    tm_buf_deinit(&end);
}

void tm_etcd_range_prefix(tm_buf *body, const char *prefix, const char *from, int limit,
                          int64_t revision)
{
    tm_buf_putc(body, '{');
    tm_etcd_put_b64(body, "key", from ? from : prefix);
    tm_buf_putc(body, ',');
    put_range_end(body, prefix);
    tm_buf_printf(body, ",\"limit\":\"%d\",\"revision\":\"%lld\"}", limit, (long long)revision);
}

void tm_etcd_watch_prefix(tm_buf *body, const char *prefix, int64_t start_revision)
{
    tm_buf_puts(body, "{\"create_request\":{");
    tm_etcd_put_b64(body, "key", prefix);
    tm_buf_putc(body, ',');
    put_range_end(body, prefix);
    tm_buf_printf(body, ",\"start_revision\":\"%lld\"}}", (long long)start_revision);
}

int64_t tm_etcd_int(const json_t *obj, const char *key)
{
    const json_t *v = tm_json_get(obj, key);
    if (json_is_integer(v))
        return json_integer_value(v);
    return json_is_string(v) ? strtoll(json_string_value(v), NULL, 10) : 0;
}

char *tm_etcd_text(const json_t *obj, const char *key, size_t max)
{
    const json_t *v = tm_json_get(obj, key);
    /* An empty value is left out by the gateway. */
    if (!v)
        return strdup("");
    tm_buf out;
    tm_buf_init(&out, max + 4);
    if (!json_is_string(v) ||
        !tm_base64_decode(&out, json_string_value(v), json_string_length(v)) || out.len > max ||
        (out.len && memchr(out.data, '\0', out.len))) {
        tm_buf_deinit(&out);
        return NULL;
    }
    if (!out.data)
        return strdup("");
    return tm_buf_steal(&out, NULL);
}

/* gRPC codes that the gateway reports in its error bodies. */
static const struct verdict {
    int code;
    tm_status st;
} verdicts[] = {
    {3, TM_STATUS_INVALID},      {4, TM_STATUS_UNAVAILABLE}, {5, TM_STATUS_NOT_FOUND},
    {7, TM_STATUS_DENIED},       {8, TM_STATUS_UNAVAILABLE}, {11, TM_STATUS_STALE},
    {14, TM_STATUS_UNAVAILABLE}, {16, TM_STATUS_DENIED},
};

tm_status tm_etcd_refusal(long http, const char *body, size_t len, tm_err *err)
{
    tm_status st = http >= 500 || http == 429 ? TM_STATUS_UNAVAILABLE : TM_STATUS_INVALID;
    json_t *v = NULL;
    const char *why = NULL;
    if (tm_json_parse(body, len, &v, NULL) == TM_OK) {
        /* Unary errors are flat, errors of a stream stand under "error". */
        const json_t *inner = json_is_object(tm_json_get(v, "error")) ? tm_json_get(v, "error") : v;
        int64_t code = tm_etcd_int(inner, "code");
        code = code ? code : tm_etcd_int(inner, "grpc_code");
        for (size_t i = 0; i < TM_ARRAY_LEN(verdicts); i++)
            if (verdicts[i].code == code)
                st = verdicts[i].st;
        why = json_string_value(tm_json_get(inner, "message"));
        if (!why)
            why = json_string_value(tm_json_get(inner, "error"));
    }
    const char *text = why ? why : "no reason given";
    if (http)
        TM_FAIL(err, st, "etcd: HTTP %ld: %.200s", http, text);
    else
        TM_FAIL(err, st, "etcd: %.200s", text);
    json_decref(v);
    return st;
}
