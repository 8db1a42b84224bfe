/* How fast a tokenizer encodes and decodes a text on one core: tm-bench-tokenizer FOLDER TEXT [SECONDS].
 *
 * Prints the best of the runs in MB/s (10^6 bytes a second of processor time), and the time of one word of a megabyte, which must be
 * about 16 times that of 64 KiB. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/file.h"
#include "text/detok.h"
#include "text/tokenizer.h"

typedef struct bench {
    tm_tokenizer *t;
    const char *text;
    size_t len, ids_n;
    int32_t *ids;
} bench;

/* Processor time: other programs on the machine do not count. */
static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static bool encode_once(bench *b)
{
    tm_err err = TM_ERR_INIT;
    free(b->ids);
    b->ids = NULL;
    if (tm_tokenizer_encode(b->t, b->text, b->len, NULL, &b->ids, &b->ids_n, &err) == TM_OK)
        return true;
    fprintf(stderr, "%s\n", err.msg);
    return false;
}

static bool decode_once(bench *b)
{
    tm_detok *d = NULL;
    tm_buf out;
    if (tm_detok_create(&d, b->t, NULL, NULL) != TM_OK)
        return false;
    tm_buf_init(&out, 0);
    for (size_t i = 0; i < b->ids_n; i++)
        tm_detok_push(d, b->ids[i], &out);
    tm_detok_finish(d, &out);
    tm_buf_deinit(&out);
    tm_detok_destroy(d);
    return true;
}

/* Nanoseconds of the fastest run within the time, 0 on failure. */
static int64_t best_of(bench *b, bool (*run)(bench *b), double seconds)
{
    int64_t best = INT64_MAX, end = now_ns() + (int64_t)(seconds * 1e9);
    for (int i = 0; i < 3 || now_ns() < end; i++) {
        int64_t start = now_ns();
        if (!run(b))
            return 0;
        int64_t took = now_ns() - start;
        best = took < best ? took : best;
    }
    return best;
}

static bool long_words(bench *b)
{
    size_t most = (size_t)1 << 20;
    char *word = malloc(most);
    uint32_t seed = 7;
    if (!word)
        return false;
    for (size_t i = 0; i < most; i++) {
        seed = seed * 1664525u + 1013904223u;
        word[i] = (char)('a' + (seed >> 24) % 26);
    }
    b->text = word;
    for (b->len = most / 16; b->len <= most; b->len *= 16) {
        int64_t ns = best_of(b, encode_once, 0);
        printf("one word of %7zu bytes  %8.2f ms  %6.1f MB/s\n", b->len, (double)ns / 1e6,
               ns ? (double)b->len * 1e3 / (double)ns : 0);
    }
    free(word);
    return true;
}

int main(int argc, char **argv)
{
    bench b = {0};
    tm_err err = TM_ERR_INIT;
    char *text;
    if (argc < 3) {
        fprintf(stderr, "usage: tm-bench-tokenizer FOLDER TEXT [SECONDS]\n");
        return 2;
    }
    double seconds = argc > 3 ? strtod(argv[3], NULL) : 2;
    int64_t start = now_ns();
    if (tm_tokenizer_load(&b.t, argv[1], &err) != TM_OK ||
        tm_file_read(argv[2], (size_t)256 << 20, &text, &b.len, &err) != TM_OK) {
        fprintf(stderr, "%s\n", err.msg);
        return 1;
    }
    printf("loading                    %8.0f ms\n", (double)(now_ns() - start) / 1e6);
    b.text = text;
    int64_t encode = best_of(&b, encode_once, seconds), decode = best_of(&b, decode_once, seconds);
    if (encode == 0 || decode == 0)
        return 1;
    printf("encoding %8zu bytes    %8.1f MB/s, %.2f bytes a token\n", b.len,
           (double)b.len * 1e3 / (double)encode, (double)b.len / (double)b.ids_n);
    printf("decoding, token by token   %8.1f MB/s\n", (double)b.len * 1e3 / (double)decode);
    if (!long_words(&b))
        return 1;
    free(text);
    free(b.ids);
    tm_tokenizer_destroy(b.t);
    return 0;
}
