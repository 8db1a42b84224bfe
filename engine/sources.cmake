list(APPEND TM_ENGINE_SOURCES engine.c events.c loop.c open.c requests.c sampling.c steps.c watchdog.c)
