/* The operators of one instruction set. TM_ISA (vec.h) gives each its name. */
#ifndef TM_ENGINE_BACKEND_CPU_SIMD_SIMD_H
#define TM_ENGINE_BACKEND_CPU_SIMD_SIMD_H

#include "engine/backend/backend.h"
#include "engine/backend/cpu/simd/vec.h"

tm_status TM_ISA(embed)(tm_device *dev, const tm_embed_args *a);
tm_status TM_ISA(norm)(tm_device *dev, const tm_norm_args *a);
tm_status TM_ISA(linear)(tm_device *dev, const tm_linear_args *a);
tm_status TM_ISA(rope_append)(tm_device *dev, const tm_rope_append_args *a);
tm_status TM_ISA(attention_prefill)(tm_device *dev, const tm_attention_args *a);
tm_status TM_ISA(attention_decode)(tm_device *dev, const tm_attention_args *a);
tm_status TM_ISA(act)(tm_device *dev, const tm_act_args *a);

extern const tm_op_table TM_ISA(ops);

#endif
