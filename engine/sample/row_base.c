/* Row loops in registers of four values, which every processor has. */
#define TM_ROW_LANES 4
#define TM_ROW_OPS   tm_row_base
#include "engine/sample/row_lanes.inc"
