/* Weights streamed against up to 8 rows of x: 16 rows of W on the M side of the tensor core, rows of x on its N side.
 *
 * Lane 4 g + t owns 8 neighbouring k of rows g and g + 8 of the tile and of row g of x, so everything goes straight from
 * memory to registers. K is any multiple of 8; rows and columns that are not there are zeros. */
#ifndef TM_ENGINE_BACKEND_CUDA_STREAM_CUH
#define TM_ENGINE_BACKEND_CUDA_STREAM_CUH

#include "engine/backend/cuda/mma.cuh"

constexpr int STREAM_STEP = 64; /* k of one step of a warp */

/* One step under way: rows g and g + 8 of the tile and pair g, two halves of 32 k each. */
struct step_regs {
    uint4 lo[2], hi[2];
    uint32_t x[2][4];
};

/* Where a lane reads; zeros instead of rows that are not there. */
template <typename T> struct lane_rows {
    const T *lo, *hi, *x;
    bool has_lo, has_hi, has_x;
};

template <typename T>
__device__ __forceinline__ void load_step(step_regs &s, const lane_rows<T> &r, int step, int k)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int at = step * STREAM_STEP + h * 32 + threadIdx.x % 4 * 8;
        s.lo[h] = s.hi[h] = make_uint4(0, 0, 0, 0);
        load_weights(s.lo[h], r.lo + at, r.has_lo && at < k);
        load_weights(s.hi[h], r.hi + at, r.has_hi && at < k);
        load_stream(s.x[h], r.x + at, r.has_x && at < k);
    }
}

template <typename T>
__device__ __forceinline__ void multiply_step(float (&acc)[4], const step_regs &s)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        mma<T>(acc, s.lo[h].x, s.hi[h].x, s.lo[h].y, s.hi[h].y, s.x[h][0], s.x[h][1]);
        mma<T>(acc, s.lo[h].z, s.hi[h].z, s.lo[h].w, s.hi[h].w, s.x[h][2], s.x[h][3]);
    }
}

#endif
