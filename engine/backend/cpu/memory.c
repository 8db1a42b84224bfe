/* How much memory this process may still take.
 *
 * The kernel's MemAvailable is not enough inside a container: the limit of every cgroup on the way up
 * applies, and going over it kills the process. Page cache that is clean and inactive is given back on
 * demand, so it counts as free, as MemAvailable counts it. Controllers of v1 and v2 are both read,
 * because a host may mix them; a file that is absent sets no limit. */
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "common/check.h"
#include "engine/backend/cpu/cpu.h"

typedef struct cgroup_files {
    const char *mount; /* below the cgroup root */
    const char *limit, *usage, *cache_key;
} cgroup_files;

static const cgroup_files g_v1 = {"/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                                  "total_inactive_file"};
static const cgroup_files g_v2 = {"", "memory.max", "memory.current", "inactive_file"};

/* First number of a file; false when absent or not a number ("max"). */
static bool read_number(const char *dir, const char *name, uint64_t *out)
{
    char path[PATH_MAX];
    if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path)
        return false;
    FILE *f = fopen(path, "re");
    if (!f)
        return false;
    bool ok = fscanf(f, "%" SCNu64, out) == 1;
    fclose(f);
    return ok;
}

/* The number after a word at the start of a line: "inactive_file 123", "MemAvailable: 456 kB". */
static bool read_keyed(const char *dir, const char *name, const char *key, uint64_t *out)
{
    char path[PATH_MAX], line[256], word[128];
    if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path)
        return false;
    FILE *f = fopen(path, "re");
    if (!f)
        return false;
    bool ok = false;
    while (!ok && fgets(line, sizeof line, f)) {
        uint64_t v;
        if (sscanf(line, "%127s %" SCNu64, word, &v) == 2 && strcmp(word, key) == 0) {
            *out = v;
            ok = true;
        }
    }
    fclose(f);
    return ok;
}

/* Lowers *left to what the cgroup in `dir` leaves. */
static void limit_by_dir(const cgroup_files *c, const char *dir, uint64_t *left)
{
    uint64_t limit, used, cache = 0;
    if (!read_number(dir, c->limit, &limit) || !read_number(dir, c->usage, &used))
        return;
    (void)read_keyed(dir, "memory.stat", c->cache_key, &cache);
    used -= TM_MIN(cache, used);
    *left = TM_MIN(*left, limit > used ? limit - used : 0);
}

/* Applies the cgroup `path` ("/a/b") and each one above it, up to the mount. */
static void limit_by_path(const cgroup_files *c, const char *cgroup_root, const char *path,
                          uint64_t *left)
{
    char dir[PATH_MAX];
    int base = snprintf(dir, sizeof dir, "%s%s", cgroup_root, c->mount);
    int n = snprintf(dir, sizeof dir, "%s%s%s", cgroup_root, c->mount, path);
    if (n >= (int)sizeof dir)
        return;
    for (;;) {
        limit_by_dir(c, dir, left);
        char *slash = strrchr(dir, '/');
        if (!slash || slash - dir < base)
            return;
        *slash = '\0';
    }
}

/* Lines of /proc/self/cgroup: "0::/path" is v2, "5:cpu,memory:/path" is v1. */
static void limit_by_cgroups(const char *proc_root, const char *cgroup_root, uint64_t *left)
{
    char path[PATH_MAX], line[PATH_MAX];
    if (snprintf(path, sizeof path, "%s/self/cgroup", proc_root) >= (int)sizeof path)
        return;
    FILE *f = fopen(path, "re");
    if (!f)
        return;
    while (fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *where = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!where)
            continue;
        *where++ = '\0';
        controllers++;
        if (controllers[0] == '\0')
            limit_by_path(&g_v2, cgroup_root, where, left);
        for (char *c; (c = strsep(&controllers, ",")) != NULL;)
            if (strcmp(c, "memory") == 0)
                limit_by_path(&g_v1, cgroup_root, where, left);
    }
    fclose(f);
}

tm_status tm_cpu_mem_free(const char *proc_root, const char *cgroup_root, size_t *bytes,
                          tm_err *err)
{
    uint64_t kib;
    if (!read_keyed(proc_root, "meminfo", "MemAvailable:", &kib))
        return TM_FAIL(err, TM_STATUS_IO, "%s/meminfo has no MemAvailable line", proc_root);
    uint64_t left = kib * 1024;
    limit_by_cgroups(proc_root, cgroup_root, &left);
    *bytes = (size_t)TM_MIN(left, (uint64_t)SIZE_MAX);
    return TM_OK;
}
