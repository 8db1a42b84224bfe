/* The text of a workspace's config: config.ini as Python's configparser writes it, or config.yaml as PyYAML does. */
#ifndef TM_ENGINE_WEIGHTS_WORKSPACE_TEXT_H
#define TM_ENGINE_WEIGHTS_WORKSPACE_TEXT_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "common/status.h"

#define TM_WS_TEXT_MAX    ((size_t)1 << 20)
#define TM_WS_ENTRIES_MAX 4096

/* One flat object: key to text, or to an array of texts. In YAML the name of an outermost map is left out and deeper
 * ones are kept: "vocab_size", "rope_param.base". Refusals are TM_STATUS_DATA and name the line. */
tm_status tm_ws_text_parse(json_t **out, const char *text, size_t len, bool yaml, tm_err *err);

#endif
