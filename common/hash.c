/* SHA-256 through libcrypto, a fast keyed hash for tables, hex, base64, randomness.
 *
 * libcrypto is used for SHA-256 because it has the CPU's instructions for it; the wrappers abort when
 * its context cannot be made, since every caller would have to give up anyway. */
#include "common/hash.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <errno.h>

#include "common/check.h"

struct tm_sha256_ctx {
    EVP_MD_CTX *md;
};

void tm_sha256(const void *data, size_t len, uint8_t out[32])
{
    TM_ASSERT(EVP_Digest(data, len, out, NULL, EVP_sha256(), NULL) == 1);
}

tm_sha256_ctx *tm_sha256_begin(void)
{
    tm_sha256_ctx *c = malloc(sizeof *c);
    TM_ASSERT(c != NULL);
    c->md = EVP_MD_CTX_new();
    TM_ASSERT(c->md != NULL && EVP_DigestInit_ex(c->md, EVP_sha256(), NULL) == 1);
    return c;
}

void tm_sha256_add(tm_sha256_ctx *c, const void *data, size_t len)
{
    TM_ASSERT(EVP_DigestUpdate(c->md, data, len) == 1);
}

void tm_sha256_end(tm_sha256_ctx *c, uint8_t out[32])
{
    TM_ASSERT(EVP_DigestFinal_ex(c->md, out, NULL) == 1);
    EVP_MD_CTX_free(c->md);
    free(c);
}

void tm_hex(const uint8_t *data, size_t len, char *out)
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < len; i++) {
        out[2 * i] = digits[data[i] >> 4];
        out[2 * i + 1] = digits[data[i] & 15];
    }
    out[2 * len] = '\0';
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    return -1;
}

bool tm_unhex(const char *hex, size_t len, uint8_t *out)
{
    if (len % 2)
        return false;
    for (size_t i = 0; i < len; i++)
        if (hex_digit(hex[i]) < 0)
            return false;
    for (size_t i = 0; i < len / 2; i++)
        out[i] = (uint8_t)(hex_digit(hex[2 * i]) << 4 | hex_digit(hex[2 * i + 1]));
    return true;
}

bool tm_equal_ct(const void *a, const void *b, size_t len)
{
    return CRYPTO_memcmp(a, b, len) == 0;
}

static uint64_t mix64(uint64_t x)
{
    /* The finaliser of splitmix64: every input bit reaches every output bit. */
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

uint64_t tm_hash64(const void *data, size_t len, uint64_t seed)
{
    const unsigned char *p = data;
    uint64_t h = mix64(seed + 0x9e3779b97f4a7c15u + (uint64_t)len * 0xff51afd7ed558ccdu);
    for (; len >= 8; p += 8, len -= 8) {
        uint64_t w;
        memcpy(&w, p, 8);
        h = mix64(h ^ w) + 0x9e3779b97f4a7c15u;
    }
    uint64_t tail = 0;
    if (len)
        memcpy(&tail, p, len);
    return mix64(h ^ tail);
}

static const char g_b64[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

bool tm_base64_encode(tm_buf *out, const void *data, size_t len)
{
    const unsigned char *p = data;
    if (len / 3 > SIZE_MAX / 4 - 1 || !tm_buf_reserve(out, (len + 2) / 3 * 4))
        return false;
    for (size_t i = 0; i < len; i += 3) {
        size_t n = TM_MIN(len - i, (size_t)3);
        uint32_t v = (uint32_t)p[i] << 16;
        v |= n > 1 ? (uint32_t)p[i + 1] << 8 : 0;
        v |= n > 2 ? p[i + 2] : 0;
        char q[4] = {g_b64[v >> 18], g_b64[v >> 12 & 63], n > 1 ? g_b64[v >> 6 & 63] : '=',
                     n > 2 ? g_b64[v & 63] : '='};
        tm_buf_append(out, q, 4);
    }
    return !out->failed;
}

static int b64_value(char c)
{
    if (c >= 'A' && c <= 'Z')
        return c - 'A';
    if (c >= 'a' && c <= 'z')
        return c - 'a' + 26;
    if (c >= '0' && c <= '9')
        return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

/* Four characters to one to three bytes; 0 when they are not base64. Bits that padding leaves over
 * must be zero, so that every byte string has exactly one encoding. */
static size_t b64_quad(const char *q, bool last, unsigned char *out)
{
    size_t n = !last || q[3] != '=' ? 3 : q[2] != '=' ? 2 : 1;
    uint32_t v = 0;
    for (size_t i = 0; i < 4; i++) {
        int d = i <= n ? b64_value(q[i]) : 0;
        if (d < 0)
            return 0;
        v = v << 6 | (uint32_t)d;
    }
    if ((n == 1 && (v & 0xffff)) || (n == 2 && (v & 0xff)))
        return 0;
    out[0] = (unsigned char)(v >> 16);
    out[1] = (unsigned char)(v >> 8);
    out[2] = (unsigned char)v;
    return n;
}

bool tm_base64_bytes(void *out, size_t *out_len, const char *text, size_t len)
{
    unsigned char *p = out;
    if (len % 4)
        return false;
    for (size_t i = 0; i < len; i += 4) {
        unsigned char b[3];
        size_t n = b64_quad(text + i, i + 4 == len, b);
        if (n == 0)
            return false;
        memcpy(p, b, n);
        p += n;
    }
    *out_len = (size_t)(p - (unsigned char *)out);
    return true;
}

bool tm_base64_decode(tm_buf *out, const char *text, size_t len)
{
    size_t n = 0;
    if (!tm_buf_reserve(out, len / 4 * 3) ||
        !tm_base64_bytes(out->data + out->len, &n, text, len)) {
        if (out->data)
            out->data[out->len] = '\0';
        return false;
    }
    out->len += n;
    out->data[out->len] = '\0';
    return true;
}

void tm_random_bytes(void *out, size_t len)
{
    unsigned char *p = out;
    while (len > 0) {
        ssize_t n = getrandom(p, len, 0);
        if (n < 0 && errno == EINTR)
            continue;
        TM_ASSERT(n > 0);
        p += n;
        len -= (size_t)n;
    }
}
