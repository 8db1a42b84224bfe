/* Switching between fibers: on x86-64 a dozen instructions, which is what makes a warp of 32 fibers that meet in
 * every shuffle bearable; elsewhere ucontext, which costs two system calls. The page below a stack is without access, so
 * that one that is too small ends with a fault. The address sanitizer is told of every switch. */
#include "tests/cuda_emu/fiber.h"
#include "tests/cuda_emu/asan.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#ifdef EMU_ASAN
#include <sanitizer/common_interface_defs.h>
#define STACK_BYTES ((size_t)512 << 10)
#else
#define STACK_BYTES ((size_t)128 << 10)
#endif

#define GUARD_BYTES ((size_t)4096)

struct emu_fiber {
    void *sp; /* of the switched-off stack */
    char *stack;
    size_t bytes;
    emu_fiber_main *main;
#ifndef __x86_64__
    ucontext_t context;
#endif
#ifdef EMU_ASAN
    void *fake;
#endif
};

#ifdef __x86_64__
/* Saves what a call must keep on the old stack, and takes it from the new one. A jump, not a return: all switches come from
 * one place, so the processor guesses the target, and the returns behind it are those of the calls before. */
void emu_switch_stack(void **save, void *sp);
__asm__(".text\n"
        ".globl emu_switch_stack\n"
        ".type emu_switch_stack, @function\n"
        "emu_switch_stack:\n"
        "    pushq %rbp\n"
        "    pushq %rbx\n"
        "    pushq %r12\n"
        "    pushq %r13\n"
        "    pushq %r14\n"
        "    pushq %r15\n"
        "    movq %rsp, (%rdi)\n"
        "    movq %rsi, %rsp\n"
        "    popq %r15\n"
        "    popq %r14\n"
        "    popq %r13\n"
        "    popq %r12\n"
        "    popq %rbx\n"
        "    popq %rbp\n"
        "    popq %rcx\n"
        "    jmp *%rcx\n"
        ".size emu_switch_stack, .-emu_switch_stack\n");
#endif

/* What the first switch to a fiber begins with. */
static __thread emu_fiber *g_to;
#ifdef EMU_ASAN
static __thread emu_fiber *g_from;
#endif

static void arrive(void)
{
#ifdef EMU_ASAN
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(g_to->fake, &bottom, &bytes);
    if (!g_from->main) { /* an adopted stack: its place is learned when it is left */
        g_from->stack = (char *)(uintptr_t)bottom;
        g_from->bytes = bytes;
    }
#endif
}

static void begin(void)
{
    arrive();
    g_to->main(g_to);
    abort();
}

void emu_fiber_reset(emu_fiber *f)
{
    char *top = f->stack + f->bytes;
    ASAN_UNPOISON_MEMORY_REGION(f->stack, f->bytes); /* of the frames that nobody left */
#ifdef EMU_ASAN
    f->fake = NULL;
#endif
#ifdef __x86_64__
    void (*entry)(void) = begin;
    /* Six registers, the address to return to, and the place of begin's own return address. */
    memset(top - 64, 0, 64);
    memcpy(top - 16, &entry, sizeof(entry));
    f->sp = top - 64;
#else
    (void)top;
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = f->bytes;
    f->context.uc_link = NULL;
    makecontext(&f->context, begin, 0);
#endif
}

emu_fiber *emu_fiber_create(emu_fiber_main *main)
{
    emu_fiber *f = calloc(1, sizeof(*f));
    if (!f)
        return NULL;
    char *base = mmap(NULL, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED || mprotect(base, GUARD_BYTES, PROT_NONE) != 0) {
        free(f);
        return NULL;
    }
    f->stack = base + GUARD_BYTES;
    f->bytes = STACK_BYTES;
    f->main = main;
    emu_fiber_reset(f);
    return f;
}

emu_fiber *emu_fiber_adopt(void)
{
    return calloc(1, sizeof(emu_fiber));
}

void emu_fiber_free(emu_fiber *f)
{
    if (f && f->main)
        munmap(f->stack - GUARD_BYTES, GUARD_BYTES + f->bytes);
    free(f);
}

void emu_fiber_switch(emu_fiber *from, emu_fiber *to)
{
    g_to = to;
#ifdef EMU_ASAN
    g_from = from;
    __sanitizer_start_switch_fiber(&from->fake, to->stack, to->bytes);
#endif
#ifdef __x86_64__
    emu_switch_stack(&from->sp, to->sp);
#else
    swapcontext(&from->context, &to->context);
#endif
    arrive();
}
