#include <stdlib.h>
#include "router/served.h"
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
