/* Reading and mapping files, in a folder of its own under /tmp. */
#include "tests/common/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/file.h"

static char g_dir[] = "/tmp/tm_file_test_XXXXXX";

static int make_dir(void **state)
{
    (void)state;
    return mkdtemp(g_dir) ? 0 : -1;
}

static int remove_dir(void **state)
{
    (void)state;
    static const char *const names[] = {"a", "empty", "fifo"};
    char path[200];
    for (size_t i = 0; i < 3; i++) {
        tm_path_join(path, sizeof path, g_dir, names[i]);
        unlink(path);
    }
    return rmdir(g_dir);
}

static const char *write_file(const char *name, const char *data, size_t len)
{
    static char path[200];
    assert_true(tm_path_join(path, sizeof path, g_dir, name));
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, len, f), len);
    assert_int_equal(fclose(f), 0);
    return path;
}

static void reads_whole_files(void **state)
{
    (void)state;
    tm_err err = TM_ERR_INIT;
    char *data = NULL;
    size_t len = 0;
    const char *path = write_file("a", "he\0lo", 5);
    assert_int_equal(tm_file_read(path, 5, &data, &len, &err), TM_OK);
    assert_int_equal(len, 5);
    assert_memory_equal(data, "he\0lo", 6);
    free(data);
    data = NULL;
    assert_int_equal(tm_file_read(path, 4, &data, &len, &err), TM_STATUS_TOO_LARGE);
    assert_non_null(strstr(err.msg, path));
    assert_null(data);
    assert_int_equal(tm_file_read(path, SIZE_MAX, &data, &len, &err), TM_OK);
    free(data);
    path = write_file("empty", "", 0);
    assert_int_equal(tm_file_read(path, 0, &data, &len, &err), TM_OK);
    assert_int_equal(len, 0);
    assert_string_equal(data, "");
    free(data);
}

static void reads_files_without_a_size(void **state)
{
    (void)state;
    char *data;
    size_t len;
    assert_int_equal(tm_file_read("/proc/self/status", 100000, &data, &len, NULL), TM_OK);
    assert_true(len > 100);
    assert_int_equal(strlen(data), len);
    free(data);
    assert_int_equal(tm_file_read("/proc/self/status", 50, &data, &len, NULL), TM_STATUS_TOO_LARGE);
}

static void refuses_what_is_no_file(void **state)
{
    (void)state;
    tm_err err = TM_ERR_INIT;
    char *data = NULL;
    size_t len;
    tm_map map = {0};
    assert_int_equal(tm_file_read("/nowhere/at/all", 9, &data, &len, &err), TM_STATUS_NOT_FOUND);
    assert_non_null(strstr(err.msg, "/nowhere/at/all"));
    assert_int_equal(tm_file_read("/etc/passwd/x", 9, &data, &len, &err), TM_STATUS_NOT_FOUND);
    assert_int_equal(tm_file_read(g_dir, 9, &data, &len, &err), TM_STATUS_IO);
    assert_int_equal(tm_file_read("/dev/zero", 9, &data, &len, &err), TM_STATUS_IO);
    assert_int_equal(tm_map_open(&map, g_dir, &err), TM_STATUS_IO);
    assert_int_equal(tm_map_open(&map, "/nowhere", &err), TM_STATUS_NOT_FOUND);
    char path[200];
    tm_path_join(path, sizeof path, g_dir, "fifo");
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_int_equal(tm_file_read(path, 9, &data, &len, &err), TM_STATUS_IO);
    assert_null(data);
    assert_null(map.data);
}

static void maps(void **state)
{
    (void)state;
    tm_map m = {0};
    assert_int_equal(tm_map_open(&m, write_file("a", "mapped", 6), NULL), TM_OK);
    assert_int_equal(m.len, 6);
    assert_memory_equal(m.data, "mapped", 6);
    tm_map_close(&m);
    assert_null(m.data);
    tm_map_close(&m);
    assert_int_equal(tm_map_open(&m, write_file("empty", "", 0), NULL), TM_OK);
    assert_int_equal(m.len, 0);
    tm_map_close(&m);
}

static void what_a_file_is_instead(void **state)
{
    (void)state;
    static const char lfs[] = "version https://git-lfs.github.com/spec/v1\noid sha256:00\n";
    assert_non_null(strstr(tm_file_disguise(lfs, strlen(lfs)), "Git LFS pointer"));
    assert_non_null(strstr(tm_file_disguise("\xEF\xBB\xBF{}", 5), "byte order mark"));
    assert_non_null(strstr(tm_file_disguise("\xFF\xFE{\0", 4), "UTF-16"));
    assert_null(tm_file_disguise("\xEF\xBB", 2));
    assert_null(tm_file_disguise("{}", 2));
    assert_null(tm_file_disguise("", 0));
}

static void names_and_existence(void **state)
{
    (void)state;
    char out[8];
    assert_true(tm_path_join(out, sizeof out, "abc", "def"));
    assert_string_equal(out, "abc/def");
    assert_true(tm_path_join(out, sizeof out, "abc/", "def"));
    assert_string_equal(out, "abc/def");
    assert_false(tm_path_join(out, sizeof out, "abc", "defg"));
    assert_true(tm_dir_exists(g_dir));
    assert_false(tm_file_exists(g_dir));
    const char *path = write_file("a", "x", 1);
    assert_true(tm_file_exists(path));
    assert_false(tm_dir_exists(path));
    assert_false(tm_file_exists("/nowhere/at/all"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_whole_files),       cmocka_unit_test(reads_files_without_a_size),
        cmocka_unit_test(refuses_what_is_no_file), cmocka_unit_test(maps),
        cmocka_unit_test(names_and_existence),     cmocka_unit_test(what_a_file_is_instead),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
