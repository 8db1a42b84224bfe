/* Hand-written scanners for the split patterns that most models use. Each is equal to its regular
 * expression on every text; the test compares them. */
#ifndef TM_TEXT_TOK_SCAN_H
#define TM_TEXT_TOK_SCAN_H

#include <stdbool.h>
#include <stddef.h>

/* The end of the piece that begins at pos (pos < len); s is valid UTF-8 and ends at len. */
typedef size_t (*tm_scan_fn)(const char *s, size_t pos, size_t len);

/* NULL when no scanner is written for this pattern. */
tm_scan_fn tm_scan_for(const char *pattern, size_t len);
/* Is it a pattern of a published model, known to match in linear time? */
bool tm_scan_is_published(const char *pattern, size_t len);
/* The GPT-2 pattern, which ByteLevel with use_regex implies. */
size_t tm_scan_gpt2(const char *s, size_t pos, size_t len);

/* \s+$ in linear time: the next white space at or behind `from` that ends a line; false = none. */
#define TM_SCAN_TRAILING "\\s+$"
bool tm_scan_trailing(const char *s, size_t len, size_t from, size_t *begin, size_t *end);

/* The table, for tests: NULL behind the last. */
const char *tm_scan_pattern(int index);

#endif
