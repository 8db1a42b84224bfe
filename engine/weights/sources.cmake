list(APPEND TM_ENGINE_SOURCES weights/convert.c weights/safetensors.c weights/checkpoint.c
  weights/workspace_text.c weights/workspace_config.c weights/workspace.c weights/workspace_read.c)
