/* Whole files and read-only mappings. Only regular files are read: a FIFO or a device given by
 * mistake would block or never end. */
#include "common/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/check.h"

tm_status tm_file_open(const char *path, int *fd_out, size_t *size, tm_err *err)
{
    /* O_NONBLOCK keeps open() of a FIFO from waiting for a writer; it has no effect on files. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        tm_status st = errno == ENOENT || errno == ENOTDIR ? TM_STATUS_NOT_FOUND : TM_STATUS_IO;
        return TM_FAIL(err, st, "%s: %m", path);
    }
    struct stat sb;
    if (fstat(fd, &sb) < 0) {
        TM_FAIL(err, TM_STATUS_IO, "%s: %m", path);
        close(fd);
        return TM_STATUS_IO;
    }
    if (!S_ISREG(sb.st_mode)) {
        close(fd);
        return TM_FAIL(err, TM_STATUS_IO, "%s: not a regular file", path);
    }
    *fd_out = fd;
    *size = (size_t)sb.st_size;
    return TM_OK;
}

/* Reads until end of file; a file that grows meanwhile is refused when it passes max. */
static tm_status read_all(int fd, const char *path, size_t expect, size_t max, char **data,
                          size_t *len, tm_err *err)
{
    /* One byte more than expected: the read that finds the end of the file needs room. */
    size_t cap = TM_MIN(expect, max) + 1, used = 0;
    char *p = malloc(cap + 1);
    if (!p)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "%s: out of memory", path);
    for (;;) {
        if (used > max) {
            free(p);
            return TM_FAIL(err, TM_STATUS_TOO_LARGE, "%s: larger than %zu bytes", path, max);
        }
        if (used == cap) {
            /* Files in /proc say size 0: grow as the data comes. */
            size_t bigger = cap > max / 2 ? max + 1 : cap * 2;
            char *q = realloc(p, bigger + 1);
            if (!q) {
                free(p);
                return TM_FAIL(err, TM_STATUS_NO_MEMORY, "%s: out of memory", path);
            }
            p = q;
            cap = bigger;
        }
        ssize_t n = read(fd, p + used, cap - used);
        if (n == 0)
            break;
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            TM_FAIL(err, TM_STATUS_IO, "%s: %m", path);
            free(p);
            return TM_STATUS_IO;
        }
        used += (size_t)n;
    }
    p[used] = '\0';
    *data = p;
    *len = used;
    return TM_OK;
}

tm_status tm_file_read(const char *path, size_t max, char **data, size_t *len, tm_err *err)
{
    int fd;
    size_t size;
    max = TM_MIN(max, SIZE_MAX / 4);
    TM_TRY(tm_file_open(path, &fd, &size, err));
    tm_status st;
    if (size > max)
        st = TM_FAIL(err, TM_STATUS_TOO_LARGE, "%s: %zu bytes, at most %zu are allowed", path, size,
                     max);
    else
        st = read_all(fd, path, size, max, data, len, err);
    close(fd);
    return st;
}

bool tm_file_read_at(int fd, void *dst, size_t n, size_t at, size_t *got)
{
    size_t done = 0;
    while (done < n) {
        ssize_t r = pread(fd, (char *)dst + done, n - done, (off_t)(at + done));
        if (r < 0 && errno == EINTR)
            continue;
        if (r < 0)
            return false;
        if (r == 0)
            break;
        done += (size_t)r;
    }
    *got = done;
    return true;
}

const char *tm_file_disguise(const void *data, size_t len)
{
    static const struct {
        const char *begin, *is;
    } kinds[] = {
        {"version https://git-lfs.", "it is a Git LFS pointer in place of the file; `git lfs pull` "
                                     "fetches the file"},
        {"\xEF\xBB\xBF", "it begins with a byte order mark, which UTF-8 files must not have"},
        {"\xFF\xFE", "it is UTF-16, not UTF-8"},
        {"\xFE\xFF", "it is UTF-16, not UTF-8"},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(kinds); i++)
        if (len >= strlen(kinds[i].begin) &&
            memcmp(data, kinds[i].begin, strlen(kinds[i].begin)) == 0)
            return kinds[i].is;
    return NULL;
}

bool tm_file_exists(const char *path)
{
    struct stat sb;
    return stat(path, &sb) == 0 && S_ISREG(sb.st_mode);
}

bool tm_dir_exists(const char *path)
{
    struct stat sb;
    return stat(path, &sb) == 0 && S_ISDIR(sb.st_mode);
}

bool tm_path_join(char *out, size_t size, const char *dir, const char *name)
{
    size_t n = strlen(dir);
    const char *sep = n > 0 && dir[n - 1] == '/' ? "" : "/";
    int len = snprintf(out, size, "%s%s%s", dir, sep, name);
    return len >= 0 && (size_t)len < size;
}

tm_status tm_map_open(tm_map *out, const char *path, tm_err *err)
{
    int fd;
    size_t size;
    TM_TRY(tm_file_open(path, &fd, &size, err));
    tm_status st = TM_OK;
    void *p = NULL;
    if (size > 0) { /* mmap refuses length 0: an empty file is an empty map */
        p = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED)
            st = TM_FAIL(err, TM_STATUS_IO, "%s: mmap: %m", path);
    }
    close(fd);
    if (st == TM_OK)
        *out = (tm_map){.data = p, .len = size};
    return st;
}

void tm_map_close(tm_map *m)
{
    if (m->data)
        munmap((void *)(uintptr_t)m->data, m->len);
    *m = (tm_map){0};
}
