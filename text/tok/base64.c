/* Four digits make three bytes; the last group may end in one or two '='. */
#include "text/tok/base64.h"

#include <stdint.h>
#include <string.h>

static int digit_of(char c)
{
    if (c >= 'A' && c <= 'Z')
        return c - 'A';
    if (c >= 'a' && c <= 'z')
        return c - 'a' + 26;
    if (c >= '0' && c <= '9')
        return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

bool tm_b64_decode(const char *s, size_t len, char *out, size_t *out_len)
{
    size_t n = 0, digits = len;
    while (digits > 0 && len - digits < 2 && s[digits - 1] == '=')
        digits--;
    if (len % 4)
        return false;
    uint32_t bits = 0;
    for (size_t i = 0; i < digits; i++) {
        int d = digit_of(s[i]);
        if (d < 0)
            return false;
        bits = bits << 6 | (uint32_t)d;
        if (i % 4 > 0)
            out[n++] = (char)(bits >> (6 - 2 * (i % 4)));
    }
    *out_len = n;
    return true;
}
