/* The public operator table of the CPU backend, and the table of instruction-set paths.
 *
 * Every entry forwards through the device to the path that was chosen when it was opened. The indirect
 * call costs nanoseconds beside an operator's microseconds, and lets a reference device and a fast one
 * live in one process. */
#include <string.h>
#ifdef TM_CPU_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common/check.h"
#include "engine/backend/cpu/cpu.h"

tm_status tm_cpu_linear_prepare(tm_device *dev, tm_weight *w, tm_err *err)
{
    (void)dev;
    if (w->n <= 0 || w->k <= 0 || (unsigned)w->dtype >= TM_DTYPE_COUNT || !w->data)
        return TM_FAIL(err, TM_STATUS_INTERNAL, "weight of shape [%d, %d], dtype %d, is not usable",
                       w->n, w->k, (int)w->dtype);
    w->packed = NULL;
    return TM_OK;
}

void tm_cpu_linear_release(tm_device *dev, tm_weight *w)
{
    (void)dev;
    (void)w;
}

static bool always(void)
{
    return true;
}

static const tm_op_table g_ref_ops = {
    .linear_prepare = tm_cpu_linear_prepare,
    .linear_release = tm_cpu_linear_release,
    .embed = tm_cpu_ref_embed,
    .norm = tm_cpu_ref_norm,
    .linear = tm_cpu_ref_linear,
    .rope_append = tm_cpu_ref_rope_append,
    .attention_prefill = tm_cpu_ref_attention_prefill,
    .attention_decode = tm_cpu_ref_attention_decode,
    .act = tm_cpu_ref_act,
    .gather_rows = tm_cpu_ref_gather_rows,
};

#ifdef TM_CPU_X86
extern const tm_op_table tm_cpu_avx2_ops, tm_cpu_avx512_ops, tm_cpu_amx_ops;

/* Clang's __builtin_cpu_supports does not know the name f16c; AVX2's answer says that the system keeps the registers. */
static bool has_avx2(void)
{
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

/* The tiles' state is large, so Linux wants to be asked before a process uses them. */
static bool has_amx(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    unsigned a, b, c, d;
    const unsigned tile = 1u << 24, bf16 = 1u << 22;
    if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & tile) || !(d & bf16))
        return false;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

/* Best last: "auto" takes the last one that the processor supports. */
static const tm_cpu_isa g_isas[] = {
    {"ref", always, &g_ref_ops},
#ifdef TM_CPU_X86
    {"avx2", has_avx2, &tm_cpu_avx2_ops},
    {"avx512", has_avx512, &tm_cpu_avx512_ops},
    {"amx", has_amx, &tm_cpu_amx_ops},
#endif
};

const tm_cpu_isa *tm_cpu_isa_find(const char *name)
{
    bool automatic = strcmp(name, "auto") == 0;
    for (size_t i = TM_ARRAY_LEN(g_isas); i-- > 0;)
        if (automatic ? g_isas[i].supported() : strcmp(g_isas[i].name, name) == 0)
            return &g_isas[i];
    return NULL;
}

static tm_status op_embed(tm_device *dev, const tm_embed_args *a)
{
    return dev->isa->ops->embed(dev, a);
}

static tm_status op_norm(tm_device *dev, const tm_norm_args *a)
{
    return dev->isa->ops->norm(dev, a);
}

static tm_status op_linear(tm_device *dev, const tm_linear_args *a)
{
    return dev->isa->ops->linear(dev, a);
}

static tm_status op_rope_append(tm_device *dev, const tm_rope_append_args *a)
{
    return dev->isa->ops->rope_append(dev, a);
}

static tm_status op_attention_prefill(tm_device *dev, const tm_attention_args *a)
{
    return dev->isa->ops->attention_prefill(dev, a);
}

static tm_status op_attention_decode(tm_device *dev, const tm_attention_args *a)
{
    return dev->isa->ops->attention_decode(dev, a);
}

static tm_status op_act(tm_device *dev, const tm_act_args *a)
{
    return dev->isa->ops->act(dev, a);
}

static tm_status op_gather_rows(tm_device *dev, const tm_gather_rows_args *a)
{
    return dev->isa->ops->gather_rows(dev, a);
}

const tm_op_table tm_cpu_ops = {
    .linear_prepare = tm_cpu_linear_prepare,
    .linear_release = tm_cpu_linear_release,
    .embed = op_embed,
    .norm = op_norm,
    .linear = op_linear,
    .rope_append = op_rope_append,
    .attention_prefill = op_attention_prefill,
    .attention_decode = op_attention_decode,
    .act = op_act,
    .gather_rows = op_gather_rows,
    /* One version of these serves every path. */
    .features = TM_FEATURE_SEQ_ROPE | TM_FEATURE_LOGN | TM_FEATURE_LATENT_KV,
    .head_norm = tm_cpu_ref_head_norm,
    .bound = tm_cpu_ref_bound,
    .copy = tm_cpu_ref_copy,
    .moe_route = tm_cpu_ref_moe_route,
    .moe_experts = tm_cpu_moe_experts,
    .moe_work_bytes = tm_cpu_moe_work_bytes,
};
