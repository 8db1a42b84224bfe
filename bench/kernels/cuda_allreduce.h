/* The part of tm-bench-cuda that runs under mpirun. */
#ifndef TM_BENCH_KERNELS_CUDA_ALLREDUCE_H
#define TM_BENCH_KERNELS_CUDA_ALLREDUCE_H

int bench_allreduce(int replays, int h);

#endif
