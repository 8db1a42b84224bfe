/* A JSON value followed byte by byte: where it is well formed, where keys and values begin and end, and where
 * it is over. Nothing is stored, so text may come in any pieces and of any length.
 *
 * The grammar is that of RFC 8259. Whether a \u escape names a real character is left to the reader of the
 * whole value. */
#ifndef TM_TEXT_PARSE_JSCAN_H
#define TM_TEXT_PARSE_JSCAN_H

#include <stdbool.h>
#include <stdint.h>

#define TM_JSCAN_DEPTH_MAX 64

/* What a byte did. Several may hold at once: "2}" ends a number before the byte and an object with it. */
#define TM_JSCAN_VALUE 1 /* a value begins with this byte, a member of the container at `level` */
#define TM_JSCAN_KEY   2 /* the quote that ends a key of the object at `level` */
#define TM_JSCAN_END   4 /* this byte ends a value that is a member of the container at `level` */
#define TM_JSCAN_END_BEFORE                                                                        \
    8 /* a number, member of the container at `before_level`, ended before this byte */
#define TM_JSCAN_BAD       16 /* not JSON; the scan is over */
#define TM_JSCAN_KEY_BEGIN 32 /* the quote that begins a key of the object at `level` */

typedef struct tm_jscan {
    uint64_t objects; /* bit d-1: the container at depth d is an object */
    int depth;        /* open containers */
    int level;        /* of the last event: 0 = the whole value */
    int before_level;
    uint8_t state;
    uint8_t left;     /* of a literal or of hex digits */
    bool key;         /* the string at hand is a key */
    const char *word; /* what is left of a literal */
} tm_jscan;

void tm_jscan_init(tm_jscan *s);
/* The events of one byte. A whole value that is a number has no end of its own. */
int tm_jscan_byte(tm_jscan *s, char c);

#endif
