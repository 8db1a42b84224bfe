/* Row loops in registers of eight values; compiled with -mavx2 and called only where the processor has it. */
#define TM_ROW_LANES 8
#define TM_ROW_OPS   tm_row_avx2
#include "engine/sample/row_lanes.inc"
