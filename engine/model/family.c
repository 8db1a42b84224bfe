/* Finding a family by name, and the closest ones to a name that is none. */
#include <stdio.h>
#include <string.h>

#include "common/check.h"
#include "engine/model/arch.h"

#define FAMILIES_MAX 128

static bool in_list(const char *const *names, size_t n, const char *name)
{
    for (size_t i = 0; i < n && names[i]; i++)
        if (strcmp(names[i], name) == 0)
            return true;
    return false;
}

const tm_family *tm_family_find(const char *arch, const char *model_type)
{
    for (int i = 0; i < tm_family_count; i++) {
        const tm_family *f = &tm_families[i];
        bool hit = arch ? in_list(f->archs, TM_ARRAY_LEN(f->archs), arch)
                        : in_list(f->model_types, TM_ARRAY_LEN(f->model_types), model_type);
        if (hit)
            return f;
    }
    return NULL;
}

bool tm_family_has(const tm_family *f, tm_role role)
{
    for (int i = 0; i < f->row_count; i++)
        if (f->rows[i].role == role)
            return true;
    return false;
}

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

void tm_family_closest(const char *arch, char *out, size_t size)
{
    enum { SHOWN = 3 };
    TM_ASSERT(tm_family_count >= SHOWN && tm_family_count <= FAMILIES_MAX);
    bool used[FAMILIES_MAX] = {false};
    size_t at = 0;
    out[0] = '\0';
    for (int k = 0; k < SHOWN; k++) {
        int best = -1, least = 0;
        for (int i = 0; i < tm_family_count; i++) {
            int d = distance(arch, tm_families[i].archs[0]);
            if (!used[i] && (best < 0 || d < least)) {
                best = i;
                least = d;
            }
        }
        used[best] = true;
        int n = snprintf(out + at, size - at, "%s%s", at ? ", " : "", tm_families[best].archs[0]);
        if (n < 0 || (size_t)n >= size - at)
            return;
        at += (size_t)n;
    }
}
