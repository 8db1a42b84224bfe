/* Loops over one row of V logits or weights: pure leaf functions that allocate nothing. The results do not
 * depend on the processor's register width.
 *
 * A row is looked at in blocks of TM_ROW_BLOCK values: the per-block masses and maxima of the weights let later passes
 * skip almost everything. */
#ifndef TM_ENGINE_SAMPLE_ROW_H
#define TM_ENGINE_SAMPLE_ROW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TM_ROW_BLOCK 64

/* Largest value; NaNs are passed over. -infinity for a row without numbers. */
float tm_row_max(const float *x, int n);
/* Lowest index of the largest value, which goes to *max; -1 and -infinity for a row without numbers. */
int tm_row_argmax(const float *x, int n, float *max);

/* exp(x), relative error below 3e-7, for x <= 0; 0 below -87 and for NaN. */
float tm_row_exp(float x);

/* w[i] = exp((x[i] - max) * scale); masses (mass.h) and maxima by block; returns the mass of all. Blocks:
 * ceil(n / TM_ROW_BLOCK). */
uint64_t tm_row_weights(const float *x, int n, float max, float scale, float *w,
                        uint64_t *block_mass, float *block_max);
/* ln(sum of exp(x)), with max = tm_row_max(x). */
double tm_row_lse(const float *x, int n, float max);
/* The same of max and the mass of the row's weights at scale 1. */
double tm_row_lse_of(float max, uint64_t mass);

/* The k largest values of the row, largest first, lowest index first among equals. Returns how many: less than k for
 * a shorter row; NaNs are left out. */
int tm_row_top(const float *x, int n, int k, int32_t *ids, float *values);

/* A leading part of the weights in the order (largest first, lowest index first among equals): all values above
 * `least`, and the first `ties` ones equal to it. */
typedef struct tm_row_cut {
    float least;
    int ties;
} tm_row_cut;

/* The k first ones (all, when there are fewer). Weights are in [0, 1]; scratch [n]. */
tm_row_cut tm_row_cut_count(const float *w, int n, int k, float *scratch);
/* The shortest leading part whose mass reaches `mass`, which is at least 1 and at most that of all. */
tm_row_cut tm_row_cut_mass(const float *w, int n, uint64_t mass, float *scratch);

#endif
