/* Finding a family by name, and the closest ones to a name that is none. */
#include <string.h>

#include "common/check.h"
#include "common/closest.h"
#include "engine/model/arch.h"

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

static const char *arch_of(size_t i)
{
    return tm_families[i].archs[0];
}

void tm_family_closest(const char *arch, char *out, size_t size)
{
    tm_closest(arch, arch_of, (size_t)tm_family_count, out, size);
}
