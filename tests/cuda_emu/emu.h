/* The emulator of CUDA for the tests: runs the project's own .cu files, compiled as C++, on the CPU.
 *
 * A CUDA thread is a fiber: it runs until it meets a barrier or an operation of its warp and then lets another go on.
 * The threads of a block run on one thread of the process, in an order that is the same every time: even blocks count
 * their warps and lanes up, odd blocks down. Blocks follow each other, except that one which waits in a loop for
 * another (it calls emu_yield, as every clock, sleep and acquiring load here does) makes room for further blocks.
 * Streams are queues: nothing runs before somebody waits for it, so that a result that is read too early is not there.
 *
 * What is checked: a barrier or a warp operation that not all of its threads reach (the kernel fails, with its name and
 * where its threads wait); races in shared memory, two threads at the same bytes with no barrier or __syncwarp between
 * (race.c; with GCC and without another sanitizer); memory outside an allocation (no access around each; under the address
 * sanitizer every byte); memory that nobody wrote (device and shared memory begin as bytes 0xff, no number in any dtype);
 * asynchronous copies that are not waited for (nothing is copied before the wait); products of a warpgroup whose registers
 * are used before the wait, and what they read of shared memory without the fence (hopper.c); misaligned vectors; shared memory
 * beyond the limits; a kernel of a dependent launch that does not wait.
 *
 * What it does not show: the order in which another thread sees writes (fences do nothing here that would be missed),
 * races in device memory that both orders of a block survive, what a kernel reads before it waits for the one in front,
 * registers, bank conflicts, speed, and the last bits of the approximate instructions. A loop that waits by plain reads,
 * without a clock, a sleep, a volatile or acquiring load, hangs here. */
#ifndef TM_TESTS_CUDA_EMU_EMU_H
#define TM_TESTS_CUDA_EMU_EMU_H

#include "tests/cuda_emu/include/cuda_runtime_api.h"

#ifdef __cplusplus
extern "C" {
#endif

#define EMU_LANES            32
#define EMU_THREADS_MAX      1024
#define EMU_SMEM_DEFAULT     ((size_t)48 << 10) /* of a block, without and with asking for more */
#define EMU_SMEM_MAX         ((size_t)227 << 10)
#define EMU_SMS              4
#define EMU_CLUSTER_MAX      16 /* over EMU_CLUSTER_PORTABLE only for kernels that said so */
#define EMU_CLUSTER_PORTABLE 8
#define EMU_POISON           0xff
#define EMU_ALL              0xffffffffu

/* ---- for the headers that kernels are compiled with ---- */

struct emu_block;
struct emu_fiber;
struct emu_copy;

/* A place in a source file where threads wait for each other. */
typedef struct emu_site {
    const char *what, *file;
    int line;
} emu_site;

typedef struct emu_thread {
    uint3 index;
    unsigned warp, lane;
    struct emu_block *block;
    struct emu_fiber *fiber; /* NULL: not started */
    bool waited;             /* for the kernel in front (dependent launch) */
    struct emu_copy *copies; /* asynchronous ones, oldest first */
    int n_copies, copies_room;
    int copy_group; /* of the next copies */
} emu_thread;

/* What all threads of a launch have in common. */
typedef struct emu_launch {
    dim3 grid, block;
    size_t smem;
    unsigned cluster; /* blocks, of those that follow each other in x */
    bool dependent, cooperative;
    void *kernel;                   /* its address, for its name */
    void (*call)(const void *args); /* one thread */
} emu_launch;

/* The part of a block that kernels see; the rest is in block.c. */
typedef struct emu_block {
    uint3 index;
    const emu_launch *launch;
} emu_block;

/* The running one, NULL outside of kernels. */
extern __thread emu_thread *emu_self __attribute__((tls_model("initial-exec")));

/* All threads of the block. `value` is combined: the number of threads where it is not 0. */
int emu_barrier(int value, emu_site site);
/* The lanes of mask: the last to arrive runs op over the arguments of all, by lane; `lanes` are those there. */
typedef void emu_warp_op(void **args, unsigned lanes);
void emu_warp(unsigned mask, emu_warp_op *op, void *arg, emu_site site);
/* The same for an instruction that the whole warp has to execute. */
void emu_warp_all(emu_warp_op *op, void *arg, emu_site site);
/* Others may run: called by whatever loops wait with. */
void emu_yield(void);
/* Ends the kernel as a failure with the message, its name and where its threads are. */
void emu_fail(const char *fmt, ...) __attribute__((format(printf, 1, 2), noreturn));
void emu_check_aligned(const void *p, size_t to);
/* All blocks of the cluster have come here. */
void emu_cluster_wait(emu_site site);
/* To the same place in the shared memory of the cluster's block `rank`. */
void emu_cluster_store(void *at, int rank, const void *v, size_t bytes);
/* The same; the bytes count for that block's barrier. */
void emu_cluster_send(void *at, int rank, const void *v, size_t bytes, void *barrier);

/* Shared memory of the block: a variable, by the address of something that is its own; and the dynamic part. */
void *emu_shared(const void *id, size_t bytes, size_t align);
void *emu_shared_dynamic(void);

/* The compiler does not see this access to shared memory: races are looked for (race.c). */
void emu_watch(const void *p, size_t bytes, bool write);

void emu_copy_async(void *to, const void *from, size_t bytes, bool valid);
void emu_copy_commit(void);
void emu_copy_wait(int groups);

long long emu_clock_ns(void);

/* Hopper's (hopper.c). Addresses of shared memory as the device counts them. */
struct CUtensorMap;
unsigned emu_shared_address(const void *p);
void emu_mbarrier_init(void *at, int arrivals);
void emu_mbarrier_arrive(void *at, int bytes);
void emu_mbarrier_wait(void *at, int parity, emu_site site);
/* As many threads as said, by the barrier's number, 1 to 15. */
void emu_turn(int name, int threads, bool wait, emu_site site);
void emu_fence_async(void);
/* Bytes that follow each other. */
void emu_row_load(void *to, const void *from, int bytes, void *barrier);
void emu_tile_load(void *to, const struct CUtensorMap *map, int x, int y, void *barrier);

/* The exchange of bits: operations of warp.c. */
struct emu_shuffle {
    uint64_t in, out;
    int from; /* the lane whose value is wanted, of 0..31; others: own */
};
emu_warp_op emu_op_sync, emu_op_shuffle, emu_op_vote, emu_op_reduce;
struct emu_vote {
    int in;
    unsigned ballot, lanes;
};
struct emu_reduce {
    char op; /* + m(in) M(ax) & | ^ */
    bool is_signed;
    unsigned in, out;
};
struct emu_mma {
    float *c; /* [4] */
    uint32_t a[4], b[2];
    bool f16;
};
emu_warp_op emu_op_mma, emu_op_transpose8, emu_op_load_matrix;
struct emu_transpose8 {
    uint32_t in, out;
};
struct emu_load_matrix {
    uint32_t *out; /* [n] */
    const void *row;
    int n;
    bool trans;
};

typedef struct emu_product {
    float *c;          /* [n / 2] */
    const uint32_t *a; /* [4], or NULL: in shared memory */
    uint64_t a_tile, b_tile;
    int n; /* columns */
    bool f16, add;
} emu_product;
emu_warp_op emu_op_product, emu_op_products_begin, emu_op_products_commit, emu_op_products_wait;

/* Appends a launch to the stream; `data` begins with an emu_launch and is copied, what follows are the arguments. */
cudaError_t emu_enqueue_launch(cudaStream_t stream, const void *data, size_t bytes);
cudaError_t emu_func_smem(void *kernel, size_t bytes);
cudaError_t emu_func_large_clusters(void *kernel);

/* ---- between the files of the emulator ---- */

/* Work in a stream: run gets the data, which was copied. */
typedef cudaError_t emu_work_run(void *data);
cudaError_t emu_enqueue(cudaStream_t stream, emu_work_run *run, const void *data, size_t bytes);
cudaError_t emu_drain(cudaStream_t stream);
bool emu_capturing(cudaStream_t stream);

/* Runs every block; args begin behind the launch. */
cudaError_t emu_run_launch(void *data);
/* The failure of a kernel stays until cudaDeviceReset. */
cudaError_t emu_sticky(void);
void emu_set_sticky(cudaError_t e);
cudaError_t emu_return(cudaError_t e); /* remembers it for cudaGetLastError */
const char *emu_failure(void);         /* the last message of emu_fail */

/* Where p is: an allocation of the device, of pinned host memory, or neither. */
typedef enum emu_memory { EMU_PAGEABLE, EMU_PINNED, EMU_DEVICE } emu_memory;
emu_memory emu_memory_of(const void *p);
/* The bytes lie inside one allocation of the device. */
bool emu_inside(const void *p, size_t bytes);
/* For messages: where an address is, in relation to the nearest allocation. */
void emu_describe_address(const void *p, char *out, size_t size);
void emu_name_of(const void *function, char *out, size_t size);

#ifdef __cplusplus
}
#endif
#endif
