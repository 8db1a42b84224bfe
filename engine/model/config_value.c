/* Values of config.json by name, with their types and bounds checked; messages name the key. */
#include <math.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "engine/model/config_impl.h"

json_t *tm_config_get(const json_t *root, const char *path)
{
    const char *dot = strchr(path, '.');
    if (!dot)
        return tm_json_get(root, path);
    char head[64];
    size_t n = (size_t)(dot - path);
    if (n >= sizeof(head))
        return NULL;
    memcpy(head, path, n);
    head[n] = '\0';
    return tm_config_get(tm_json_get(root, head), dot + 1);
}

json_t *tm_config_any(const json_t *root, const char *const *names, const char **hit)
{
    for (int i = 0; i < TM_CONFIG_NAMES && names[i]; i++) {
        json_t *v = tm_config_get(root, names[i]);
        if (v) {
            *hit = names[i];
            return v;
        }
    }
    return NULL;
}

tm_status tm_config_to_int(const json_t *v, const char *key, int min, int max, int *out,
                           tm_err *err)
{
    double num = json_number_value(v);
    if (!json_is_number(v) || num != floor(num) || num < min || num > max)
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: expected an integer from %d to %d", key, min,
                       max);
    *out = (int)num;
    return TM_OK;
}

tm_status tm_config_int(const json_t *root, const char *path, int min, int max, int *out,
                        tm_err *err)
{
    json_t *v = tm_config_get(root, path);
    return v ? tm_config_to_int(v, path, min, max, out, err) : TM_OK;
}

tm_status tm_config_any_num(const json_t *root, const char *const *names, double min, double max,
                            double *out, tm_err *err)
{
    const char *key = names[0];
    json_t *v = tm_config_any(root, names, &key);
    if (!v)
        return TM_OK;
    double num = json_number_value(v);
    if (!json_is_number(v) || !(num >= min && num <= max))
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: expected a number from %g to %g", key, min, max);
    *out = num;
    return TM_OK;
}

tm_status tm_config_num(const json_t *root, const char *path, double min, double max, double *out,
                        tm_err *err)
{
    const char *const names[TM_CONFIG_NAMES] = {path};
    return tm_config_any_num(root, names, min, max, out, err);
}

tm_status tm_config_rule(const json_t *root, tm_flag_rule rule, bool *out, tm_err *err)
{
    json_t *v = rule.key ? tm_config_get(root, rule.key) : NULL;
    if (v && !json_is_boolean(v))
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: expected true or false, got %s", rule.key,
                       tm_json_type_name(v));
    *out = v ? json_is_true(v) : rule.def;
    return TM_OK;
}

tm_status tm_config_flag(const json_t *root, const char *path, bool *out, tm_err *err)
{
    return tm_config_rule(root, (tm_flag_rule){path, *out}, out, err);
}
