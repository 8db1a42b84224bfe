/* Fibers: stacks that take turns on one thread. */
#ifndef TM_TESTS_CUDA_EMU_FIBER_H
#define TM_TESTS_CUDA_EMU_FIBER_H

#include <stddef.h>

typedef struct emu_fiber emu_fiber;
typedef void emu_fiber_main(emu_fiber *self);

/* A stack of its own; at the first switch to it, `main` begins there, and it never returns. NULL: no memory. */
emu_fiber *emu_fiber_create(emu_fiber_main *main);
/* The stack of the caller, to come back to. */
emu_fiber *emu_fiber_adopt(void);
void emu_fiber_free(emu_fiber *f);
/* Forgets what the fiber was doing: the next switch begins `main` anew. */
void emu_fiber_reset(emu_fiber *f);
void emu_fiber_switch(emu_fiber *from, emu_fiber *to);

#endif
