/* Whole files into memory, and read-only mappings. */
#ifndef TM_COMMON_FILE_H
#define TM_COMMON_FILE_H

#include <stdbool.h>
#include <stddef.h>

#include "common/status.h"

/* Reads a regular file of at most max bytes; *data is NUL-terminated and freed by the caller.
 * NOT_FOUND when absent, TOO_LARGE over max, IO otherwise. The message names the path. */
tm_status tm_file_read(const char *path, size_t max, char **data, size_t *len, tm_err *err);
bool tm_file_exists(const char *path);
/* What a file that does not parse is instead, where that shows: a sentence about "it" for the message. NULL: nothing
 * special. */
const char *tm_file_disguise(const void *data, size_t len);
bool tm_dir_exists(const char *path);
/* dir + "/" + name into out; false when it does not fit. */
bool tm_path_join(char *out, size_t size, const char *dir, const char *name);

/* Opens a regular file for tm_file_read_at; the caller closes *fd. */
tm_status tm_file_open(const char *path, int *fd, size_t *size, tm_err *err);
/* n bytes from position `at` into dst. *got is less only where the file ends. False, with errno, when the system
 * cannot read. Any thread. */
bool tm_file_read_at(int fd, void *dst, size_t n, size_t at, size_t *got);

typedef struct tm_map {
    const unsigned char *data;
    size_t len;
} tm_map;
tm_status tm_map_open(tm_map *out, const char *path, tm_err *err);
void tm_map_close(tm_map *m);

#endif
