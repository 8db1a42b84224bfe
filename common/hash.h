/* SHA-256 (libcrypto), constant-time comparison and base64. */
#ifndef TM_COMMON_HASH_H
#define TM_COMMON_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/buf.h"

void tm_sha256(const void *data, size_t len, uint8_t out[32]);
/* Streaming form. */
typedef struct tm_sha256_ctx tm_sha256_ctx;
tm_sha256_ctx *tm_sha256_begin(void);
void tm_sha256_add(tm_sha256_ctx *c, const void *data, size_t len);
void tm_sha256_end(tm_sha256_ctx *c, uint8_t out[32]); /* frees c */

void tm_hex(const uint8_t *data, size_t len, char *out);  /* 2*len + NUL */
bool tm_unhex(const char *hex, size_t len, uint8_t *out); /* len hex digits, even */
bool tm_equal_ct(const void *a, const void *b, size_t len);

uint64_t tm_hash64(const void *data, size_t len,
                   uint64_t seed); /* not cryptographic (FNV/xx style) */

bool tm_base64_encode(tm_buf *out, const void *data, size_t len);
bool tm_base64_decode(tm_buf *out, const char *text, size_t len); /* strict, padded */
/* The same into room for len / 4 * 3 bytes; *out_len changes only on success. */
bool tm_base64_bytes(void *out, size_t *out_len, const char *text, size_t len);

void tm_random_bytes(void *out, size_t len); /* getrandom; aborts when the kernel refuses */

#endif
