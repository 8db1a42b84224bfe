#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include "router/served.h"
tm_status tm_served_create(tm_served **out, const char *name, const char *digest,
                           const tm_text_file *files, int count, const char *chat_template,
                           tm_err *err)
{
    tm_served *s = calloc(1, sizeof(*s));
    (void)files;
    (void)count;
    (void)chat_template;
    (void)err;
    s->refs = 1;
    snprintf(s->name, sizeof s->name, "%s", name);
    snprintf(s->digest, sizeof s->digest, "%s", digest);
    *out = s;
    return TM_OK;
}
tm_served *tm_served_acquire(tm_served *s)
{
    s->refs++;
    return s;
}
void tm_served_release(tm_served *s)
{
    if (--s->refs == 0)
        free(s);
}
