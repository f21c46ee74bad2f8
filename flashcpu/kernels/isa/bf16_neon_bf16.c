#include "neon_bf16.h"
#ifdef FC_ISA
/* Before registers are given out GCC 12 moves loads to the front, and spills. */
#pragma GCC optimize("no-schedule-insns")
#define FC_REAL 32
#define FC_BF16
#define FC_DTYPE bf16
#include "../tile.inc"
#endif
