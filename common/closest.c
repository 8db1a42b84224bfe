/* See closest.h. Whole distances are computed: tables are short and the program is about to end. */
#include "common/closest.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "common/check.h"

#define SHOWN        3
#define NAMES_MAX    128
#define DISTANCE_MAX 64 /* letters of a name that are looked at */

/* Letters to insert, remove or exchange between two names. */
static int distance(const char *a, const char *b)
{
    int n = (int)strnlen(a, DISTANCE_MAX), m = (int)strnlen(b, DISTANCE_MAX);
    int row[DISTANCE_MAX + 1];
    for (int j = 0; j <= m; j++)
        row[j] = j;
    for (int i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= m; j++) {
            int other = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = TM_MIN(other, TM_MIN(row[j], row[j - 1]) + 1);
        }
    }
    return row[m];
}

void tm_closest(const char *word, const char *(*name)(size_t i), size_t count, char *out,
                size_t size)
{
    bool used[NAMES_MAX] = {false};
    size_t at = 0;
    TM_ASSERT(count >= SHOWN && count <= NAMES_MAX && size > 0);
    out[0] = '\0';
    for (int k = 0; k < SHOWN; k++) {
        size_t best = count;
        int least = 0;
        for (size_t i = 0; i < count; i++) {
            int d = distance(word, name(i));
            if (!used[i] && (best == count || d < least)) {
                best = i;
                least = d;
            }
        }
        used[best] = true;
        int n = snprintf(out + at, size - at, "%s%s", at ? ", " : "", name(best));
        if (n < 0 || (size_t)n >= size - at)
            return;
        at += (size_t)n;
    }
}
