/* Runs a fuzz entry without libFuzzer: every file of the corpus folders given, then random changes of them.
 * TM_SEED repeats a run, TM_FUZZ_RUNS says how many changes (0: only the corpus), and TM_FUZZ_KEEP names a
 * file that always holds the input at hand, so that it is still there after a crash. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/check.h"
#include "common/file.h"

#define SEEDS_MAX 16384
#define INPUT_MAX ((size_t)64 << 10)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct input {
    uint8_t *data;
    size_t len;
} input;

static input g_seeds[SEEDS_MAX];
static int g_seed_count;
static uint64_t g_state;

static uint32_t random_below(size_t n)
{
    g_state = g_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((g_state >> 33) % n);
}

static int is_file(const struct dirent *e)
{
    return e->d_name[0] != '.';
}

/* In the order of the names, so that a seed means the same changes everywhere. */
static void load_folder(const char *dir)
{
    struct dirent **list;
    int n = scandir(dir, &list, is_file, alphasort);
    if (n < 0) {
        fprintf(stderr, "%s: cannot be opened\n", dir);
        exit(1);
    }
    for (int i = 0; i < n; i++) {
        char path[4096], *data;
        size_t len;
        if (g_seed_count == SEEDS_MAX || !tm_path_join(path, sizeof(path), dir, list[i]->d_name) ||
            tm_file_read(path, INPUT_MAX, &data, &len, NULL) != TM_OK) {
            fprintf(stderr, "%s/%s: cannot be read, or is too large, or one too many\n", dir,
                    list[i]->d_name);
            exit(1);
        }
        g_seeds[g_seed_count++] = (input){(uint8_t *)data, len};
        free(list[i]);
    }
    free(list);
}

static void run(const uint8_t *data, size_t len)
{
    const char *keep = getenv("TM_FUZZ_KEEP");
    FILE *f = keep ? fopen(keep, "wb") : NULL;
    if (f) {
        fwrite(data, 1, len, f);
        fclose(f);
    }
    /* A copy of exactly this size lets a sanitizer see every step behind the end. */
    uint8_t *copy = malloc(len ? len : 1);
    if (!copy)
        exit(1);
    memcpy(copy, data, len);
    LLVMFuzzerTestOneInput(copy, len);
    free(copy);
}

/* Changes up to three places: a bit, a byte, a stretch removed, doubled, or taken from another seed. */
static size_t change(uint8_t *v, size_t len)
{
    for (uint32_t times = 1 + random_below(3); times > 0 && len > 1; times--) {
        size_t at = random_below(len), n = 1 + random_below(TM_MIN(len - at, (size_t)64));
        const input *other = &g_seeds[random_below((size_t)g_seed_count)];
        switch (random_below(6)) {
        case 0:
            v[at] ^= (uint8_t)(1u << random_below(8));
            break;
        case 1:
            v[at] = (uint8_t)random_below(256);
            break;
        case 2:
            v[at] = (uint8_t) "{}[]()%\"'|.,:-+*/0129\\ \n"[random_below(24)];
            break;
        case 3:
            memmove(v + at, v + at + n, len - at - n);
            len -= n;
            break;
        case 4:
            if (len + n <= INPUT_MAX) {
                memmove(v + at + n, v + at, len - at);
                len += n;
            }
            break;
        default:
            if (other->len > 0 && at < other->len)
                memcpy(v + at, other->data + at, TM_MIN(n, other->len - at));
        }
    }
    return len;
}

int main(int argc, char **argv)
{
    const char *seed = getenv("TM_SEED"), *runs = getenv("TM_FUZZ_RUNS");
    long n = runs ? strtol(runs, NULL, 10) : 3000;
    static uint8_t work[INPUT_MAX + 64];
    g_state = seed ? strtoull(seed, NULL, 10) : (uint64_t)time(NULL);
    printf("TM_SEED=%llu\n", (unsigned long long)g_state);
    fflush(stdout);
    for (int i = 1; i < argc; i++)
        load_folder(argv[i]);
    if (g_seed_count == 0) {
        fprintf(stderr, "no corpus\n");
        return 1;
    }
    for (int i = 0; i < g_seed_count; i++)
        run(g_seeds[i].data, g_seeds[i].len);
    for (long i = 0; i < n; i++) {
        const input *from = &g_seeds[random_below((size_t)g_seed_count)];
        memcpy(work, from->data, from->len);
        run(work, change(work, from->len));
    }
    printf("%d inputs, %ld changes\n", g_seed_count, n);
    for (int i = 0; i < g_seed_count; i++)
        free(g_seeds[i].data);
    return 0;
}
