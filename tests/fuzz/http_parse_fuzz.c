/* Fuzz entry of the HTTP parser (libFuzzer). The first byte chooses request or response and how the rest is
 * fragmented; the oracle is that fragmentation changes nothing: same verdict, same fields, same body.
 * The corpus is tests/fuzz/corpus/http_parse. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "net/http/parse.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const tm_http_limits limits = {
    .line_max = 300, .header_bytes_max = 1000, .body_max = 2000, .header_count_max = 12};

static tm_http_event run(tm_http_parser *p, bool response, const char *data, size_t len,
                         size_t piece)
{
    tm_http_event ev = TM_HTTP_EV_MORE;
    size_t at = 0;
    tm_http_parser_init(p, &limits, response);
    while (ev != TM_HTTP_EV_DONE && ev != TM_HTTP_EV_BAD) {
        size_t used = 0, n = TM_MIN(piece, len - at);
        ev = tm_http_parser_feed(p, data + at, n, &used);
        TM_ASSERT(used <= n);
        at += used;
        if (ev == TM_HTTP_EV_MORE) {
            TM_ASSERT(used == n);
            if (at == len)
                break;
        }
    }
    return ev;
}

static void check_same(tm_http_parser *a, tm_http_parser *b)
{
    TM_ASSERT(a->bad_status == b->bad_status);
    TM_ASSERT(a->field_count == b->field_count);
    /* A response that runs over body_max is refused after as much as the pieces allowed. */
    if (a->response && a->bad_status)
        return;
    TM_ASSERT(a->body.len == b->body.len);
    TM_ASSERT(a->body.len == 0 || memcmp(a->body.data, b->body.data, a->body.len) == 0);
    TM_ASSERT(a->body.len <= limits.body_max + 1);
    TM_ASSERT(strcmp(tm_http_parser_path(a), tm_http_parser_path(b)) == 0);
    for (int i = 0; i < a->field_count; i++)
        TM_ASSERT(strcmp(a->head.data + a->fields[i].value, b->head.data + b->fields[i].value) ==
                  0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2)
        return 0;
    bool response = data[0] & 1;
    const char *text = (const char *)data + 1;
    tm_http_parser whole, cut;
    tm_http_event a = run(&whole, response, text, size - 1, size);
    tm_http_event b = run(&cut, response, text, size - 1, 1 + data[0] / 8);
    TM_ASSERT(a == b);
    check_same(&whole, &cut);
    const char *query = tm_http_parser_query(&whole);
    if (query) {
        char *flat = malloc(2 * strlen(query) + 2);
        size_t n = tm_http_query_flatten(query, flat);
        tm_http_query_find(flat, n, "no such name");
        free(flat);
    }
    tm_http_parser_eof(&whole);
    tm_http_parser_deinit(&whole);
    tm_http_parser_deinit(&cut);
    return 0;
}
