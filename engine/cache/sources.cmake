list(APPEND TM_ENGINE_SOURCES cache/block_pool.c cache/prefix_tree.c)
