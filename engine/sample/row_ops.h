/* The vector loops of one register width. */
#ifndef TM_ENGINE_SAMPLE_ROW_OPS_H
#define TM_ENGINE_SAMPLE_ROW_OPS_H

#include <stdint.h>

typedef struct tm_row_ops {
    float (*max)(const float *x, int n);
    float (*exp)(float x);
    uint64_t (*weights)(const float *x, int n, float max, float scale, float *w,
                        uint64_t *block_mass, float *block_max);
    uint64_t (*mass_exp)(const float *x, int n, float max);
} tm_row_ops;

extern const tm_row_ops tm_row_base; /* four lanes: SSE2, NEON, or plain code */
#ifdef TM_SAMPLE_AVX2
extern const tm_row_ops tm_row_avx2;
#endif

#endif
