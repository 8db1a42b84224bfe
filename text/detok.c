/* Two small machines in a row. The first turns bytes into characters: it keeps an unfinished character back and
 * makes U+FFFD of what cannot become one. The second watches for stop strings with one Knuth-Morris-Pratt state
 * per string, fed byte by byte: the longest state is how much text must be held back, and a result does not
 * depend on how tokens cut the text.
 *
 * A stop string counts as soon as its last byte is there. So the match that is complete first wins, and of
 * those complete at the same byte the longest. */
#include "text/detok.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "text/tok/tok.h"
#include "text/tok/unicode.h"

#define STOP_LENGTH_MAX 256

typedef struct stop_string {
    char text[STOP_LENGTH_MAX];
    uint16_t back[STOP_LENGTH_MAX]; /* longest proper border of each prefix */
    int len, state;                 /* state: how many bytes of it the text ends with */
} stop_string;

struct tm_detok {
    const tm_tokenizer *t;
    bool skip_special, include_stop;
    bool started;   /* a byte was seen: the first space is no longer the first */
    char cut[4];    /* beginning of a character */
    size_t cut_len; /* <= 3 */
    int32_t keep[TM_DETOK_KEEP_MAX];
    int keep_count;
    stop_string *stops;
    int stop_count, matched;
    char held[STOP_LENGTH_MAX]; /* text that may still become part of a stop string */
    size_t held_len;
};

/* ---- stop strings --------------------------------------------------------------------------------------- */

static void prepare_stop(stop_string *s, const char *text, size_t len)
{
    memcpy(s->text, text, len);
    s->len = (int)len;
    for (int i = 1, k = 0; i < s->len; i++) {
        while (k > 0 && s->text[i] != s->text[k])
            k = s->back[k - 1];
        k += s->text[i] == s->text[k];
        s->back[i] = (uint16_t)k;
    }
}

static bool advance(stop_string *s, char c)
{
    int k = s->state;
    while (k > 0 && s->text[k] != c)
        k = s->back[k - 1];
    s->state = k + (s->text[k] == c);
    return s->state == s->len;
}

/* Takes one byte of text; true when it completes a stop string. */
static bool stop_byte(tm_detok *d, char c, tm_buf *out)
{
    int keep = 0;
    for (int i = 0; i < d->stop_count; i++) {
        stop_string *s = &d->stops[i];
        if (advance(s, c) && (d->matched < 0 || s->len > d->stops[d->matched].len))
            d->matched = i;
        keep = TM_MAX(keep, s->state);
    }
    if (d->matched >= 0) {
        const stop_string *s = &d->stops[d->matched];
        tm_buf_append(out, d->held, d->held_len + 1 - (size_t)s->len);
        if (d->include_stop)
            tm_buf_append(out, s->text, (size_t)s->len);
        d->held_len = 0;
        return true;
    }
    size_t give = d->held_len + 1 - (size_t)keep;
    if (give > d->held_len) { /* nothing stays */
        tm_buf_append(out, d->held, d->held_len);
        tm_buf_putc(out, c);
        d->held_len = 0;
        return false;
    }
    tm_buf_append(out, d->held, give);
    memmove(d->held, d->held + give, d->held_len - give);
    d->held_len -= give;
    d->held[d->held_len++] = c;
    return false;
}

static bool put_text(tm_detok *d, const char *s, size_t len, tm_buf *out)
{
    if (d->stop_count == 0) {
        tm_buf_append(out, s, len);
        return false;
    }
    for (size_t i = 0; i < len; i++)
        if (stop_byte(d, s[i], out))
            return true;
    return false;
}

static bool put_wrong(tm_detok *d, size_t bytes, tm_buf *out)
{
    bool stop = false;
    for (size_t i = 0; i < (d->t->per_byte ? bytes : 1) && !stop; i++)
        stop = put_text(d, "\xEF\xBF\xBD", 3, out);
    return stop;
}

/* ---- characters ----------------------------------------------------------------------------------------- */

/* One character at a time at the seam, where kept bytes and new ones meet. Returns true at a stop. */
static bool finish_cut(tm_detok *d, const char **s, size_t *len, tm_buf *out)
{
    while (d->cut_len > 0 && *len > 0) {
        d->cut[d->cut_len] = **s;
        size_t bad;
        bool cut;
        int n = tm_utf8_check(d->cut, d->cut_len + 1, &bad, &cut);
        if (n == 0 && !cut) {
            /* The new byte does not belong to the kept ones: it is looked at again by itself. */
            size_t wrong = d->cut_len;
            d->cut_len = 0;
            if (put_wrong(d, wrong, out))
                return true;
            break;
        }
        d->cut_len++;
        (*s)++;
        (*len)--;
        if (n > 0) {
            d->cut_len = 0;
            if (put_text(d, d->cut, (size_t)n, out))
                return true;
        }
    }
    return false;
}

static bool put_bytes(tm_detok *d, const char *s, size_t len, tm_buf *out)
{
    if (finish_cut(d, &s, &len, out))
        return true;
    size_t good = 0, pos = 0;
    while (pos < len) {
        size_t bad;
        bool cut;
        int n = tm_utf8_check(s + pos, len - pos, &bad, &cut);
        if (n > 0) {
            pos += (size_t)n;
            continue;
        }
        if (put_text(d, s + good, pos - good, out))
            return true;
        if (cut) {
            memcpy(d->cut, s + pos, len - pos);
            d->cut_len = len - pos;
            return false;
        }
        if (put_wrong(d, bad, out))
            return true;
        pos += bad;
        good = pos;
    }
    return put_text(d, s + good, pos - good, out);
}

/* ---- public --------------------------------------------------------------------------------------------- */

static tm_status copy_stops(tm_detok *d, const tm_detok_opts *o, tm_err *err)
{
    if (o->stop_count < 0 || o->stop_count > TM_DETOK_STOPS_MAX)
        return TM_FAIL(err, TM_STATUS_INVALID, "%d stop strings, at most %d are allowed",
                       o->stop_count, TM_DETOK_STOPS_MAX);
    if (o->stop_count == 0)
        return TM_OK;
    d->stops = calloc((size_t)o->stop_count, sizeof(*d->stops));
    if (!d->stops)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    for (int i = 0; i < o->stop_count; i++) {
        size_t len = strlen(o->stops[i]);
        if (len < 1 || len > STOP_LENGTH_MAX)
            return TM_FAIL(err, TM_STATUS_INVALID,
                           "stop string %d has %zu bytes, allowed are 1 to %d", i, len,
                           STOP_LENGTH_MAX);
        prepare_stop(&d->stops[i], o->stops[i], len);
    }
    d->stop_count = o->stop_count;
    return TM_OK;
}

tm_status tm_detok_create(tm_detok **out, const tm_tokenizer *t, const tm_detok_opts *opts,
                          tm_err *err)
{
    static const tm_detok_opts defaults = {.skip_special = true};
    const tm_detok_opts *o = opts ? opts : &defaults;
    tm_detok *d = calloc(1, sizeof(*d));
    if (!d)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    d->t = t;
    d->skip_special = o->skip_special;
    d->include_stop = o->include_stop;
    d->started = o->continues;
    d->matched = -1;
    if (o->keep_count < 0 || o->keep_count > TM_DETOK_KEEP_MAX) {
        free(d);
        return TM_FAIL(err, TM_STATUS_INVALID, "%d kept tokens, at most %d are allowed",
                       o->keep_count, TM_DETOK_KEEP_MAX);
    }
    for (int i = 0; i < o->keep_count; i++)
        d->keep[i] = o->keep[i];
    d->keep_count = o->keep_count;
    tm_status st = copy_stops(d, o, err);
    if (st != TM_OK) {
        tm_detok_destroy(d);
        return st;
    }
    *out = d;
    return TM_OK;
}

void tm_detok_destroy(tm_detok *d)
{
    if (!d)
        return;
    free(d->stops);
    free(d);
}

static bool is_skipped(const tm_detok *d, int32_t id)
{
    if (!d->skip_special || !tm_tokenizer_is_special(d->t, id))
        return false;
    for (int i = 0; i < d->keep_count; i++)
        if (d->keep[i] == id)
            return false;
    return true;
}

bool tm_detok_push(tm_detok *d, int32_t id, tm_buf *text)
{
    size_t len;
    const char *s = tm_tokenizer_piece(d->t, id, &len);
    if (d->matched >= 0)
        return true;
    if (!s || is_skipped(d, id))
        return false;
    for (bool skip = true; skip && !d->started && len > 0;) {
        skip = s[0] == ' ' && (d->t->strip_first_space || d->t->strip_all_spaces);
        d->started = !skip || !d->t->strip_all_spaces;
        s += skip;
        len -= skip;
    }
    return put_bytes(d, s, len, text);
}

void tm_detok_finish(tm_detok *d, tm_buf *text)
{
    size_t wrong = d->cut_len;
    if (d->matched >= 0)
        return;
    d->cut_len = 0;
    if (wrong > 0 && put_wrong(d, wrong, text))
        return;
    tm_buf_append(text, d->held, d->held_len);
    d->held_len = 0;
}

int tm_detok_matched(const tm_detok *d)
{
    return d->matched;
}
