/* The operator table of this instruction set. Row gathering is a plain copy everywhere. */
#include "engine/backend/cpu/cpu.h"
#include "engine/backend/cpu/simd/simd.h"

const tm_op_table TM_ISA(ops) = {
    .linear_prepare = tm_cpu_linear_prepare,
    .linear_release = tm_cpu_linear_release,
    .embed = TM_ISA(embed),
    .norm = TM_ISA(norm),
    .linear = TM_ISA(linear),
    .rope_append = TM_ISA(rope_append),
    .attention_prefill = TM_ISA(attention_prefill),
    .attention_decode = TM_ISA(attention_decode),
    .act = TM_ISA(act),
    .gather_rows = tm_cpu_ref_gather_rows,
};
