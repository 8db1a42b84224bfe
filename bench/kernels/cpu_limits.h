/* What the processor can do at best with a number of threads: the denominators of tm-bench-ops. */
#ifndef TM_BENCH_KERNELS_CPU_LIMITS_H
#define TM_BENCH_KERNELS_CPU_LIMITS_H

#include <stddef.h>

#include "engine/backend/backend.h"

/* Seconds to read `bytes` (whole 64-byte lines) once with all threads of the device. */
double bench_read_seconds(tm_device *dev, const void *p, size_t bytes);

/* f32 FLOP/s of independent fused multiply-adds in registers, all threads; widest vectors there are. */
double bench_fma_flops(tm_device *dev);

double bench_now(void); /* seconds, monotonic */

#endif
