/* Spellings lie behind each other in one blob; a power-of-two table of (hash, id) with linear probing finds
 * them. A separate map type would cost a pointer chase per word of text, and this lookup is the fast
 * path of encoding: most words are one token. */
#include "text/tok/vocab.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOB_MAX ((size_t)512 << 20)

void tm_vocab_init(tm_vocab *v)
{
    *v = (tm_vocab){0};
    tm_buf_init(&v->blob, BLOB_MAX);
}

void tm_vocab_deinit(tm_vocab *v)
{
    free(v->tokens);
    free(v->slots);
    tm_buf_deinit(&v->blob);
}

static uint32_t hash_bytes(const char *s, size_t len)
{
    uint64_t h = 0x9E3779B97F4A7C15u ^ len;
    while (len >= 8) {
        uint64_t w;
        memcpy(&w, s, 8);
        h = (h ^ w) * 0xD6E8FEB86659FD93u;
        h ^= h >> 32;
        s += 8;
        len -= 8;
    }
    uint64_t w = 0;
    if (len >= 4) {
        uint32_t a, b;
        memcpy(&a, s, 4);
        memcpy(&b, s + len - 4, 4);
        w = (uint64_t)a << 32 | b;
    } else if (len > 0) {
        w = (uint64_t)(unsigned char)s[0] << 16 | (uint64_t)(unsigned char)s[len / 2] << 8 |
            (unsigned char)s[len - 1];
    }
    h = (h ^ w) * 0xD6E8FEB86659FD93u;
    h ^= h >> 32;
    return (uint32_t)(h * 0xD6E8FEB86659FD93u >> 32);
}

static bool grow(tm_vocab *v, int32_t id)
{
    if (id < v->cap)
        return true;
    int32_t cap = v->cap ? v->cap : 1024;
    while (cap <= id)
        cap *= 2;
    tm_token *t = realloc(v->tokens, (size_t)cap * sizeof(*t));
    if (!t)
        return false;
    memset(t + v->cap, 0, (size_t)(cap - v->cap) * sizeof(*t));
    v->tokens = t;
    v->cap = cap;
    return true;
}

static tm_status put(tm_vocab *v, const char *s, size_t len, uint32_t *off, tm_err *err)
{
    if (len > TM_TOKEN_LENGTH_MAX)
        return TM_FAIL(err, TM_STATUS_TOO_LARGE,
                       "a token is %zu bytes long, at most %d are allowed", len,
                       TM_TOKEN_LENGTH_MAX);
    size_t at = v->blob.len;
    /* The NUL ends the bytes for callers that print them; it is not part of the token. */
    if (!tm_buf_append(&v->blob, s, len) || !tm_buf_putc(&v->blob, 0))
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for the vocabulary");
    *off = (uint32_t)at;
    return TM_OK;
}

tm_status tm_vocab_add(tm_vocab *v, int32_t id, const char *key, size_t key_len, const char *piece,
                       size_t piece_len, uint8_t flags, tm_err *err)
{
    char q[64];
    if (id < 0 || id >= TM_VOCAB_IDS_MAX)
        return TM_FAIL(err, TM_STATUS_DATA, "token %s has id %d, allowed are 0..%d",
                       tm_token_quote(key, key_len, q), (int)id, TM_VOCAB_IDS_MAX - 1);
    if (tm_vocab_has(v, id))
        return TM_FAIL(err, TM_STATUS_DATA, "two tokens have id %d, one of them is %s", (int)id,
                       tm_token_quote(key, key_len, q));
    if (!grow(v, id))
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for the vocabulary");
    tm_token t = {.flags = (uint8_t)(flags | TM_TOKEN_USED),
                  .key_len = (uint32_t)key_len,
                  .piece_len = (uint32_t)(piece ? piece_len : key_len)};
    tm_status st = put(v, key, key_len, &t.key, err);
    if (st != TM_OK)
        return st;
    t.piece = t.key;
    if (piece && (piece_len != key_len || memcmp(piece, key, key_len) != 0)) {
        st = put(v, piece, piece_len, &t.piece, err);
        if (st != TM_OK)
            return st;
    }
    v->tokens[id] = t;
    if (id >= v->count)
        v->count = id + 1;
    return TM_OK;
}

tm_status tm_vocab_set_piece(tm_vocab *v, int32_t id, const char *piece, size_t len, tm_err *err)
{
    uint32_t off;
    tm_status st = put(v, piece, len, &off, err);
    if (st != TM_OK)
        return st;
    v->tokens[id].piece = off;
    v->tokens[id].piece_len = (uint32_t)len;
    return TM_OK;
}

static tm_vocab_slot *probe(const tm_vocab *v, const char *key, size_t len, uint32_t hash)
{
    for (uint32_t i = hash & v->mask;; i = (i + 1) & v->mask) {
        tm_vocab_slot *s = &v->slots[i];
        if (s->id < 0)
            return s;
        const tm_token *t = &v->tokens[s->id];
        if (s->hash == hash && t->key_len == len && memcmp(v->blob.data + t->key, key, len) == 0)
            return s;
    }
}

tm_status tm_vocab_index(tm_vocab *v, tm_err *err)
{
    uint32_t size = 16;
    while (size < (uint32_t)v->count * 2)
        size *= 2;
    v->slots = malloc(size * sizeof(*v->slots));
    if (!v->slots)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for the vocabulary");
    v->mask = size - 1;
    memset(v->slots, 0xFF, size * sizeof(*v->slots));
    for (int32_t id = 0; id < v->count; id++) {
        const tm_token *t = &v->tokens[id];
        if (!(t->flags & TM_TOKEN_USED) || (t->flags & TM_TOKEN_HIDDEN))
            continue;
        const char *key = v->blob.data + t->key;
        uint32_t hash = hash_bytes(key, t->key_len);
        tm_vocab_slot *s = probe(v, key, t->key_len, hash);
        char q[64];
        if (s->id >= 0)
            return TM_FAIL(err, TM_STATUS_DATA, "token %s has two ids, %d and %d",
                           tm_token_quote(key, t->key_len, q), (int)s->id, (int)id);
        *s = (tm_vocab_slot){hash, id};
    }
    return TM_OK;
}

int32_t tm_vocab_find(const tm_vocab *v, const char *key, size_t len)
{
    if (!v->slots)
        return -1;
    return probe(v, key, len, hash_bytes(key, len))->id;
}

const char *tm_token_quote(const char *s, size_t len, char out[64])
{
    size_t n = 0;
    out[n++] = '"';
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)s[i];
        if (n > 54) {
            n += (size_t)snprintf(out + n, 64 - n, "...");
            break;
        }
        if (c < 0x20 || c == 0x7F || c == '"' || c == '\\')
            n += (size_t)snprintf(out + n, 64 - n, "\\x%02x", c);
        else
            out[n++] = (char)c;
    }
    out[n++] = '"';
    out[n] = 0;
    return out;
}
