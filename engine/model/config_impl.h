/* Inside of reading config.json. A number goes by several names, first hit wins, and "a.b" looks into an object. */
#ifndef TM_ENGINE_MODEL_CONFIG_IMPL_H
#define TM_ENGINE_MODEL_CONFIG_IMPL_H

#include "engine/model/arch.h"

#define TM_CONFIG_NAMES 8 /* of one number at most; the list ends with NULL */

/* config_value.c */
json_t *tm_config_any(const json_t *root, const char *const *names, const char **hit);
tm_status tm_config_to_int(const json_t *v, const char *key, int min, int max, int *out,
                           tm_err *err);
/* Leaves *out as it is when no name is there. */
tm_status tm_config_any_num(const json_t *root, const char *const *names, double min, double max,
                            double *out, tm_err *err);
tm_status tm_config_rule(const json_t *root, tm_flag_rule rule, bool *out, tm_err *err);

/* config_rope.c, config_layers.c: parts of tm_arch, after its sizes. */
tm_status tm_config_rope(tm_arch *a, const json_t *root, tm_err *err);
tm_status tm_config_windows(tm_arch *a, const json_t *root, tm_err *err);
tm_status tm_config_scores(tm_arch *a, const json_t *root, tm_err *err);
tm_status tm_config_moe(tm_arch *a, const json_t *root, tm_err *err);
tm_status tm_config_check_groups(const tm_arch *a, tm_err *err);

#endif
