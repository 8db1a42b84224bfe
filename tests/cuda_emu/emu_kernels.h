/* Small kernels, right and wrong, that the emulator's own test launches. */
#ifndef TM_TESTS_CUDA_EMU_KERNELS_H
#define TM_TESTS_CUDA_EMU_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/backend/cuda/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One block of 64 threads each, `mode` says which mistake: */
typedef enum emu_mistake {
    EMU_NO_MISTAKE,
    EMU_BARRIER_SKIPPED,   /* one thread goes on without */
    EMU_BARRIER_AFTER_END, /* one thread has ended */
    EMU_TWO_BARRIERS,      /* half of the threads is at another one */
    EMU_SHUFFLE_MISSING,   /* a lane of the mask does not come */
    EMU_SHUFFLE_MASKS,     /* lanes disagree about the mask */
    EMU_SHUFFLE_NOT_IN,    /* the caller is not in its mask */
    EMU_MMA_HALF,          /* half a warp multiplies */
    EMU_MISALIGNED,        /* 16 bytes at an odd place */
    EMU_NO_WAIT,           /* of a dependent launch */
    EMU_TRAP,
    EMU_MISTAKES
} emu_mistake;
cudaError_t emu_mistake_launch(int *out, emu_mistake mode, const tm_cuda_ctx *c);
extern const char *const emu_mistake_says[EMU_MISTAKES];

/* out[i] for every thread i of `threads`: the six numbers are what each exchange gives for in[]. */
cudaError_t emu_exchange_launch(uint32_t *out, const uint32_t *in, int threads,
                                const tm_cuda_ctx *c);
/* c[16,8] = a[16,16] b[16,8]; a is row-major, b column-major; with `loads`, a and b pass ldmatrix (b transposed). */
cudaError_t emu_product_launch(float *c, const uint16_t *a, const uint16_t *b, bool f16, bool loads,
                               const tm_cuda_ctx *ctx);
cudaError_t emu_transpose_launch(uint16_t *out, const uint16_t *in, const tm_cuda_ctx *c);
/* One warpgroup: scores [64][128] = a[64][64] b[128][64]^T by tiles in shared memory, sums [64][64] = a' b' where a' are
 * the first 16 columns of a, in registers, and b' the first 16 rows of b. bf16. */
typedef enum emu_tiles {
    EMU_TILES_RIGHT,
    EMU_TILES_EARLY,   /* the sums are taken before the wait: no numbers */
    EMU_TILES_FENCE,   /* a thread's stores are not fenced */
    EMU_TILES_BEGIN,   /* products_begin is missing */
    EMU_TILES_CHANGED, /* registers change under a product */
    EMU_TILES_BYTES,   /* the barrier waits for more than was loaded */
    EMU_TILES_RACE,    /* a store without a barrier to what a product reads */
    EMU_TILES_MODES
} emu_tiles;
cudaError_t emu_tiles_launch(float *scores, float *sums, const uint16_t *a, const uint16_t *b,
                             emu_tiles mode, const tm_cuda_ctx *c);
extern const char *const emu_tiles_says[EMU_TILES_MODES];
/* Three groups of copies, `waits` of them waited for; out: 12 words as they are then. */
cudaError_t emu_copies_launch(uint32_t *out, const uint32_t *in, int waits, const tm_cuda_ctx *c);
/* Every block waits until its number of blocks before it have added themselves: the last comes first. */
cudaError_t emu_turns_launch(int *turn, int *order, int blocks, const tm_cuda_ctx *c);
/* `rounds` times: adds one to *mine and waits until *theirs is as large. */
cudaError_t emu_ping_launch(int *mine, int *theirs, int rounds, const tm_cuda_ctx *c);
/* Writes v to p[i]; *p = v after reading *from. */
cudaError_t emu_poke_launch(int *p, int i, int v, const tm_cuda_ctx *c);
cudaError_t emu_copy_int_launch(int *p, const int *from, const tm_cuda_ctx *c);
/* out[0..1]: the first word of a static and of `smem` bytes of dynamic shared memory, as found. */
cudaError_t emu_shared_launch(uint32_t *out, size_t smem, const tm_cuda_ctx *c);
/* Half of the threads read what others of the block write; `safe`: with a barrier between. */
cudaError_t emu_race_launch(int *out, int threads, bool safe, const tm_cuda_ctx *c);
/* out[b][k][i]: what block b has in round k of 2 from block size - 1 - i of its cluster, its number + 1000 k. */
typedef enum emu_cluster {
    EMU_CLUSTER_RIGHT,
    EMU_CLUSTER_UNBEGUN, /* stores to blocks that have perhaps not begun */
    EMU_CLUSTER_RACE     /* the second round stores to what others of the first may still read */
} emu_cluster;
cudaError_t emu_cluster_launch(float *out, int clusters, int size, emu_cluster mode,
                               const tm_cuda_ctx *c);
/* out[b][k][i]: what block b got in round k of 2 from block i of its cluster, [4]: that block's number, b's place in the
 * cluster, k, and minus the block's number. Blocks end without waiting for the others. */
typedef enum emu_sends {
    EMU_SENDS_RIGHT,
    EMU_SENDS_EARLY,   /* what was sent is taken before the wait: not all is there */
    EMU_SENDS_UNBEGUN, /* to blocks that have perhaps not begun */
    EMU_SENDS_UNMADE,  /* one block's barrier is missing */
    EMU_SENDS_AT,      /* to a place that is no multiple of 16 bytes */
    EMU_SENDS_MODES
} emu_sends;
cudaError_t emu_sends_launch(float *out, int clusters, int size, emu_sends mode,
                             const tm_cuda_ctx *c);
extern const char *const emu_sends_says[EMU_SENDS_MODES];
/* Copies `rows` rows, `pitch` bytes from one to the next, to shared memory with 16 bytes between; out is all of that. */
typedef enum emu_rows {
    EMU_ROWS_RIGHT,
    EMU_ROWS_EARLY, /* the rows are taken before the wait: no numbers */
    EMU_ROWS_BYTES, /* the barrier waits for more than was loaded */
    EMU_ROWS_FROM,  /* no multiple of 16: where the rows are, */
    EMU_ROWS_TO,    /* where they go to, */
    EMU_ROWS_SIZE,  /* their size */
    EMU_ROWS_NONE,  /* rows of no bytes */
    EMU_ROWS_RACE,  /* read without a barrier behind the loads */
    EMU_ROWS_MODES
} emu_rows;
cudaError_t emu_rows_launch(uint32_t *out, const void *from, int rows, int bytes, int pitch,
                            emu_rows mode, const tm_cuda_ctx *c);
extern const char *const emu_rows_says[EMU_ROWS_MODES];
/* Every bit pattern widened and rounded back. */
cudaError_t emu_convert_launch(float *wide, uint16_t *back, const float *from, uint16_t *rounded,
                               int n, bool f16, const tm_cuda_ctx *c);

#ifdef __cplusplus
}
#endif
#endif
