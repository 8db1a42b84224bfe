list(APPEND TM_ENGINE_SOURCES weights/convert.c weights/safetensors.c weights/checkpoint.c)
