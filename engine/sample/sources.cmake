list(APPEND TM_ENGINE_SOURCES sample/row.c sample/sampler.c sample/seen.c)
