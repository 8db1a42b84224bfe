/* One whole vector through each function of vmath.h, and the rounding stores of vec.h. */
#include "engine/backend/cpu/simd/vmath.h"
#include "tests/engine/op_vmath.h"

#ifdef __AVX512F__
#define ISA "avx512"
#else
#define ISA "avx2"
#endif

static void do_exp(const float *x, float *y)
{
    vf_store(y, vm_exp(vf_load(x)));
}
static void do_tanh(const float *x, float *y)
{
    vf_store(y, vm_tanh(vf_load(x)));
}
static void do_erfc(const float *x, float *y)
{
    vf_store(y, vm_erfc_pos(vf_load(x)));
}
static void do_sin(const float *x, float *y)
{
    vf s, c;
    vm_sincos(vf_load(x), &s, &c);
    vf_store(y, s);
}
static void do_cos(const float *x, float *y)
{
    vf s, c;
    vm_sincos(vf_load(x), &s, &c);
    vf_store(y, c);
}

static void do_store_bf16(uint16_t *out, const float *x)
{
    vf_store_bf16(out, vf_load(x));
}
static void do_store_f16(uint16_t *out, const float *x)
{
    vf_store_f16(out, vf_load(x));
}

const op_vmath_table op_vmath = {
    .isa = ISA,
    .lanes = VW,
    .exp = do_exp,
    .tanh = do_tanh,
    .erfc = do_erfc,
    .sin = do_sin,
    .cos = do_cos,
    .store_bf16 = do_store_bf16,
    .store_f16 = do_store_f16,
};
