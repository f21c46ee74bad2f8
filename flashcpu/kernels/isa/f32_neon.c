#include "neon.h"
#ifdef FC_ISA
/* Before registers are given out GCC 12 moves all broadcasts to the front, and spills. */
#pragma GCC optimize("no-schedule-insns")
#define FC_REAL 32
#define FC_DTYPE f32
#include "../tile.inc"
#endif
