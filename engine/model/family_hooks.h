/* Hooks of families, see tm_family: each a few lines that no other field of the row can say. */
#ifndef TM_ENGINE_MODEL_FAMILY_HOOKS_H
#define TM_ENGINE_MODEL_FAMILY_HOOKS_H

#include "engine/model/arch.h"

tm_status tm_family_qwen_shape(tm_arch *a, const json_t *root, tm_err *err);
tm_status tm_family_qwen_adjust(tm_arch *a, const json_t *root, tm_err *err);
tm_status tm_family_baichuan_adjust(tm_arch *a, const json_t *root, tm_err *err);
tm_status tm_family_chatglm_shape(tm_arch *a, const json_t *root, tm_err *err);
tm_status tm_family_chatglm_adjust(tm_arch *a, const json_t *root, tm_err *err);
tm_status tm_family_falcon_shape(tm_arch *a, const json_t *root, tm_err *err);
tm_status tm_family_falcon_adjust(tm_arch *a, const json_t *root, tm_err *err);
tm_status tm_family_deepseek_adjust(tm_arch *a, const json_t *root, tm_err *err);
tm_status tm_family_deepseek_mla_adjust(tm_arch *a, const json_t *root, tm_err *err);
tm_status tm_family_dbrx_adjust(tm_arch *a, const json_t *root, tm_err *err);

#endif
