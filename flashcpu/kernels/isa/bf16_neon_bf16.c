#include "neon_bf16.h"
/* Before registers are given out GCC 12 moves loads to the front, and spills. */
#pragma GCC optimize("no-schedule-insns")
#define FC_BF16
#include "../tile.inc"
