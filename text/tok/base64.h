/* Base64 with padding, as tokenizer files have it. */
#ifndef TM_TEXT_TOK_BASE64_H
#define TM_TEXT_TOK_BASE64_H

#include <stdbool.h>
#include <stddef.h>

/* out has room for len / 4 * 3 bytes; false: not base64. */
bool tm_b64_decode(const char *s, size_t len, char *out, size_t *out_len);

#endif
